"""Streams that somebody left, collected in the midst of our own code: nothing hangs, and each is billed once."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import wait_until
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_stripe_meter import Messages, StripeMeterCallbackHandler, Tokens, from_lead
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger.group import GroupCommit
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.ledger.views import tail
from langchain_stripe_meter.reentry import WORTH_A_THREAD, Bell, inside, is_inside, soon, within
from langchain_stripe_meter.sandbox import StripeSandbox


class Model(BaseChatModel):
    """Answers 15 tokens at once, or streams two words and reports nothing."""

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        return ChatResult(generations=[ChatGeneration(message=AIMessage("hi", usage_metadata=usage))])

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate()

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for word in ("one ", "two "):
            yield ChatGenerationChunk(message=AIMessageChunk(word))


class Clock:
    """Time that stands still; reading it may collect garbage, as any allocation may."""

    collects = False

    def __call__(self) -> float:
        if self.collects:
            gc.collect()
        return 1_790_000_000.0


class Collecting:
    """An id that collects garbage whenever a dictionary looks at it."""

    def __hash__(self) -> int:
        gc.collect()
        return 1

    hex = "collecting"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def only_when_told() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def make(path: Path, clock: Clock, **options: Any) -> StripeMeterCallbackHandler:
    options = {"customer": "cus_1", "deliver": False, "clock": clock, **options}
    return StripeMeterCallbackHandler(
        Tokens("tokens"), Messages("messages"), ledger=f"sqlite:///{path}/l.db", **options
    )


@pytest.fixture
def handler(tmp_path: Path, clock: Clock) -> Iterator[StripeMeterCallbackHandler]:
    with make(tmp_path, clock) as handler:
        Model().invoke("warm up", {"callbacks": [handler]})
        yield handler


def leave_a_stream(handler: StripeMeterCallbackHandler) -> None:
    """Garbage that only the collector finds, with a stream inside that was read in part."""
    box: dict[str, Any] = {"stream": Model().stream("Count, please.", {"callbacks": [handler]})}
    box["box"] = box
    next(box["stream"])


def done(work: Callable[[], object]) -> bool:
    """Whether ``work`` returns, on a thread that nobody has to wait for."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    return not thread.is_alive()


def billed(handler: StripeMeterCallbackHandler) -> dict[str, list[bool]]:
    rows = tail(handler._ledger, 1000)
    return {name: sorted(row.estimated for row in rows if row.event_name == name) for name in ("tokens", "messages")}


def test_a_stream_collected_while_the_ledger_writes_is_billed_once(
    handler: StripeMeterCallbackHandler,
) -> None:
    insert = handler._ledger._insert

    def collecting(driver: Any, rows: Any) -> None:
        gc.collect()
        insert(driver, rows)
        gc.collect()

    handler._ledger._insert = collecting

    def work() -> None:
        leave_a_stream(handler)
        Model().invoke("hi", {"callbacks": [handler]})

    assert done(work)
    assert billed(handler) == {"tokens": [False, False, True], "messages": [False, False, False]}
    assert handler.status().unrecorded == 0


def test_a_stream_collected_while_a_run_starts_is_billed_once(handler: StripeMeterCallbackHandler) -> None:
    run_id: Any = Collecting()

    def work() -> None:
        leave_a_stream(handler)
        handler.on_chat_model_start({}, [["hi"]], run_id=run_id)

    assert done(work)
    assert billed(handler)["tokens"] == [False, True]
    assert handler.status().open_runs == 1


def test_a_stream_collected_while_abandoned_runs_are_looked_for_is_billed_once(
    handler: StripeMeterCallbackHandler, clock: Clock
) -> None:
    def work() -> None:
        leave_a_stream(handler)
        clock.collects = True
        handler.status()
        clock.collects = False

    assert done(work)
    assert billed(handler)["tokens"] == [False, True]


def test_a_stream_collected_inside_a_transaction_is_billed_once_and_not_rolled_back_with_it(
    handler: StripeMeterCallbackHandler,
) -> None:
    def work() -> None:
        leave_a_stream(handler)
        with suppress(KeyError), handler._ledger.deliver_lane().transaction():
            gc.collect()
            raise KeyError

    assert done(work)
    assert billed(handler)["tokens"] == [False, True]


