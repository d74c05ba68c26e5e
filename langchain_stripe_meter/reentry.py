"""What garbage collection starts in the midst of our own code waits until that code is done.

A collection may begin at any allocation, also where this thread holds one of our locks or has a transaction open. If it
finds a stream that somebody left, LangChain reports that stream's end at once, on the same thread. Locks that may be
taken twice would not do: the same dictionary would change under its own loop, and a transaction begin inside another.
And LangGraph waits there for the nodes of that stream, whose ends may be waiting, on other threads, for what this one
holds. So Python begins no collection by itself while any thread is inside; where one was asked for, its events wait.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, suppress
from functools import partial, wraps
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import ref

from langchain_stripe_meter.errors import logger
from langchain_stripe_meter.forks import renew_after_fork

P = ParamSpec("P")
T = TypeVar("T")


class _Place(threading.local):
    """Whether this thread is inside our code, and what waits until it is not."""

    inside = False

    def __init__(self) -> None:
        self.waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()  # its put may interrupt itself, by contract


_place = _Place()

WORTH_A_THREAD = 10
"""How many times as much as Python collects after: to start a thread takes as long as to record a run."""


class _Collector:
    """Python's own, which begins nothing by itself while any of the ``busy`` threads is inside."""

    def __init__(self) -> None:
        self.busy: set[int] = set()
        self._is_paused = False  # by us: an application that wants no collections is not given any
        self._is_collecting = False
        renew_after_fork(self)

    def pause(self, thread: int) -> None:
        self.busy.add(thread)
        if gc.isenabled():
            self._is_paused = True  # first: an interrupt after the next line would leave it disabled for good
            gc.disable()

    def resume(self) -> None:
        """Collect again when nobody is inside. Where much was put off (a ledger was opened, or the threads take turns
        without end), it is done by a thread that nobody waits for: this one may be a node of the graph whose stream is
        found."""
        young, most = gc.get_count()[0], gc.get_threshold()[0]
        if self._is_paused and not (young > WORTH_A_THREAD * most > 0 and self._start()):
            self._enable()

    def _enable(self) -> None:
        if self._is_paused and not self.busy:
            self._is_paused = False  # no other thread comes in before the next line is done, since nothing is called
            gc.enable()

    def _start(self) -> bool:
        if not self._is_collecting:
            self._is_collecting = True
            try:
                threading.Thread(target=self._collect, name="stripe-meter-garbage", daemon=True).start()
            except BaseException as error:  # also Ctrl-C
                self._is_collecting = False
                if not isinstance(error, RuntimeError):
                    raise
                return False  # the interpreter is shutting down and starts no threads
        return True

    def _collect(self) -> None:
        gc.collect(1 if gc.get_count()[1] > gc.get_threshold()[1] else 0)
        self._is_collecting = False
        self._enable()

    def after_fork(self) -> None:
        """The threads that were inside are the parent's."""
        self.busy.clear()
        self._is_collecting = False
        self._enable()


_collector = _Collector()


def is_inside() -> bool:
    """Whether this thread was interrupted inside our code."""
    return _place.inside


def within(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function``; events that interrupt it wait until it has returned."""
    place = _place
    if place.inside:
        return function(*args, **kwargs)
    place.inside, thread = True, get_ident()
    try:
        _collector.pause(thread)
        return function(*args, **kwargs)
    finally:  # the first things done here can not be interrupted by Ctrl-C: nothing of Python's is called before them
        place.inside = False
        _collector.busy.discard(thread)
        _left(place)


def soon(event: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """As ``within``; but where this thread is inside our code already, ``event`` is what interrupted it, and waits."""
    place = _place
    if place.inside:
        place.waiting.put(partial(event, *args, **kwargs))
        return
    within(event, *args, **kwargs)


class _Exit(partial[bool]):
    """How a ``with`` statement leaves its block. Nobody but the statement holds the ``generator``, no traceback either:
    when the statement is over, however it came to that, the interpreter has closed it."""

    generator: Generator[Any, None, None]


class _Block(Generic[T]):
    """A ``with`` statement lets go of it as soon as it has asked it for both its methods."""

    def __init__(self, generator: Generator[T, None, None]) -> None:
        self._generator = generator

    @property
    def __enter__(self) -> Callable[[], T]:
        return self._generator.__next__

    @property
    def __exit__(self) -> Callable[..., bool]:  # noqa: PLE0302 - what it gives takes the other three
        leave = _Exit(_leave, ref(self._generator))
        leave.generator = self._generator
        return leave


def _leave(generator: Callable[[], Any], _kind: Any, error: BaseException | None, traceback: Any) -> bool:
    if generator() is None:  # garbage collection is closing all of it
        return False
    try:
        if error is None:
            next(generator(), None)
        else:
            generator().throw(error)
    except BaseException as raised:
        in_disguise = isinstance(error, StopIteration) and raised.__cause__ is error  # a generator may not raise it
        if error is None or (raised is not error and not in_disguise):
            raise
        error.__traceback__ = traceback  # without the generator's own lines
    return False


def block(function: Callable[P, Generator[T, None, None]]) -> Callable[P, AbstractContextManager[T]]:
    """As ``contextlib.contextmanager``, for what holds a lock or a mark; such a block suppresses no error.

    With contextlib, an exception that a signal's handler raises just as the block is entered or left (Ctrl-C, a task's
    time limit) leaves the generator where it is, for as long as anybody keeps the traceback, as a notebook does.
    """

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Block(function(*args, **kwargs))

    return make


@block
def inside() -> Generator[None, None, None]:
    """As ``within``, for a block."""
    if _place.inside:
        yield
        return
    _place.inside, thread = True, get_ident()
    try:
        _collector.pause(thread)
        yield
    finally:
        _place.inside = False
        _collector.busy.discard(thread)
        _left(_place)


def _left(place: _Place) -> None:
    if not place.waiting.empty():
        _carry_out(place.waiting)
    _collector.resume()


def _carry_out(waiting: SimpleQueue[Callable[[], None]]) -> None:
    """Do what waited; on a thread of its own where an event loop runs in this one, which must not block."""
    while not waiting.empty():
        _place.inside, thread = True, get_ident()
        try:
            _collector.pause(thread)
            if asyncio._get_running_loop() is None or not _start_thread(waiting):
                _do_all(waiting)
        finally:
            _place.inside = False
            _collector.busy.discard(thread)
            _collector.resume()
        if asyncio._get_running_loop() is not None:
            return


def _start_thread(waiting: SimpleQueue[Callable[[], None]]) -> bool:
    try:
        threading.Thread(target=soon, args=(_do_all, waiting), name="stripe-meter-late").start()
    except RuntimeError:  # the interpreter is shutting down and starts no threads: better to block than to lose
        return False
    return True


def _do_all(waiting: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        try:
            event = waiting.get_nowait()
        except Empty:
            return
        try:
            event()
        except Exception as error:  # noqa: BLE001 - whoever was interrupted must not hear of it
            logger.error("stripe-meter: a late event failed: %s", type(error).__name__)


class Bell:
    """As ``threading.Event``, but ringing it may interrupt its own waiting: that one's lock is a plain one."""

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()

    def is_set(self) -> bool:
        return not self._rings.empty()

    def set(self) -> None:
        if self._rings.empty():
            self._rings.put(None)

    def clear(self) -> None:
        with suppress(Empty):
            while True:
                self._rings.get_nowait()

    def wait(self, timeout: float) -> None:
        """Return when it rings or has rung, or when ``timeout`` seconds are up; one waits at a time."""
        with suppress(Empty):
            self._rings.get(timeout=max(timeout, 0))
            self._rings.put(None)
