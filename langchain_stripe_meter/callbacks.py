"""The LangChain side of the handler: starts are remembered, ends are recorded before the run goes on."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import LLMResult

from langchain_stripe_meter.core.customers import Facts, Skip
from langchain_stripe_meter.core.meters import Call
from langchain_stripe_meter.core.runs import OpenRuns, Run
from langchain_stripe_meter.core.tenants import Untold
from langchain_stripe_meter.counting import Decide, Ending, call_of
from langchain_stripe_meter.errors import UnidentifiedError, logger
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.observed import (
    Observed,
    as_running_total,
    facts_of,
    observe,
    observe_decision,
    piece_of,
    piece_of_event,
    received,
    requested_model,
    surrounding_run,
    surrounding_user,
)
from langchain_stripe_meter.recording import Recorder
from langchain_stripe_meter.reentry import is_inside, soon
from langchain_stripe_meter.workers import in_worker


class _DualEvent:
    """An event that is recorded durably before the run goes on, in sync and in async flows.

    LangChain looks the method up for each event, awaits it if it is a coroutine function, and with ``run_inline``
    calls it directly otherwise. So this gives a coroutine function where an event loop runs in this thread, which
    waits for the ledger without blocking the loop, and a plain one elsewhere. Everything else stays inline, which is
    why streamed tokens cost nothing. (A plain handler would hop through a thread for every token.)
    """

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self.__doc__ = decide.__doc__

    def __get__(self, handler: MeteringCallbacks | None, owner: type | None = None) -> Any:
        if handler is None:
            return self
        # The public function raises, which costs more than all the rest here. A thread that was interrupted inside our
        # code must not wait for a loop: the plain function postpones the event.
        if asyncio._get_running_loop() is None or is_inside():
            return partial(soon, handler._recorder.settle_inside, self._decide, handler)
        return partial(Recorder.asettle, handler._recorder, self._decide, handler)  # of a function, not of a method


class _Gate:
    """The start of a model call, which may refuse it.

    LangChain awaits coroutine functions in its asynchronous flow, and loses what they raise in its synchronous one. So
    whoever can await is given a coroutine function where the ledger must be asked, and everybody else a plain one.
    """

    def __init__(self, start: Callable[..., None]) -> None:
        self._start = start
        self.__doc__ = start.__doc__

    def __get__(self, handler: MeteringCallbacks | None, owner: type | None = None) -> Any:
        if handler is None:
            return self
        start = self._start.__get__(handler)
        if not handler._refuses:
            return start
        if handler._recorder.needs_lookup and sys._getframe(1).f_code.co_flags & inspect.CO_COROUTINE:

            async def astarted(*args: Any, **kwargs: Any) -> None:
                facts = handler.facts_at_start(kwargs.get("metadata"), kwargs.get("parent_run_id"))
                await in_worker(handler._check_payer, facts)
                start(*args, **kwargs)

            return astarted

        def started(*args: Any, **kwargs: Any) -> None:
            handler._check_payer(handler.facts_at_start(kwargs.get("metadata"), kwargs.get("parent_run_id")))
            start(*args, **kwargs)

        return started


@dataclass(eq=False)
class _Batch:
    """Prompts that a text completion model sends in one request. LangChain tells the usage of all with the first end,
    and an empty report with the others."""

    params: Any
    facts: list[Facts] = field(default_factory=list)
    reported: bool = False

    def share(self, observed: Observed) -> Observed:
        """What one prompt comes to: the first stands for all, unless somebody else might pay for another of them."""
        if observed.usage is not None and not observed.partial:
            self.reported = all(facts == self.facts[0] for facts in self.facts)
            return observed if self.reported else replace(observed, usage=None)
        return replace(observed, output=()) if self.reported else observed


@dataclass(slots=True)
class _Completion(Run):
    """A call of a text completion model that belongs to a batch."""

    batch: _Batch | None = field(default=None, repr=False)


class MeteringCallbacks(BaseCallbackHandler):
    """Follows runs and hands what ended to the recorder. Starts touch only memory; no event ever raises, but for a call
    that is refused."""

    run_inline = True
    ignore_custom_event = True
    ignore_retry = True
    _refuses = False
    """Whether a model call that names nobody who pays is refused."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.after_fork()
        renew_after_fork(self)
        self._batches: weakref.WeakValueDictionary[int, _Batch] = weakref.WeakValueDictionary()

    def after_fork(self) -> None:
        """The runs that are open belong to the parent."""
        self._lock = threading.Lock()
        self._runs = OpenRuns()

    # -- starts: only memory is touched

    @_Gate
    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A model call begins: remember who, when, which model, which parent."""
        self._start_call(run_id, parent_run_id, messages[0] if messages else None, metadata, kwargs)

    @_Gate
    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``on_chat_model_start``, for text completion models."""
        self._start_call(run_id, parent_run_id, prompts[0] if prompts else None, metadata, kwargs)

    def _start_call(
        self, run_id: UUID, parent: UUID | None, prompt: Any, metadata: dict[str, Any] | None, kwargs: dict[str, Any]
    ) -> None:
        now = self._recorder.ledger.now()
        facts = facts_of(metadata, now)
        params = kwargs.get("invocation_params") or {}
        of_batch = kwargs.get("batch_size", 1) > 1 and isinstance(prompt, str) and params
        run = (_Completion if of_batch else Run)(
            run_id,
            now,
            is_call=True,
            facts=facts,
            model=requested_model(facts, params),
            provider=facts.metadata.get("ls_provider"),
            prompt=prompt,
            tools=params.get("tools"),
        )
        runs = self._runs  # needs no lock for a start
        started = runs.start(run, parent, surrounding_run() if parent is None else None)
        if started and isinstance(run, _Completion):
            soon(self._join_batch, run, params)
        if runs.is_sweep_due:
            soon(self._let_go_of_abandoned, now)

    def _join_batch(self, run: _Completion, params: Any) -> None:
        with self._lock:
            # One request has one object of parameters; the batch keeps it, so that its id stays its own.
            run.batch = self._batches.setdefault(id(params), _Batch(params))
            run.batch.facts.append(run.facts)

    def _let_go_of_abandoned(self, now: int) -> None:
        with self._lock:
            if self._runs.is_sweep_due:  # else another thread was faster
                self._runs.sweep(now)

    def on_chain_start(
        self, serialized: Any, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A step begins that model calls may belong to. (Tools give their input twice, the second time by name.)

        A decision model, too, reports itself as a step, but as one of the type "llm".
        """
        if kwargs.get("run_type") == "llm":
            self._start_call(run_id, parent_run_id, args[0] if args else None, kwargs.get("metadata"), {})
            return
        run, around = Run(run_id, self._recorder.ledger.now(), user=surrounding_user()), None
        if parent_run_id is None:
            run.facts, around = Facts(kwargs.get("metadata") or {}), surrounding_run()
        self._runs.start(run, parent_run_id, around)
        if self._runs.is_sweep_due:
            soon(self._let_go_of_abandoned, run.started)

    on_tool_start = on_chain_start
    on_retriever_start = on_chain_start

    def on_llm_new_token(self, token: Any, *, run_id: UUID, chunk: Any = None, **kwargs: Any) -> None:
        """A streamed piece arrived; kept only in case the end is never told (a cancelled ``ainvoke``)."""
        message = getattr(chunk, "message", None)
        self._runs.receive(run_id, piece_of(token, message), getattr(message, "usage_metadata", None))

    def on_stream_event(self, event: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """As ``on_llm_new_token``, for models that stream without it, in newer LangChains."""
        self._runs.hear_event(run_id, event.get("event", ""), piece_of_event(event))

    # -- ends: recorded before the run goes on

    def _call_ended(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> Sequence[Ending]:
        """A model call succeeded: what it consumed is recorded before the run returns."""
        return self._end(run_id, observe(response, run_id), answers=True)

    def _call_failed(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> Sequence[Ending]:
        """A model call failed: what it had consumed by then is recorded; nothing, if it had produced nothing.

        A stream that its reader left (GeneratorExit) has answered; any other failure has not.
        """
        observed = observe(kwargs.get("response"), partial=True)
        return self._end(run_id, observed, answers=isinstance(error, GeneratorExit), error=error)

    def _step_ended(self, *outputs: Any, run_id: UUID, **kwargs: Any) -> Sequence[Ending]:
        """A step ended: if it was the user's message, that is recorded before the run returns. (What the caller of a
        tool gives beside its input comes along, under whatever name.) A decision is paid for, and answers nothing."""
        decided = observe_decision(outputs[0]) if outputs and self._runs.is_call(run_id) else None
        return self._end(run_id, decided, answers=False)

    def _step_failed(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> Sequence[Ending]:
        """A step failed. A message that failed was not answered; one that waits for a person is not answered yet. One
        that was cancelled, by whoever may have read enough, is told as skipped."""
        left = isinstance(error, GeneratorExit)
        with self._lock:
            if _is_interrupt(error):
                self._runs.interrupt(run_id)
            elif not left:
                self._runs.fail(run_id)
        return self._end(run_id, None, answers=left, error=error)

    on_llm_end = _DualEvent(_call_ended)
    on_llm_error = _DualEvent(_call_failed)
    on_chain_end = _DualEvent(_step_ended)
    on_chain_error = _DualEvent(_step_failed)
    on_tool_end = on_chain_end
    on_tool_error = on_chain_error
    on_retriever_end = on_chain_end
    on_retriever_error = on_chain_error

    def _end(
        self, run_id: UUID, observed: Observed | None, *, answers: bool, error: BaseException | None = None
    ) -> Sequence[Ending]:
        now = self._recorder.ledger.now()
        counts = self._recorder.counts_messages
        cancelled = error is not None and isinstance(error, asyncio.CancelledError)
        call = message = None
        with self._lock:
            run = self._runs.end(run_id, now)
            if run is None:
                return ()
            if observed is not None:
                observed, call = self._observed(run, observed, answers=answers and counts, cancelled=cancelled)
            elif run.top is run and error is not None and not _is_interrupt(error):
                self._runs.cut(run, now)
            endings = self._take_lost(run, answers=answers and counts) if self._runs.lost else []
            if counts:
                message = self._runs.take_unanswered(run) if cancelled else self._runs.take_message(run)
        if message is not None or call is not None:
            endings.append(Ending(run, observed, call, message, run.was_lost, cancelled))
        return endings

    def _observed(
        self, run: Run, observed: Observed, *, answers: bool, cancelled: bool
    ) -> tuple[Observed, Call | None]:
        """The end of a call in the light of what was told before it, and the call, if there is anything to bill."""
        if observed.partial or observed.cached or isinstance(run, _Completion):
            observed = _as_told(run, observed)
        if run.running_total is not None:
            observed = as_running_total(observed, run.told, run.running_total)
        empty, call = observed.is_empty, call_of(run, observed)
        if answers and not (empty and observed.partial):
            self._runs.answered(run, call)
        if empty:
            return observed, None
        if cancelled:
            run.top.begun = (call, run.facts)
        return observed, call

    def _take_lost(self, top: Run | None = None, *, answers: bool = False) -> list[Ending]:
        """Abandoned calls, as far as they are known; ``top`` is their message, which they answered or had begun to."""
        endings = [_lost_ending(run) for run in self._runs.take_lost()]
        for lost in endings:
            if lost.run.top is top and top is not None and lost.call is not None:
                top.begun = (lost.call, lost.run.facts)
                if answers:
                    self._runs.answered(lost.run, lost.call)
        return endings

    def _sweep(self) -> Sequence[Ending]:
        """Calls that ended without saying so, as far as that is known by now."""
        with self._lock:
            self._runs.sweep(self._recorder.ledger.now())
            return self._take_lost()

    def _cut_all(self) -> Sequence[Ending]:
        """What calls that are open have received by now; the rest is recorded when they end, if anybody is there."""
        with self._lock:
            self._runs.cut_all(self._recorder.ledger.now())
            return self._take_lost()

    # -- refusals, before a model is called

    @property
    def raise_error(self) -> bool:  # type: ignore[override]
        """LangChain asks this while it handles what an event raised.

        Only a refusal goes on into the chain, nothing else ever.
        """
        return isinstance(sys.exception(), UnidentifiedError)

    def facts_at_start(self, metadata: Mapping[str, Any] | None, parent_run_id: UUID | None = None) -> Facts:
        """Who could pay for a call that starts here and now, as it will be recorded; ``parent_run_id`` is as LangChain
        tells it of the call, if it does."""
        facts = facts_of(metadata, self._recorder.ledger.now())
        return self._runs.facts_at(parent_run_id, facts, surrounding_run() if parent_run_id is None else None)

    def _check_payer(self, facts: Facts) -> None:
        try:
            _, who = self._recorder.payer(facts)
        except Exception as error:  # noqa: BLE001 - not to know is no reason to break the chain
            logger.error("stripe-meter: who pays could not be looked up: %s", type(error).__name__)
            return
        if isinstance(who, Skip) and not isinstance(who, Untold):
            raise UnidentifiedError(
                f"Nobody pays for this run: {who.reason}. It was refused before the model was called, as "
                "on_unidentified='raise' says."
            )


def _is_interrupt(error: BaseException) -> bool:
    """Whether a graph waits for a person."""
    return type(error).__name__ in ("GraphInterrupt", "GraphBubbleUp", "NodeInterrupt")


def _as_told(run: Run, observed: Observed) -> Observed:
    """The end of a call in the light of what was told before it."""
    if observed.partial and observed.is_empty and run.produced:  # an error may leave out what came
        return received(run.running_total or run.reported, run.pieces)
    if observed.cached and run.produced:  # what is found in a cache does not come in pieces
        return replace(observed, cached=False)
    batch = run.batch if isinstance(run, _Completion) else None
    return observed if batch is None else batch.share(observed)


def _lost_ending(run: Run) -> Ending:
    """An abandoned call, as far as it is known: what was received of its answer."""
    observed = received(run.running_total or run.reported, run.pieces)
    return Ending(run, observed, call_of(run, observed))