def test_a_stream_collected_while_the_ledger_is_read_is_billed_once_where_a_lead_is_looked_up(
    tmp_path: Path, clock: Clock
) -> None:
    with make(tmp_path, clock, customer=from_lead(by="email")) as handler:
        handler.status()

        def work() -> None:
            leave_a_stream(handler)
            with handler._ledger.read():
                gc.collect()

        assert done(work)
        assert billed(handler)["tokens"] == [True]


def test_many_streams_collected_at_once_are_each_billed(handler: StripeMeterCallbackHandler) -> None:
    def work() -> None:
        for _ in range(300):
            leave_a_stream(handler)
        with inside():
            gc.collect()

    assert done(work)
    assert sum(billed(handler)["tokens"]) == 300


def test_a_stream_collected_by_a_loop_inside_our_code_is_recorded_by_another_thread(
    handler: StripeMeterCallbackHandler,
) -> None:
    where: list[str] = []
    record = handler._ledger.record

    def recording(entries: Any) -> None:
        where.append(threading.current_thread().name)
        record(entries)

    handler._ledger.record = recording  # type: ignore[method-assign]

    async def main() -> None:
        await asyncio.to_thread(leave_a_stream, handler)
        with inside():
            gc.collect()

    def work() -> None:
        asyncio.run(main())
        for thread in threading.enumerate():
            if thread.name == "stripe-meter-late":
                thread.join()

    assert done(work)
    assert where == ["stripe-meter-late"]
    assert sum(billed(handler)["tokens"]) == 1


# -- what Python collects by itself


class Waits:
    """As LangGraph does for a stream that somebody left: its end waits until a node, on another thread, has answered.

    It can only be found by a collection.
    """

    def __init__(self, node: Callable[[], object], ended: list[bool]) -> None:
        self.itself, self.node, self.ended = self, node, ended

    def __del__(self) -> None:
        node = threading.Thread(target=self.node, daemon=True)
        node.start()
        node.join(10)
        self.ended.append(not node.is_alive())


@pytest.fixture
def by_itself() -> Iterator[None]:
    """Python collects when it has made 700 objects more."""
    with inside():
        gc.enable()
        gc.collect()
    yield
    gc.disable()


@pytest.mark.usefixtures("by_itself")
def test_nothing_is_collected_where_its_end_would_wait_for_us(handler: StripeMeterCallbackHandler) -> None:
    ended, kept = list[bool](), list[list[int]]()
    insert, answer = handler._ledger._insert, partial(Model().invoke, "hi", {"callbacks": [handler]})

    def writing(driver: Any, rows: Any) -> None:
        if not ended and threading.current_thread() is threading.main_thread():
            Waits(answer, ended)
            kept.extend([] for _ in range(20_000))
        insert(driver, rows)

    handler._ledger._insert = writing
    answer()
    wait_until(lambda: ended)
    assert ended == [True]
    assert billed(handler)["tokens"] == [False] * 3
    wait_until(gc.isenabled)


@contextmanager
def another_inside() -> Iterator[None]:
    """Another thread is inside our code."""
    leave = threading.Event()

    def stay() -> None:
        with inside():
            leave.wait(60)

    other = threading.Thread(target=stay)
    other.start()
    wait_until(lambda: not gc.isenabled())
    yield
    leave.set()
    other.join()


@pytest.mark.usefixtures("by_itself")
def test_while_others_are_inside_what_was_put_off_is_collected_when_one_leaves() -> None:
    ended = list[bool]()
    with another_inside():
        Waits(int, ended)
        kept = [[] for _ in range(20_000)]
        assert ended == []
        within(len, kept)
        wait_until(lambda: ended)
        assert not gc.isenabled()
    wait_until(gc.isenabled)


