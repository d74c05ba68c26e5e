"""Agents and graphs: every call inside them is billed once, and together they answer one message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from metering import Shop
from providers import OpenAIServer, Reply, openai_usage

from langchain_stripe_meter import Credits, Messages, Tokens


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    meters = Tokens("tokens"), Messages("messages"), Credits("credits", {"gpt-4o": 10, "gpt-4o-mini": 1})
    with Shop(tmp_path, *meters) as shop:
        yield shop


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def ask(agent: Any, shop: Shop, *earlier: Any) -> None:
    agent.invoke({"messages": [*earlier, HumanMessage("Hello?")]}, shop.config())


def test_a_tool_that_calls_a_model_is_billed_and_belongs_to_the_message(shop: Shop, server: OpenAIServer) -> None:
    inner = server.chat(model="gpt-4o-mini")

    @tool
    def translate(text: str) -> str:
        """Translate a text."""
        return str(inner.invoke(text).content)

    server.reply(
        Reply(tool_calls=[("translate", {"text": "hi"})], usage=openai_usage(100, 10)),
        Reply("salut", usage=openai_usage(20, 2)),
        Reply("It is: salut", usage=openai_usage(130, 8)),
    )
    ask(create_agent(server.chat(model="gpt-4o"), [translate]), shop)
    assert shop.billed() == {"tokens": 110 + 22 + 138, "messages": 1, "credits": 10}


def test_a_summariser_is_billed_and_is_not_what_answers(shop: Shop, server: OpenAIServer) -> None:
    summariser = SummarizationMiddleware(
        model=server.chat(model="gpt-4o-mini"), trigger=("messages", 4), keep=("messages", 1)
    )
    agent = create_agent(server.chat(model="gpt-4o"), [], middleware=[summariser])
    server.reply(Reply("They talked.", usage=openai_usage(400, 9)), Reply("Hello!", usage=openai_usage(27, 5)))
    history = [message for number in range(3) for message in (HumanMessage(f"q{number}"), AIMessage(f"a{number}"))]
    ask(agent, shop, *history)
    assert len(server.requests) == 2
    assert shop.billed() == {"tokens": 409 + 32, "messages": 1, "credits": 10}


class Parallel(TypedDict, total=False):
    question: str
    answers: Annotated[list[str], lambda one, other: one + other]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_parallel_nodes_are_billed_each_and_answer_one_message(
    shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    model = server.chat(model="gpt-4o")

    def left(state: Parallel) -> Parallel:
        return {"answers": [str(model.invoke(state["question"]).content)]}

    async def aright(state: Parallel) -> Parallel:
        return {"answers": [str((await model.ainvoke(state["question"])).content)]}

    builder = StateGraph(Parallel)
    builder.add_node("left", left)
    builder.add_node("right", aright if asynchronous else left)
    builder.add_edge(START, "left")
    builder.add_edge(START, "right")
    graph = builder.compile()
    if asynchronous:
        asyncio.run(graph.ainvoke({"question": "Hi"}, shop.config()))
    else:
        graph.invoke({"question": "Hi"}, shop.config())
    assert shop.billed() == {"tokens": 30, "messages": 1, "credits": 10}


def test_a_sub_graph_belongs_to_the_message_of_its_graph(shop: Shop, server: OpenAIServer) -> None:
    model = server.chat(model="gpt-4o")

    def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    inner = StateGraph(MessagesState)
    inner.add_node("answer", answer)
    inner.add_edge(START, "answer")
    outer = StateGraph(MessagesState)
    outer.add_node("sub", inner.compile())
    outer.add_node("again", answer)
    outer.add_edge(START, "sub")
    outer.add_edge("sub", "again")
    ask(outer.compile(), shop)
    assert shop.billed() == {"tokens": 30, "messages": 1, "credits": 10}


def test_a_model_without_a_name_bills_its_tokens_and_holds_what_depends_on_the_name(shop: Shop) -> None:
    from langchain_core.language_models import GenericFakeChatModel

    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=usage)]))
    model.invoke("Hello", shop.config())
    assert shop.billed() == {"tokens": 15, "messages": 1}
    assert [held.event_name for held in shop.handler.held()] == ["credits"]
