"""Open runs: which belongs to which, which of them is the user's message, which never said that they ended.

A *message* is the topmost run that we can see. It counts once, when it ends, if a model call inside it succeeded and
no interrupt left it waiting; the call that succeeded last is the one that answered. Who pays is as that call says, but
what the metadata of the topmost run says comes first.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.meters import Call

ABANDONED_AFTER = 3600
"""Seconds after which an open call is taken to have ended without saying so."""
STEP_ABANDONED_AFTER = 86400
"""The same for a step, counted from the last start or end inside it: a tool may work for hours, or ask a person. And
how long an abandoned call may still say that it ended."""
ORPHANED_AFTER = 900
"""The same for a run whose message has ended, counted from that end, or from what happened in the run since: it may
still report (abandoned streams, background tasks), and the providers' clients wait ten minutes for an answer. And how
long what begins in a step that has ended belongs to its message."""
SWEEP_EVERY = 256
"""Runs started between two looks for abandoned ones, so that they never accumulate."""
REMEMBERED = 4096
"""The most abandoned calls whose end is waited for, and the most steps that are known after their end, so that they
never accumulate."""

RUNNING = 3
"""Reports of one stream, each with a prompt and none smaller than the one before, that are no parts of a sum: nobody
sends a prompt three times. (Two may be: what a provider's own tools added to the prompt. But not of the very same one.)
"""

_START, _DELTA = "content-block-start", "content-block-delta"
_LIVE = frozenset({(_DELTA, _DELTA), (_DELTA, _START), (_START, _START)})
"""Events that follow each other in no answer from a cache: there, each block comes in one piece, and is finished before
the next begins."""

_NO_FACTS = Facts()


@dataclass(slots=True)
class Run:
    """One open run. ``message`` is the run around it that stands for the user's message; None if it does so itself.
    ``user`` is whom an agent server authenticated where a step began. ``interrupted`` marks a message that is not
    answered for now, and ``waits_in`` the run in which it waits or failed. ``late`` marks a call of a message that was
    cancelled: it counts as abandoned, unless its end is told after all; ``was_lost`` one that was handed over before it
    said so. ``billed`` is what a call was recorded as, in the readings ``billed_as``; ``begun`` of a message what a
    cancelled call had begun to answer. Of the reports of usage in a stream, ``reported`` is the first, ``latest`` the
    last, ``told`` the sum of their inputs, and ``repeats`` how many there were while each said what it came to so far.
    ``inside`` are the ids of the open runs that belong to a message. ``told_as_events`` are pieces of an answer that
    came as events, block by block: beside those ``received``, instead of them, or of an answer from a cache;
    ``is_live`` says that it cannot be one from a cache, and ``last_event`` is the last of those events.
    """

    id: Hashable
    started: int
    is_call: bool = False
    facts: Facts = field(default=_NO_FACTS, repr=False)
    model: str | None = None
    provider: str | None = None
    prompt: Any = field(default=None, repr=False)
    tools: Any = field(default=None, repr=False)
    answer: tuple[Call, Facts] | None = field(default=None, repr=False)
    begun: tuple[Call, Facts] | None = field(default=None, repr=False)
    received: list[str] = field(default_factory=list, repr=False)
    told_as_events: list[str] = field(default_factory=list, repr=False)
    last_event: str = ""
    is_live: bool = False
    reported: Any = field(default=None, repr=False)
    latest: Any = field(default=None, repr=False)
    repeats: int = 0
    told: int = 0
    interrupted: bool = False
    waits_in: Hashable = None
    taken: bool = False
    late: bool = False
    was_lost: bool = False
    billed: Call | None = field(default=None, repr=False)
    billed_as: Sequence[Any] = field(default=(), repr=False)
    ended: int | None = None
    parent: Run | None = field(default=None, repr=False)
    user: Any = field(default=None, repr=False)
    message: Run | None = field(default=None, repr=False)
    active: int = field(default=0, repr=False)
    inside: set[Hashable] = field(default_factory=set, repr=False)

    @property
    def top(self) -> Run:
        """The run that stands for the user's message, maybe this one. (Stored, a reference to itself would leave every
        run, and the prompt that it holds, to the garbage collector.)"""
        return self.message or self

    @property
    def produced(self) -> bool:
        """Whether there is anything to bill, should its end never be told."""
        return bool(self.pieces) or self.reported is not None

    @property
    def pieces(self) -> Sequence[str]:
        """What came of the answer, in whichever way it was told."""
        return self.told_as_events if self.is_live and not self.received else self.received

    @property
    def running_total(self) -> Any:
        """The last report of a stream in which each told the whole prompt, and all that had come by then."""
        if self.repeats < RUNNING - 1:
            return None
        is_same = self.told == self.repeats * _sums(self.latest)[0]
        return self.latest if is_same or self.repeats >= RUNNING else None

    @property
    def nearest_user(self) -> Any:
        """Whom an agent server authenticated where this step, or the nearest one around it that knows, began."""
        run: Run | None = self
        while run is not None and run.user is None:
            run = run.parent
        return None if run is None else run.user

    def facts_inside(self, facts: Facts) -> Facts:
        """Those of a call that starts inside this run: it is believed as of the start of its message, and if it lost
        its authenticated user, it has that of the nearest step around it.

        LangGraph drops the user from the configurable of a graph that is called, inside a graph, with a thread of its
        own.
        """
        user = facts.auth_user if facts.auth_user is not None else self.nearest_user
        on_server = facts.on_server or user is not facts.auth_user
        return replace(facts, auth_user=user, on_server=on_server, now=self.top.started)

    def touch(self, now: int) -> None:
        """Something happened in this run: it and those around it are alive."""
        run: Run | None = self
        while run is not None:
            run.active = max(run.active, now)
            run = run.parent


class OpenRuns:
    """The runs that have started and not yet ended. The caller holds a lock, but for a start, ``facts_at``,
    ``is_call`` and ``receive``, and for ``len``: those look up and put in one run at a time, which nothing divides.
    So whoever looks at all runs looks at a list of them, and a run that ends is known as past before it is no more
    open."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, Run] = {}
        self._let_go: dict[Hashable, Run] = {}
        self._past: dict[Hashable, Run] = {}
        self._starts = 0  # since the last sweep
        self.lost: list[Run] = []
        """Abandoned calls that had produced something: they are still to be billed."""
        self.abandoned = 0

    def __len__(self) -> int:
        return sum(not run.late for run in self._all())

    def __contains__(self, run_id: Hashable) -> bool:
        return run_id in self._runs

    def is_call(self, run_id: Hashable) -> bool:
        """Whether this open run is a model call."""
        run = self._runs.get(run_id)
        return run is not None and run.is_call

    def _all(self) -> list[Run]:
        return list(self._runs.values())

    def start(self, run: Run, parent_id: Hashable = None, around: Hashable = None) -> bool:
        """Open ``run`` under its parent, if that is open, else under the one ``around`` it; False if it was open.

        LangChain reports some nested runs as roots (top-level fallbacks, explicit callbacks inside a run).
        """
        parent = self._enclosing(parent_id, around, run.started)
        run.active = run.started
        if self._runs.setdefault(run.id, run) is not run:
            return False
        if parent is not None:
            run.parent, run.message = parent, parent.top
            run.message.inside.add(run.id)
            if run.is_call:
                run.facts = parent.facts_inside(run.facts)
            parent.touch(run.started)
        self._starts += 1
        return True

    @property
    def is_sweep_due(self) -> bool:
        """Whether enough have started since the last ``sweep``."""
        return self._starts >= SWEEP_EVERY

    def facts_at(self, parent_id: Hashable, facts: Facts, around: Hashable = None) -> Facts:
        """As a call that starts under the same would have them. It needs no lock."""
        parent = self._enclosing(parent_id, around, facts.now or 0)
        return facts if parent is None else parent.facts_inside(facts)

    def _enclosing(self, parent_id: Hashable, around: Hashable, now: int) -> Run | None:
        """The run in which one starts: maybe a step that ended a while ago, and left a task in the background."""
        run = self._runs.get(parent_id) or self._runs.get(around) or self._past.get(parent_id)
        return None if run is None or now - (run.ended or now) >= ORPHANED_AFTER else run

    def end(self, run_id: Hashable, now: int) -> Run | None:
        """Close a run; None if it is not open: never seen, or ended already (the first end wins).

        A call that was abandoned, and billed as an estimate if it had produced anything, may say so all the same, once:
        in a thread it goes on when its message is cancelled. What it came to beyond that is known then.
        """
        run = self._runs.get(run_id)
        if run is None:
            run = self._let_go.pop(run_id, None)
            self.abandoned -= run is not None
            return run
        run.ended = now
        if not run.is_call:
            _remember(self._past, run)
        self._close(run)
        self.abandoned -= run.late
        if run.parent is not None:
            run.parent.touch(now)
        return run

    def receive(self, run_id: Hashable, text: str, report: Any = None) -> None:
        """A piece of a streamed answer arrived, maybe with a ``report`` of usage, of which the first that says
        anything is kept: all that will be known of it, should its end never be told."""
        run = self._runs.get(run_id)
        if run is None:
            return
        if text:
            run.received.append(text)
        if report and (report.get("input_tokens") or report.get("output_tokens")):
            _hear(run, report)

    def hear_event(self, run_id: Hashable, event: str, text: str) -> None:
        """As ``receive``, for an answer that is told as events, maybe with a piece of it."""
        run = self._runs.get(run_id)
        if run is None:
            return
        run.is_live |= (run.last_event, event) in _LIVE
        run.last_event = event
        if text:
            run.told_as_events.append(text)

    def answered(self, run: Run, call: Call) -> None:
        """``run`` is a model call that succeeded: for now, it is what answers its message.

        Where the graph that waited for a person has ended, and the message has not, the application handled that.
        """
        top = run.top
        top.answer = (call, run.facts)
        if top.interrupted and top.ended is None and top.waits_in not in self._runs:
            top.interrupted = False

    def interrupt(self, run_id: Hashable) -> None:
        """A person must decide before the message goes on: it is answered when the resumed run ends."""
        run = self._runs.get(run_id)
        if run is not None:
            run.top.interrupted, run.top.waits_in = True, (run.parent or run).id

    def fail(self, run_id: Hashable) -> None:
        """A step failed; if it stood for the message, the message was not answered."""
        run = self._runs.get(run_id)
        if run is not None and run.top is run:
            run.interrupted, run.waits_in = True, run_id

    def take_message(self, run: Run) -> tuple[Call, Facts] | None:
        """The answer of the message that ``run`` belongs to, once: when the message has ended."""
        top = run.top
        if top.ended is None or top.interrupted or top.answer is None or top.taken:
            return None
        answer, top.answer, top.taken = top.answer, None, True
        return _of_message(top, answer)

    def take_unanswered(self, top: Run) -> tuple[Call, Facts] | None:
        """What had answered a message that was cancelled, or had begun to, once."""
        begun, top.answer, top.begun = top.answer or top.begun, None, None
        if begun is None or top.message is not None or top.taken:
            return None
        top.taken = True
        return _of_message(top, begun)

    def cut(self, top: Run, now: int) -> None:
        """A message failed or was cancelled: of the model calls that its tasks had under way, LangChain may not tell.

        What they had received is known by now. The others are waited for a while: what runs in threads goes on.
        """
        open_now = (self._runs.get(one) for one in (top.id, *list(top.inside)))
        theirs = [run for run in open_now if run is not None and run.top is top]
        self._abandon([run for run in theirs if run.produced], now)
        for run in theirs:
            if run.is_call and not run.produced and not run.late:
                run.late = True
                self.abandoned += 1

    def cut_all(self, now: int) -> None:
        """Nobody will be there to hear of an end: close every call that has received anything."""
        self._abandon([run for run in self._all() if run.produced], now)

    def sweep(self, now: int) -> None:
        """Close the runs that ended without saying so."""
        self._starts = 0
        self._abandon([run for run in self._all() if _is_abandoned(run, now)], now)
        for run in [run for run in self._let_go.values() if now - (run.ended or 0) >= STEP_ABANDONED_AFTER]:
            del self._let_go[run.id]

    def _abandon(self, gone: list[Run], now: int) -> None:
        for run in gone:
            run.ended = now
            self.abandoned += run.is_call and not run.late
            if run.produced:
                run.was_lost = True
                self.lost.append(run)
            _remember(self._let_go if run.is_call else self._past, run)
            self._close(run)

    def _close(self, run: Run) -> None:
        del self._runs[run.id]
        if run.message is not None:
            run.message.inside.discard(run.id)

    def take_lost(self) -> list[Run]:
        """What was ``lost``, each once."""
        lost, self.lost = self.lost, []
        return lost


