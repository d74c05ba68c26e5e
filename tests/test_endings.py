"""How runs end without saying so, and what is billed then: through the real clients, against the providers' wire."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph
from providers import AnthropicServer, OpenAIServer, ProviderServer, Reply

from langchain_stripe_meter import Messages, StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.core.runs import ABANDONED_AFTER, ORPHANED_AFTER
from langchain_stripe_meter.ledger.views import Row, tail


class Clock:
    """Time that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handler(tmp_path: Path, clock: Clock) -> Iterator[StripeMeterCallbackHandler]:
    with StripeMeterCallbackHandler(
        Tokens("tokens"), Tokens("output", count="output"), Messages("messages"),
        customer="cus_1", deliver=False, ledger=f"sqlite:///{tmp_path}/l.db", clock=clock,
    ) as handler:  # fmt: skip
        yield handler


@pytest.fixture(params=[OpenAIServer, AnthropicServer], ids=["openai", "anthropic"])
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param() as server:
        yield server


def billed(handler: StripeMeterCallbackHandler) -> dict[str, Row]:
    rows = {row.event_name: row for row in tail(handler._ledger, 100)}
    assert len(rows) == len(tail(handler._ledger, 100))
    return rows


def config(handler: StripeMeterCallbackHandler) -> dict[str, Any]:
    return {"callbacks": [handler]}