@pytest.mark.usefixtures("by_itself")
def test_while_another_thread_collects_what_was_put_off_waits_for_the_next_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python collects in one thread at a time; whoever asks meanwhile gets nothing done."""
    begun, go_on, started = threading.Event(), threading.Event(), list[str]()
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    class Long:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            begun.set()
            go_on.wait(30)

    monkeypatch.setattr(threading.Thread, "start", counted)
    with inside():
        Long()
        kept: list[Any] = []
        collecting = threading.Thread(target=gc.collect)
        collecting.start()
        assert begun.wait(30)
        kept.extend([] for _ in range(20_000))
        is_much = gc.get_count()[0] > WORTH_A_THREAD * gc.get_threshold()[0]  # 3.13 counts nothing while it collects
    wait_until(lambda: "stripe-meter-garbage" not in [thread.name for thread in threading.enumerate()])
    assert started.count("stripe-meter-garbage") == is_much
    go_on.set()
    collecting.join(30)
    within(len, kept)
    wait_until(gc.isenabled)


@pytest.mark.usefixtures("by_itself")
def test_what_was_put_off_does_not_make_a_node_wait_for_itself() -> None:
    ended, kept = list[bool](), list[list[int]]()

    class Left:
        """A stream that somebody left, whose end waits for the node that is collecting it."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            node.join(10)
            ended.append(not node.is_alive())

    def answer() -> None:
        with inside():
            Left()
            kept.extend([] for _ in range(20_000))
        kept.extend([] for _ in range(20_000))

    node = threading.Thread(target=answer)
    node.start()
    wait_until(lambda: ended)
    assert ended == [True]
    wait_until(gc.isenabled)


def test_an_application_that_wants_no_collections_is_given_none(handler: StripeMeterCallbackHandler) -> None:
    Model().invoke("hi", {"callbacks": [handler]})
    assert not gc.isenabled()


@pytest.mark.usefixtures("by_itself")
def test_an_application_that_stops_collections_while_we_do_one_is_given_no_further() -> None:
    kept = list[list[int]]()

    class Left:
        """Something that only a collection finds, and that ends all further ones when it is found."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            within(len, kept)
            gc.disable()

    with inside():
        Left()
        kept.extend([] for _ in range(20_000))
    wait_until(lambda: "stripe-meter-garbage" not in [thread.name for thread in threading.enumerate()])
    assert not gc.isenabled()


@pytest.mark.usefixtures("by_itself")
def test_a_child_collects_whoever_of_its_parents_threads_was_inside() -> None:
    with another_inside():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0


# -- group commits and interrupts


def test_what_interrupts_a_group_commit_is_written_after_it() -> None:
    written: list[int] = []

    def write(items: Sequence[int]) -> None:
        if items == [1]:
            soon(group.submit, [2])
            assert written == []
        written.extend(items)

    group = GroupCommit(write)
    assert done(lambda: group.submit([1]))
    assert written == [1, 2]


@pytest.mark.parametrize("closes", ["another thread", "a signal's handler"])
def test_a_group_commit_that_is_closed_while_somebody_wakes_its_helper_leaves_nobody_waiting(closes: str) -> None:
    written: list[str] = []
    group = GroupCommit(written.extend)

    async def write(*items: str) -> None:
        for item in items:
            await group.asubmit([item])

    asyncio.run(write("first"))
    helper = group._helper
    assert helper is not None

    def is_alive() -> bool:
        """Right after it was asked, the group is closed, as far as that can be."""
        if closes == "another thread":
            closing = threading.Thread(target=group.close)
            closing.start()
            closing.join(0.2)
        else:
            group.close()
        return True

    helper.is_alive = is_alive  # type: ignore[method-assign]
    assert done(lambda: asyncio.run(write("second", "third")))
    assert written == ["first", "second", "third"]
    group.close()


def test_a_late_event_that_fails_disturbs_neither_its_host_nor_the_others(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a prompt")

    heard: list[int] = []

    def host() -> int:
        soon(fail)
        soon(heard.append, 1)
        assert heard == []
        return 7

    assert within(host) == 7
    assert heard == [1]
    assert not is_inside()
    assert "ValueError" in caplog.text
    assert "a prompt" not in caplog.text


def test_what_interrupts_a_late_event_is_carried_out_after_it() -> None:
    told: list[str] = []

    def first() -> None:
        soon(told.append, "second")
        told.append("first")

    async def interrupted() -> None:
        within(soon, first)

    asyncio.run(interrupted())
    wait_until(lambda: len(told) == 2)
    assert told == ["first", "second"]


def test_a_thread_that_ended_amid_our_code_leaves_the_next_with_its_number_outside(
    handler: StripeMeterCallbackHandler,
) -> None:
    """Whoever keeps a generator that was begun there keeps it inside."""
    kept: list[Any] = []

    def amid() -> Iterator[None]:
        with inside():
            yield

    def begin() -> None:
        kept.append(amid())
        next(kept[0])

    def ask() -> None:
        Model().invoke("hi", {"callbacks": [handler]})

    def in_a_thread(work: Callable[[], None]) -> int | None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
        return thread.ident

    number = in_a_thread(begin)
    numbers: list[int | None] = []
    while number not in numbers and len(numbers) < 500:  # another thread may have it meanwhile
        numbers.append(in_a_thread(ask))
    assert number in numbers
    assert len(billed(handler)["tokens"]) == 1 + len(numbers)
    kept.clear()


def test_a_bell_rings_until_it_is_cleared() -> None:
    bell = Bell()
    bell.wait(0)
    assert not bell.is_set()
    bell.set()
    bell.set()
    bell.wait(60)
    bell.wait(60)
    assert bell.is_set()
    bell.clear()
    assert not bell.is_set()


# -- what a signal's handler raises, wherever it strikes


class Interrupt(BaseException):
    """As Ctrl-C."""


class TimeLimitError(Exception):
    """As Celery's soft time limit, which is an error like any other."""


