"""The ledger: one suite for what must hold on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, insert, select, update

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import EventState, Move, Outcome, ReadingState
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError, LedgerError
from langchain_stripe_meter.ledger import acts, outbox, resolving, sealing, views
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.opening import VERSION_TABLE, migrate
from langchain_stripe_meter.ledger.outbox import Claimed
from langchain_stripe_meter.ledger.resolving import Unknown, Waiting
from langchain_stripe_meter.ledger.schema import events, metadata, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger

NOW = 1_800_000_000
ANN = Reference("email", "ann@example.com")
UNKNOWN_ANN = Unknown("", ANN)
ACCEPTED = Outcome(Move.ACCEPTED)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger(url, clock=lambda: NOW)
    yield ledger
    ledger.close()


def entry(key: str, value: object = 1, **changes: Any) -> Entry:
    facts: dict[str, Any] = {"at": NOW, "state": ReadingState.RESOLVED, "customer": "cus_1", **changes}
    return Entry(key, facts.pop("event_name", "ai_tokens"), None if value is None else Decimal(str(value)), **facts)


def named(key: str, who: Reference = ANN, value: object = 1, **changes: Any) -> Entry:
    return entry(key, value, state=ReadingState.RECORDED, customer=None, reference=who, **changes)


def do(ledger: Ledger, act: Callable[..., Any], *arguments: Any) -> Any:
    with ledger.deliver_lane().transaction() as connection:
        return act(connection, *arguments)


def claim(ledger: Ledger, slots: int = 10, now: int = NOW) -> list[Claimed]:
    do(ledger, sealing.seal, now)
    return list(do(ledger, outbox.claim, slots, now))


def finish(ledger: Ledger, claimed: list[Claimed], outcome: Outcome = ACCEPTED, now: int = NOW) -> Any:
    return do(ledger, outbox.finish, [(one, outcome) for one in claimed], now)


def keys(ledger: Ledger) -> list[str]:
    with ledger.read() as connection:
        return list(connection.execute(select(readings.c.key).order_by(readings.c.key)).scalars())


def states(ledger: Ledger) -> dict[str, str]:
    return {row.identifier: row.state for row in views.tail(ledger, 1000)}


# -- recording


SELDOM = {
    "reference": ANN, "dimensions": {"model": "m"}, "reason": "why", "account": "acct_1", "session": "s", "value": None,
    "estimated": True,
}  # fmt: skip


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("seldom", [None, *SELDOM])
def test_every_column_of_an_entry_is_stored_whether_alone_or_with_others(
    ledger: Ledger, seldom: str | None, together: bool
) -> None:
    one = entry("one", **({} if seldom is None else {seldom: SELDOM[seldom]}))
    both = [one, entry("two")] if together else [one]
    ledger.record(both)
    with ledger.read() as connection:
        rows = connection.execute(select(readings).order_by(readings.c.id)).mappings().all()
    assert [{name: row[name] for name in each.columns()} for row, each in zip(rows, both, strict=True)] == [
        each.columns() for each in both
    ]


def test_the_same_key_recorded_twice_is_one_row_and_the_first_one_stands(ledger: Ledger) -> None:
    ledger.record([entry("run", 5)])
    ledger.record([entry("run", 9), entry("other")])
    ledger.record([entry("twin"), entry("twin")])
    assert keys(ledger) == ["other", "run", "twin"]
    assert views.totals(ledger)["ai_tokens", "cus_1"] == {"resolved": 7}


def test_64_threads_that_record_at_once_each_find_their_row_stored(ledger: Ledger) -> None:
    barrier = threading.Barrier(64)

    def record(number: int) -> bool:
        barrier.wait()
        ledger.record([entry(f"run-{number // 2}"), entry(f"own-{number}")])  # two threads share each run
        return f"own-{number}" in keys(ledger)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(record, range(64)))
    assert len(keys(ledger)) == 32 + 64


def test_coroutines_of_several_loops_each_find_their_row_stored(ledger: Ledger) -> None:
    barrier = threading.Barrier(3)

    async def record(loop: int, number: int) -> None:
        await ledger.arecord([entry(f"run-{number}"), entry(f"loop-{loop}-{number}")])

    async def all_of(loop: int) -> None:
        await asyncio.gather(*(record(loop, number) for number in range(100)))

    def run(loop: int) -> None:
        barrier.wait()
        asyncio.run(all_of(loop))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert len(keys(ledger)) == 100 + 300


def test_a_bad_row_fails_its_own_caller_and_nobody_else(ledger: Ledger) -> None:
    barrier = threading.Barrier(16)

    def record(number: int) -> str:
        barrier.wait()
        try:
            ledger.record([entry(f"run-{number}", event_name="\ud800" if number == 7 else "ai_tokens")])
        except InvalidValueError:
            return "refused"
        return "stored"

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(record, range(16)))
    assert answers == ["stored"] * 7 + ["refused"] + ["stored"] * 8
    assert keys(ledger) == sorted(f"run-{number}" for number in range(16) if number != 7)


def test_a_coroutine_that_was_cancelled_has_recorded_all_the_same(ledger: Ledger) -> None:
    async def main() -> None:
        ledger.record([entry("first")])
        lane = ledger.database.lane("record")
        with lane.lock:
            task = asyncio.create_task(ledger.arecord([entry("cancelled")]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await ledger.arecord([entry("after")])

    asyncio.run(main())
    assert keys(ledger) == ["after", "cancelled", "first"]


def test_a_key_that_is_no_text_is_refused_and_the_connection_stays_good(ledger: Ledger) -> None:
    with pytest.raises(InvalidValueError):
        ledger.record([entry("good"), entry("bad", event_name="\ud800")])
    ledger.record([entry("later")])
    assert keys(ledger) == ["later"]


def test_a_closed_ledger_opens_again_when_it_is_used(ledger: Ledger) -> None:
    ledger.record([entry("one")])
    ledger.close()
    ledger.record([entry("two")])
    assert keys(ledger) == ["one", "two"]


# -- leads and notes


def test_leads_keep_what_is_not_said_again_and_can_be_forgotten(ledger: Ledger) -> None:
    leads = Leads(ledger)
    leads.capture("session", email="Ann@EXAMPLE.com", name="Ann")
    leads.capture("session", phone="+49 151 12345678")
    leads.capture("session", name="Ann Smith")
    assert leads.find("session") == {"email": "Ann@example.com", "name": "Ann Smith", "phone": "+4915112345678"}
    assert leads.find("another") is None
    assert leads.forget("session")
    assert not leads.forget("session")
    assert leads.find("session") is None


@pytest.mark.parametrize("session", ["", "x" * 256, None, 7])
def test_a_lead_belongs_to_a_session(ledger: Ledger, session: Any) -> None:
    with pytest.raises(ConfigurationError):
        Leads(ledger).capture(session, email="ann@example.com")
    with pytest.raises(ConfigurationError, match="at least one"):
        Leads(ledger).capture("session")


def test_two_who_set_the_same_note_at_once_both_succeed(ledger: Ledger, url: str) -> None:
    other = Ledger(url)
    barrier = threading.Barrier(2)

    def note(one: Ledger) -> None:
        for _ in range(20):
            barrier.wait()
            one.set_note("paused", "why")
            barrier.wait()
            one.set_note("paused", None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(note, [ledger, other]))
    ledger.set_note("paused", "at last")
    assert other.note("paused") == "at last"
    other.close()


# -- what a person sees and does


def test_status_counts_every_state_and_tells_the_age_of_what_waits(ledger: Ledger) -> None:
    ledger.record([entry("sent", at=NOW - 500), entry("sending", at=NOW - 90, event_name="other")])
    finish(ledger, claim(ledger, 1))
    claim(ledger, 1)
    ledger.record(
        [
            entry("waiting", at=NOW - 40),
            named("unknown", at=NOW - 30),
            entry("nobody", state=ReadingState.SKIPPED, customer=None, reason="no lead"),
            entry("unmetered", None, state=ReadingState.HELD, reason="usage was not reported"),
            entry("guess", estimated=True),
        ]
    )
    status = views.status(ledger)
    assert (status.delivered, status.pending, status.held, status.skipped) == (1, 4, 1, 1)
    assert (status.rejected, status.doubtful, status.written_off, status.estimated) == (0, 0, 0, 1)
    assert status.oldest_pending_seconds == 90
    assert status.paused is None
    assert views.why_skipped(ledger) == {"no lead": 1}
    assert "oldest_pending_seconds" in status._repr_html_()


def test_held_readings_are_grouped_by_what_they_wait_for_and_can_be_assigned(ledger: Ledger) -> None:
    unknown_amount = {"state": ReadingState.HELD, "reason": "usage was not reported"}
    ledger.record([named("a", value="0.1"), named("b", value="0.2"), entry("c", None, **unknown_amount)])
    do(ledger, resolving.hold, UNKNOWN_ANN, "Stripe has no customer with this email", NOW)
    by_customer, by_amount = views.held(ledger)
    assert (by_customer.reference, by_customer.value) == ("email:ann@example.com", Decimal("0.3"))
    assert "ann@example.com" not in repr(by_customer)
    assert (by_amount.customer, by_amount.value) == ("cus_1", None)

    assert acts.assign(ledger, by_amount.ids, None, 7) == 1
    assert acts.assign(ledger, by_customer.ids, "cus_2") == 2
    assert not views.held(ledger)
    assert views.totals(ledger)["ai_tokens", "cus_2"] == {"resolved": Decimal("0.3")}
    assert views.totals(ledger)["ai_tokens", "cus_1"] == {"resolved": 7}


def test_a_reading_without_amount_and_customer_needs_both(ledger: Ledger) -> None:
    ledger.record([entry("a", None, state=ReadingState.HELD, customer=None, reference=ANN)])
    (held,) = views.held(ledger)
    assert acts.assign(ledger, held.ids, "cus_1") == 0
    assert acts.assign(ledger, held.ids, None, "2.5") == 1
    with pytest.raises(ConfigurationError):
        acts.assign(ledger, held.ids, None)


def test_more_held_readings_can_be_assigned_than_a_statement_takes_values(ledger: Ledger) -> None:
    ledger.record([named("run")])
    columns = "event_name, reference, value, at, estimated, state"
    with ledger.deliver_lane().transaction() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO readings (key, {columns}) WITH RECURSIVE runs(number) AS (SELECT 1 UNION ALL "
            f"SELECT number + 1 FROM runs WHERE number < 69999) SELECT 'run-' || number, {columns} FROM readings, runs"
        )
    do(ledger, resolving.hold, UNKNOWN_ANN, "unknown", NOW)
    (held,) = views.held(ledger)
    assert acts.assign(ledger, held.ids, "cus_1") == 70_000


def test_retry_looks_held_readings_up_again_and_sends_rejected_events_again(ledger: Ledger) -> None:
    ledger.record([entry("refused"), named("unknown")])
    do(ledger, resolving.hold, UNKNOWN_ANN, "unknown", NOW)
    finish(ledger, claim(ledger), Outcome(Move.REFUSED, "No such customer"))
    assert states(ledger) == {"refused": "rejected", "unknown": "held"}
    assert do(ledger, resolving.unresolved, NOW) == {}
    assert sealing.retry(ledger) == 2
    assert do(ledger, resolving.unresolved, NOW) == {UNKNOWN_ANN: True}
    assert states(ledger) == {"refused": "pending", "unknown": "recorded"}


def test_totals_are_exact_however_far_apart_the_amounts_lie(ledger: Ledger) -> None:
    big, small = Decimal("999999999999999"), Decimal("0.000000000000001")
    ledger.record([entry("big", big), entry("small", small), entry("minus", "-0.1"), entry("plus", "0.3")])
    assert views.totals(ledger)["ai_tokens", "cus_1"]["resolved"] == Decimal("999999999999999.200000000000001")
    assert views.totals(ledger, since=NOW + 1) == {}


# -- resolving, sealing


def test_resolving_moves_every_waiting_reading_of_a_reference_and_erases_it(ledger: Ledger) -> None:
    ledger.record([named("a"), named("b", Reference("name", "Ann"))])
    do(ledger, resolving.hold, UNKNOWN_ANN, "unknown", NOW)
    ledger.record([named("c")])
    assert do(ledger, resolving.resolve, UNKNOWN_ANN, "cus_9", NOW) == 2
    with ledger.read() as connection:
        rows = connection.execute(select(readings.c.key, readings.c.customer, readings.c.reference)).all()
    assert sorted(map(tuple, rows)) == [("a", "cus_9", None), ("b", None, "name:Ann"), ("c", "cus_9", None)]


def test_a_reading_that_names_nobody_any_more_is_held_and_stops_nobody_else(ledger: Ledger) -> None:
    ledger.record([named("a"), named("b", Reference("name", "Ann"))])
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).where(readings.c.key == "a").values(reference=None))
        found = resolving.unresolved(connection, NOW)
        held = connection.execute(select(readings.c.key).where(readings.c.state == "held")).scalars().all()
    assert ([one.reference for one in found], held) == ([Reference("name", "Ann")], ["a"])


def test_a_held_reference_is_looked_up_again_later_and_later(ledger: Ledger) -> None:
    ledger.record([named("a")])
    now, waits = NOW, []
    for _ in range(5):
        do(ledger, resolving.hold, UNKNOWN_ANN, "unknown", now)
        due = do(ledger, outbox.next_due)
        assert do(ledger, resolving.unresolved, due - 1) == {}
        assert do(ledger, resolving.unresolved, due) == {UNKNOWN_ANN: False}
        waits.append(due - now)
        now = due
    assert waits == [60, 300, 900, 3600, 3600]


def test_a_reference_that_is_none_is_held_and_stops_nobody_else(ledger: Ledger) -> None:
    ledger.record([named("bad"), named("good", Reference("name", "Ann"))])
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).where(readings.c.key == "bad").values(reference="fax:1"))
    assert do(ledger, resolving.unresolved, NOW) == {Unknown("", Reference("name", "Ann")): False}
    assert states(ledger)["bad"] == "held"


def test_a_meter_that_cannot_take_events_stops_alone_and_is_tried_again(ledger: Ledger) -> None:
    ledger.record([entry("a"), entry("b", event_name="other")])
    new = Waiting(is_due=False, again=False)
    assert do(ledger, resolving.waiting_meters, NOW) == {"": {"ai_tokens": new, "other": new}}
    assert do(ledger, resolving.hold_usage, ("", "ai_tokens"), "inactive", NOW) == (1, NOW + 60)
    assert do(ledger, resolving.waiting_meters, NOW + 59) == {"": {"other": new}}
    due = Waiting(is_due=True, again=False)
    assert do(ledger, resolving.waiting_meters, NOW + 60) == {"": {"ai_tokens": due, "other": new}}
    assert do(ledger, resolving.hold_usage, ("", "ai_tokens"), "inactive", NOW + 60) == (0, NOW + 360)
    assert do(ledger, resolving.release, "", "ai_tokens", NOW + 359) == 0
    assert do(ledger, resolving.release, "", "ai_tokens", NOW + 360) == 1
    again = Waiting(is_due=False, again=True)
    assert do(ledger, resolving.waiting_meters, NOW) == {"": {"ai_tokens": again, "other": new}}


def test_of_an_account_that_is_closed_all_is_held_but_what_stripe_may_have_taken(ledger: Ledger) -> None:
    keys = ("new", "pending", "doubted", "sending")
    ledger.record([entry(key, customer=f"cus_{key}", account="acct_1") for key in keys[1:]])
    ledger.record([entry("ours")])
    do(ledger, sealing.seal, NOW, None, ["", "acct_1"])
    ledger.record([entry("new", account="acct_1")])
    with ledger.deliver_lane().transaction() as connection:
        doubted = update(events).where(events.c.identifier == "doubted").values(first_unknown_at=NOW)
        connection.execute(doubted)
        connection.execute(update(events).where(events.c.identifier == "sending").values(state="sending"))
        _, due = resolving.hold_usage(connection, ("acct_1", None), "HTTP 403", NOW)
        sealing.withdraw(connection, "acct_1", "HTTP 403", due)
    assert states(ledger) == {
        "pending": "held", "doubted": "pending", "sending": "sending", "ours": "pending", "new": "held",
    }  # fmt: skip
    assert {held.reason for held in views.held(ledger)} == {"HTTP 403"}
    assert do(ledger, outbox.next_due) == NOW
    assert [item.event.identifier for item in do(ledger, outbox.claim, 9, NOW, ["acct_1"])] == ["ours"]


def test_only_the_accounts_that_were_looked_at_are_sealed(ledger: Ledger) -> None:
    ledger.record([entry("ours"), entry("theirs", account="acct_1")])
    for accounts, sealed in (([], 0), (["acct_1"], 1), ([""], 1)):
        assert do(ledger, sealing.seal, NOW, None, accounts) == sealed


def test_usage_of_34_days_ago_is_held_and_usage_ahead_waits(ledger: Ledger) -> None:
    day = 86_400
    ledger.record(
        [entry("stale", at=NOW - 34 * day - 1), entry("old", at=NOW - 34 * day), entry("ahead", at=NOW + 301)]
    )
    assert [one.event.identifier for one in claim(ledger)] == ["old"]
    assert states(ledger) == {"stale": "held", "old": "sending", "ahead": "resolved"}
    assert next(held.reason for held in views.held(ledger)).startswith("older than 34 days")
    assert do(ledger, sealing.seal, NOW + 1) == 1
    assert states(ledger)["ahead"] == "pending"


def test_a_reading_that_stripe_could_never_take_is_held_and_the_others_are_sealed(ledger: Ledger) -> None:
    ledger.record([entry("bad", "1234567890123456"), entry("worse", customer="somebody"), entry("good")])
    assert [one.event.identifier for one in claim(ledger)] == ["good"]
    assert states(ledger) == {"bad": "held", "worse": "held", "good": "sending"}


# -- claiming, settling


def test_a_claim_takes_at_most_one_event_of_a_customer_and_meter_in_order(ledger: Ledger) -> None:
    ledger.record([entry(f"a{number}") for number in range(5)])
    ledger.record([entry("b0", customer="cus_2"), entry("c0", event_name="other"), entry("b1", customer="cus_2")])
    first = claim(ledger)
    assert [one.event.identifier for one in first] == ["a0", "b0", "c0"]
    assert claim(ledger) == []
    finish(ledger, first[:1])
    assert [one.event.identifier for one in claim(ledger)] == ["a1"]


def test_a_claim_passes_a_customer_and_meter_that_rest(ledger: Ledger) -> None:
    ledger.record([entry("a"), entry("b", customer="cus_2"), entry("c", event_name="other")])
    do(ledger, sealing.seal, NOW)
    claimed = do(ledger, outbox.claim, 10, NOW, [("", "cus_1", "ai_tokens")])
    assert [one.event.identifier for one in claimed] == ["b", "c"]


def test_couriers_that_claim_at_the_same_time_never_share_a_customer_and_meter(ledger: Ledger, url: str) -> None:
    ledger.record([entry(f"run-{number}", customer=f"cus_{number % 4}") for number in range(40)])
    do(ledger, sealing.seal, NOW)
    others = [ledger, *(Ledger(url) for _ in range(3))]
    barrier = threading.Barrier(4)

    def grab(one: Ledger) -> list[Claimed]:
        one.note("opens it")
        barrier.wait()
        return list(do(one, outbox.claim, 3, NOW))

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            claimed = [item for batch in pool.map(grab, others) for item in batch]
        assert sorted(item.event.customer for item in claimed) == ["cus_0", "cus_1", "cus_2", "cus_3"]
        finish(ledger, claimed)
    for other in others[1:]:
        other.close()


def test_an_accepted_event_is_delivered_and_a_refused_one_rejected_with_its_reason(ledger: Ledger) -> None:
    ledger.record([entry("a"), entry("b", customer="cus_2"), entry("c", customer="cus_3")])
    a, b, c = claim(ledger)
    assert finish(ledger, [a]) == [EventState.DELIVERED]
    assert finish(ledger, [b], Outcome(Move.REFUSED, "HTTP 400: no", "req_1")) == [EventState.REJECTED]
    assert finish(ledger, [c], Outcome(Move.DUPLICATE)) == [EventState.DELIVERED]
    row = {row.identifier: row for row in views.tail(ledger)}["b"]
    assert (row.state, row.reason) == ("rejected", "HTTP 400: no")


def test_a_late_answer_changes_nothing_once_the_lease_was_taken_away(ledger: Ledger) -> None:
    ledger.record([entry("a")])
    (first,) = claim(ledger)
    later = NOW + outbox.LEASE_SECONDS + 1
    assert do(ledger, outbox.reap, later - 1) == 0
    assert do(ledger, outbox.reap, later) == 1
    assert finish(ledger, [first], now=later) == [None]
    (second,) = claim(ledger, now=later + 10)
    assert finish(ledger, [first], Outcome(Move.REFUSED), now=later + 10) == [None]
    assert second.attempt.first_unknown_at == NOW
    assert finish(ledger, [second], now=later + 10) == [EventState.DELIVERED]


def test_two_claims_of_one_event_in_the_same_second_have_different_leases(ledger: Ledger) -> None:
    ledger.record([entry("a")])
    (first,) = claim(ledger)
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(events).values(state="pending", due=NOW))
    (second,) = claim(ledger)
    assert finish(ledger, [first]) == [None]
    assert finish(ledger, [second]) == [EventState.DELIVERED]


def test_an_event_of_a_dead_process_is_unknown_at_once_and_one_of_another_machine_when_its_lease_is_over(
    ledger: Ledger,
) -> None:
    """Containers may share a host's name, or its kernel: only of one's own processes can it be seen."""
    others = {"b": "cus_2", "c": "cus_3", "d": "cus_4", "e": "cus_5"}
    ledger.record([entry("a"), *(entry(key, customer=customer) for key, customer in others.items())])
    claim(ledger)
    machine, _, rest = outbox.owner().split("/", 2)
    host, kernel, processes = machine.split("|")
    leases = {"a": machine, "b": f"elsewhere|{kernel}|{processes}", "c": f"{host}|other|{processes}"}
    leases |= {"d": f"{host}|{kernel}|pid:[1]", "e": host}  # the last as an earlier version wrote it
    with ledger.deliver_lane().transaction() as connection:
        for identifier, where in leases.items():
            its = update(events).where(events.c.identifier == identifier)
            connection.execute(its.values(lease=f"{where}/999999999/{rest}/1"))
    assert do(ledger, outbox.reap, NOW) == 1
    assert states(ledger) == {"a": "pending", "b": "sending", "c": "sending", "d": "sending", "e": "sending"}
    assert do(ledger, outbox.reap, NOW + outbox.LEASE_SECONDS + 1) == 4


def test_an_unknown_outcome_is_tried_again_for_23_hours_and_then_doubtful(ledger: Ledger) -> None:
    ledger.record([entry("a")])
    finish(ledger, claim(ledger), Outcome(Move.UNKNOWN, "timeout"))
    last = NOW + 23 * 3600 - 1
    assert len(claim(ledger, now=last)) == 1
    do(ledger, outbox.reap, last + outbox.LEASE_SECONDS + 1)
    assert states(ledger) == {"a": "doubtful"}


def test_a_pending_event_that_stripe_may_have_forgotten_is_not_claimed_but_doubtful(ledger: Ledger) -> None:
    ledger.record([entry("a"), entry("b", customer="cus_2")])
    a, b = claim(ledger)
    finish(ledger, [a], Outcome(Move.UNKNOWN, "timeout"))
    finish(ledger, [b], Outcome(Move.REFUSED_FOR_NOW, "429"))
    assert [one.event.identifier for one in claim(ledger, now=NOW + 23 * 3600)] == ["b"]
    assert states(ledger) == {"a": "doubtful", "b": "sending"}
    assert claim(ledger, now=NOW + 30 * 3600) == []


def test_an_event_that_cannot_be_read_is_rejected_and_the_queue_goes_on(ledger: Ledger) -> None:
    row = {"event_name": "ai_tokens", "at": NOW, "state": "pending", "due": NOW}
    bad = [
        {"identifier": "value", "customer": "cus_1", "value": "ten", "dimensions": None},
        {"identifier": "customer", "customer": "nobody", "value": "1", "dimensions": None},
        {"identifier": "json", "customer": "cus_3", "value": "1", "dimensions": "{"},
        {"identifier": "good", "customer": "cus_4", "value": "1", "dimensions": None},
    ]
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(insert(events), [{**row, **one} for one in bad])
    assert [one.event.identifier for one in claim(ledger)] == ["good"]
    with ledger.read() as connection:
        found = connection.execute(select(events.c.identifier).where(events.c.state == "rejected")).scalars()
        assert sorted(found) == ["customer", "json", "value"]


def test_next_due_is_the_earliest_of_pending_events_and_held_readings(ledger: Ledger) -> None:
    assert do(ledger, outbox.next_due) is None
    ledger.record([named("a"), entry("b")])
    do(ledger, resolving.hold, UNKNOWN_ANN, "unknown", NOW)
    assert do(ledger, outbox.next_due) == NOW + 60
    do(ledger, sealing.seal, NOW + 7)
    assert do(ledger, outbox.next_due) == NOW + 7


# -- the schema


@contextmanager
def migrated(url: str) -> Iterator[Connection]:
    """A database that only the migrations have made."""
    engine = create_engine(url)
    with engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            migrate(connection)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def ours(name: str | None, kind: str, _parents: Any) -> bool:
    return (kind, name) != ("table", VERSION_TABLE)


def test_the_migrations_make_exactly_the_schema(url: str) -> None:
    options = {"compare_type": True, "compare_server_default": True, "include_name": ours}
    with migrated(url) as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_a_new_ledger_is_what_the_migrations_make(tmp_path: Path) -> None:
    """Alembic does not compare the conditions of partial indexes, so SQLite's own text of them is; and what each of
    them makes of a table, column by column."""
    indexes = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
    columns = """SELECT tables.name, columns.* FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns
                 WHERE tables.type = 'table' ORDER BY tables.name, columns.name"""
    ledger = Ledger(f"sqlite:///{tmp_path}/made.db")
    with migrated(f"sqlite:///{tmp_path}/migrated.db") as connection, ledger.read() as made:
        for query in (indexes, columns, f"SELECT * FROM {VERSION_TABLE}"):
            assert made.exec_driver_sql(query).all() == connection.exec_driver_sql(query).all() != []
    ledger.close()


def test_errors_while_reading_are_ledger_errors_too(ledger: Ledger) -> None:
    with pytest.raises(LedgerError), ledger.read() as connection:
        connection.exec_driver_sql("SELECT * FROM nothing_like_it")
