"""Threads of our own for what must not block an event loop: an application's tools may keep all of asyncio's busy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.reentry import within

P = ParamSpec("P")
T = TypeVar("T")

MOST = 32
"""Threads at once for what only waits for a database; they are started as they are needed."""


class _Task(Generic[T]):
    """A call that is made once: by a thread of the pool, unless whoever gave it to the pool took it back."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._call = call
        self._claims = [True]

    def claim(self) -> bool:
        """Whether it is the caller's now."""
        with suppress(IndexError):  # nothing divides a pop
            return self._claims.pop()
        return False

    def __call__(self) -> None:
        if not self.claim() or not self.future.set_running_or_notify_cancel():  # from here on, nobody cancels it
            return
        future, call = self.future, self._call
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - it is the waiter's
            future.set_exception(error)
            del self, future, call  # the error holds this frame, which must not hold it
        else:
            future.set_result(result)


class _Place(threading.local):
    """Whether this thread is at work for ``Workers``."""

    at_work = False


_place = _Place()


class Workers:
    """At most so many threads, and what is under way in them: maybe still when the event loop that asked has ended."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The threads, and what they do, are the parent's."""
        self._pool = ThreadPoolExecutor(self._most, self._name)
        self._futures: set[Future[Any]] = set()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call ``function`` in one of the threads, in the caller's context. Raises ``RuntimeError``, and does not call
        it, where the interpreter is shutting down and starts no threads."""
        task = _Task(partial(copy_context().run, function, *args, **kwargs))
        self._futures.add(task.future)
        task.future.add_done_callback(self._futures.discard)
        try:
            within(self._pool.submit, _work, [task])  # it takes a lock, at which no collection may begin
        except RuntimeError:  # the pool may keep it all the same
            if task.claim():
                self._futures.discard(task.future)
                raise
        return task.future

    def wait(self, seconds: float) -> None:
        """Return when all is done, at most after so many seconds; at once where that could be waiting for this."""
        if not _place.at_work:
            wait(list(self._futures), max(seconds, 0))


def _work(one: list[_Task[Any]]) -> None:
    """Do it, and let go of it: what it raises holds its frame, that holds this one, and this one the pool's."""
    _place.at_work = True
    try:
        one.pop()()
    finally:
        _place.at_work = False


_workers = Workers(MOST, "stripe-meter-worker")


async def in_worker(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` where it delays no event loop; for what waits for a database, and for nothing else of ours."""
    return await asyncio.wrap_future(_workers.submit(function, *args, **kwargs))


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``in_worker``, in a thread of its own: for what may take long, and wait for those."""
    return await asyncio.wrap_future(_start(partial(copy_context().run, function, *args, **kwargs)))


def _start(call: Callable[[], T]) -> Future[T]:
    task = _Task(call)
    threading.Thread(target=task, name="stripe-meter-waiting", daemon=True).start()
    return task.future
