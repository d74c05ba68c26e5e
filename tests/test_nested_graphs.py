"""On an agent server, also inside a graph that is called inside another with a thread of its own: LangGraph drops the
authenticated user from its configurable, but whoever pays is found, limited, and never chosen by the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, first_of, from_auth_user, from_lead
from langchain_stripe_meter.agents.limits import (
    Budget,
    SpendLimit,
    SpendLimitCallback,
    SpendLimitError,
    SpendLimitMiddleware,
)
from langchain_stripe_meter.cli.demo import ScriptedModel, says
from langchain_stripe_meter.errors import UnidentifiedError
from langchain_stripe_meter.ledger import views

Step = Callable[..., Any]


class User:
    """What an agent server authenticated: an object, where a client can only put JSON."""

    identity = "ann"
    stripe_customer_id = "cus_ann"


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[Callable[..., StripeMeterCallbackHandler]]:
    """Makes handlers on one ledger, that only record."""
    made: list[StripeMeterCallbackHandler] = []

    def make(**options: Any) -> StripeMeterCallbackHandler:
        ledger = f"sqlite:///{tmp_path}/ledger.db"
        made.append(StripeMeterCallbackHandler(Tokens("tokens"), ledger=ledger, deliver=False, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(state: Any, config: RunnableConfig) -> Any:
    return {"messages": [ScriptedModel(script=[says("Hello", 10, 5)]).invoke(state["messages"])]}


def graph_of(step: Step, **options: Any) -> Any:
    return StateGraph(MessagesState).add_node("step", step).add_edge(START, "step").compile(**options)


def nested(step: Step) -> Any:
    """A graph whose node calls another one, with a thread of its own, whose node is ``step``."""
    inner = graph_of(step, checkpointer=InMemorySaver())
    return graph_of(lambda state: inner.invoke(state, {"configurable": {"thread_id": "its own"}}))


def anested() -> Any:
    """As ``nested``, with a model call as the step, for async runs."""

    async def step(state: Any) -> Any:
        return {"messages": [await ScriptedModel(script=[says("Hello", 10, 5)]).ainvoke(state["messages"])]}

    inner = graph_of(step, checkpointer=InMemorySaver())

    async def call(state: Any) -> Any:
        return await inner.ainvoke(state, {"configurable": {"thread_id": "its own"}})

    return graph_of(call)


ANN = User()
HI = {"messages": [("user", "Hi")]}


def on_server(callbacks: tuple[Any, ...], user: User | None) -> Any:
    """The config with which an agent server runs a graph for a user whose client says that somebody else pays."""
    known = {} if user is None else {"langgraph_auth_user": user, "langgraph_auth_user_id": user.identity}
    return {
        "callbacks": list(callbacks),
        "configurable": {**known, "thread_id": "t1"},
        "metadata": {"stripe_customer_id": "cus_evil", "langgraph_api_version": "1.0"},
    }


def run(graph: Any, *callbacks: Any, user: User | None = ANN) -> None:
    graph.invoke(HI, on_server(callbacks, user))


async def arun(graph: Any, *callbacks: Any, user: User | None = ANN) -> None:
    await graph.ainvoke(HI, on_server(callbacks, user))


def paid(meter: StripeMeterCallbackHandler) -> list[tuple[str | None, Decimal | None]]:
    """Who pays how much, in the order in which it was recorded."""
    return [(row.customer, row.value) for row in views.tail(meter._ledger)]


@pytest.mark.parametrize("around", [graph_of, nested], ids=["a graph", "a graph in a graph, with its own thread"])
def test_usage_that_a_node_records_is_the_authenticated_users(
    handler: Callable[..., StripeMeterCallbackHandler], around: Callable[..., Any]
) -> None:
    meter = handler()

    def embed(state: Any, config: RunnableConfig) -> None:
        meter.record_usage({"input_tokens": 5}, id=uuid4().hex)
        meter.record_usage({"input_tokens": 7}, id=uuid4().hex, metadata=config["metadata"])

    run(around(embed), meter)
    assert paid(meter) == [("cus_ann", 5), ("cus_ann", 7)]


def test_there_a_paying_user_is_not_refused_and_a_stranger_is(
    handler: Callable[..., StripeMeterCallbackHandler],
) -> None:
    meter = handler(on_unidentified="raise")
    run(nested(answer), meter)
    assert paid(meter) == [("cus_ann", 15)]
    with pytest.raises(UnidentifiedError):
        run(nested(answer), meter, user=None)


@pytest.mark.filterwarnings(r"ignore:(?s).*ahandle_event")  # LangChain leaves the other handlers' coroutines unawaited
def test_there_a_paying_user_is_not_refused_in_an_async_run_either(
    handler: Callable[..., StripeMeterCallbackHandler],
) -> None:
    meter = handler(customer=first_of(from_auth_user("stripe_customer_id"), from_lead()), on_unidentified="raise")
    asyncio.run(arun(anested(), meter))
    assert paid(meter) == [("cus_ann", 15)]
    with pytest.raises(UnidentifiedError):
        asyncio.run(arun(anested(), meter, user=None))


def test_there_a_limit_holds_for_the_authenticated_user(handler: Callable[..., StripeMeterCallbackHandler]) -> None:
    meter = handler()
    budget = Budget(meter, SpendLimit("tokens", 10, per="ever"))
    graph = nested(answer)
    run(graph, meter, SpendLimitCallback(budget))
    with pytest.raises(SpendLimitError, match="limit of 10 tokens"):
        run(graph, meter, SpendLimitCallback(budget))
    with pytest.raises(SpendLimitError, match="limit of 10 tokens"):
        asyncio.run(arun(anested(), meter, SpendLimitCallback(budget)))
    assert paid(meter) == [("cus_ann", 15)]


def test_there_an_agents_middleware_and_its_tools_know_the_authenticated_user(
    handler: Callable[..., StripeMeterCallbackHandler],
) -> None:
    meter = handler()
    budget = Budget(meter, SpendLimit("tokens", 10, per="ever"))
    seen: list[Decimal | None] = []

    @tool
    def left() -> str:
        """What is left."""
        seen.append(budget.remaining())
        return "some"

    script = [says("", 4, 0, call={"name": "left", "args": {}}), says("Some", 10, 5)]
    middleware = [SpendLimitMiddleware(budget)]
    agent = create_agent(ScriptedModel(script=script), [left], middleware=middleware, checkpointer=InMemorySaver())
    answers: list[str] = []

    def step(state: Any) -> None:
        own = {"configurable": {"thread_id": uuid4().hex}}
        answers.append(agent.invoke({"messages": [("user", "Hi")]}, own)["messages"][-1].content)

    for _ in range(2):
        run(graph_of(step), meter)
    assert seen == [6]
    assert answers[0] == "Some"
    assert "limit of 10 tokens is used up" in answers[1]
