"""Group commit: whoever finds the ledger free writes for all who wait, so that one fsync serves many runs."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class _Job(Generic[T]):
    """What one caller wants written, and what became of it."""

    __slots__ = ("done", "error", "items", "waiter")

    def __init__(self, items: Sequence[T], waiter: asyncio.Future[None] | None = None) -> None:
        self.items = items
        self.waiter = waiter
        self.done = False
        self.error: BaseException | None = None


class GroupCommit(Generic[T]):
    """Writes items in batches through ``write``, which returns when they are durable.

    ``submit`` blocks its thread; ``asubmit`` waits without blocking its event loop, and its writing is done by one
    helper thread that is started when first needed and again after a fork.
    """

    def __init__(self, write: Callable[[Sequence[T]], None], *, most: int = 500) -> None:
        self._write = write
        self._most = most
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._jobs: deque[_Job[T]] = deque()
        self._leader = threading.Lock()
        self._executor: Executor | None = None

    def submit(self, items: Sequence[T]) -> None:
        """Return when ``items`` are durable; raises what ``write`` raised for them."""
        if self._pid != os.getpid():
            self._reset()
        if not self._jobs and self._leader.acquire(blocking=False):  # nobody else is here: nothing to group
            try:
                self._write(items)
            finally:
                self._leader.release()
            return
        job = _Job(items)
        self._jobs.append(job)
        while not job.done:
            with self._leader:
                if not job.done:
                    self._write_batch()
        if job.error is not None:
            raise job.error

    async def asubmit(self, items: Sequence[T]) -> None:
        """As ``submit``, for a coroutine."""
        if self._pid != os.getpid():
            self._reset()
        job = _Job(items, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._wake_helper()
        assert job.waiter is not None  # noqa: S101 - made above
        await job.waiter

    def _wake_helper(self) -> None:
        try:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="stripe-meter-ledger")
            self._executor.submit(self._drain)
        except RuntimeError:  # the interpreter is shutting down and starts no threads: better to block than to lose
            self._drain()

    def _drain(self) -> None:
        while self._jobs:
            with self._leader:
                self._write_batch()

    def _write_batch(self) -> None:
        jobs: list[_Job[T]] = []
        size = 0
        while self._jobs and size < self._most:
            jobs.append(self._jobs.popleft())
            size += len(jobs[-1].items)
        if not jobs:
            return
        try:
            self._write([item for job in jobs for item in job.items])
        except BaseException as error:  # noqa: BLE001 - handed to the callers it concerns
            self._write_singly(jobs, error)
        self._report(jobs)

    def _write_singly(self, jobs: list[_Job[T]], error: BaseException) -> None:
        """A batch failed: one caller's bad row must not fail the others."""
        if len(jobs) == 1:
            jobs[0].error = error
            return
        for job in jobs:
            try:
                self._write(job.items)
            except BaseException as own_error:  # noqa: BLE001 - handed to its caller
                job.error = own_error

    @staticmethod
    def _report(jobs: list[_Job[T]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[_Job[T]]] = {}
        for job in jobs:
            job.done = True
            if job.waiter is not None:
                by_loop.setdefault(job.waiter.get_loop(), []).append(job)
        for loop, theirs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, theirs)
            except RuntimeError:  # the loop was closed meanwhile: what it waited for is durable all the same
                continue


def _wake(jobs: list[_Job[T]]) -> None:
    for job in jobs:
        assert job.waiter is not None  # noqa: S101 - only jobs with a waiter come here
        if job.waiter.done():
            continue
        if job.error is None:
            job.waiter.set_result(None)
        else:
            job.waiter.set_exception(job.error)
