"""Threads of our own for what an event loop must not wait for: asyncio's may all be busy with its tools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from langchain_stripe_meter.forks import renew_after_fork

P = ParamSpec("P")
T = TypeVar("T")

MOST = 32
"""Threads at once; they are started as they are needed, and mostly wait for a database."""


class _Workers:
    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The threads are the parent's."""
        self.pool = ThreadPoolExecutor(MOST, "stripe-meter-worker")


_workers = _Workers()


def submit(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call ``function`` in one of our threads, in the caller's context. Raises ``RuntimeError``, and does not call it,
    where the interpreter is shutting down and starts no threads."""
    threading.Thread(
        target=bool, name="stripe-meter-probe", daemon=True
    ).start()  # else the pool keeps what it was given
    return _workers.pool.submit(copy_context().run, partial(function, *args, **kwargs))


async def in_worker(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``submit``, for a coroutine to wait for."""
    return await asyncio.wrap_future(submit(function, *args, **kwargs))


class Elsewhere:
    """What is under way in our threads, and may still be when the event loop that asked for it has ended."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """It is the parent's."""
        self._futures: set[Future[Any]] = set()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As the function of that name."""
        future = submit(function, *args, **kwargs)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def wait(self, seconds: float) -> None:
        """Return when it is done; at most after so many seconds."""
        wait(list(self._futures), max(seconds, 0))
