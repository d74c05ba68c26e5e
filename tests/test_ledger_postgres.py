"""What holds of a ledger on PostgreSQL: who migrates it, and that it comes back when the server does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.engine import make_url

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.ledger.schema import readings
from langchain_stripe_meter.ledger.store import Entry, Ledger


@pytest.fixture
def ledger(postgres_url: str) -> Iterator[Ledger]:
    ledger = Ledger(postgres_url)
    yield ledger
    ledger.close()


def record(ledger: Ledger, *names: str) -> None:
    ledger.record([Entry(name, "ai_tokens", 1, 1_800_000_000, ReadingState.RESOLVED, "cus_1") for name in names])


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