def _hear(run: Run, report: Mapping[str, Any]) -> None:
    """Some gateways report with each piece what the call came to so far, which LangChain takes for parts of a sum."""
    (sent, came), before = _sums(report), _sums(run.latest or {})
    repeats = run.repeats >= 0 and sent > 0 and sent >= before[0] and came >= before[1]
    run.repeats = run.repeats + 1 if repeats else -1
    run.told += sent
    run.latest = report
    run.reported = run.reported or report


def _sums(report: Mapping[str, Any]) -> tuple[int, int]:
    return report.get("input_tokens") or 0, report.get("output_tokens") or 0


def _is_abandoned(run: Run, now: int) -> bool:
    if now - run.active >= (ABANDONED_AFTER if run.is_call else STEP_ABANDONED_AFTER):
        return True
    return run.top.ended is not None and now - max(run.top.ended, run.active) >= ORPHANED_AFTER


def _of_message(top: Run, answer: tuple[Call, Facts]) -> tuple[Call, Facts]:
    """The call that answered, and who could pay for the message: an application may have another pay for that call.

    On a server, metadata may be the client's, and what the call knows stands.
    """
    call, facts = answer
    said = {key: value for key, value in top.facts.metadata.items() if value is not None and value != ""}
    return answer if facts.on_server else (call, replace(facts, metadata=merged(facts.metadata, said)))


def _remember(some: dict[Hashable, Run], run: Run) -> None:
    some[run.id] = run
    if len(some) > REMEMBERED:
        del some[next(iter(some))]


def merged(surrounding: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A run's metadata over that of the run around it, which LangChain loses under explicit callbacks."""
    if not surrounding:
        return own or {}
    return {**surrounding, **own} if own else surrounding