class Interrupter:
    """Interrupts work at random. It keeps the last traceback, as a notebook does, and so whatever that refers to."""

    def __init__(self) -> None:
        self._armed = False
        self.kept: BaseException | None = None
        self.kind: type[BaseException] = Interrupt

    def __enter__(self) -> Interrupter:
        self._before = signal.signal(signal.SIGALRM, self._strike)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _strike(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise self.kind

    def __call__(self, work: Callable[[], object], seconds: float) -> None:
        """Repeat ``work`` until it is interrupted, within so many seconds."""
        try:
            self._armed = True
            # Again and again: in rare cases Python does not see an alarm before the next one.
            signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, seconds), 1)
            self._repeat(work)
        except BaseException as error:  # a database that was amid a statement may say it in its own words
            if self._armed:
                raise
            self.kept = error

    def _repeat(self, work: Callable[[], object]) -> None:
        """By itself: what strikes as a loop jumps back, Python 3.12 and 3.13 raise outside the ``try`` around it."""
        while self._armed:
            work()


@pytest.fixture
def interrupt() -> Iterator[Interrupter]:
    with Interrupter() as interrupter:
        yield interrupter


by_alarm = pytest.mark.timeout(120, method="thread")
"""These tests need the alarm that would else watch over them."""


@by_alarm
def test_an_interrupt_leaves_no_group_commit_that_nobody_may_write_through(interrupt: Interrupter) -> None:
    written: list[int] = []
    group = GroupCommit(written.extend)
    for _ in range(3000):
        interrupt(lambda: group.submit([1]), 3e-4)
        assert not group._leader.locked()
    assert done(lambda: group.submit([2]))
    assert 2 in written


def test_an_interrupt_of_who_waits_for_a_leader_that_was_faster_leaves_its_items_to_be_written() -> None:
    class Overtaken:
        """A lock that somebody else has taken since it was looked at, for a while."""

        def __init__(self, let_go: Callable[[], None]) -> None:
            self._let_go = let_go

        def __enter__(self) -> None:
            self._let_go()
            raise Interrupt

        def __exit__(self, *_: object) -> None: ...

        def locked(self) -> bool:
            return False

    written: list[int] = []
    group = GroupCommit(written.extend)
    leader = group._leader
    group._leader = Overtaken(lambda: setattr(group, "_leader", leader))  # type: ignore[assignment]
    with pytest.raises(Interrupt):
        group.submit([1])
    wait_until(lambda: written == [1])