def test_a_stream_that_its_reader_leaves_is_billed_as_an_estimate_of_what_came(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    server.reply(Reply("one two three four five six seven"))
    stream = server.chat().stream("Count to seven, please.", config(handler))
    for _ in range(4):
        next(stream)
    stream.close()
    rows = billed(handler)
    assert rows["tokens"].estimated
    assert 1 <= int(rows["output"].value or 0) <= 7
    assert rows["messages"].value == 1
    assert handler.status().open_runs == 0


def test_a_stream_that_the_provider_cuts_is_billed_as_an_estimate_and_is_no_answered_message(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    server.reply(Reply("one two three four", break_after=2))
    with pytest.raises(Exception, match=r"."):
        list(server.chat().stream("Count!", config(handler)))
    rows = billed(handler)
    assert rows["output"].estimated
    assert "messages" not in rows


def test_a_refusal_that_broke_off_is_billed_as_an_estimate(handler: StripeMeterCallbackHandler) -> None:
    """For clients that pass it on in pieces: that of OpenAI's chat completions drops it."""

    class Refusing(GenericFakeChatModel):
        def _stream(self, *args: Any, run_manager: Any = None, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            chunk = AIMessageChunk("", additional_kwargs={"refusal": "I am sorry, but I cannot"})
            yield ChatGenerationChunk(message=chunk)
            raise ConnectionError("the provider is away")

    with pytest.raises(ConnectionError):
        list(Refusing(messages=iter(())).stream("Count!", config(handler)))
    rows = billed(handler)
    assert rows["output"].estimated
    assert int(rows["output"].value or 0) >= 5
    assert "messages" not in rows


def test_a_call_that_failed_before_it_produced_anything_bills_nothing(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    server.reply(Reply(status=500))
    with pytest.raises(Exception, match=r"."):
        server.chat().invoke("Hello", config(handler))
    assert billed(handler) == {}


async def cancel_after_first_piece(run: Any, server: ProviderServer) -> None:
    """Cancel ``run`` once the provider has sent a piece and is waiting."""
    arrived = asyncio.Event()

    async def watched() -> None:
        await run(arrived)

    task = asyncio.create_task(watched())
    await asyncio.wait_for(arrived.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Arrival(StripeMeterCallbackHandler):
    """Ours, and it tells when a piece of text has arrived."""

    arrived: asyncio.Event

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        super().on_llm_new_token(token, **kwargs)
        if token:
            self.arrived.set()


@pytest.fixture
def arrival(tmp_path: Path, clock: Clock) -> Iterator[Arrival]:
    with Arrival(
        Tokens("tokens"), Tokens("output", count="output"), Messages("messages"),
        customer="cus_1", deliver=False, ledger=f"sqlite:///{tmp_path}/a.db", clock=clock,
    ) as handler:  # fmt: skip
        yield handler


def cancelled_ainvoke(arrival: Arrival, server: Any, *, in_chain: bool) -> None:
    gate = threading.Event()
    server.reply(Reply("one two three", gate=gate))
    model = server.chat(streaming=True)
    runnable = (RunnableLambda(lambda x: x) | model) if in_chain else model

    async def run(arrived: asyncio.Event) -> None:
        arrival.arrived = arrived
        await runnable.ainvoke("Count!", config(arrival))

    try:
        asyncio.run(cancel_after_first_piece(run, server))
    finally:
        gate.set()


def test_a_cancelled_ainvoke_inside_a_chain_is_found_by_its_parents_end(arrival: Arrival, server: Any) -> None:
    cancelled_ainvoke(arrival, server, in_chain=True)
    rows = billed(arrival)
    assert rows["output"].estimated
    assert rows["output"].value == 1
    assert rows["messages"].state == "skipped"
    assert arrival.status().abandoned == 1
    assert arrival.status().open_runs == 0


def test_a_cancelled_bare_ainvoke_is_found_after_a_deadline(arrival: Arrival, server: Any, clock: Clock) -> None:
    cancelled_ainvoke(arrival, server, in_chain=False)
    assert billed(arrival) == {}
    assert arrival.status().open_runs == 1
    clock.now += ABANDONED_AFTER + 1
    status = arrival.status()
    assert (status.abandoned, status.open_runs) == (1, 0)
    assert billed(arrival)["output"].estimated


def test_what_a_cancelled_call_had_produced_is_recorded_when_the_handler_is_closed(
    arrival: Arrival, server: Any
) -> None:
    cancelled_ainvoke(arrival, server, in_chain=False)
    assert billed(arrival) == {}
    arrival.close()
    assert billed(arrival)["output"].estimated
    assert (arrival.status().abandoned, arrival.status().open_runs) == (1, 0)


def test_a_call_that_goes_on_after_the_handler_was_closed_is_billed_once_in_full(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    gate, came = threading.Event(), threading.Event()
    server.reply(Reply("one two three", gate=gate))

    def read() -> None:
        for chunk in server.chat().stream("Hello", config(handler)):
            if chunk.text:
                came.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert came.wait(60)
    handler.close()
    assert all(row.estimated for row in tail(handler._ledger, 9))
    gate.set()
    reader.join()
    assert sum(row.value or 0 for row in tail(handler._ledger, 9) if row.event_name == "tokens") == 15


def test_what_a_step_had_produced_when_its_sibling_failed_is_billed(arrival: Arrival, server: Any) -> None:
    """LangGraph cancels a step whose sibling fails, and LangChain tells nothing of its model call."""
    gate = threading.Event()
    server.reply(Reply("one two three", gate=gate))
    model = server.chat(streaming=True)

    async def slow(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke("Count!")]}

    async def broken(state: MessagesState) -> dict[str, Any]:
        await asyncio.wait_for(arrival.arrived.wait(), 60)
        raise ValueError("a bug of the application")

    async def main() -> None:
        arrival.arrived = asyncio.Event()
        graph = StateGraph(MessagesState).add_node(slow).add_node(broken).add_edge(START, "slow")
        with pytest.raises(ValueError, match="a bug"):
            await graph.add_edge(START, "broken").compile().ainvoke({"messages": []}, config(arrival))

    try:
        asyncio.run(main())
    finally:
        gate.set()
    assert billed(arrival)["output"].estimated
    assert "messages" not in billed(arrival)


def test_a_call_that_times_out_inside_a_node_that_goes_on_is_found_a_while_after_the_message_ends(
    arrival: Arrival, server: Any, clock: Clock
) -> None:
    gate = threading.Event()
    server.reply(Reply("one two three", gate=gate))
    model = server.chat(streaming=True)

    async def node(question: str, config: Any) -> str:
        task = asyncio.create_task(model.ainvoke(question, config))
        await asyncio.wait_for(arrival.arrived.wait(), 60)
        task.cancel()
        await asyncio.wait([task])
        return "sorry, too slow"

    async def main() -> str:
        arrival.arrived = asyncio.Event()
        answer: str = await RunnableLambda(node).ainvoke("Count!", config(arrival))
        return answer

    try:
        assert asyncio.run(main()) == "sorry, too slow"
    finally:
        gate.set()
    assert billed(arrival) == {}
    clock.now += ORPHANED_AFTER + 1
    assert arrival.status().abandoned == 1
    assert billed(arrival)["output"].estimated


def test_a_call_that_goes_on_in_a_thread_after_its_message_was_cancelled_is_billed_when_it_ends(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    """A synchronous step runs in a thread, which a timeout around ``ainvoke`` does not stop."""
    gate, asked, left = threading.Event(), threading.Event(), threading.Event()
    server.reply(Reply("one two three", gate=gate))

    def step(question: str) -> str:
        asked.set()
        try:
            return str(server.chat().invoke(question).text)
        finally:
            left.set()

    async def main() -> None:
        task = asyncio.create_task(RunnableLambda(step).ainvoke("Count!", config(handler)))
        await asyncio.to_thread(asked.wait, 60)
        while handler.status().open_runs < 2:  # the step, and the call inside it
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert billed(handler) == {}
        gate.set()
        assert await asyncio.to_thread(left.wait, 60)

    asyncio.run(main())
    rows = billed(handler)
    assert not rows["tokens"].estimated
    assert "messages" not in rows
    assert (handler.status().abandoned, handler.status().open_runs) == (0, 0)


@pytest.mark.parametrize("patience", [ABANDONED_AFTER, 3 * ABANDONED_AFTER], ids=["an hour", "three hours"])
def test_a_call_that_was_taken_to_have_ended_is_billed_as_it_is_reported_when_it_does(
    handler: StripeMeterCallbackHandler, server: Any, clock: Clock, patience: int
) -> None:
    gate = threading.Event()
    server.reply(Reply(gate=gate))
    call = threading.Thread(target=server.chat().invoke, args=("Hello", config(handler)))
    call.start()
    while handler.status().open_runs == 0:
        call.join(0)
    for _ in range(patience // ABANDONED_AFTER):
        clock.now += ABANDONED_AFTER
        assert handler.status().abandoned == 1
    gate.set()
    call.join()
    rows = billed(handler)
    assert (rows["tokens"].value, rows["tokens"].estimated, rows["messages"].value) == (15, False, 1)
    assert handler.status().abandoned == 0


def test_a_call_that_begins_long_after_its_message_has_ended_is_billed(
    handler: StripeMeterCallbackHandler, server: Any, clock: Clock
) -> None:
    gate, background = threading.Event(), []
    server.reply(Reply(gate=gate))
    later = asyncio.Event()

    async def research(question: str) -> None:
        await later.wait()
        await server.chat().ainvoke(question)

    async def begin(question: str) -> None:
        background.append(asyncio.create_task(RunnableLambda(research).ainvoke(question)))

    async def main() -> None:
        await RunnableLambda(begin).ainvoke("Hello", config(handler))
        await asyncio.sleep(0)
        clock.now += ORPHANED_AFTER - 1
        later.set()
        while handler.status().open_runs < 2:  # the step, and the call inside it
            await asyncio.sleep(0)
        clock.now += ORPHANED_AFTER - 1
        assert (handler.status().open_runs, handler.status().abandoned) == (2, 0)
        gate.set()
        await background[0]

    asyncio.run(main())
    rows = billed(handler)
    assert (rows["tokens"].value, rows["messages"].value) == (15, 1)


def test_an_abandoned_stream_of_a_chain_is_billed_once_though_the_chain_ends_before_its_model(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    server.reply(Reply("one two three four five"))
    stream = (RunnableLambda(lambda x: x) | server.chat()).stream("Count!", config(handler))
    for _ in range(3):
        next(stream)
    stream.close()
    rows = billed(handler)
    assert rows["output"].estimated
    assert rows["messages"].value == 1
    assert handler.status().open_runs == 0


def test_in_a_batch_whose_second_item_fails_the_first_is_billed(
    handler: StripeMeterCallbackHandler, server: Any
) -> None:
    model = server.chat()
    server.reply(Reply("fine"), Reply(status=400))
    outcomes = model.batch(["a", "b"], {**config(handler), "max_concurrency": 1}, return_exceptions=True)
    assert isinstance(outcomes[0], AIMessage)
    assert isinstance(outcomes[1], Exception)
    assert billed(handler)["messages"].value == 1


def test_prompts_of_one_generate_whose_end_langchain_never_tells_are_counted_as_abandoned(
    handler: StripeMeterCallbackHandler, server: Any, clock: Clock
) -> None:
    """LangChain throws the first, paid answer away when the second prompt fails: nothing of it is known to bill."""
    server.reply(Reply("fine"), Reply(status=400))
    with pytest.raises(Exception, match=r"."):
        server.chat().generate([[HumanMessage("a")], [HumanMessage("b")]], callbacks=[handler])
    assert handler.status().open_runs == 1
    clock.now += ABANDONED_AFTER + 1
    assert handler.status().abandoned == 1
    assert billed(handler) == {}


def test_the_same_end_told_twice_counts_once(handler: StripeMeterCallbackHandler, server: Any) -> None:
    model = server.chat()
    server.reply(Reply("fine"))
    model.with_config(callbacks=[handler]).invoke("Hello", {"callbacks": [handler, handler]})
    assert billed(handler)["messages"].value == 1
