"""On an agent server, also inside a graph that is called inside another with a thread of its own: LangGraph drops the
authenticated user from its configurable, but whoever pays is found, limited, and never chosen by the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.cli.scripted import ScriptedModel, says
from langchain_stripe_meter.ledger import views

Step = Callable[[Any, RunnableConfig], Any]


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


def run(graph: Any, *callbacks: Any) -> None:
    """As an agent server runs a graph for Ann, whose client says that somebody else pays."""
    graph.invoke(
        {"messages": [("user", "Hi")]},
        {
            "callbacks": list(callbacks),
            "configurable": {"langgraph_auth_user": User(), "langgraph_auth_user_id": "ann", "thread_id": "t1"},
            "metadata": {"stripe_customer_id": "cus_evil", "langgraph_api_version": "1.0"},
        },
    )


def paid(meter: StripeMeterCallbackHandler) -> list[tuple[str | None, Decimal | None]]:
    """Who pays how much, in the order in which it was recorded."""
    return [(row.customer, row.value) for row in views.tail(meter._ledger)]


def test_usage_that_a_node_records_is_the_authenticated_users(
    handler: Callable[..., StripeMeterCallbackHandler],
) -> None:
    meter = handler()

    def embed(state: Any, config: RunnableConfig) -> None:
        meter.record_usage({"input_tokens": 5}, id=uuid4().hex)
        meter.record_usage({"input_tokens": 7}, id=uuid4().hex, metadata=config["metadata"])

    run(graph_of(embed), meter)
    assert paid(meter) == [("cus_ann", 5), ("cus_ann", 7)]
