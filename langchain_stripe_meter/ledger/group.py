"""Group commit: whoever finds the ledger free writes for all who wait, so that one fsync serves many runs."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.reentry import inside, within

T = TypeVar("T")

MOST = 500
"""Items after which a batch takes no more."""


class _Job(Generic[T]):
    """What one caller wants written, and what became of it."""

    __slots__ = ("done", "error", "items", "left", "on_failure", "waiter")

    def __init__(
        self,
        items: Sequence[T],
        waiter: asyncio.Future[None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.items = items
        self.waiter = waiter
        self.on_failure = on_failure
        self.left = False
        self.done = False
        self.error: Exception | None = None


class GroupCommit(Generic[T]):
    """Writes items in batches through ``write``, which returns when they are durable and changes nothing when repeated.

    A ``LedgerError`` from it concerns everybody in the batch; anything else only whoever brought the bad item.
    ``submit`` blocks its thread; ``asubmit`` waits without blocking its event loop, and its writing is done by one
    helper thread that is started when first needed and again after a fork.
    """

    def __init__(self, write: Callable[[Sequence[T]], None]) -> None:
        self._write = write
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """What waits belongs to the parent's threads, and the helper is gone."""
        self._jobs: deque[_Job[T]] = deque()
        self._leader = threading.Lock()
        self._telling = threading.Lock()
        self._ringing = threading.RLock()  # a signal's handler may close it amid a ring
        self._helper: threading.Thread | None = None
        self._bell: SimpleQueue[bool] = SimpleQueue()
        self._rung = False

    def submit(self, items: Sequence[T]) -> None:
        """Return when ``items`` are durable; raises what ``write`` raised for them."""
        within(self._submit, items)

    def _submit(self, items: Sequence[T]) -> None:
        if not self._jobs and not self._leader.locked():  # nobody else is here: nothing to group
            try:
                with self._leader:  # unlike an acquire(), this can not be interrupted after the lock is taken
                    self._write(items)
            except Exception:
                raise
            except BaseException:  # Ctrl-C, maybe while somebody else was faster
                self._jobs.append(_Job(items))
                self._wake_helper()
                raise
            return
        job = _Job(items)
        try:
            self._jobs.append(job)
            self._write_until(job)
        except BaseException:  # Ctrl-C reached whoever was waiting or writing: nobody's items must go with it
            self._wake_helper()
            raise
        if job.error is not None:
            raise job.error

    def _write_until(self, job: _Job[T]) -> None:
        while not job.done:
            written: Sequence[_Job[T]] = ()
            with self._leader:
                if not job.done:
                    written = self._write_batch()
            self._tell(written)

    async def asubmit(self, items: Sequence[T], on_failure: Callable[[Exception], None] | None = None) -> None:
        """As ``submit``, for a coroutine. One that is cancelled leaves its items to be written all the same; where
        that fails, ``on_failure`` is called instead of raising, on whichever thread finds out."""
        waiter = asyncio.get_running_loop().create_future()
        job = _Job(items, waiter, on_failure)
        try:
            self._jobs.append(job)
            within(self._wake_helper)
        except BaseException:  # as in _submit()
            job.left = True
            within(self._wake_helper)
            raise
        try:
            await waiter
        except (asyncio.CancelledError, GeneratorExit):  # the latter where the loop ended without cancelling its tasks
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # told below, and asyncio shall not complain that nobody asked
            job.left = True
            within(self._tell, [job])
            raise

    def _tell(self, jobs: Sequence[_Job[T]]) -> None:
        """Tell, once, of what failed while nobody waited for it. The caller holds no lock: it may come back to us."""
        for job in jobs:
            if job.error is None:
                continue
            with self._telling:
                tell = job.on_failure if job.left and job.done else None
                if tell is not None:
                    job.on_failure = None
            if tell is not None:
                tell(job.error)

    def _wake_helper(self) -> None:
        """Ring once; whoever comes before the helper has looked relies on the same ring."""
        if not self._rung and not self._ring():
            self._drain()

    def _ring(self) -> bool:
        """False where the interpreter is shutting down and starts no threads: better to block than to lose."""
        with self._ringing:
            if self._rung:
                return True
            self._rung, bell = True, self._bell
            try:
                if self._helper is None or not self._helper.is_alive():
                    self._helper = threading.Thread(
                        target=self._serve, args=(bell,), name="stripe-meter-ledger", daemon=True
                    )
                    self._helper.start()
                bell.put(True)
            except BaseException as error:  # also Ctrl-C: who comes next must not rely on this ring
                self._rung = False
                if not isinstance(error, RuntimeError):
                    raise
                return False
            return True

    def _serve(self, bell: SimpleQueue[bool]) -> None:
        goes_on = True
        while goes_on:
            goes_on = bell.get()
            self._rung = False  # before looking, so that a job that comes meanwhile rings again
            within(self._drain)

    def close(self) -> None:
        """Let the helper thread end; it starts anew when it is needed again."""
        with inside(), self._ringing:
            if self._helper is not None:
                self._helper = None
                self._rung = False  # whoever has rung is still heard: the helper looks once more before it ends
                self._bell.put(False)
                self._bell = SimpleQueue()

    def _drain(self) -> None:
        while self._jobs:
            with self._leader:
                written = self._write_batch()
            self._tell(written)

    def _write_batch(self) -> Sequence[_Job[T]]:
        jobs: list[_Job[T]] = []
        try:
            self._take(jobs)
            if jobs:
                self._write_all(jobs)
            self._report(jobs)
        except BaseException:  # they are written, and told, again
            self._jobs.extendleft(reversed(jobs))
            raise
        return jobs

    def _take(self, jobs: list[_Job[T]]) -> None:
        size = 0
        while self._jobs and size < MOST:
            jobs.append(self._jobs[0])  # first, so that no interrupt finds it nowhere
            self._jobs.popleft()
            size += len(jobs[-1].items)

    def _write_all(self, jobs: list[_Job[T]]) -> None:
        """Write for all; where one brought a bad item, for each alone, so that it fails nobody else."""
        try:
            self._write([item for job in jobs for item in job.items])
        except Exception as error:  # noqa: BLE001 - handed to the callers it concerns
            if len(jobs) == 1 or isinstance(error, LedgerError):  # each alone would only wait for the same again
                for job in jobs:
                    job.error = error
                return
            for job in jobs:
                self._write_all([job])

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
            except RuntimeError:  # the loop was closed meanwhile
                for job in theirs:
                    job.left = True


def _wake(jobs: list[_Job[T]]) -> None:
    for job in jobs:
        assert job.waiter is not None  # noqa: S101 - only jobs with a waiter come here
        if job.waiter.done():
            continue
        if job.error is None:
            job.waiter.set_result(None)
        else:
            job.waiter.set_exception(job.error)
