"""What holds of a ledger on PostgreSQL: who migrates it, and that it comes back when the server does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import run_sql, wait_until
from psycopg import _cursor_base as cursors
from sqlalchemy import Connection, create_engine, event, func, select
from sqlalchemy.engine import make_url

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import InvalidValueError, LedgerError
from langchain_stripe_meter.ledger import lanes, resolving
from langchain_stripe_meter.ledger.forget import forget
from langchain_stripe_meter.ledger.resolving import Unknown, secret_of
from langchain_stripe_meter.ledger.schema import readings
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

NOW = 1_800_000_000


@pytest.fixture
def ledger(postgres_url: str) -> Iterator[Ledger]:
    ledger = Ledger(postgres_url)
    yield ledger
    ledger.close()


def record(ledger: Ledger, *names: str) -> None:
    ledger.record([Entry(name, "ai_tokens", 1, NOW, ReadingState.RESOLVED, "cus_1") for name in names])


def insert_and_then(ledger: Ledger, act: Callable[[Connection], object]) -> None:
    with ledger.deliver_lane().transaction() as connection:
        connection.exec_driver_sql("INSERT INTO notes VALUES ('lost', 'x', 1)")
        act(connection)


def count(ledger: Ledger) -> int:
    with ledger.read() as connection:
        return int(connection.execute(select(func.count()).select_from(readings)).scalar_one())


def cut_all_connections(url: str) -> None:
    """What every client sees when the server restarts."""
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    engine.dispose()


class TimeLimitError(Exception):
    """What a signal's handler raises wherever it strikes, such as Celery's soft time limit."""


def test_a_time_limit_that_strikes_where_a_transaction_begins_spoils_none_after_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute: Any = cursors.execute

    def strike_once(*args: Any) -> Generator[Any, Any, Any]:
        monkeypatch.undo()
        yield from execute(*args)
        raise TimeLimitError

    ledger.set_note("number", "0")
    monkeypatch.setattr(cursors, "execute", strike_once)  # its answer is there, and psycopg about to look at it
    with pytest.raises(TimeLimitError):
        ledger.set_note("number", "1")
    for number in range(10):  # what psycopg has seen so often, it prepares: not four statements
        ledger.set_note("number", str(number))
    assert ledger.note("number") == "9"


def test_an_operator_migrates_and_until_then_the_ledger_says_how(postgres_server: str) -> None:
    empty = make_url(postgres_server).set(database="template1").render_as_string(hide_password=False)
    ledger = Ledger(empty)
    with pytest.raises(LedgerError, match="stripe-meter ledger upgrade"):
        record(ledger, "a")


def test_the_plain_scheme_means_psycopg_3(postgres_url: str) -> None:
    ledger = Ledger(postgres_url.replace("postgresql+psycopg://", "postgresql://"))
    record(ledger, "a")
    assert count(ledger) == 1
    ledger.close()


def test_what_is_recorded_after_the_server_restarted_is_stored_by_the_first_try(
    ledger: Ledger, postgres_url: str
) -> None:
    record(ledger, "before")
    cut_all_connections(postgres_url)
    record(ledger, "after")
    cut_all_connections(postgres_url)
    record(ledger, "several", "at once")
    assert count(ledger) == 4


def test_transactions_and_reading_go_on_after_the_server_restarted(ledger: Ledger, postgres_url: str) -> None:
    ledger.set_note("a", "1")
    cut_all_connections(postgres_url)
    ledger.set_note("b", "2")
    cut_all_connections(postgres_url)
    assert (ledger.note("a"), ledger.note("b")) == ("1", "2")


def test_a_connection_that_dies_within_a_transaction_changes_nothing_and_is_replaced(
    ledger: Ledger, postgres_url: str
) -> None:
    with pytest.raises(LedgerError):
        insert_and_then(
            ledger, lambda connection: (cut_all_connections(postgres_url), connection.exec_driver_sql("SELECT 1"))
        )
    ledger.set_note("after", "1")
    assert ledger.note("lost") is None


def test_a_transaction_that_failed_leaves_the_connection_usable(ledger: Ledger) -> None:
    with pytest.raises(LedgerError):
        insert_and_then(ledger, lambda connection: connection.exec_driver_sql("SELECT 1 / 0"))
    ledger.set_note("after", "1")
    assert (ledger.note("lost"), ledger.note("after")) == (None, "1")


def test_a_server_that_is_gone_is_a_ledger_error(postgres_server: str) -> None:
    with pytest.raises(LedgerError):
        record(Ledger("postgresql+psycopg://nobody@127.0.0.1:1/nowhere"), "a")


@pytest.fixture
def writer(postgres_url: str) -> Iterator[Ledger]:
    """A ledger whose role has the rights that it needs, and no more."""
    rights = [f"GRANT ALL ON ALL {what} IN SCHEMA public TO writer" for what in ("TABLES", "SEQUENCES")]
    run_sql(postgres_url, "CREATE ROLE writer LOGIN", *rights)
    ledger = Ledger(make_url(postgres_url).set(username="writer").render_as_string(hide_password=False))
    yield ledger
    ledger.close()
    run_sql(postgres_url, "DROP OWNED BY writer", "DROP ROLE writer")


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("REVOKE INSERT ON readings FROM writer", "permission denied .* Give the ledger's role the rights"),
        ("ALTER TABLE readings RENAME TO gone", "does not exist. Look whether it is the ledger's .* ledger upgrade"),
        ("ALTER ROLE writer SET default_transaction_read_only = on", "read-only .* Give the address of the server"),
    ],
    ids=["no right", "no table", "read-only"],
)
def test_what_is_wrong_with_the_database_is_told_and_no_fault_of_the_values(
    writer: Ledger, postgres_url: str, does: str, said: str
) -> None:
    record(writer, "a")
    run_sql(postgres_url, does)
    if "read_only" in does:
        writer.close()  # it holds for new connections
    with pytest.raises(LedgerError, match=said):
        record(writer, "b")


def test_a_value_of_the_wrong_type_is_the_callers_fault_however_few_rights_the_ledger_has(writer: Ledger) -> None:
    bad: Any = {"a": 1}
    for key in (bad, "nul\0"):
        with pytest.raises(InvalidValueError):
            record(writer, key)
    record(writer, "a")
    assert count(writer) == 1


# -- many couriers, and acts beside them

PEOPLE = [Unknown("", Reference("email", f"{name}@example.com")) for name in ("ann", "ben")]
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def is_somebody_waiting(url: str) -> bool:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.exec_driver_sql(WAITING).scalar_one()
    engine.dispose()
    return bool(found)


def test_two_couriers_that_learn_of_the_same_people_in_another_order_do_not_stop_each_other(
    ledger: Ledger, postgres_url: str
) -> None:
    ledger.record(
        [
            Entry(str(one), "ai_tokens", 1, NOW, ReadingState.RECORDED, reference=who.reference)
            for one, who in enumerate(PEOPLE)
        ]
    )
    secret_of(ledger)
    other, first_is_in = Ledger(postgres_url), threading.Event()

    def resolve(of: Ledger, order: Sequence[Unknown], between: Callable[[], object]) -> None:
        with of.deliver_lane().transaction() as connection:
            resolving.resolve(connection, order[0], "cus_1", NOW)
            between()
            resolving.resolve(connection, order[1], "cus_1", NOW)

    def let_the_other_in() -> None:
        first_is_in.set()
        wait_until(lambda: is_somebody_waiting(postgres_url))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(resolve, ledger, PEOPLE, let_the_other_in)
        first_is_in.wait(60)
        second = pool.submit(resolve, other, PEOPLE[::-1], lambda: None)
        first.result(60)
        second.result(60)
    with ledger.read() as connection:
        found = connection.execute(select(readings.c.state, readings.c.customer, readings.c.reference)).all()
    assert found == [("resolved", "cus_1", None)] * 2
    other.close()


def test_a_process_that_was_stopped_in_the_middle_does_not_keep_the_others_from_going_on(
    ledger: Ledger, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "STOPPED_SECONDS", 1)
    stopped = Ledger(postgres_url)

    def others_go_on(_connection: Connection) -> None:
        ledger.set_note("whole", "x")  # waits until the server has given the stopped one up

    with pytest.raises(LedgerError):
        insert_and_then(stopped, others_go_on)
    assert (ledger.note("lost"), ledger.note("whole")) == (None, "x")
    stopped.close()


def test_who_waits_for_its_turn_in_vain_says_so_and_gets_it_later(
    ledger: Ledger, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "BUSY_SECONDS", 1)
    slow = Ledger(postgres_url)
    with slow.deliver_lane().transaction(), pytest.raises(LedgerError, match="Another process holds it"):
        ledger.set_note("name", "x")
    ledger.set_note("name", "x")
    assert ledger.note("name") == "x"
    slow.close()


def test_a_flush_keeps_its_time_while_the_courier_waits_for_its_turn(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "BUSY_SECONDS", 100)
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        handler = StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_1", ledger=postgres_url)
        handler.record_usage({"input_tokens": 1, "output_tokens": 1}, id="job")
        other, done = Ledger(postgres_url), threading.Event()
        with other.deliver_lane().transaction():
            wait_until(lambda: is_somebody_waiting(postgres_url))  # the courier, with the lane in its hand
            flushing = threading.Thread(target=lambda: (handler.flush(0.2), done.set()))
            flushing.start()
            assert done.wait(60)
        flushing.join(60)
        handler.close()
        other.close()


def test_forgetting_somebody_leaves_who_records_at_the_same_moment_with_a_payer(
    ledger: Ledger, postgres_url: str
) -> None:
    def named(key: str) -> Entry:
        return Entry(key, "ai_tokens", 1, NOW, ReadingState.RECORDED, reference=PEOPLE[0].reference)

    ledger.record([named("before")])
    other, late = Ledger(postgres_url), [named("meanwhile")]

    def between(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if late and statement.startswith("UPDATE readings SET reference=") and "state=" not in statement:
            other.record([late.pop()])

    event.listen(ledger.database.engine, "before_cursor_execute", between)
    forget(ledger, email=PEOPLE[0].reference.value)
    with other.deliver_lane().transaction() as connection:
        assert not late
        assert list(resolving.unresolved(connection, NOW)) == [PEOPLE[0]]
    other.close()
