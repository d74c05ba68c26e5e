"""Open runs: what belongs to which message, and what becomes of runs that never end."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.meters import Call
from langchain_stripe_meter.core.runs import (
    ABANDONED_AFTER,
    ORPHANED_AFTER,
    REMEMBERED,
    STEP_ABANDONED_AFTER,
    SWEEP_EVERY,
    OpenRuns,
    Run,
    merged,
)

NOW = 1_780_000_000
ANSWER = Call(None, "gpt-4o")


@pytest.fixture
def runs() -> OpenRuns:
    return OpenRuns()


@pytest.fixture
def lively() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def start(runs: OpenRuns, name: str, *parents: str | None, call: bool = False, at: int = NOW) -> Run:
    run = Run(name, at, is_call=call, facts=Facts({"who": name}) if call else Facts())
    assert runs.start(run, *parents)
    return run


def end(runs: OpenRuns, run: Run, *, answer: Call | None = None, at: int = NOW) -> tuple[Call, Facts] | None:
    """End a run as the handler does; the message's answer if this was the moment to bill it."""
    if runs.end(run.id, at) is None:
        return None
    if answer is not None:
        runs.answered(run, answer)
    return runs.take_message(run)


def test_a_run_that_ended_lets_its_prompt_go_without_waiting_for_the_garbage_collector() -> None:
    class Prompt:
        pass

    runs, prompts = OpenRuns(), [Prompt(), Prompt()]
    references = [weakref.ref(prompt) for prompt in prompts]
    gc.disable()
    try:
        runs.start(Run("root", NOW, is_call=True, prompt=prompts.pop()))
        runs.start(Run("child", NOW, is_call=True, prompt=prompts.pop()), "root")
        runs.end("child", NOW)
        runs.end("root", NOW)
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_a_call_by_itself_is_its_own_message(runs: OpenRuns) -> None:
    call = start(runs, "call", call=True)
    assert call.top is call
    assert end(runs, call, answer=ANSWER) == (ANSWER, call.facts)
    assert len(runs) == 0


def test_a_message_counts_once_when_its_topmost_run_ends(runs: OpenRuns) -> None:
    root = start(runs, "root")
    node = start(runs, "node", "root")
    for n in range(3):
        assert end(runs, start(runs, f"call {n}", "node", call=True), answer=Call(None, f"m{n}")) is None
    assert end(runs, node) is None
    message = end(runs, root)
    assert message is not None
    assert message[0].model == "m2"  # the call that succeeded last is the one that answered
    assert message[1].metadata == {"who": "call 2"}


@pytest.mark.parametrize("taken", [OpenRuns.take_message, OpenRuns.take_unanswered])
@pytest.mark.parametrize("on_server", [False, True], ids=["own process", "server"])
def test_what_the_topmost_run_says_of_its_message_comes_first_unless_a_client_may_have_said_it(
    runs: OpenRuns, on_server: bool, taken: Callable[[OpenRuns, Run], Any]
) -> None:
    root = Run("root", NOW, facts=Facts({"who": "root", "also": None, "too": ""}))
    assert runs.start(root)
    call = Run("call", NOW, is_call=True, facts=Facts({"who": "call", "also": 1, "too": 2}, on_server=on_server))
    assert runs.start(call, "root")
    assert runs.end("call", NOW) is call
    runs.answered(call, ANSWER)
    assert runs.end("root", NOW) is root
    answer, facts = taken(runs, root)
    assert (answer, facts.on_server) == (ANSWER, on_server)
    assert facts.metadata == {"who": "call" if on_server else "root", "also": 1, "too": 2}


def test_a_second_start_of_the_same_run_changes_nothing(runs: OpenRuns) -> None:
    root = start(runs, "root")
    call = start(runs, "call", "root", call=True)
    assert not runs.start(Run("call", NOW + 5))
    assert runs.end("call", NOW) is call
    assert call.top is root


def test_the_first_end_of_a_run_wins(runs: OpenRuns) -> None:
    call = start(runs, "call", call=True)
    assert end(runs, call, answer=ANSWER) is not None
    assert runs.end("call", NOW + 9) is None
    assert call.ended == NOW
    assert runs.end("never seen", NOW) is None


