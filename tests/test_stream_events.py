"""Streams that newer LangChains tell as events (``version="v3"``), of models that tell no tokens themselves."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from metering import Shop

from langchain_stripe_meter import Messages, Tokens

streaming = pytest.importorskip("langchain_core.tracers._streaming", reason="a LangChain without such streams")
pytestmark = pytest.mark.filterwarnings("ignore:.*beta.*")
USAGE: Any = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
LIKE_TEN = 9, 12
"""What the estimate of a short prompt and three words may come to."""


class Quiet(BaseChatModel):
    """Streams without telling its run manager; its usage comes last, and ``breaks`` says that it does not come."""

    breaks: bool = False

    @property
    def _llm_type(self) -> str:
        return "quiet"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("one two three", usage_metadata=USAGE))])

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for word in ("one ", "two ", "three"):
            yield ChatGenerationChunk(message=AIMessageChunk(word))
        if self.breaks:
            raise ConnectionError("gone")
        yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=USAGE))

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream():
            await asyncio.sleep(0)
            yield chunk


class Listener(BaseCallbackHandler, streaming._V2StreamingCallbackHandler):
    """What makes a plain call stream its answer as events, as LangGraph does for whoever watches."""


async def read(model: Quiet, config: Any, *, until: int | None = None) -> None:
    """The model's events, all of them or so many; then it is cancelled."""
    task = asyncio.current_task()
    assert task is not None
    events = await model.astream_events("Hi", config, version="v3")
    number = 0
    async for _ in events:
        number += 1
        if number == until:
            break
    for other in asyncio.all_tasks() - {task}:
        if until:
            other.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await other


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Shop(tmp_path, Tokens("tokens"), Messages("messages")) as shop:
            yield shop


def test_a_stream_of_events_is_billed_what_its_provider_reported(shop: Shop) -> None:
    asyncio.run(read(Quiet(), shop.config()))
    assert shop.billed() == {"tokens": 15, "messages": 1}


def test_of_a_stream_of_events_that_is_left_what_had_come_is_billed(shop: Shop) -> None:
    asyncio.run(read(Quiet(), shop.config(), until=4))
    assert LIKE_TEN[0] <= shop.billed()["tokens"] <= LIKE_TEN[1]


def test_of_a_stream_of_events_that_breaks_what_had_come_is_billed(shop: Shop) -> None:
    with suppress(ConnectionError):
        asyncio.run(read(Quiet(breaks=True), shop.config()))
    assert LIKE_TEN[0] <= shop.billed()["tokens"] <= LIKE_TEN[1]


def test_an_answer_from_the_cache_is_not_billed_though_its_reader_leaves_while_it_is_told(shop: Shop) -> None:
    """It comes in events, too, but each of its blocks in one piece."""
    told = asyncio.Event()

    class Slow(AsyncCallbackHandler, streaming._V2StreamingCallbackHandler):
        async def on_stream_event(self, event: Any, **kwargs: Any) -> None:
            if event["event"] == "content-block-finish":
                told.set()
                await asyncio.sleep(60)

    model, config = Quiet(cache=InMemoryCache()), shop.config()
    model.invoke("Hi", {**config, "callbacks": [*config["callbacks"], Listener()]})
    chain = RunnableLambda(lambda question: question) | model

    async def leave() -> None:
        task = asyncio.create_task(chain.ainvoke("Hi", {**config, "callbacks": [*config["callbacks"], Slow()]}))
        await asyncio.wait_for(told.wait(), 60)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert shop.billed() == {"tokens": 15, "messages": 1}


def test_an_answer_from_the_cache_is_not_billed_though_it_is_told_in_pieces(shop: Shop) -> None:
    model, config = Quiet(cache=InMemoryCache()), shop.config()
    config["callbacks"].append(Listener())
    for _ in range(2):
        model.invoke("Hi", config)
    assert shop.billed() == {"tokens": 15, "messages": 2}


class Two(Quiet):
    """Answers twice."""

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        both = ("one two", "three four")
        return ChatResult(generations=[ChatGeneration(message=AIMessage(one, usage_metadata=USAGE)) for one in both])


def test_two_answers_from_the_cache_are_not_billed_though_they_are_told_as_events(shop: Shop) -> None:
    model, config = Two(cache=InMemoryCache()), shop.config()
    model.invoke("Hi", config)
    for _ in range(2):
        model.invoke("Hi", {**config, "callbacks": [*config["callbacks"], Listener()]})
    assert shop.billed()["tokens"] == 15


class Calling(Quiet):
    """Says a sentence and calls two tools, each in one piece; then nothing comes any more."""

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        yield ChatGenerationChunk(message=AIMessageChunk("one two three"))
        for number in range(2):
            call = tool_call_chunk(name="search", args='{"query": "four five six"}', id=f"c{number}", index=number)
            yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[call]))
        await asyncio.sleep(60)


def test_an_answer_of_several_blocks_in_one_piece_each_is_billed_when_its_reader_leaves(shop: Shop) -> None:
    asyncio.run(read(Calling(), shop.config(), until=6))
    assert shop.billed()["tokens"] > LIKE_TEN[1]
