"""A server that must stop delivers what is pending first, and one that starts what an earlier one left."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from metering import Shop
from serving import uvicorn
from starlette.applications import Starlette

from langchain_stripe_meter import Tokens
from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.sandbox import StripeSandbox, hang

HEAD = """
from contextlib import asynccontextmanager
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens

meter = StripeMeterCallbackHandler(Tokens("tokens"), customer="cus_1")
usage = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}

async def ask():
    model = GenericFakeChatModel(messages=iter([AIMessage("Hello!", usage_metadata=usage)]))
    return (await model.ainvoke("Hello?", {"callbacks": [meter]})).content
"""
STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def chat(request):
    return PlainTextResponse(await ask())

app = Starlette(routes=[Route("/chat", chat, methods=["POST"])], lifespan=meter.lifespan)
"""
FASTAPI = """
from fastapi import FastAPI, Request

@asynccontextmanager
async def lifespan(app):
    async with meter.lifespan(app):
        print("the application's own start", flush=True)
        yield {"mine": "kept"}
        print("the application's own end", flush=True)

app = FastAPI(lifespan=lifespan)

@app.post("/chat")
async def chat(request: Request):
    assert request.state.mine == "kept"
    return await ask()
"""


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("tokens")
        sandbox.create_customer(id="cus_1")
        yield sandbox


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path, Tokens("tokens")) as shop:
        yield shop


def hold_back(sandbox: StripeSandbox) -> tuple[threading.Event, threading.Event]:
    """Stripe lets its callers wait: set once somebody does, and what lets it answer."""
    arrived, answer = threading.Event(), threading.Event()
    sandbox.fail(hang(answer), times=None, where=lambda _: arrived.set() or True)  # type: ignore[func-returns-value]
    return arrived, answer


@pytest.mark.parametrize("app", [STARLETTE, FASTAPI], ids=["starlette", "fastapi with its own lifespan"])
def test_sigterm_with_usage_pending_delivers_it_before_the_process_ends(
    sandbox: StripeSandbox, tmp_path: Path, app: str
) -> None:
    (tmp_path / "app.py").write_text(HEAD + app)
    arrived, answer = hold_back(sandbox)
    environment = {**sandbox.environment(), "STRIPE_METER_LEDGER": f"sqlite:///{tmp_path}/ledger.db"}
    with uvicorn(tmp_path, "app:app", environment) as server:
        for _ in range(3):
            assert "Hello!" in server.post("/chat", {})
        assert arrived.wait(60)
        server.process.terminate()
        wait_until(lambda: "Waiting for application shutdown" in server.said())
        assert sandbox.billed("tokens", "cus_1") == 0
        answer.set()
        server.process.wait(60)
        assert sandbox.billed("tokens", "cus_1") == 3 * 120
        assert "Application shutdown complete" in server.said()
        assert server.said().count("the application's own") == (2 if app is FASTAPI else 0)
        assert "Traceback" not in server.said()


def record(shop: Shop, name: str) -> None:
    shop.handler.record_usage({"input_tokens": 1}, id=name, customer="cus_1")


def test_the_loop_is_not_blocked_while_the_last_usage_is_delivered(shop: Shop) -> None:
    arrived, answer = hold_back(shop.sandbox)

    async def serve() -> None:
        async with shop.handler.lifespan(timeout=60):
            await asyncio.to_thread(record, shop, "job-1")
            await asyncio.to_thread(arrived.wait, 60)
            asyncio.get_running_loop().call_soon(answer.set)  # only a loop that still turns lets Stripe answer

    asyncio.run(serve())
    assert shop.handler.status().pending == 0
    assert shop.sandbox.billed("tokens", "cus_1") == 1


def test_a_stripe_that_never_answers_holds_up_the_end_only_until_the_deadline(shop: Shop) -> None:
    arrived, answer = hold_back(shop.sandbox)

    async def serve(timeout: float) -> None:
        async with shop.handler.lifespan(timeout=timeout):
            await asyncio.to_thread(record, shop, "job-1")
            await asyncio.to_thread(arrived.wait, 60)

    asyncio.run(serve(timeout=0.1))  # returns, though Stripe has not answered
    assert shop.sandbox.billed("tokens", "cus_1") == 0
    assert shop.handler.status().pending == 1
    answer.set()
    asyncio.run(serve(timeout=60))
    assert shop.handler.status().pending == 0
    assert shop.sandbox.billed("tokens", "cus_1") == 1


def test_an_application_that_starts_again_in_one_process_delivers_again(shop: Shop) -> None:
    async def serve(name: str) -> None:
        async with shop.handler.lifespan():
            await asyncio.to_thread(record, shop, name)

    for number in (1, 2):
        asyncio.run(serve(f"job-{number}"))
        assert shop.sandbox.billed("tokens", "cus_1") == number


def test_what_an_earlier_process_left_is_delivered_at_the_start(shop: Shop) -> None:
    earlier = shop.another_handler(deliver=False, stripe=None)
    earlier.record_usage({"input_tokens": 7}, id="job-1", customer="cus_1")

    async def serve() -> None:
        async with shop.handler.lifespan():
            await asyncio.to_thread(wait_until, lambda: shop.sandbox.billed("tokens", "cus_1") == 7)

    asyncio.run(serve())


def test_what_the_application_raises_passes_and_what_was_recorded_is_delivered(shop: Shop) -> None:
    async def serve() -> None:
        async with shop.handler.lifespan():
            await asyncio.to_thread(record, shop, "job-1")
            raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        asyncio.run(serve())
    assert shop.sandbox.billed("tokens", "cus_1") == Decimal(1)


def test_a_handler_that_only_records_has_a_lifespan_too(tmp_path: Path, shop: Shop) -> None:
    handler: Any = shop.another_handler(deliver=False, stripe=None)

    async def serve() -> None:
        async with handler.lifespan():
            pass

    asyncio.run(serve())


@pytest.mark.parametrize("deliver", [True, False], ids=["delivers", "only records"])
def test_a_server_does_not_start_on_a_ledger_that_cannot_be_opened_unless_it_is_told_to(
    shop: Shop, tmp_path: Path, deliver: bool
) -> None:
    (tmp_path / "junk.db").write_bytes(b"this is no database at all" * 100)
    handler = shop.another_handler(ledger=f"sqlite:///{tmp_path}/junk.db", deliver=deliver)
    served = []

    async def serve(lifespan: Any) -> None:
        app = Starlette(lifespan=lifespan)
        async with app.router.lifespan_context(app):
            served.append(lifespan)

    with pytest.raises(LedgerError, match=r"no SQLite database; .*\. Restore a backup"):
        asyncio.run(serve(handler.lifespan))
    with pytest.raises(LedgerError, match="no SQLite database"):
        handler.check()
    assert not served
    asyncio.run(serve(partial(handler.lifespan, check=False)))
    assert len(served) == 1


def test_a_ledger_that_cannot_be_read_at_the_end_does_not_keep_the_server_from_stopping(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = shop.handler._ledger
    path = Path(str(ledger.database.url.database))

    async def serve() -> None:
        async with shop.handler.lifespan(timeout=1):
            with ledger.deliver_lane().lock, ledger.read():  # else the courier might just be making the file anew
                for file in path.parent.glob("ledger.db*"):
                    file.unlink()
                path.mkdir()

    with caplog.at_level(logging.ERROR):
        asyncio.run(serve())
    assert "closing failed" in caplog.text
    path.rmdir()