def test_a_run_that_langchain_reports_as_a_root_is_adopted_by_the_run_around_it(runs: OpenRuns) -> None:
    root = start(runs, "fallbacks")
    first = start(runs, "first", None, "fallbacks", call=True)
    assert end(runs, first) is None  # it failed
    second = start(runs, "second", None, "fallbacks", call=True)
    assert second.top is root
    assert end(runs, second, answer=ANSWER) is None
    assert end(runs, root) == (ANSWER, second.facts)


def test_the_told_parent_comes_before_the_surrounding_run(runs: OpenRuns) -> None:
    start(runs, "around")
    parent = start(runs, "parent")
    assert start(runs, "child", "parent", "around").top is parent
    assert start(runs, "other", "unseen", "unseen too").top.id == "other"


def test_a_message_without_an_answer_is_not_counted(runs: OpenRuns) -> None:
    root = start(runs, "root")
    assert end(runs, start(runs, "call", "root", call=True)) is None
    assert end(runs, root) is None


def test_an_interrupted_message_is_not_counted_until_the_resumed_run_ends(runs: OpenRuns) -> None:
    root = start(runs, "root")
    node = start(runs, "node", "root")
    end(runs, start(runs, "call", "node", call=True), answer=ANSWER)
    runs.interrupt("node")
    assert end(runs, node) is None
    assert end(runs, root) is None
    resumed = start(runs, "resumed")
    end(runs, start(runs, "call again", "resumed", call=True), answer=ANSWER)
    assert end(runs, resumed) is not None


def graph_that_waits(runs: OpenRuns) -> Run:
    """A graph under the message's root, of which one node waits for a person."""
    graph = start(runs, "graph", "root")
    node = start(runs, "node", "graph")
    runs.interrupt("node")
    end(runs, node)
    return graph


def test_an_interrupt_inside_that_the_application_handled_does_not_make_its_answer_free(runs: OpenRuns) -> None:
    root = start(runs, "root")
    end(runs, graph_that_waits(runs))
    end(runs, start(runs, "call", "root", call=True), answer=ANSWER)
    assert end(runs, root) is not None


def test_a_call_that_answers_beside_a_node_that_waits_does_not_answer_the_message(runs: OpenRuns) -> None:
    root = start(runs, "root")
    graph = graph_that_waits(runs)
    end(runs, start(runs, "beside", "graph", call=True), answer=ANSWER)
    end(runs, graph)
    assert end(runs, root) is None


def test_a_call_that_answers_after_its_message_has_ended_waiting_does_not_answer_it(runs: OpenRuns) -> None:
    root = start(runs, "root")
    late = start(runs, "late", "root", call=True)
    end(runs, graph_that_waits(runs))
    end(runs, root)
    assert end(runs, late, answer=ANSWER) is None


def test_a_message_that_failed_is_not_counted_even_if_a_call_answers_late(runs: OpenRuns) -> None:
    root = start(runs, "root")
    early = start(runs, "early", "root", call=True)
    late = start(runs, "late", "root", call=True)
    end(runs, early, answer=ANSWER)
    runs.fail("root")
    assert end(runs, root) is None
    assert end(runs, late, answer=ANSWER) is None


def test_a_step_that_failed_inside_does_not_spoil_the_message(runs: OpenRuns) -> None:
    root = start(runs, "root")
    tool = start(runs, "tool", "root")
    end(runs, start(runs, "call", "root", call=True), answer=ANSWER)
    runs.fail("tool")
    end(runs, tool)
    assert end(runs, root) is not None


def test_interrupting_or_failing_an_unknown_run_does_nothing(runs: OpenRuns) -> None:
    runs.interrupt("unknown")
    runs.fail("unknown")
    runs.receive("unknown", "text")
    assert len(runs) == 0


def test_an_abandoned_stream_is_counted_when_its_call_ends_after_its_root(runs: OpenRuns) -> None:
    root = start(runs, "root")
    call = start(runs, "call", "root", call=True)
    assert end(runs, root) is None
    assert end(runs, call, answer=ANSWER) == (ANSWER, call.facts)


def test_a_call_that_ends_after_its_message_was_counted_does_not_count_it_again(runs: OpenRuns) -> None:
    root = start(runs, "root")
    background = start(runs, "background", "root", call=True)
    end(runs, start(runs, "call", "root", call=True), answer=ANSWER)
    assert end(runs, root) is not None
    assert end(runs, background, answer=ANSWER) is None


