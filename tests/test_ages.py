"""Usage that grows old before Stripe has it: told once when a threshold is crossed, and shown as long as it stands."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from auditing import Books
from faults import settled
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from langchain_stripe_meter import MeteringSettings, StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.audit.chores import Ages
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.periods import DAY, billing_period, spans
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import AgeAlarm, ConfigurationError
from langchain_stripe_meter.ledger import acts, views

NOON = int(datetime(2027, 3, 12, 12, tzinfo=UTC).timestamp())
"""Nowhere near the end of a billing period that begins on the first."""


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    url: Any = tmp_path if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    with Books(url) as books:
        books.sandbox.set_time(NOON)
        yield books


def hold(books: Books, *keys: str, days: float = 0, **facts: Any) -> None:
    books.record(
        *keys, at=books.ledger.now() - int(days * DAY), state=ReadingState.HELD, reason="no such meter", **facts
    )


def alarms(books: Books) -> list[tuple[str, dict[str, int]]]:
    """The alarms that were told since this was last asked."""
    books.do_chores()
    found = [(error.threshold, error.counts) for error in books.errors if isinstance(error, AgeAlarm)]
    books.errors.clear()
    return found


def test_each_threshold_is_told_once_as_usage_grows_old(books: Books, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hold(books, "run-1", "run-2")
    hold(books, "out-1", event_name="other")
    told = {}
    for day in range(36):
        told[day] = alarms(books)
        assert alarms(books) == []
        books.sandbox.set_time(NOON + (day + 1) * DAY + 1000)
    counts = {"ai_tokens": 2, "other": 1}
    ages = {day: one for day, found in told.items() for one in found if "days" in one[0]}
    assert ages == {7: ("7 days", counts), 21: ("21 days", counts), 30: ("30 days", counts), 34: ("34 days", counts)}
    (line,) = [record.getMessage() for record in caplog.records if "older than 7 days" in record.getMessage()]
    assert line.endswith("is older than 7 days: 2 on ai_tokens, 1 on other. Stripe refuses it at 35 days.")
    assert "cus_" not in caplog.text


@pytest.mark.parametrize("state", ["recorded", "resolved", "held", "pending", "sending", "rejected", "doubtful"])
def test_whatever_keeps_it_from_being_delivered(tmp_path: Path, state: str) -> None:
    with Books(tmp_path) as books:
        books.sandbox.set_time(NOON)
        books.record("run-1", at=books.ledger.now() - 8 * DAY, state=ReadingState.HELD)
        on_event = state in ("pending", "sending", "rejected", "doubtful")
        if on_event:
            put_into(books, state)
        else:
            with books.ledger.deliver_lane().transaction() as connection:
                connection.exec_driver_sql(f"UPDATE readings SET state = '{state}'")
        assert len(Ages(books.ledger).standing()) == 1


def put_into(books: Books, state: str) -> None:
    """An event of the only reading, in this state."""
    with books.ledger.deliver_lane().transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO events (id, identifier, event_name, customer, value, at, state, due, account)"
            f" SELECT 1, key, event_name, customer, value, at, '{state}', 0, '' FROM readings"
        )
        connection.exec_driver_sql("UPDATE readings SET state = 'sealed', event_id = 1")


@pytest.mark.parametrize("state", ["delivered", "written_off"])
def test_what_is_settled_is_no_alarm(tmp_path: Path, state: str) -> None:
    with Books(tmp_path) as books:
        books.sandbox.set_time(NOON)
        hold(books, "run-1", days=8)
        put_into(books, state)
        assert Ages(books.ledger).standing() == ()
        with books.ledger.deliver_lane().transaction() as connection:
            connection.exec_driver_sql("DELETE FROM events")
            connection.exec_driver_sql("UPDATE readings SET state = 'written_off'")


def test_a_restart_and_another_process_do_not_tell_again(books: Books) -> None:
    hold(books, "run-1", days=8)
    assert alarms(books) == [("7 days", {"ai_tokens": 1})]
    for _ in range(2):
        books.courier.close(1)
        books.courier = books.another_courier()
        assert alarms(books) == []


def test_what_was_settled_and_crosses_again_is_told_again(books: Books) -> None:
    hold(books, "run-1", days=8)
    assert len(alarms(books)) == 1
    acts.assign(books.ledger, [1], "cus_1")
    books.deliver()
    assert alarms(books) == []
    hold(books, "run-2", days=8)
    assert alarms(books) == [("7 days", {"ai_tokens": 1})]


def test_more_that_crosses_a_threshold_is_told_at_most_once_a_day(books: Books) -> None:
    hold(books, "run-1", days=8)
    assert len(alarms(books)) == 1
    hold(books, "run-2", days=6.99)
    books.sandbox.advance(hours=6)
    assert alarms(books) == []
    books.sandbox.advance(hours=19)
    assert alarms(books) == [("7 days", {"ai_tokens": 2})]
    books.sandbox.advance(hours=25)
    assert alarms(books) == []


def test_a_period_that_closes_with_undelivered_usage_is_told_before_and_after(books: Books) -> None:
    end = int(datetime(2027, 4, 1, tzinfo=UTC).timestamp())
    books.sandbox.set_time(end - DAY - 300)
    hold(books, "run-1", days=2)
    assert alarms(books) == []
    books.sandbox.set_time(end - DAY + 1)
    assert alarms(books) == [("closing", {"ai_tokens": 1})]
    books.sandbox.set_time(end - 600)
    assert alarms(books) == []
    hold(books, "in April", days=-700 / DAY)
    books.sandbox.set_time(end + 5)
    assert alarms(books) == [("closed", {"ai_tokens": 1})]
    assert "2027-04-01 00:00 UTC" in Ages(books.ledger).standing()[0]
    books.sandbox.set_time(end + 3601)
    assert alarms(books) == []
    assert Ages(books.ledger).standing() == ()


def test_what_is_only_moving_is_no_alarm_at_the_end_of_a_period(books: Books) -> None:
    books.sandbox.set_time(int(datetime(2027, 3, 31, 12, tzinfo=UTC).timestamp()))
    books.record("run-1")
    ages = Ages(books.ledger)
    assert ages.standing() == ()
    books.sandbox.advance(seconds=700)
    assert len(ages.standing()) == 1


def test_two_processes_at_once_tell_once(books: Books) -> None:
    from concurrent.futures import ThreadPoolExecutor

    hold(books, "run-1", days=8)
    now = books.ledger.now()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: Ages(books.ledger, books.errors.append).chore(now), range(8)))
    assert len(books.errors) == 1


def test_an_on_error_that_fails_is_logged_and_stops_nothing(books: Books, caplog: pytest.LogCaptureFixture) -> None:
    hold(books, "run-1", days=8)

    def broken(_: Exception) -> None:
        raise ValueError

    Ages(books.ledger, broken).chore(books.ledger.now())
    assert "on_error itself failed: ValueError" in caplog.text


@given(st.integers(0, 4 * 10**9), st.integers(1, 31))
def test_every_moment_lies_in_one_period_that_begins_on_its_day(now: int, day: int) -> None:
    start, end = billing_period(now, day)
    assert start <= now < end
    assert 28 * DAY <= end - start <= 31 * DAY
    assert billing_period(end, day)[0] == end
    begins = datetime.fromtimestamp(start, UTC)
    assert begins.day == day or (begins.day < day and datetime.fromtimestamp(start + DAY, UTC).day == 1)
    assert (begins.hour, begins.minute, begins.second) == (0, 0, 0)


@given(st.integers(10**8, 4 * 10**9), st.integers(0, 50))
def test_usage_belongs_to_one_age_at_most(now: int, days: int) -> None:
    ages = [span for span in spans(now) if span.ends is None and span.since <= now - days * DAY - 1 < span.before]
    assert len(ages) == (days >= 7)


@pytest.mark.parametrize("day", [0, 32, True, "1", 1.5])
def test_a_billing_day_that_no_month_has_is_refused(day: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="billing_day"):
        StripeMeterCallbackHandler(
            Tokens("t"), customer="cus_1", stripe="sk_test_1", ledger=f"sqlite:///{tmp_path}/l.db", billing_day=day
        )


def test_the_handler_its_settings_and_the_command_show_and_tell(
    tmp_path: Path,
) -> None:
    with Books(tmp_path) as books:
        url = f"sqlite:///{tmp_path}/ledger.db"
        books.sandbox.set_time(int(datetime(2027, 3, 15, tzinfo=UTC).timestamp()) + 60)
        hold(books, "run-1", days=0.5)
        hold(books, "run-2", days=8)
        settings = MeteringSettings.model_validate({
            "meters": [{"kind": "tokens", "event_name": "ai_tokens"}], "customer": {"source": "static", "id": "cus_1"},
            "ledger": url, "billing_day": 15,
        })  # fmt: skip
        with settings.handler(
            stripe=books.gateway.client, on_error=books.errors.append, clock=books.sandbox.now
        ) as handler:
            handler.record_usage({"input_tokens": 5}, id="job-1")
            assert handler.flush(60).pending == 0
            assert [one.partition(":")[0] for one in handler.status().alarms] == [
                "Undelivered usage is older than 7 days",
                "A billing period closed at 2027-03-15 00",
            ]
            assert "alarms" in handler.status()._repr_html_()
        assert [error.threshold for error in books.errors if isinstance(error, AgeAlarm)] == ["7 days", "closed"]
        hold(books, "run-3", days=(books.ledger.now() - time.time()) / DAY + 25)  # the command goes by the real clock
        shown = CliRunner().invoke(app, ["status", "--ledger", url, "--json"])
        assert any("older than 21 days: 1 on ai_tokens" in alarm for alarm in json.loads(shown.output)["alarms"])
        assert "older than 21 days" in CliRunner().invoke(app, ["status", "--ledger", url]).output


# -- what lies ahead


def test_usage_from_more_than_five_minutes_ahead_waits_until_stripe_takes_it_and_is_seen_waiting(books: Books) -> None:
    books.record("ahead", at=books.ledger.now() + 3600)
    books.record("nearly", at=books.ledger.now() + 240)
    books.deliver()
    status = views.status(books.ledger)
    assert (status.delivered, status.pending, status.ahead, status.oldest_pending_seconds) == (1, 1, 1, 0)
    assert books.states() == {"ahead": "resolved", "nearly": "delivered"}
    books.sandbox.advance(seconds=3600 - 290)
    books.deliver()
    status = views.status(books.ledger)
    assert (status.delivered, status.pending, status.ahead) == (2, 0, 0)
    assert all(event.billed for event in books.sandbox.events)
    settled(books.ledger, books.sandbox, fault="usage is dated more than five minutes ahead")


def test_alarms_are_told_while_stripe_cannot_be_reached(books: Books) -> None:
    books.record("run-1", at=books.ledger.now() - 8 * DAY)
    books.sandbox.stop()
    for _ in range(3):
        books.do_chores()
    assert [error.threshold for error in books.errors if isinstance(error, AgeAlarm)] == ["7 days"]
    books.sandbox.start()
