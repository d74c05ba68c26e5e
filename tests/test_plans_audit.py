"""What the courier, Stripe's error reports and doubts ask is found by indexes, not by reading all of the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, update

from langchain_stripe_meter.core.states import Move, Outcome, ReadingState
from langchain_stripe_meter.ledger import doubts, outbox, recalling, reports, resolving, sealing, views
from langchain_stripe_meter.ledger.reports import Window
from langchain_stripe_meter.ledger.schema import events
from langchain_stripe_meter.ledger.store import Entry, Ledger

NOW = 1_780_000_000
REPORT = Window("window:1", "acct_1", ("ai_tokens",), NOW - 3600, NOW, 5, customer_missing=False)
DELIVERED, MINUTE, ATTENTION = "events_delivered", "events_minute", "events_attention"

QUESTIONS: dict[str, tuple[Callable[[Connection], object], list[str]]] = {
    "when its sums can be read": (
        lambda known: reports.is_readable(known, REPORT, NOW), ["events_unknown", "events_sending", DELIVERED],
    ),
    "whose usage it is about": (lambda known: reports.customers(known, REPORT, 20), [DELIVERED]),
    "a customer's minutes": (
        lambda known: reports.minutes(known, REPORT, "ai_tokens", "cus_1", NOW), [DELIVERED, MINUTE],
    ),
    "whether anything is in doubt": (lambda known: doubts.any_due(known, NOW), [ATTENTION]),
    "how much is in doubt": (views.attention, [ATTENTION]),
    "the minutes of doubts": (doubts.facts, [f"{ATTENTION} {MINUTE}"]),
    "what a wrong clock left in doubt": (lambda known: recalling.recall_rest(known, NOW), [f"{ATTENTION} {MINUTE}"]),
}  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else f"sqlite:///{tmp_path}/l.db"
    ledger = Ledger(url)
    ledger.deliver_lane()
    yield ledger
    ledger.close()


def deliver(connection: Connection) -> None:
    """A month of events of many customers; one of the last hour, and one in doubt."""
    old = [("delivered", f"cus_{number % 100}", NOW - 60 * number) for number in range(61, 4000)]
    rows = [*old, ("delivered", "cus_1", NOW), ("doubtful", "cus_1", NOW)]
    usual = {"event_name": "ai_tokens", "value": "1", "due": 0, "account": "acct_1"}
    made = [
        {**usual, "identifier": f"run-{number}", "state": state, "customer": customer, "at": at, "sent_at": at,
         "settled_at": at}
        for number, (state, customer, at) in enumerate(rows)
    ]  # fmt: skip
    connection.execute(insert(events), made)
    if connection.dialect.name == "postgresql":  # it does so by itself; SQLite never does
        connection.exec_driver_sql("ANALYZE")


def plan_of(connection: Connection, statement: str, parameters: object) -> str:
    """How the database goes about it, with its parameters bound as they really are."""
    is_sqlite = connection.dialect.name == "sqlite"
    asked = f"{'EXPLAIN QUERY PLAN' if is_sqlite else 'EXPLAIN'} {statement}"
    return "\n".join(str(row[-1]) for row in connection.exec_driver_sql(asked, parameters))  # type: ignore[arg-type]


@pytest.mark.parametrize("question", QUESTIONS)
def test_no_question_of_the_audit_reads_every_event(ledger: Ledger, question: str) -> None:
    ask, indexes = QUESTIONS[question]
    asked: list[tuple[str, object]] = []
    with ledger.deliver_lane().transaction() as connection:
        deliver(connection)
        event.listen(connection, "before_cursor_execute", lambda *told: asked.append((told[2], told[3])))
        ask(connection)
        of_events = [(statement, bound) for statement, bound in asked if "FROM events" in statement]
        plans = [plan_of(connection, statement, bound) for statement, bound in of_events]
    assert len(plans) == len(indexes)
    for plan, index in zip(plans, indexes, strict=True):
        assert all(name in plan for name in index.split())
        assert "Seq Scan on events" not in plan
        assert "SCAN events\n" not in f"{plan}\n"


COURIERS: dict[str, Callable[[Connection], object]] = {
    "who must be looked up": lambda known: resolving.unresolved(known, NOW),
    "on which meters": lambda known: resolving.waiting_meters(known, NOW),
    "what can be sealed": lambda known: sealing.seal(known, NOW, None, [""]),
    "whether anything is pending": views.pending,
    "whose courier died": lambda known: outbox.reap(known, NOW),
    "what a wrong clock put off": lambda known: recalling.recall(known, NOW),
    "what a wrong clock left": lambda known: recalling.recall_rest(known, NOW),
    "what can be sent": lambda known: (sealing.seal(known, NOW), outbox.claim(known, 8, NOW)),
    "what is due next": outbox.next_due,
}


@pytest.mark.parametrize("question", COURIERS)
def test_no_question_of_a_turn_reads_the_readings_that_are_sealed(tmp_path: Path, question: str) -> None:
    """On SQLite, which keeps no statistics: there a plan follows from the statement alone."""
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    ledger.record([Entry("run", "ai_tokens", 1, NOW, ReadingState.RESOLVED, "cus_1")])
    asked: list[tuple[str, object]] = []
    with ledger.deliver_lane().transaction() as connection:
        event.listen(connection, "before_cursor_execute", lambda *told: asked.append((told[2], told[3])))
        COURIERS[question](connection)
        wanted = [(text, bound) for text, bound in asked if not text.startswith("INSERT")]
        plans = [plan_of(connection, text, bound) for text, bound in wanted if not isinstance(bound, list)]
    ledger.close()
    assert plans
    for plan in plans:
        for table in ("readings", "events"):
            assert f"SCAN {table}\n" not in f"{plan}\n"


# -- a backlog


def wait(connection: Connection, customers: int, each: int, due: int = NOW - 60) -> None:
    """Pending events, the first of every customer first."""
    usual = {"event_name": "ai_tokens", "value": "1", "account": "", "state": "pending", "at": NOW - 60, "due": due}
    made = [
        {**usual, "identifier": f"{each}-{due}-{number}-{customer}", "customer": f"cus_{customer}"}
        for number in range(each)
        for customer in range(customers)
    ]
    connection.execute(insert(events), made)
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("ANALYZE")


def work_of(connection: Connection, act: Callable[[Connection], object]) -> int:
    """How many hundred steps SQLite takes for it."""
    driver: Any = connection.connection.driver_connection
    steps: list[None] = []
    driver.set_progress_handler(lambda: steps.append(None), 100)
    act(connection)
    driver.set_progress_handler(None, 0)
    return len(steps)


def claim_some(connection: Connection) -> None:
    assert len(outbox.claim(connection, 8, NOW)) == 1
    assert outbox.claim(connection, 8, NOW) == []  # while that one is being sent
    assert outbox.next_due(connection) == NOW - 60


@pytest.mark.parametrize("waiting", ["due", "not due"])
def test_what_a_claim_costs_does_not_grow_with_the_backlog_of_a_customer(tmp_path: Path, waiting: str) -> None:
    work = []
    for backlog in (20, 5000):
        ledger = Ledger(f"sqlite:///{tmp_path}/{backlog}.db")
        with ledger.deliver_lane().transaction() as connection:
            wait(connection, 1, 2)
            wait(connection, 1, backlog, NOW - 30 if waiting == "due" else NOW + 1000)
            work.append(work_of(connection, claim_some))
        ledger.close()
    assert work[1] < work[0] + 5


def test_on_postgresql_a_claim_steps_through_the_index_of_who_waits(postgres_url: str) -> None:
    ledger = Ledger(postgres_url)
    asked: list[tuple[str, object]] = []
    with ledger.deliver_lane().transaction() as connection:
        wait(connection, 50, 400)
        event.listen(connection, "before_cursor_execute", lambda *told: asked.append((told[2], told[3])))
        assert len(outbox.claim(connection, 8, NOW)) == 8
        outbox.next_due(connection)
        recalling.recall(connection, NOW)
        wanted = [(text, bound) for text, bound in asked if "FROM events" in text]
        plans = [plan_of(connection, text, bound) for text, bound in wanted]
    ledger.close()
    assert plans
    for plan in plans:
        assert "Seq Scan on events" not in plan
    assert any("events_pending" in plan for plan in plans)
    assert any("events_due" in plan for plan in plans)


def test_everybody_who_waits_has_a_turn(ledger: Ledger) -> None:
    turn = outbox.Round()
    sent: Counter[str] = Counter()
    with ledger.deliver_lane().transaction() as connection:
        wait(connection, 1, 100)
        wait(connection, 7, 4)
        for _ in range(7):
            claimed = outbox.claim(connection, 2, NOW, at=turn)
            assert len({one.line for one in claimed}) == 2
            outbox.finish(connection, [(one, Outcome(Move.ACCEPTED)) for one in claimed], NOW)
            sent.update(one.event.customer for one in claimed)
    assert sent == {f"cus_{number}": 2 for number in range(7)}


def test_whoever_is_due_is_found_among_very_many_who_are_not(ledger: Ledger) -> None:
    turn = outbox.Round()
    with ledger.deliver_lane().transaction() as connection:
        wait(connection, 3 * outbox.LINES_AT_ONCE, 1, NOW + 1000)
        wait(connection, 1, 1)
        connection.execute(update(events).where(events.c.due < NOW).values(customer="cus_z"))
        found = [one for _ in range(4) for one in outbox.claim(connection, 8, NOW, at=turn)]
    assert [one.event.customer for one in found] == ["cus_z"]


def test_whatever_stripe_may_have_forgotten_is_put_in_doubt_whoever_else_is_due(ledger: Ledger) -> None:
    with ledger.deliver_lane().transaction() as connection:
        wait(connection, 1, outbox.LINES_AT_ONCE + 2)
        connection.execute(update(events).values(first_unknown_at=NOW - 24 * 3600))
        wait(connection, 1, 1, NOW)
        found = [one for _ in range(3) for one in outbox.claim(connection, 1, NOW)]
        assert [one.attempt.first_unknown_at for one in found] == [None]
        assert views.attention(connection) == (0, outbox.LINES_AT_ONCE + 2)
