"""What is done beside an event loop has threads of its own, however busy the application keeps asyncio's."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from weakref import ref

import pytest
from conftest import wait_until
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatResult

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_lead
from langchain_stripe_meter.agents.limits import Budget, SpendLimit, SpendLimitCallback, SpendLimitMiddleware
from langchain_stripe_meter.core.tenants import Tenant
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.ledger.views import tail
from langchain_stripe_meter.telling import hand_on
from langchain_stripe_meter.workers import MOST, Workers, in_thread, in_worker

USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
Work = Callable[[StripeMeterCallbackHandler], Awaitable[Any]]


class Model(GenericFakeChatModel):
    """Answers without a thread."""

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate(*args, **kwargs)


def model(usage: Any = USAGE) -> Model:
    return Model(messages=iter([AIMessage("Hello", usage_metadata=usage)]))


async def a_lead_is_asked_for(meter: StripeMeterCallbackHandler) -> None:
    await model().ainvoke("Hi", {"callbacks": [meter], "metadata": {"session_id": "s"}})


async def a_limit_is_checked(meter: StripeMeterCallbackHandler) -> None:
    limit = SpendLimitCallback(Budget(meter, SpendLimit("tokens", 100)))
    await model().ainvoke("Hi", {"callbacks": [meter, limit], "metadata": {"session_id": "s"}})


async def an_agents_limit_is_checked(meter: StripeMeterCallbackHandler) -> None:
    agent = create_agent(model(), [], middleware=[SpendLimitMiddleware(Budget(meter, SpendLimit("tokens", 100)))])
    message: Any = {"messages": [("user", "Hi")]}
    await agent.ainvoke(message, {"callbacks": [meter], "metadata": {"session_id": "s"}})


async def a_lead_is_captured(meter: StripeMeterCallbackHandler) -> None:
    await meter.leads.acapture("s", email="ann@example.com")


async def a_job_is_recorded(meter: StripeMeterCallbackHandler) -> None:
    await meter.arecord_usage({"input_tokens": 1}, id="job", customer="cus_1")


async def it_is_flushed(meter: StripeMeterCallbackHandler) -> None:
    await meter.aflush(5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "work",
    [a_lead_is_asked_for, a_limit_is_checked, an_agents_limit_is_checked, a_lead_is_captured, a_job_is_recorded,
     it_is_flushed],
)  # fmt: skip
def test_nothing_waits_for_the_applications_own_tools(work: Work, tmp_path: Path) -> None:
    tool = threading.Event()

    async def main(meter: StripeMeterCallbackHandler) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, tool.wait)
        try:
            async with asyncio.timeout(60):
                await work(meter)
        finally:
            tool.set()
            await busy

    ledger = f"sqlite:///{tmp_path}/l.db"
    with StripeMeterCallbackHandler(Tokens("tokens"), customer=from_lead(), deliver=False, ledger=ledger) as meter:
        asyncio.run(main(meter))
        assert meter.status().unrecorded == 0


@pytest.mark.timeout(120)
def test_flushes_that_wait_hold_no_run_up(tmp_path: Path) -> None:
    """However many there are: what they wait for has threads of its own."""
    slow, settling = threading.Event(), list[None]()

    def tenant(facts: Any) -> Tenant:
        settling.append(None)
        slow.wait()
        return Tenant("")

    async def main(meter: StripeMeterCallbackHandler) -> None:
        runs = [asyncio.create_task(model().ainvoke("Hi", {"callbacks": [meter]})) for _ in range(MOST + 2)]
        while len(settling) < MOST:  # all of the threads are busy, and two runs wait for one
            await asyncio.sleep(0.01)
        flushes = [asyncio.create_task(meter.aflush(1000)) for _ in range(2 * MOST)]
        while sum(thread.name == "stripe-meter-waiting" for thread in threading.enumerate()) < 2 * MOST:
            await asyncio.sleep(0.01)
        slow.set()
        await asyncio.gather(*runs, *flushes)

    ledger = f"sqlite:///{tmp_path}/l.db"
    with StripeMeterCallbackHandler(
        Tokens("tokens"), customer="cus_1", tenant=tenant, deliver=False, ledger=ledger
    ) as meter:
        asyncio.run(main(meter))
        assert len(tail(meter._ledger, 1000)) == MOST + 2


@pytest.mark.timeout(120)
def test_who_is_told_may_flush_where_it_is_told(tmp_path: Path) -> None:
    def on_error(error: MeteringError) -> None:
        meter.flush(1000)
        told.append(error)

    told: list[MeteringError] = []
    usage = {**USAGE, "input_token_details": {"cache_read": 11}}  # is held, and told
    options: dict[str, Any] = {"on_error": on_error, "deliver": False, "ledger": f"sqlite:///{tmp_path}/l.db"}
    with StripeMeterCallbackHandler(Tokens("tokens"), customer=from_lead(), **options) as meter:
        lead = {"lead": {"email": "ann@example.com"}}
        asyncio.run(model(usage).ainvoke("Hi", {"callbacks": [meter], "metadata": lead}))
        meter.flush()
        assert len(told) == 1


@pytest.mark.timeout(120)
def test_two_who_are_told_at_once_may_flush_both(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def on_error(error: MeteringError) -> None:
        both.wait()
        meter.flush(1000)

    async def main() -> None:
        hand_on(on_error, MeteringError("by the thread that tells"))
        lead = {"lead": {"email": "ann@example.com"}}
        usage = {**USAGE, "input_token_details": {"cache_read": 11}}
        await model(usage).ainvoke("Hi", {"callbacks": [meter], "metadata": lead})

    options: dict[str, Any] = {"on_error": on_error, "deliver": False, "ledger": f"sqlite:///{tmp_path}/l.db"}
    with StripeMeterCallbackHandler(Tokens("tokens"), customer=from_lead(), **options) as meter:
        asyncio.run(main())
        meter.flush(1000)


@pytest.mark.timeout(120)
def test_errors_are_told_in_their_order_by_one_thread_which_a_flush_waits_for(tmp_path: Path) -> None:
    told, threads = list[str](), set[threading.Thread]()
    gate = threading.Event()

    def on_error(error: MeteringError) -> None:
        gate.wait()
        told.append(str(error))
        threads.add(threading.current_thread())

    async def main() -> None:
        for number in range(20):
            hand_on(on_error, MeteringError(str(number)))
        gate.set()

    ledger = f"sqlite:///{tmp_path}/l.db"
    with StripeMeterCallbackHandler(Tokens("tokens"), customer="cus_1", deliver=False, ledger=ledger) as meter:
        asyncio.run(main())
        meter.flush()
    assert told == [str(number) for number in range(20)]
    assert len(threads) == 1


@pytest.mark.parametrize("wait", [in_worker, in_thread])
def test_whoever_waits_may_be_cancelled_and_the_work_is_done_all_the_same(wait: Any) -> None:
    begun, gate, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        gate.wait()
        done.set()

    async def main() -> None:
        waiting = asyncio.create_task(wait(work))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    gate.set()
    assert done.wait(60)
    for thread in threading.enumerate():
        if thread.name == "stripe-meter-waiting":
            thread.join(60)  # what it raises, pytest tells


@pytest.mark.parametrize("wait", [in_worker, in_thread])
def test_what_fails_is_let_go_of_at_once_and_left_to_no_collection(wait: Any) -> None:
    """With it go the frames that its traceback holds, and the prompts in them."""

    class Prompt:
        pass

    kept: list[ref[Prompt]] = []

    def fail() -> None:
        prompt = Prompt()
        kept.append(ref(prompt))
        raise ValueError

    async def main() -> None:
        with suppress(ValueError):
            await wait(fail)

    gc.disable()
    try:
        asyncio.run(main())
        wait_until(lambda: kept[0]() is None, 10)
    finally:
        gc.enable()


def test_what_a_pool_could_not_begin_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, done = Workers(1, "w"), list[int]()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            workers.submit(done.append, 1)
    workers.submit(done.append, 2).result()
    workers.wait(60)
    assert done == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_what_a_forked_child_settles_beside_its_loop_is_recorded_once_each(tmp_path: Path) -> None:
    """The threads that settled for the parent are not there; what it was settling is the parent's."""
    settling, slow = threading.Event(), threading.Event()

    def tenant(facts: Any) -> Tenant:
        if facts.metadata["who"] == "parent":
            settling.set()
            slow.wait()
        return Tenant("")

    async def run(who: str) -> None:
        await model().ainvoke("Hi", {"callbacks": [meter], "metadata": {"who": who}})

    async def main() -> None:
        parents = asyncio.create_task(run("parent"))
        while not settling.is_set():
            await asyncio.sleep(0.001)
        child = os.fork()
        if not child:
            _in_a_child(lambda: asyncio.run(run("child")))
        assert os.waitpid(child, 0)[1] == 0
        slow.set()
        await parents

    ledger = f"sqlite:///{tmp_path}/l.db"
    with StripeMeterCallbackHandler(
        Tokens("tokens"), customer="cus_1", tenant=tenant, deliver=False, ledger=ledger
    ) as meter:
        asyncio.run(main())
        assert [row.value for row in tail(meter._ledger)] == [15, 15]


def _in_a_child(work: Callable[[], None]) -> NoReturn:
    """Do it on a thread, where no event loop of the parent's seems to run, and leave."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    os._exit(thread.is_alive())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    async def ask() -> int:
        return await in_worker(threading.get_ident)

    assert asyncio.run(ask()) != threading.get_ident()
    child = os.fork()
    if not child:
        os._exit(0 if asyncio.run(ask()) else 1)
    assert os.waitpid(child, 0)[1] == 0