@pytest.mark.parametrize("told", [True, False], ids=["ended", "abandoned"])
def test_what_begins_in_a_step_that_ended_a_while_ago_belongs_to_its_message(runs: OpenRuns, told: bool) -> None:
    root = start(runs, "root")
    node = start(runs, "node", "root")
    end(runs, start(runs, "call", "node", call=True), answer=ANSWER)
    assert end(runs, root) is not None
    now = NOW
    if told:
        end(runs, node)
    else:
        now += ORPHANED_AFTER
        runs.sweep(now)
    assert runs.end("node", now) is None
    now += ORPHANED_AFTER - 1
    background = start(runs, "background", "node", call=True, at=now)
    assert background.top is root
    assert end(runs, background, answer=ANSWER, at=now) is None
    assert runs.facts_at("node", Facts(now=now)).now == NOW
    later = start(runs, "later", "node", call=True, at=now + 1)
    assert end(runs, later, answer=ANSWER, at=now + 1) is not None
    assert runs.facts_at("node", Facts(now=now + 1)).now == now + 1
    assert runs.abandoned == 0


def test_what_langchain_reports_as_a_root_is_a_message_though_the_step_around_it_has_ended(runs: OpenRuns) -> None:
    root = start(runs, "root")
    end(runs, start(runs, "answer", "root", call=True), answer=ANSWER)
    assert end(runs, root) is not None
    assert end(runs, start(runs, "call", None, "root", call=True), answer=ANSWER) is not None


def test_only_so_many_steps_that_ended_are_remembered(runs: OpenRuns) -> None:
    roots = [start(runs, f"step {n}") for n in range(REMEMBERED + 1)]
    for root in roots:
        end(runs, root)
    assert start(runs, "call 0", "step 0", call=True).top is not roots[0]
    assert start(runs, "call 1", "step 1", call=True).top is roots[1]


# -- runs that never say that they ended


def test_a_silent_call_is_abandoned_after_an_hour_and_counted_and_the_step_around_it_after_a_day(
    runs: OpenRuns,
) -> None:
    start(runs, "root")
    start(runs, "call", "root", call=True)
    runs.sweep(NOW + ABANDONED_AFTER - 1)
    assert len(runs) == 2
    runs.sweep(NOW + ABANDONED_AFTER)
    assert (len(runs), runs.abandoned) == (1, 1)
    runs.sweep(NOW + STEP_ABANDONED_AFTER - 1)
    assert "root" in runs
    runs.sweep(NOW + STEP_ABANDONED_AFTER)
    assert (len(runs), runs.abandoned) == (0, 1)


def test_a_message_whose_tool_works_for_hours_is_one_message(runs: OpenRuns) -> None:
    root, later = start(runs, "root"), NOW + 5 * ABANDONED_AFTER
    assert end(runs, start(runs, "plan", "root", call=True), answer=ANSWER) is None
    runs.sweep(later)
    assert end(runs, start(runs, "step", "root", call=True, at=later), answer=ANSWER, at=later) is None
    assert end(runs, root, at=later) is not None


def test_a_long_message_is_not_abandoned_while_things_happen_inside_it(runs: OpenRuns) -> None:
    root, now = start(runs, "root"), NOW
    node = start(runs, "node", "root")
    while now <= NOW + 2 * STEP_ABANDONED_AFTER:
        call = start(runs, f"call at {now}", "node", call=True, at=now)
        now += ABANDONED_AFTER // 2
        end(runs, call, answer=ANSWER, at=now)
        now += ABANDONED_AFTER // 4
        runs.sweep(now)
    end(runs, node, at=now)
    assert end(runs, root, at=now) is not None
    assert runs.abandoned == 0


def test_a_call_that_was_lost_inside_a_living_message_is_let_go(runs: OpenRuns) -> None:
    start(runs, "root")
    start(runs, "lost", "root", call=True)
    start(runs, "alive", "root", call=True, at=NOW + ABANDONED_AFTER - 1)
    runs.sweep(NOW + ABANDONED_AFTER)
    assert "lost" not in runs
    assert "alive" in runs
    assert "root" in runs


def test_a_call_whose_message_has_ended_may_still_report_for_longer_than_providers_answer(runs: OpenRuns) -> None:
    assert ORPHANED_AFTER > 600
    root = start(runs, "root")
    start(runs, "call", "root", call=True)
    end(runs, root, at=NOW + 5)
    runs.sweep(NOW + 5 + ORPHANED_AFTER - 1)
    assert "call" in runs
    runs.sweep(NOW + 5 + ORPHANED_AFTER)
    assert (len(runs), runs.abandoned) == (0, 1)