@by_alarm
@pytest.mark.parametrize("waits", ["a thread", "a coroutine"])
def test_an_interrupt_of_whoever_writes_for_others_or_waits_keeps_nobody_waiting(
    interrupt: Interrupter, waits: str
) -> None:
    written: set[int] = set()
    group = GroupCommit(written.update)
    theirs, over = range(-1, -1_000_000, -1), threading.Event()
    acknowledged: list[int] = []

    def record() -> None:
        for number in theirs:
            group.submit([number])
            acknowledged.append(number)
            if over.is_set():
                break

    async def arecord() -> None:
        for number in theirs:
            await group.asubmit([number])
            acknowledged.append(number)
            if over.is_set():
                break

    work = record if waits == "a thread" else lambda: asyncio.run(arecord())
    threads = [threading.Thread(target=work, daemon=True) for _ in "12"]
    for thread in threads:
        thread.start()
    for number in range(1500):
        interrupt(lambda number=number: group.submit([number]), 3e-3)  # type: ignore[misc]
    over.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert written.issuperset(acknowledged)
    wait_until(lambda: not group._jobs, 20)
    group.close()


@by_alarm
def test_an_interrupt_leaves_no_thread_that_seems_to_be_inside_for_good(interrupt: Interrupter) -> None:
    heard: list[int] = []

    def nested() -> None:
        with inside(), inside():
            soon(heard.append, 1)

    for number in range(3000):
        interrupt((nested, lambda: within(nested), lambda: soon(nested))[number % 3], 3e-4)
        assert not is_inside()
        heard.clear()
        soon(heard.append, 2)
        assert 2 in heard


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db", synchronous="NORMAL")
    yield ledger
    ledger.close()


@by_alarm
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where it strikes a destructor
@pytest.mark.parametrize("kind", [Interrupt, TimeLimitError])
def test_an_interrupt_leaves_a_ledger_that_takes_what_comes_next_and_keeps_what_it_took(
    interrupt: Interrupter, ledger: Ledger, kind: type[BaseException]
) -> None:
    acknowledged: list[str] = []

    def record(count: int) -> None:
        keys = [uuid4().hex for _ in range(count)]
        ledger.record([Entry(key, "tokens", 1, 0, ReadingState.RESOLVED, customer="cus_1") for key in keys])
        acknowledged.extend(keys)

    def note() -> None:
        ledger.set_note("some", "note")

    def read() -> None:
        ledger.note("some")

    def look() -> None:
        with ledger.look() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM notes")

    def count_by_lane() -> None:
        ledger.database.lane("count").run(lambda driver: driver.execute("SELECT count(*) FROM notes"))

    works: list[Callable[[], object]] = [partial(record, 1), partial(record, 3), note, read, look, count_by_lane]
    interrupt.kind = kind
    for work in works:
        work()
    for number in range(360):
        interrupt(works[number % len(works)], 3e-3)
        assert not is_inside()
        works[number // len(works) % len(works)]()
        if number % 36 == 0:
            gc.collect()  # connections that broke, and their errors
            assert done(lambda: [work() for work in works])
    ledger.close()
    with ledger.read() as connection:
        kept = {row.key for row in connection.exec_driver_sql("SELECT key FROM readings")}
    assert kept.issuperset(acknowledged)


@by_alarm
@pytest.mark.filterwarnings("ignore:Exception ignored in. <sqlite3.Connection:pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_of_a_flush_leaves_the_courier_its_connection(
    interrupt: Interrupter, handler: StripeMeterCallbackHandler
) -> None:
    for _ in range(600):
        interrupt(lambda: handler._is_pending(0), 2e-3)
    assert done(lambda: handler._ledger.set_note("some", "note"))


class Turning(Courier):
    """It knows which threads it turned in."""

    def turn(self) -> bool:
        self.threads = {*getattr(self, "threads", ()), threading.current_thread()}
        return super().turn()


@by_alarm
def test_an_interrupt_of_its_start_leaves_no_courier_that_turns_in_two_threads(
    interrupt: Interrupter, tmp_path: Path
) -> None:
    with StripeSandbox() as sandbox, closing(Ledger(f"sqlite:///{tmp_path}/l.db")) as ledger:
        for _ in range(200):
            with closing(Gateway(sandbox.api_key, api_base=sandbox.url)) as gateway:
                courier = Turning(ledger, gateway)
                interrupt(courier.wake, 1e-3)
                courier.wake()
                wait_until(lambda courier=courier: hasattr(courier, "threads"))
                courier.close(10)
                assert len(courier.threads) == 1


def test_a_block_changes_no_error_that_is_raised_in_it() -> None:
    with pytest.raises(StopIteration), inside():
        next(iter(()))
