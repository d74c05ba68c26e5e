"""A real agent server: the user whom it authenticated pays, whatever the client says."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_stripe_meter.sandbox import StripeSandbox

EXAMPLE = Path(__file__).parent.parent / "notebooks" / "agent_server"
LANGGRAPH = Path(sys.executable).with_name("langgraph")
PATIENCE = 30.0
SLOW = """
import asyncio
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph
from metering import meter

class Slow(GenericFakeChatModel):
    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        async for chunk in super()._astream(messages, stop, run_manager, **kwargs):
            yield chunk
        await asyncio.sleep(3600)

async def answer(state):
    model = Slow(messages=iter([AIMessage("one two three")]))
    return {"messages": [await model.ainvoke(state["messages"])]}

builder = StateGraph(MessagesState)
builder.add_node("answer", answer)
builder.add_edge(START, "answer")
graph = builder.compile().with_config(callbacks=[meter])
"""
"""A model that says three words and then goes on for ever."""

pytest.importorskip("langgraph_api", reason="langgraph-cli[inmem] is not installed")
langgraph_sdk = pytest.importorskip("langgraph_sdk")


def wait_until(condition: Any, what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience} s for {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ok") as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens_used")
        for name in ("ann", "bob", "evil"):
            sandbox.create_customer(id=f"cus_{name}")
        yield sandbox


@pytest.fixture(scope="module")
def server(sandbox: StripeSandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    example = Path(shutil.copytree(EXAMPLE, folder / "example"))  # the server writes next to its graphs
    (example / "slow.py").write_text(SLOW)
    setup = json.loads((example / "langgraph.json").read_text())
    setup["graphs"]["slow"] = "./slow.py:graph"
    (example / "langgraph.json").write_text(json.dumps(setup))
    settings = {
        **sandbox.environment(),
        "STRIPE_METER_LEDGER": f"sqlite:///{folder}/ledger.db",
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGGRAPH_NO_VERSION_CHECK": "true",
        "LANGSMITH_TRACING": "false",
    }
    command = [str(LANGGRAPH), "dev", "--host", "127.0.0.1", "--port", str(port), "--no-browser", "--no-reload"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=example, env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(url) or process.poll() is not None, "the server to answer")
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    said = (folder / "log").read_text()
    assert "BlockingError" not in said
    assert "could not be recorded" not in said


def client(server: str, user: str) -> Any:
    return langgraph_sdk.get_client(url=server, headers={"Authorization": f"Bearer token-of-{user}"})


FORGED: dict[str, Any] = {
    "metadata": {"stripe_customer_id": "cus_evil", "lead": {"email": "evil@example.com"}},
    "config": {
        "metadata": {"stripe_customer_id": "cus_evil"},
        "configurable": {
            "stripe_customer_id": "cus_evil",
            "langgraph_auth_user": {"identity": "evil", "stripe_customer_id": "cus_evil"},
            "langgraph_auth_user_id": "evil",
        },
    },
}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_each_user_pays_for_their_own_runs_and_a_forging_client_changes_nothing(
    server: str, sandbox: StripeSandbox
) -> None:
    async def chat() -> None:
        async with client(server, "ann") as ann, client(server, "bob") as bob:
            thread = await ann.threads.create()
            await ann.runs.wait(thread["thread_id"], "agent", input=HELLO)
            await asyncio.gather(
                ann.runs.wait(None, "agent", input=HELLO, **FORGED),
                bob.runs.wait(None, "agent", input=HELLO, **FORGED),
            )
            async for _ in bob.runs.stream(None, "agent", input=HELLO, stream_mode="messages", **FORGED):
                pass
            thread = await bob.threads.create()
            background = await bob.runs.create(thread["thread_id"], "agent", input=HELLO)
            await bob.runs.join(thread["thread_id"], background["run_id"])

    asyncio.run(chat())
    wait_until(lambda: sum(sandbox.billed("ai_tokens_used").values()) >= 5 * 120, "five runs to be billed")
    assert sandbox.billed("ai_tokens_used") == {"cus_ann": 2 * 120, "cus_bob": 3 * 120}


def test_a_client_without_a_known_token_is_turned_away(server: str, sandbox: StripeSandbox) -> None:
    before = len(sandbox.events)

    async def chat() -> None:
        async with client(server, "evil") as evil:
            await evil.runs.wait(None, "agent", input=HELLO, **FORGED)

    with pytest.raises(Exception, match="401"):
        asyncio.run(chat())
    assert len(sandbox.events) == before


def test_a_run_that_its_client_cancels_is_billed_as_an_estimate_of_what_had_come(
    server: str, sandbox: StripeSandbox
) -> None:
    before = sandbox.billed("ai_tokens_used", "cus_ann")

    async def leave() -> None:
        async with client(server, "ann") as ann:
            pieces = ann.runs.stream(None, "slow", input=HELLO, stream_mode="messages-tuple", on_disconnect="cancel")
            async for piece in pieces:
                if "three" in json.dumps(piece.data):
                    break
            await pieces.aclose()

    asyncio.run(leave())
    wait_until(lambda: sandbox.billed("ai_tokens_used", "cus_ann") > before, "the cancelled run to be billed")
    assert 3 <= sandbox.billed("ai_tokens_used", "cus_ann") - before <= 20
