"""The example's agent server with more graphs, its clients, and what a forging one may send."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from conftest import wait_until
from serving import EVIL, KEYS, Server

from langchain_stripe_meter.agents import sign_customer
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.observed import CLIENT_RUN
from langchain_stripe_meter.sandbox import StripeSandbox

EXAMPLE = Path(__file__).parent.parent / "notebooks" / "agent_server"
SECRET = "a-secret-of-more-than-32-bytes-indeed"
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
EVERYTHING = """
from langchain_stripe_meter import (
    Messages, StripeMeterCallbackHandler, Tokens, first_of, from_auth_user, from_context, from_lead, from_metadata)
from langchain_stripe_meter.agents import from_signed_token

KEY = "stripe_customer_id"
everywhere = from_auth_user(KEY), from_metadata(KEY), from_context(KEY), from_lead(), from_signed_token()
meter = StripeMeterCallbackHandler(Tokens("everything"), Messages("answers"), customer=first_of(*everywhere))
"""
"""A handler that believes every source that may be believed."""
OPEN = """
from typing import TypedDict
from agent import answer
from everything import meter
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import interrupt

class Context(TypedDict, total=False):  # the server passes on no other keys, where it can read this (Python 3.12)
    stripe_customer_id: str
    stripe_customer_token: str

def asked(state):
    if state["messages"][-1].content == "Wait":
        interrupt("May I?")
    return answer(state)

def nested(state, config):
    return graph.invoke(state, {"configurable": {"thread_id": "a thread of its own"}})

builder = StateGraph(MessagesState, context_schema=Context)
builder.add_node("answer", asked)
builder.add_edge(START, "answer")
graph = builder.compile().with_config(callbacks=[meter])

builder = StateGraph(MessagesState)
builder.add_node("nested", nested)
builder.add_edge(START, "nested")
outer = builder.compile().with_config(callbacks=[meter])
"""
"""A graph with that handler that waits for a person if it is asked to, and another one around it."""
OWN = """
from agent import answer
from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_auth_user
from langgraph.graph import START, MessagesState, StateGraph

print("own.py is imported", flush=True)
meter = StripeMeterCallbackHandler(Tokens("ai_tokens_used"), customer=from_auth_user("stripe_customer_id"))
builder = StateGraph(MessagesState)
builder.add_node("answer", answer)
builder.add_edge(START, "answer")
one = builder.compile().with_config(callbacks=[meter])
other = builder.compile().with_config(callbacks=[meter])
"""
"""A graph file that makes its own handler, and holds two graphs."""
WITHOUT_A_RUN = """
from uuid import uuid4
from everything import meter
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, MessagesState, StateGraph

async def embed(state, config: RunnableConfig):
    await meter.arecord_usage({"input_tokens": 5}, id=uuid4().hex)
    await meter.arecord_usage({"input_tokens": 7}, id=uuid4().hex, metadata=config["metadata"])

builder = StateGraph(MessagesState)
builder.add_node("embed", embed)
builder.add_edge(START, "embed")
graph = builder.compile()
"""
"""A graph that records what LangChain has no callback for, with and without its run's metadata."""
GRAPHS = {
    "slow": "./slow.py:graph",
    "open": "./open_to_all.py:graph",
    "outer": "./open_to_all.py:outer",
    "one": "./own.py:one",
    "other": "./own.py:other",
    "without_a_run": "./without_a_run.py:graph",
}


def install(folder: Path, sandbox: StripeSandbox, *, auth: bool = True) -> dict[str, str]:
    """The example, with more graphs, in ``folder``; its environment. Without ``auth`` anybody may do anything."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)  # the server writes next to its graphs
    modules = {"slow": SLOW, "everything": EVERYTHING, "open_to_all": OPEN, "own": OWN, "without_a_run": WITHOUT_A_RUN}
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    with (folder / "metering.py").open("a") as module:
        module.write('print("metering.py is imported", flush=True)\n')
    with (folder / "auth.py").open("a") as module:
        module.write('USERS["token-of-eve"] = None\n')
    setup = json.loads((folder / "langgraph.json").read_text())
    setup["graphs"].update(GRAPHS)
    if not auth:
        del setup["auth"]
    (folder / "langgraph.json").write_text(json.dumps(setup))
    return {
        **sandbox.environment(),
        "STRIPE_METER_LEDGER": f"sqlite:///{folder}/ledger.db",
        "STRIPE_METER_TOKEN_SECRET": SECRET,
    }


class Bills:
    """What each customer came to owe on a meter, and how many readings had nobody to bill, since this was made."""

    def __init__(self, ledger: Ledger, sandbox: StripeSandbox) -> None:
        self._ledger, self._sandbox = ledger, sandbox
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], int]:
        wait_until(lambda: views.status(self._ledger).pending == 0)
        now = {("", "skipped"): views.status(self._ledger).skipped}
        for name in ("ai_tokens_used", "everything", "answers"):
            now.update({(name, who): int(value) for who, value in self._sandbox.billed(name).items()})
        return now

    def since(self) -> dict[tuple[str, str], int]:
        now = self._now()
        return {
            who: value - self._before.get(who, 0) for who, value in now.items() if value != self._before.get(who, 0)
        }


def client(server: Server, user: str | None, **headers: str) -> Any:
    if user is not None:
        headers["Authorization"] = f"Bearer token-of-{user}"
    import langgraph_sdk

    return langgraph_sdk.get_client(url=server.url, headers=headers)


def chat(server: Server, user: str | None, talk: Callable[[Any], Awaitable[Any]], **headers: str) -> Any:
    """What ``talk`` came to, given the client of ``user``."""

    async def connect() -> Any:
        async with client(server, user, **headers) as connected:
            return await talk(connected)

    return asyncio.run(connect())


def owed(who: str, runs: int = 1) -> dict[tuple[str, str], int]:
    """What ``runs`` of the graph that believes everybody come to."""
    return {("everything", f"cus_{who}"): 120 * runs, ("answers", f"cus_{who}"): runs}


CLAIMS = {"stripe_customer_id": EVIL, "lead": {"email": "victim@example.com"}, **dict.fromkeys(KEYS, "victims-thread")}
TOKENS = {"stripe_customer_token": sign_customer(EVIL, "another" + SECRET, expires_at=10**11)}
MARK = {CLIENT_RUN: {"user": {"stripe_customer_id": EVIL}, "session": "victims-thread"}}
METADATA = {**CLAIMS, **TOKENS, **MARK}
CONFIGURABLE = {
    **CLAIMS,
    **TOKENS,
    CLIENT_RUN: "client",
    "langgraph_auth_user": {"identity": "evil", "stripe_customer_id": EVIL},
    "langgraph_auth_user_id": "evil",
    "langgraph_auth_permissions": ["everything"],
    "user_id": "evil",
}
BY_CONFIG: dict[str, Any] = {
    "metadata": METADATA,
    "config": {"metadata": METADATA, "configurable": CONFIGURABLE, "run_id": str(uuid4())},
}
BY_CONTEXT: dict[str, Any] = {
    "metadata": METADATA,
    "config": {"metadata": METADATA},
    "context": {**CLAIMS, **TOKENS, "langgraph_auth_user": {"identity": "evil", "stripe_customer_id": EVIL}},
}
FORGERIES = [BY_CONFIG, BY_CONTEXT]
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
WAIT = {"messages": [{"role": "user", "content": "Wait"}]}