def test_what_happens_after_its_message_has_ended_keeps_a_run_alive(runs: OpenRuns) -> None:
    root = start(runs, "root")
    start(runs, "background", "root")
    end(runs, root)
    later = NOW + ORPHANED_AFTER - 1
    start(runs, "call", "background", call=True, at=later)
    runs.sweep(later + ORPHANED_AFTER - 1)
    assert ("background" in runs, "call" in runs) == (True, True)
    runs.sweep(later + ORPHANED_AFTER)
    assert (len(runs), runs.abandoned) == (0, 1)


def test_what_an_abandoned_call_had_produced_is_handed_over_once(runs: OpenRuns) -> None:
    start(runs, "silent", call=True)
    told = start(runs, "told", call=True)
    runs.receive("told", "Hel")
    runs.receive("told", "lo")
    runs.sweep(NOW + ABANDONED_AFTER)
    assert runs.take_lost() == [told]
    assert told.received == ["Hel", "lo"]
    assert runs.take_lost() == []


def test_cutting_a_message_abandons_its_runs_and_no_others(runs: OpenRuns) -> None:
    root = start(runs, "root")
    call = start(runs, "call", "root", call=True)
    runs.receive("call", "Hel")
    other = start(runs, "other", call=True)
    runs.cut(root, NOW + 1)
    assert runs.take_lost() == [call]
    assert "call" not in runs
    assert other.id in runs
    assert runs.abandoned == 1


def test_what_had_produced_nothing_when_its_message_was_cut_may_still_end_and_answers_nothing(runs: OpenRuns) -> None:
    root = start(runs, "root")
    step = start(runs, "step", "root")
    call = start(runs, "call", "step", call=True)
    runs.fail("root")
    runs.end("root", NOW)
    runs.cut(root, NOW)
    assert (len(runs), runs.abandoned) == (1, 1)  # the call counts as abandoned, the step is still open
    assert end(runs, call, answer=ANSWER, at=NOW + 60) is None
    assert runs.abandoned == 0  # for it was told after all
    another = start(runs, "another call of the same step", "step", call=True, at=NOW + 60)
    assert another.top is root
    assert end(runs, another, answer=ANSWER, at=NOW + 120) is None
    assert end(runs, step, at=NOW + 120) is None
    assert (len(runs), runs.take_lost()) == (0, [])


def test_what_had_answered_a_cancelled_message_is_told_once_and_nothing_where_nothing_had(runs: OpenRuns) -> None:
    root = start(runs, "root")
    assert runs.take_unanswered(root) is None
    call = start(runs, "call", "root", call=True)
    for expected in ((ANSWER, call.facts), None):
        runs.answered(call, ANSWER)
        assert runs.take_unanswered(root) == expected


@pytest.mark.parametrize("first", [{"input_tokens": 3, "output_tokens": 0}, {"input_tokens": 0, "output_tokens": 2}])
def test_of_the_reports_amid_a_stream_the_first_that_says_anything_is_kept(
    runs: OpenRuns, first: dict[str, int]
) -> None:
    call = start(runs, "call", call=True)
    for report in ({"input_tokens": 0, "output_tokens": 0}, first, {"input_tokens": 9, "output_tokens": 9}):
        runs.receive("call", "", report)
    assert call.reported is first


TOTALS = [{"input_tokens": 5, "output_tokens": came} for came in (0, 0, 2)]


@pytest.mark.parametrize(
    ("reports", "total", "told"),
    [
        (TOTALS, TOTALS[-1], 15),
        (TOTALS[:2], TOTALS[1], 10),  # the same prompt again
        (TOTALS[1:], TOTALS[-1], 10),
        ([*TOTALS[1:], {"input_tokens": 9, "output_tokens": 2}], {"input_tokens": 9, "output_tokens": 2}, 19),
        ([TOTALS[0], {"input_tokens": 9, "output_tokens": 2}], None, 14),  # two may be parts of a sum
        ([TOTALS[2], TOTALS[0]], None, 10),
        ([{"input_tokens": 6, "output_tokens": 0}, *TOTALS], None, 21),
        ([*TOTALS, {"input_tokens": 5, "output_tokens": 1}], None, 20),
        ([*TOTALS[:2], {"output_tokens": 2}, *TOTALS], None, 25),  # once a part, and none is a total any more
        ([{"input_tokens": None, "output_tokens": 3}] * 3, None, 0),
    ],
)
def test_reports_that_tell_one_prompt_twice_or_any_three_times_and_never_less_are_running_totals(
    runs: OpenRuns, reports: list[dict[str, int | None]], total: Any, told: int
) -> None:
    call = start(runs, "call", call=True)
    for report in reports:
        runs.receive("call", "", report)
    assert (call.running_total, call.told, call.reported) == (total, told, reports[0])


