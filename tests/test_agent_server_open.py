"""A real agent server that authenticates nobody, until SIGTERM ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_serving import CLAIMS, FORGERIES, HELLO, METADATA, SECRET, chat, install
from conftest import wait_until
from serving import Server, agent_server

from langchain_stripe_meter.agents import sign_customer
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, hang

pytest.importorskip("langgraph_cli", reason="langgraph-cli[inmem] is not installed")

WEBAPP = """
from contextlib import asynccontextmanager
from starlette.applications import Starlette
import everything, metering

@asynccontextmanager
async def lifespan(app):
    async with metering.meter.lifespan(app), everything.meter.lifespan(app):
        yield
        print("the server is stopping", flush=True)

app = Starlette(lifespan=lifespan)
"""


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name in ("ai_tokens_used", "everything", "answers"):
            sandbox.create_meter(name)
        for name in ("bob", "evil"):
            sandbox.create_customer(id=f"cus_{name}")
        sandbox.create_customer(id="cus_victim", email="victim@example.com")
        yield sandbox


@pytest.fixture
def server(sandbox: StripeSandbox, tmp_path: Path) -> Iterator[Server]:
    environment = install(tmp_path, sandbox, auth=False)
    (tmp_path / "webapp.py").write_text(WEBAPP)
    with agent_server(tmp_path, environment) as server:
        yield server


def test_only_a_signed_token_is_believed_and_sigterm_delivers_what_it_pays(
    server: Server, sandbox: StripeSandbox, tmp_path: Path
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    Leads(ledger).capture(str(CLAIMS["thread_id"]), email="victim@example.com")
    arrived, answer = threading.Event(), threading.Event()
    sandbox.fail(hang(answer), times=None, where=lambda _: arrived.set() or True)  # type: ignore[func-returns-value]
    token = {"stripe_customer_token": sign_customer("cus_bob", SECRET, expires_at=10**11)}

    async def talk(anybody: Any) -> None:
        thread = (await anybody.threads.create(metadata=METADATA))["thread_id"]
        shared = (await anybody.assistants.search(graph_id="open"))[0]["assistant_id"]
        await anybody.assistants.update(shared, **FORGERIES[0])
        for forged in FORGERIES:
            await anybody.runs.wait(None, "open", input=HELLO, **forged)
            await anybody.runs.wait(thread, "open", input=HELLO, **forged)
            await anybody.runs.wait(thread, "agent", input=HELLO, **forged)
        for _ in range(3):
            await anybody.runs.wait(None, "open", input=HELLO, metadata=token)

    chat(server, None, talk)
    assert views.status(ledger).skipped == 4 * 2 + 2
    assert arrived.wait(60)
    server.process.terminate()
    wait_until(lambda: "the server is stopping" in server.said())
    assert not sandbox.billed("everything")
    answer.set()
    server.process.wait(60)
    ledger.close()
    assert sandbox.billed("everything") == {"cus_bob": 3 * 120}
    assert sandbox.billed("answers") == {"cus_bob": 3}
    assert not sandbox.billed("ai_tokens_used")
    for bad in ("Traceback", "BlockingError", "Error in StripeMeter", SECRET, token["stripe_customer_token"]):
        assert bad not in server.said()
