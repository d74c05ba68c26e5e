"""The handler as its user meets it: attached in every way, durable before a run returns, never in the way."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import inspect
import pickle
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda
from metering import ONE_ANSWER, Shop, paid_by
from providers import OpenAIServer, Reply

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_metadata, static, stripe_meter
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError, MeteringError, UsageError
from langchain_stripe_meter.ledger.views import FlushReport, tail, why_skipped
from langchain_stripe_meter.sandbox import StripeSandbox


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path) as shop:
        yield shop


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


# Attached in every way, a run is billed once


def per_call(shop: Shop, server: OpenAIServer) -> None:
    server.chat().invoke("Hi", shop.config())


def on_the_model(shop: Shop, server: OpenAIServer) -> None:
    server.chat(callbacks=[shop.handler]).invoke("Hi", paid_by("cus_1"))


def on_the_chain(shop: Shop, server: OpenAIServer) -> None:
    chain = RunnableLambda(str) | server.chat()
    chain.with_config(callbacks=[shop.handler]).invoke("Hi", paid_by("cus_1"))


def with_the_customer_bound_to_the_chain(shop: Shop, server: OpenAIServer) -> None:
    server.chat().with_config(shop.config()).invoke("Hi")


def with_a_copy_of_the_config(shop: Shop, server: OpenAIServer) -> None:
    copied = copy.deepcopy(shop.config())
    assert copied["callbacks"] == [copy.copy(shop.handler)] == [shop.handler]
    server.chat().invoke("Hi", copied)


def everywhere(shop: Shop, server: OpenAIServer) -> None:
    with stripe_meter(shop.handler):
        server.chat().invoke("Hi", paid_by("cus_1"))


def everywhere_nested(shop: Shop, server: OpenAIServer) -> None:
    with stripe_meter(shop.handler), stripe_meter(shop.handler):
        server.chat().invoke("Hi", paid_by("cus_1"))


def everywhere_in_tasks(shop: Shop, server: OpenAIServer) -> None:
    async def main() -> None:
        with stripe_meter(shop.handler):
            await asyncio.create_task(server.chat().ainvoke("Hi", paid_by("cus_1")))

    asyncio.run(main())


def twice_on_one_call(shop: Shop, server: OpenAIServer) -> None:
    server.chat().invoke("Hi", shop.config(callbacks=[shop.handler, shop.handler]))


def on_model_chain_call_and_everywhere(shop: Shop, server: OpenAIServer) -> None:
    model = server.chat(callbacks=[shop.handler]).with_config(callbacks=[shop.handler])
    with stripe_meter(shop.handler):
        (RunnableLambda(str) | model).with_config(callbacks=[shop.handler]).invoke("Hi", shop.config())


def two_handlers_with_one_ledger(shop: Shop, server: OpenAIServer) -> None:
    server.chat().invoke("Hi", shop.config(callbacks=[shop.handler, shop.another_handler()]))


def inside_a_running_loop(shop: Shop, server: OpenAIServer) -> None:
    async def cell() -> None:  # a notebook's cell runs in a loop, and may well call the model without await
        server.chat().invoke("Hi", shop.config())

    asyncio.run(cell())


def streamed_inside_a_running_loop(shop: Shop, server: OpenAIServer) -> None:
    async def cell() -> None:
        list((RunnableLambda(str) | server.chat()).stream("Hi", shop.config()))

    asyncio.run(cell())


WAYS: list[Callable[[Shop, OpenAIServer], None]] = [
    per_call,
    on_the_model,
    on_the_chain,
    with_the_customer_bound_to_the_chain,
    with_a_copy_of_the_config,
    everywhere,
    everywhere_nested,
    everywhere_in_tasks,
    twice_on_one_call,
    on_model_chain_call_and_everywhere,
    two_handlers_with_one_ledger,
    inside_a_running_loop,
    streamed_inside_a_running_loop,
]


@pytest.mark.parametrize("attach", WAYS)
def test_a_run_is_billed_once_however_the_handler_is_attached(
    attach: Callable[[Shop, OpenAIServer], None], shop: Shop, server: OpenAIServer
) -> None:
    attach(shop, server)
    assert shop.billed() == ONE_ANSWER
    status = shop.handler.status()
    assert (status.open_runs, status.unrecorded, status.abandoned) == (0, 0, 0)


def test_two_handlers_with_meters_of_their_own_both_bill(shop: Shop, server: OpenAIServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with Shop(tmp_path / "other", Tokens("others")) as other:
        server.chat().invoke("Hi", shop.config(callbacks=[shop.handler, other.handler]))
        assert (shop.billed(), other.billed()) == (ONE_ANSWER, {"others": 15})


def test_after_the_block_nothing_is_metered_even_if_it_raised(shop: Shop, server: OpenAIServer) -> None:
    def fail() -> None:
        with stripe_meter(shop.handler) as handler:
            assert handler is shop.handler
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    server.chat().invoke("Hi", paid_by("cus_1"))
    assert shop.billed() == {}


def test_an_inner_block_does_not_end_the_outer_one(shop: Shop, server: OpenAIServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with Shop(tmp_path / "other", Tokens("others")) as other:
        with stripe_meter(shop.handler):
            with stripe_meter(other.handler), stripe_meter(shop.handler):
                pass
            server.chat().invoke("Hi", paid_by("cus_1"))
        assert (shop.billed(), other.billed()) == (ONE_ANSWER, {})


def test_a_block_in_a_generator_that_was_left_meters_nothing_further(shop: Shop, server: OpenAIServer) -> None:
    """The loop ends such a generator in a task of its own, which cannot undo what was set in this one."""

    async def chat() -> AsyncIterator[str]:
        with stripe_meter(shop.handler):
            async for piece in server.chat().astream("Hi", paid_by("cus_1")):
                yield piece.text

    async def serve() -> list[str]:
        unhandled: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: unhandled.append(str(told)))
        async for text in chat():
            if text:
                break  # its reader goes away
        while not tail(shop.handler._ledger, 9):
            gc.collect()
            await asyncio.sleep(0.01)
        await server.chat().ainvoke("Hi", paid_by("cus_2"))  # what comes next in the same task is somebody else's
        return unhandled

    assert asyncio.run(serve()) == []
    assert shop.billed("cus_1")
    assert shop.billed("cus_2") == {}


def chats_in_a_block(shop: Shop, server: OpenAIServer, count: int) -> Iterator[None]:
    with stripe_meter(shop.handler):
        for _ in range(count):
            yield
            server.chat().invoke("Hi", paid_by("cus_1"))


@pytest.mark.parametrize("first", [0, 1], ids=["entered first", "entered last"])
def test_two_streams_with_a_block_each_are_metered_to_their_ends_and_no_further(
    shop: Shop, server: OpenAIServer, first: int
) -> None:
    """They are read by turns on one thread: the block that was entered first may be left first."""
    streams = [chats_in_a_block(shop, server, 1), chats_in_a_block(shop, server, 2)]
    for stream in streams:
        next(stream)
    list(streams.pop(first))
    list(streams.pop())
    assert shop.billed() == {name: 3 * value for name, value in ONE_ANSWER.items()}
    server.chat().invoke("Hi", paid_by("cus_1"))  # by now it is nobody's stream
    assert shop.billed() == {name: 3 * value for name, value in ONE_ANSWER.items()}


def test_a_task_that_was_begun_in_a_stream_is_metered_to_its_end_though_its_block_was_left_out_of_order(
    shop: Shop, server: OpenAIServer
) -> None:
    async def main() -> None:
        left = asyncio.Event()

        async def job() -> None:
            await left.wait()
            await server.chat().ainvoke("Hi", paid_by("cus_1"))

        async def begin() -> AsyncIterator[asyncio.Task[None]]:
            with stripe_meter(shop.handler):
                yield asyncio.create_task(job())

        first, second = begin(), begin()
        tasks = [await anext(first), await anext(second)]
        for stream in (first, second):
            assert await anext(stream, None) is None
        left.set()
        await asyncio.gather(*tasks)
        await server.chat().ainvoke("Hi", paid_by("cus_1"))  # outside

    asyncio.run(main())
    assert shop.billed() == {name: 2 * value for name, value in ONE_ANSWER.items()}


def test_a_task_that_was_begun_in_a_block_is_metered_to_its_end(shop: Shop, server: OpenAIServer) -> None:
    async def main() -> None:
        left = asyncio.Event()

        async def job() -> None:
            await left.wait()
            await server.chat().ainvoke("Hi", paid_by("cus_1"))

        with stripe_meter(shop.handler):
            task = asyncio.create_task(job())
        left.set()
        await task

    asyncio.run(main())
    assert shop.billed() == ONE_ANSWER


def test_a_block_may_be_left_in_another_context_than_it_was_entered_in(shop: Shop, server: OpenAIServer) -> None:
    """As FastAPI does with a dependency that yields."""

    def dependency() -> Iterator[None]:
        with stripe_meter(shop.handler):
            yield

    block, entered = dependency(), contextvars.copy_context()
    entered.run(next, block)
    contextvars.copy_context().run(list, block)
    entered.run(server.chat().invoke, "Hi", paid_by("cus_1"))
    assert shop.billed() == {}


def test_a_handler_stays_in_its_process(shop: Shop) -> None:
    chain = RunnableLambda(str).with_config(callbacks=[shop.handler])
    with pytest.raises(TypeError, match=r"StripeMeterCallbackHandler holds .* Make one in each process that needs it"):
        pickle.dumps(chain)


# DESIGN.md's samples


def test_the_sample_of_the_public_face_runs_as_written(
    stripe_sandbox: StripeSandbox, server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stripe_sandbox.create_meter("ai_tokens_used")
    stripe_sandbox.create_customer(id="cus_123")
    chain = ChatPromptTemplate.from_template("{question}") | server.chat()

    meter = StripeMeterCallbackHandler(Tokens("ai_tokens_used"), customer=from_metadata("stripe_customer_id"))
    chain.invoke({"question": "..."}, config={"callbacks": [meter], "metadata": {"stripe_customer_id": "cus_123"}})
    chain.invoke({"question": "..."}, config={"callbacks": [meter]})
    report = meter.flush(timeout=10)

    assert report == FlushReport(delivered=1, pending=0, held=0, skipped=1, rejected=0, doubtful=0)
    assert stripe_sandbox.billed("ai_tokens_used") == {"cus_123": 15}
    assert why_skipped(meter._ledger) == {"metadata has no 'stripe_customer_id'": 1}
    assert (tmp_path / "stripe_meter.db").exists()
    meter.close()


def test_without_a_customer_argument_the_metadata_names_who_pays(shop: Shop, server: OpenAIServer) -> None:
    server.chat().invoke("Hi", shop.config(callbacks=[shop.another_handler(customer=None)]))
    assert shop.billed() == ONE_ANSWER


def test_a_static_customer_pays_whatever_the_metadata_says(shop: Shop, server: OpenAIServer) -> None:
    server.chat().invoke("Hi", shop.config("cus_1", callbacks=[shop.another_handler(customer="cus_2")]))
    assert (shop.billed("cus_1"), shop.billed("cus_2")) == ({}, ONE_ANSWER)


# Durable before the run returns, without blocking the loop


def test_a_retry_finds_a_customer_who_was_made_a_moment_ago(stripe_sandbox: StripeSandbox) -> None:
    stripe_sandbox.create_meter("ai_tokens")
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer=static(email="new@example.com")) as handler:
        handler.record_usage({"input_tokens": 5}, id="job")
        assert handler.flush(timeout=10).held == 1
        customer = stripe_sandbox.create_customer(email="new@example.com")
        assert handler.retry() == 1
        assert handler.flush(timeout=10).delivered == 1
    assert stripe_sandbox.billed("ai_tokens", customer) == 5


def stored(path: Path) -> int:
    """Readings in the file, as another process sees them."""
    with closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM readings").fetchone()
    return int(count)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[StripeMeterCallbackHandler]:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with StripeMeterCallbackHandler(Tokens("tokens"), customer="cus_1", ledger=url, deliver=False) as handler:
        yield handler


def test_a_run_is_in_the_file_when_invoke_returns(
    recorder: StripeMeterCallbackHandler, server: OpenAIServer, tmp_path: Path
) -> None:
    for count in (1, 2):
        server.chat().invoke("Hi", {"callbacks": [recorder]})
        assert stored(tmp_path / "ledger.db") == count
    assert recorder.flush() == FlushReport(delivered=0, pending=2, held=0, skipped=0, rejected=0, doubtful=0)


@pytest.mark.parametrize("way", ["ainvoke", "astream", "abatch", "stream"])
def test_a_run_is_in_the_file_when_the_other_ways_return(
    way: str, recorder: StripeMeterCallbackHandler, server: OpenAIServer, tmp_path: Path
) -> None:
    config: RunnableConfig = {"callbacks": [recorder]}

    async def main() -> int:
        if way == "ainvoke":
            await server.chat().ainvoke("Hi", config)
        elif way == "abatch":
            await server.chat().abatch(["Hi"], config)
        elif way == "astream":
            async for _ in server.chat().astream("Hi", config):
                pass
        else:
            list(server.chat().stream("Hi", config))
        return stored(tmp_path / "ledger.db")

    assert asyncio.run(main()) == 1


def test_ends_are_coroutines_inside_a_loop_and_plain_functions_outside(recorder: StripeMeterCallbackHandler) -> None:
    ends = [f"on_{run}_{end}" for run in ("llm", "chain", "tool", "retriever") for end in ("end", "error")]

    async def inside() -> list[bool]:
        return [inspect.iscoroutinefunction(getattr(recorder, end)) for end in ends]

    assert recorder.run_inline
    assert not any(inspect.iscoroutinefunction(getattr(recorder, end)) for end in ends)
    assert all(asyncio.run(inside()))


def test_streamed_tokens_and_starts_never_leave_the_loops_thread(tmp_path: Path, server: OpenAIServer) -> None:
    threads: dict[str, set[int]] = {}

    class Watched(StripeMeterCallbackHandler):
        """Ours, and it tells in which threads it is called."""

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            threads.setdefault("start", set()).add(threading.get_ident())
            super().on_chat_model_start(*args, **kwargs)

        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            threads.setdefault("token", set()).add(threading.get_ident())
            super().on_llm_new_token(token, **kwargs)

    server.reply(Reply("one two three four five"))
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Watched(Tokens("tokens"), customer="cus_1", ledger=url, deliver=False) as handler:

        async def main() -> None:
            async for _ in server.chat().astream("Hi", {"callbacks": [handler]}):
                pass

        asyncio.run(main())
    assert threads == {"start": {threading.get_ident()}, "token": {threading.get_ident()}}
    assert not inspect.iscoroutinefunction(handler.on_llm_new_token)


def test_while_the_ledger_is_busy_the_event_loop_goes_on(
    recorder: StripeMeterCallbackHandler, server: OpenAIServer, tmp_path: Path
) -> None:
    lane = recorder._ledger.database.lane("record")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lane.lock:
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)

    async def main() -> None:
        run = asyncio.create_task(server.chat().ainvoke("Hi", {"callbacks": [recorder]}))
        await asyncio.to_thread(server.wait_for_requests)
        while len(recorder._runs):  # until the end of the run waits for the ledger
            await asyncio.sleep(0)
        for _ in range(1000):  # the loop still turns
            await asyncio.sleep(0)
        assert not run.done()
        assert stored(tmp_path / "ledger.db") == 0
        release.set()
        await run

    try:
        asyncio.run(main())
    finally:
        release.set()
        holder.join()
    assert stored(tmp_path / "ledger.db") == 1


# What has no run


def test_usage_without_a_run_is_billed_once_per_id(shop: Shop) -> None:
    handler, usage = shop.another_handler(), {"input_tokens": 812}
    for _ in range(2):
        handler.record_usage(usage, model="text-embedding-3-small", customer="cus_1", id="job-7")
        asyncio.run(shop.handler.arecord_usage(usage, customer="cus_1", id="job-7"))
    handler.record_usage(usage, customer="cus_1", id="job-8")
    assert shop.billed() == {"in": 1624}


def test_usage_without_a_run_is_paid_by_whom_the_metadata_names_or_skipped(shop: Shop) -> None:
    shop.handler.record_usage({"output_tokens": 5}, id="a", metadata={"stripe_customer_id": "cus_2"})
    shop.handler.record_usage({"output_tokens": 7}, id="b")
    assert shop.billed("cus_2") == {"out": 5}
    assert shop.handler.flush().skipped == 1


@pytest.mark.parametrize(
    ("usage", "options", "error", "named"),
    [
        ({"input_tokens": -1}, {}, UsageError, "-1"),
        ({"input_tokens": 1.5}, {}, UsageError, "1.5"),
        ({"input_tokens": True}, {}, UsageError, "True"),
        ({"input_tokens": 5, "input_token_details": {"cache_read": 9}}, {}, UsageError, "9"),
        ({"input_tokens": 0, "total_tokens": 9}, {}, UsageError, "total_tokens = 9"),
        ({"input_tokens": 5}, {"id": ""}, ConfigurationError, "id="),
        ({"input_tokens": 5}, {"id": 7}, ConfigurationError, "id="),
        ({"input_tokens": 5}, {"customer": "someone"}, InvalidValueError, "cus_"),
        ({"input_tokens": 5}, {"customer": 5}, ConfigurationError, "int"),
        ({"input_tokens": 5}, {"at": 1}, InvalidValueError, "35 days"),
        ({"input_tokens": 5}, {"at": 1_790_000_000_000}, InvalidValueError, "milliseconds"),
        ({"prompt_tokens": 5}, {}, MeteringError, "prompt_tokens"),
        ({}, {}, MeteringError, "neither"),
        (None, {}, MeteringError, "NoneType"),
    ],
)
def test_bad_usage_without_a_run_is_refused_naming_it(
    usage: dict[str, Any], options: dict[str, Any], error: type[Exception], named: str, shop: Shop
) -> None:
    with pytest.raises(error, match=named):
        shop.handler.record_usage(usage, **{"id": "job", "customer": "cus_1", **options})
    assert shop.billed() == {}