def test_a_call_is_known_as_one_while_it_is_open(runs: OpenRuns) -> None:
    start(runs, "step")
    start(runs, "call", call=True)
    assert [runs.is_call(name) for name in ("step", "call", "other")] == [False, True, False]
    runs.end("call", NOW)
    assert not runs.is_call("call")


def test_when_nobody_will_hear_of_an_end_what_was_received_is_handed_over_and_the_rest_is_waited_for(
    runs: OpenRuns,
) -> None:
    for name in ("first", "second"):
        start(runs, name, call=True)
    runs.receive("first", "Hel")
    runs.cut_all(NOW + 7)
    assert [(run.id, run.ended) for run in runs.take_lost()] == [("first", NOW + 7)]
    assert "second" in runs


@pytest.mark.parametrize("where", [("root", None), (None, "root"), ("other", "root")])
def test_who_pays_can_be_asked_before_a_call_starts_where_it_will(
    runs: OpenRuns, where: tuple[str | None, str | None]
) -> None:
    runs.start(Run("root", NOW, user="ann"))
    facts = runs.facts_at(where[0], Facts(now=NOW + 60), where[1])
    assert (facts.auth_user, facts.on_server, facts.now) == ("ann", True, NOW)
    assert runs.facts_at(None, Facts(now=NOW + 60)) == Facts()
    late = Facts(now=NOW + 60)
    runs.end("root", NOW)
    assert runs.facts_at("other", late) is late


def test_each_call_that_a_cut_message_waits_for_counts_as_abandoned(runs: OpenRuns) -> None:
    root = start(runs, "root")
    for name in ("first", "second"):
        start(runs, name, "root", call=True)
    runs.cut(root, NOW)
    assert runs.abandoned == 2


def test_what_is_never_told_after_its_message_was_cut_is_let_go_a_while_later(runs: OpenRuns) -> None:
    root = start(runs, "root")
    start(runs, "call", start(runs, "step", "root").id, call=True)
    runs.end("root", NOW)
    runs.cut(root, NOW)
    runs.sweep(NOW + ORPHANED_AFTER)
    assert (len(runs), runs.abandoned) == (0, 1)


def test_a_clock_that_runs_backwards_abandons_nothing(runs: OpenRuns) -> None:
    start(runs, "root", at=NOW)
    runs.sweep(NOW - 10 * ABANDONED_AFTER)
    assert "root" in runs


def test_memory_stays_flat_however_many_runs_never_end(runs: OpenRuns) -> None:
    most = 0
    for n in range(50_000):
        start(runs, f"call {n}", call=True, at=NOW + n * 10)
        if runs.is_sweep_due:
            runs.sweep(NOW + n * 10)
        most = max(most, len(runs))
    assert most <= ABANDONED_AFTER // 10 + SWEEP_EVERY + 1
    assert runs.abandoned == 50_000 - len(runs)


@given(st.lists(st.tuples(st.sampled_from("SEAIF"), st.integers(0, 7), st.integers(-1, 7)), max_size=60))
def test_whatever_happens_each_message_counts_at_most_once(steps: list[tuple[str, int, int]]) -> None:
    runs, seen = OpenRuns(), {}
    counted: list[Run] = []
    for now, (what, which, parent) in enumerate(steps, NOW):
        if what == "S" and which not in seen:
            seen[which] = Run(which, now, is_call=which % 2 == 1)
            runs.start(seen[which], parent)
        elif what == "I":
            runs.interrupt(which)
        elif what == "F":
            runs.fail(which)
        elif what in "EA" and (run := runs.end(which, now)) is not None:
            if what == "A" and run.is_call:
                runs.answered(run, ANSWER)
            if runs.take_message(run) is not None:
                counted.append(run.top)
    assert len({run.id for run in counted}) == len(counted)
    assert all(run.top is run and run.ended is not None for run in counted)
    assert len(runs) == sum(run.ended is None for run in seen.values())


@pytest.mark.parametrize("cut", [True, False])
def test_a_run_that_never_said_so_ended_when_it_was_let_go(runs: OpenRuns, cut: bool) -> None:
    call = start(runs, "call", call=True)
    runs.receive("call", "Hel")
    if cut:
        runs.cut(call, NOW + 7)
    else:
        runs.sweep(NOW + ABANDONED_AFTER)
    (lost,) = runs.take_lost()
    assert lost.ended == NOW + (7 if cut else ABANDONED_AFTER)


def test_every_so_many_starts_the_abandoned_are_looked_for(runs: OpenRuns) -> None:
    start(runs, "silent", call=True)
    for n in range(SWEEP_EVERY - 2):
        start(runs, f"call {n}", at=NOW + ABANDONED_AFTER)
    assert not runs.is_sweep_due
    start(runs, "the last of so many", at=NOW + ABANDONED_AFTER)
    assert runs.is_sweep_due
    runs.sweep(NOW + ABANDONED_AFTER)
    assert "silent" not in runs
    assert not runs.is_sweep_due


def test_starts_need_no_lock_beside_what_looks_at_all_runs(runs: OpenRuns, lively: None) -> None:
    faults: list[BaseException] = []
    calls = 3000

    def open_many(name: str) -> None:
        try:
            for n in range(calls):
                start(runs, f"{name} step {n}")
                start(runs, f"{name} call {n}", f"{name} step {n}", call=True)
        except BaseException as error:  # noqa: BLE001 - told below
            faults.append(error)

    threads = [threading.Thread(target=open_many, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        runs.sweep(NOW)
        runs.cut(Run("nothing", NOW), NOW)
        len(runs)
    assert not faults
    assert len(runs) == 3 * 2 * calls
    assert {runs.end(f"two call {n}", NOW).message.id for n in range(calls)} == {f"two step {n}" for n in range(calls)}  # type: ignore[union-attr]


@pytest.mark.parametrize("attempt", range(10))
def test_a_step_that_ends_is_found_all_the_time_by_what_begins_in_it(
    runs: OpenRuns, lively: None, attempt: int
) -> None:
    steps = [f"step {n}" for n in range(REMEMBERED)]
    for name in steps:
        start(runs, name)
    ending = [steps[0]]

    def end_all() -> None:
        for ending[0] in steps:
            runs.end(ending[0], NOW)

    thread = threading.Thread(target=end_all)
    thread.start()
    found = []
    while thread.is_alive():
        call = Run(object(), NOW, is_call=True)
        runs.start(call, ending[0])
        found.append(call.message)
    assert None not in found


# -- who was authenticated


def test_a_call_that_lost_its_user_has_that_of_the_nearest_step_around_it(runs: OpenRuns) -> None:
    outer, inner = start(runs, "outer"), start(runs, "inner", "outer")
    outer.user, inner.user = "ann", "bob"
    step, call = start(runs, "step", "inner"), start(runs, "call", "step", call=True)
    assert call.facts == Facts({"who": "call"}, auth_user="bob", on_server=True)
    assert step.facts == Facts()


def test_a_call_that_knows_its_own_user_keeps_it(runs: OpenRuns) -> None:
    runs.start(Run("step", NOW, user="bob"))
    assert runs.facts_at("step", Facts(auth_user="ann", on_server=True)).auth_user == "ann"


def test_where_nobody_was_authenticated_a_call_stays_as_it_was(runs: OpenRuns) -> None:
    start(runs, "root")
    call = start(runs, "call", "root", call=True)
    assert call.facts == Facts({"who": "call"})


def test_who_pays_for_a_call_is_believed_as_of_the_start_of_its_message(runs: OpenRuns) -> None:
    start(runs, "root")
    assert start(runs, "call", "root", call=True, at=NOW + 100).facts.now == NOW
    assert runs.facts_at("root", Facts(now=NOW + 100)).now == NOW
    assert runs.facts_at("nothing", Facts(now=NOW + 100)).now == NOW + 100


# -- metadata


def test_a_runs_own_metadata_lies_over_that_of_the_run_around_it() -> None:
    assert merged({"a": 1, "b": 1}, {"b": 2}) == {"a": 1, "b": 2}
    assert merged(None, {"a": 1}) == {"a": 1}
    assert merged({"a": 1}, None) == {"a": 1}
    assert merged(None, None) == {}


def test_what_was_let_go_may_say_that_it_ended_once_within_a_day(runs: OpenRuns) -> None:
    first, second = (start(runs, name, call=True) for name in ("first", "second"))
    for run in (first, second):
        runs.receive(run.id, "Hel")
        runs.cut(run, NOW)
    assert (runs.take_lost(), runs.abandoned) == ([first, second], 2)
    assert (first.was_lost, second.was_lost) == (True, True)
    assert runs.end("first", NOW + 9) is first
    assert (first.ended, runs.abandoned) == (NOW, 1)
    assert runs.end("first", NOW + 9) is None
    runs.sweep(NOW + STEP_ABANDONED_AFTER - 1)
    assert runs.end("second", NOW + STEP_ABANDONED_AFTER - 1) is second
    third = start(runs, "third", call=True)
    runs.receive("third", "Hel")
    runs.cut(third, NOW)
    runs.sweep(NOW + STEP_ABANDONED_AFTER)
    assert (runs.end("third", NOW + STEP_ABANDONED_AFTER), runs.abandoned) == (None, 1)


def test_an_abandoned_call_that_had_produced_nothing_may_say_so_too_and_is_not_the_rest_of_an_estimate(
    runs: OpenRuns,
) -> None:
    call = start(runs, "call", call=True)
    runs.sweep(NOW + ABANDONED_AFTER)
    assert (len(runs), runs.abandoned, runs.take_lost(), call.was_lost) == (0, 1, [], False)
    assert end(runs, call, answer=ANSWER, at=NOW + 2 * ABANDONED_AFTER) == (ANSWER, call.facts)
    assert runs.abandoned == 0


def test_only_so_many_that_were_let_go_are_waited_for(runs: OpenRuns) -> None:
    for n in range(REMEMBERED + 1):
        start(runs, f"call {n}", call=True)
    runs.sweep(NOW + ABANDONED_AFTER)
    assert runs.end("call 0", NOW + ABANDONED_AFTER) is None
    assert runs.end("call 1", NOW + ABANDONED_AFTER) is not None


def test_a_message_that_is_cut_looks_at_nobody_elses_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of users may be disconnected at once."""
    runs = OpenRuns()
    for user in range(3):
        top = Run(f"top {user}", NOW)
        runs.start(top)
        for name in ("step", "ended"):
            runs.start(Run(f"{name} {user}", NOW), top.id)
            runs.start(Run(f"call in {name} {user}", NOW, is_call=True), f"{name} {user}")
        runs.receive(f"call in step {user}", "Hello")
        runs.end("call in ended 1", NOW)
    everything = list(runs._runs.values())
    monkeypatch.setattr(runs, "_all", lambda: pytest.fail("it looked at all runs"))
    ended = runs.end("top 1", NOW)
    assert ended is not None
    runs.cut(ended, NOW)
    assert [run.id for run in runs.take_lost()] == ["call in step 1"]
    assert [run.id for run in everything if run.late] == []
    assert ended.inside == {"step 1", "ended 1"}


REPLAYED = ["message-start", "block-start", "block-delta", "block-finish", "block-start", "block-finish"]


@pytest.mark.parametrize(
    ("events", "live"),
    [
        ([], False),
        (["message-start"], False),
        ([*REPLAYED, "message-finish", *REPLAYED, "message-finish"], False),
        (["block-start", "block-delta", "block-delta"], True),
        (["block-start", "block-delta", "block-start"], True),  # before the one before it is finished
        (["block-start", "block-start", "block-delta"], True),
        ([*REPLAYED, "block-start", "block-delta", "block-delta"], True),
    ],
)
def test_pieces_that_are_told_as_events_count_where_they_cannot_come_from_a_cache(
    runs: OpenRuns, events: list[str], live: bool
) -> None:
    """There, each block is told in one piece, and finished before the next begins."""
    call = start(runs, "call", call=True)
    for number, event in enumerate(events):
        runs.hear_event("call", event.replace("block", "content-block"), f"{number} " if "delta" in event else "")
    runs.hear_event("nobody", "content-block-delta", "x")
    pieces = [f"{number} " for number, event in enumerate(events) if "delta" in event]
    assert (list(call.pieces), call.produced) == (pieces, True) if live else ([], False)
    runs.receive("call", "one ")
    assert list(call.pieces) == ["one "]
