"""A ledger that comes back from the past: nothing is billed twice, and nothing is lost that the backup held."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from faults import settled, tally
from restored_shop import Shop, killed
from sqlalchemy import update
from typer.testing import CliRunner

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.audit.chores import Doubts
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import IllegalMoveError, LedgerError, MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import acts, epoch, reversals, sealing, views
from langchain_stripe_meter.ledger.doubts import doubtful, settle_doubt
from langchain_stripe_meter.ledger.epoch import Epoch, backup
from langchain_stripe_meter.ledger.forget import forget
from langchain_stripe_meter.ledger.keeping import prune
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.schema import events
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import rate_limited, refuse, server_error

HOUR = 3600


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.ledger.close()
    shop.sandbox.stop()


# -- restored


@pytest.mark.parametrize("hours", [0, 1, 22, 24, 48, 24 * 40])
@pytest.mark.parametrize("by_command", [True, False])
@pytest.mark.parametrize("sidecar", [True, False])
def test_what_was_sent_after_the_backup_is_not_billed_again_whenever_it_is_restored(
    shop: Shop, hours: int, by_command: bool, sidecar: bool
) -> None:
    shop.record("first")
    shop.deliver()
    shop.record("second", "third")
    if by_command:
        backup(shop.ledger, shop.copy)
    else:
        shop.raw_copy()
    shop.deliver()
    shop.record("lost")
    shop.deliver()
    shop.sandbox.advance(hours=hours)
    shop.restore(sidecar=sidecar)
    shop.deliver(until=lambda: set(shop.states().values()) <= {"delivered", "doubtful", "held"})
    assert shop.billed() == ["first", "lost", "second", "third"]
    (told,) = shop.told
    assert "restored" in told
    assert told in str(views.status(shop.ledger).restored)
    expected = "delivered" if hours < 23 else "doubtful" if hours < 24 * 34 else "held"
    assert shop.states() == {"first": "delivered", "second": expected, "third": expected}

    shop.record("new")
    shop.deliver()
    assert shop.billed() == ["first", "lost", "new", "second", "third"]
    assert len(shop.told) == 1


def test_what_a_restore_put_in_doubt_says_why(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.send_since_a_backup()
    shop.sandbox.advance(hours=30)
    shop.restore()
    shop.deliver()
    assert "meter event second is doubtful: it may have been sent before the ledger was restored" in caplog.text
    (doubt,) = doubtful(shop.ledger)
    assert "restored" in doubt.reason


@pytest.mark.parametrize("is_noticed", [True, False])
def test_what_may_have_been_re_timed_after_the_backup_is_not_re_timed_again_unless_a_person_has_looked(
    shop: Shop, is_noticed: bool
) -> None:
    shop.record("sent", "unsent", at=shop.ledger.now() - 40 * 24 * HOUR)
    shop.record("first")
    shop.deliver()
    backup(shop.ledger, shop.copy)
    acts.retime(shop.ledger, [1])
    shop.deliver()
    shop.sandbox.advance(hours=48)
    shop.restore()
    if is_noticed:
        shop.deliver()
    for ids in ([1], [1, 2]):
        with pytest.raises(IllegalMoveError, match=r"reading 1 \(sent\) .*backup.*verify.*not_billed"):
            acts.retime(shop.ledger, ids)
    assert shop.states() == {"first": "delivered", "sent": "held", "unsent": "held"}
    acts.write_off(shop.ledger, [1], reason="it is billed")
    assert acts.retime(shop.ledger, [2], not_billed=True) == 1
    shop.deliver(until=lambda: shop.states()["unsent"] == "delivered")
    assert shop.billed() == ["first", "sent", "unsent"]

    shop.record("new", at=shop.ledger.now() - 40 * 24 * HOUR)
    shop.deliver()
    assert acts.retime(shop.ledger, [4]) == 1


def test_what_is_used_after_everything_was_pruned_is_not_taken_for_what_was_restored(shop: Shop) -> None:
    """SQLite numbers rows by what it still has."""
    shop.record("run-1", "run-2")
    shop.deliver()
    epoch.restored(shop.ledger)
    shop.sandbox.advance(days=80)
    prune(shop.ledger, 36)
    shop.record("run-3", at=shop.ledger.now() - 25 * HOUR)
    shop.deliver()
    assert (shop.states(), shop.billed()) == ({"run-3": "delivered"}, ["run-1", "run-2", "run-3"])


@pytest.mark.parametrize("hours", [1, 25, 48])
def test_what_a_restore_put_in_doubt_is_compared_and_ends_delivered_once(shop: Shop, hours: int) -> None:
    """One was sent after the backup, one was not: Stripe's sums tell which."""
    shop.record("first")
    shop.deliver()
    shop.sandbox.advance(seconds=120)
    shop.record("second", value=3)
    shop.sandbox.advance(seconds=120)
    shop.record("third", value=5)
    backup(shop.ledger, shop.copy)
    shop.sandbox.fail(rate_limited(), where=lambda request: request.params["identifier"] == "third", times=None)
    shop.deliver(until=lambda: shop.states()["second"] == "delivered")
    shop.sandbox.clear_faults()
    shop.sandbox.advance(hours=hours)
    shop.restore()
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    courier = Courier(shop.ledger, gateway, on_error=shop.errors.append, chores=[Doubts(shop.ledger, gateway)])

    def in_ten_minutes() -> bool:
        courier.turn()
        if not courier.in_flight:
            shop.sandbox.advance(seconds=600)
        return set(shop.states().values()) == {"delivered"}

    wait_until(in_ten_minutes)
    courier.close(5)
    gateway.close()
    assert shop.sandbox.billed("m", "cus_1") == 9
    settled(shop.ledger, shop.sandbox, fault="the ledger is restored from a backup")


@pytest.mark.parametrize("hours", [1, 22, 23, 25, 48])
def test_a_copy_from_the_minute_in_which_its_courier_was_killed_bills_nothing_twice(shop: Shop, hours: int) -> None:
    with killed(shop) as send:
        shop.record("first")
        send()
        shop.record("second")
        with closing(sqlite3.connect(shop.path)) as source, closing(sqlite3.connect(shop.copy)) as target:
            source.backup(target)
        send()
    shop.sandbox.advance(hours=hours)
    shop.restore()
    shop.deliver()
    assert shop.billed() == ["first", "second"]
    assert shop.states() == {"first": "delivered", "second": "delivered" if hours < 23 else "doubtful"}
    assert shop.told == ([] if hours < 23 else [epoch.KILLED])


def test_after_a_courier_was_killed_only_what_it_may_have_sent_is_compared(shop: Shop) -> None:
    with killed(shop) as send:
        shop.record("first")
        send()
        shop.record("second", value=2)
    shop.sandbox.advance(hours=3)
    shop.record("later")
    shop.sandbox.advance(hours=24)
    shop.ledger.close()
    shop.deliver()
    assert shop.states() == {"first": "delivered", "second": "doubtful", "later": "delivered"}
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    for _ in range(2):
        shop.sandbox.advance(hours=3)
        Doubts(shop.ledger, gateway)(shop.ledger.now())
    gateway.close()
    shop.deliver()
    assert shop.told == [epoch.KILLED]
    assert set(shop.states().values()) == {"delivered"}
    settled(shop.ledger, shop.sandbox, fault="kill -9 while it delivers, and no start for a day")


def test_after_a_courier_that_ended_nothing_is_compared_however_late(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    shop.record("second")
    shop.ledger.close()
    shop.sandbox.advance(hours=48)
    shop.deliver()
    assert (shop.billed(), shop.told) == (["first", "second"], [])


def test_a_backup_that_was_taken_and_restored_with_nothing_sent_between_is_delivered(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    shop.record("second")
    backup(shop.ledger, shop.copy)
    shop.restore()
    shop.deliver()
    assert shop.states() == {"first": "delivered", "second": "delivered"}
    assert shop.billed() == ["first", "second"]


def test_events_that_were_sealed_before_the_backup_are_in_doubt_too(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    shop.record("refused", "waiting")
    shop.sandbox.fail(server_error(), times=2)
    shop.deliver(until=lambda: "pending" in shop.states().values())
    backup(shop.ledger, shop.copy)
    shop.sandbox.advance(seconds=1000)
    shop.deliver()
    shop.sandbox.advance(hours=25)
    shop.restore()
    shop.deliver(until=lambda: "doubtful" in shop.states().values())
    assert shop.billed() == ["first", "refused", "waiting"]
    assert shop.states() == {"first": "delivered", "refused": "doubtful", "waiting": "doubtful"}


def test_what_is_young_at_the_restore_but_too_old_when_stripe_is_back_is_in_doubt(shop: Shop) -> None:
    shop.send_since_a_backup()
    shop.sandbox.advance(hours=22)
    shop.restore()
    with shop.sandbox.outage():
        shop.deliver(until=lambda: views.status(shop.ledger).restored)
        shop.sandbox.advance(hours=3)
    shop.deliver()
    assert shop.states()["second"] == "doubtful"
    assert shop.billed() == ["first", "second"]


def test_a_weekend_without_a_courier_is_no_restore(shop: Shop) -> None:
    shop.record("first")
    shop.deliver(ends=False)
    shop.sandbox.advance(hours=2)
    shop.record("second")
    shop.sandbox.advance(hours=72)
    shop.deliver()
    assert shop.states() == {"first": "delivered", "second": "delivered"}
    assert shop.told == []


def test_what_was_rolled_up_anew_since_the_backup_is_not_sent_again_as_it_was_then(shop: Shop) -> None:
    """Its meter went and came back, and late usage joined it: Stripe has it, under an identifier of its own."""
    minute = shop.ledger.now() // 60 * 60
    shop.record("r1", "r2", value=5, at=minute)
    shop.sandbox.advance(seconds=61)
    shop.sandbox.fail(refuse(429), times=None)
    shop.deliver(roll_up=60, until=lambda: shop.states() == {"r1": "pending", "r2": "pending"})
    backup(shop.ledger, shop.copy)
    shop.sandbox.clear_faults()
    shop.sandbox.deactivate_meter("m")
    shop.sandbox.advance(seconds=700)
    shop.deliver(roll_up=60, until=lambda: shop.states() == {"r1": "held", "r2": "held"})
    shop.record("r3", at=minute + 5)
    shop.sandbox.reactivate_meter("m")
    sealing.retry(shop.ledger)
    shop.deliver(roll_up=60)
    assert shop.sandbox.billed("m", "cus_1") == 11
    shop.restore()
    shop.ledger = shop.open()
    shop.sandbox.advance(hours=1)
    shop.deliver(roll_up=60)
    assert shop.sandbox.billed("m", "cus_1") == 11
    assert shop.states() == {"r1": "doubtful", "r2": "doubtful"}


@pytest.mark.parametrize("rolls_now", [60, None])
def test_rolled_up_usage_may_have_had_another_identifier_so_it_is_in_doubt_at_once(
    shop: Shop, rolls_now: int | None
) -> None:
    """Its companions may be lost: what it is sealed with now is not what it was sealed with then."""
    start = shop.ledger.now() // 60 * 60 + 60
    shop.sandbox.set_time(start)
    shop.record("first", "second")
    shop.sandbox.advance(seconds=60)
    shop.deliver(roll_up=60)
    shop.sandbox.set_time(start + 120)
    shop.record("third", "fourth")
    backup(shop.ledger, shop.copy)
    shop.record("lost")
    shop.sandbox.advance(seconds=60)
    shop.deliver(roll_up=60)
    before = shop.billed()
    shop.restore()
    shop.deliver(roll_up=rolls_now)
    assert shop.billed() == before
    assert {key: shop.states()[key] for key in ("third", "fourth")} == {"third": "doubtful", "fourth": "doubtful"}
    shop.record("new")
    shop.sandbox.advance(seconds=120)
    shop.deliver(roll_up=rolls_now)
    assert shop.states()["new"] == "delivered"


def test_another_ledgers_file_in_its_place_is_noticed(shop: Shop, tmp_path: Path) -> None:
    shop.record("mine")
    shop.deliver()
    (tmp_path / "other").mkdir()
    other = Shop(tmp_path / "other")
    other.record("theirs")
    other.deliver()
    other.record("theirs-too")
    other.raw_copy()
    other.sandbox.stop()
    shutil.copy(other.copy, shop.copy)
    shop.restore()
    shop.deliver()
    assert any("replaced by another" in told for told in shop.told)


# -- deleted


def test_a_deleted_ledger_is_told_and_a_new_one_goes_on(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    shop.ledger.close()
    shop.path.unlink()
    shop.sandbox.advance(hours=48)
    shop.record("second")
    shop.deliver()
    (told,) = shop.told
    assert "an earlier one was here" in told
    assert shop.billed() == ["first", "second"]
    assert "an earlier one was here" in str(views.status(shop.ledger).restored)
    tally("the ledger is deleted or replaced, and a courier finds out")


@pytest.mark.parametrize("in_use", [True, False])
def test_a_deleted_ledger_that_was_only_recorded_into_is_missed_by_the_first_courier(shop: Shop, in_use: bool) -> None:
    shop.record("lost")
    if not in_use:
        shop.ledger.close()
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (shop.path.parent / name).unlink(missing_ok=True)
    shop.record("second")
    shop.sandbox.advance(hours=48)
    shop.deliver()
    (told,) = shop.told
    assert "an earlier one was here" in told
    assert shop.states() == {"second": "delivered"}


def test_a_recorder_tells_that_its_ledger_was_deleted_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def tell(error: MeteringError) -> None:
        told.append(str(error))
        meter.record_usage({"input_tokens": 1}, id=f"of-the-application-{len(told)}")  # it may do that

    meter = StripeMeterCallbackHandler(
        Tokens("m"), customer="cus_1", ledger=f"sqlite:///{tmp_path}/ledger.db", deliver=False, on_error=tell
    )
    meter.record_usage({"input_tokens": 1}, id="1")
    for count in (1, 2):
        for file in tmp_path.glob("ledger.db*"):
            file.unlink()
        for again in range(2):
            meter.record_usage({"input_tokens": 1}, id=f"{count}-{again}")
        assert len(told) == count
    assert meter.flush().pending == 3
    meter.close()
    assert "deleted or replaced while in use" in told[0]
    assert "restore it from a backup" in told[0]
    assert told[0] in caplog.text


def test_a_copy_from_before_the_first_epoch_is_no_new_ledger(shop: Shop) -> None:
    shop.record("first")
    shop.raw_copy()
    shop.deliver()
    shop.sandbox.advance(hours=30)
    shop.restore()
    shop.record("second")
    shop.deliver()
    assert shop.states() == {"first": "doubtful", "second": "delivered"}
    assert shop.billed() == ["first", "second"]


def test_a_file_that_is_deleted_while_in_use_is_opened_again_and_loses_nothing_after(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.record("first")
    shop.deliver()
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (shop.path.parent / name).unlink(missing_ok=True)
    shop.record("second")
    assert "was deleted or replaced while in use" in caplog.text
    reopened = shop.open()
    assert [row.identifier for row in views.tail(reopened)] == ["second"]
    reopened.close()
    shop.deliver()
    assert shop.billed() == ["first", "second"]
    assert "an earlier one was here" in shop.told[0]


def test_a_ledger_that_is_deleted_with_its_epoch_while_in_use_is_told_too(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    for file in shop.path.parent.glob("ledger.db*"):
        file.unlink()
    shop.record("second")
    shop.deliver()
    (told,) = shop.told
    assert "was deleted or replaced while in use" in told
    assert shop.billed() == ["first", "second"]


def test_a_courier_that_runs_notices_a_file_that_is_replaced(shop: Shop) -> None:
    shop.record("first")
    backup(shop.ledger, shop.copy)
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    courier = Courier(shop.ledger, gateway, on_error=shop.errors.append)
    wait_until(lambda: (courier.turn(), shop.states() == {"first": "delivered"})[1])
    fresh = shop.path.with_name("fresh.db")
    shutil.copy(shop.copy, fresh)
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (shop.path.parent / name).unlink(missing_ok=True)
    fresh.rename(shop.path)
    wait_until(lambda: (courier.turn(), shop.told)[1])
    assert "restored from a backup" in shop.told[0]
    wait_until(lambda: (courier.turn(), shop.states() == {"first": "delivered"})[1])
    assert shop.billed() == ["first"]
    courier.close(5)
    gateway.close()
    tally("the ledger is deleted or replaced, and a courier finds out")


@pytest.mark.parametrize("what", ["the backup", "nothing"])
def test_a_courier_that_runs_notices_every_time_that_its_file_is_replaced(shop: Shop, what: str) -> None:
    shop.record("first")
    backup(shop.ledger, shop.copy)
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    courier = Courier(shop.ledger, gateway, on_error=shop.errors.append)
    for count in range(3):
        wait_until(lambda: (courier.turn(), set(shop.states().values()) <= {"delivered", "doubtful"})[1])
        assert len(shop.told) == count
        assert bool(views.status(shop.ledger).restored) is (count > 0)
        assert shop.billed() == ["first"]
        shop.sandbox.advance(hours=30)
        swap(shop)
        if what == "nothing":
            shop.path.unlink()
    courier.close(5)
    gateway.close()


def test_nothing_is_claimed_of_a_file_that_came_after_the_epoch_was_compared(shop: Shop) -> None:
    shop.record("first")
    backup(shop.ledger, shop.copy)
    shop.deliver()
    watch = Epoch(shop.ledger, shop.errors.append)
    watch.keep(shop.ledger.now())
    swap(shop)
    with pytest.raises(LedgerError, match="replaced"), shop.ledger.deliver_lane().transaction():
        watch.sends()
    shop.record("second")  # opens the file that is there now
    with pytest.raises(LedgerError, match="replaced"), shop.ledger.deliver_lane().transaction():
        watch.sends()
    watch.keep(shop.ledger.now())
    assert "restored from a backup" in shop.told[0]
    with shop.ledger.deliver_lane().transaction():
        watch.sends()


def test_a_file_that_is_replaced_while_the_replacement_before_is_told_is_looked_at_too(shop: Shop) -> None:
    shop.record("first")
    backup(shop.ledger, shop.copy)
    shop.deliver()
    told: list[Exception] = []

    def tell(error: Exception) -> None:
        told.append(error)
        if len(told) == 1:
            swap(shop)
            shop.record("second")  # opens the file that is there now

    watch = Epoch(shop.ledger, tell)
    swap(shop)
    watch.keep(shop.ledger.now())
    with pytest.raises(LedgerError, match="replaced"), shop.ledger.deliver_lane().transaction():
        watch.sends()
    watch.keep(shop.ledger.now())
    assert len(told) == 2
    assert views.status(shop.ledger).restored


def swap(shop: Shop) -> None:
    """Put the backup in the ledger's place while the ledger is open."""
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (shop.path.parent / name).unlink(missing_ok=True)
    shutil.copy(shop.copy, shop.path)


ACTS: dict[str, Callable[[Ledger], Any]] = {
    "correct": lambda ledger: acts.correct(ledger, "cus_1", "m", -1, reason="typo", id="c"),
    "assign": lambda ledger: acts.assign(ledger, [1], "cus_1"),
    "retime": lambda ledger: acts.retime(ledger, [2], not_billed=True),
    "write_off": lambda ledger: acts.write_off(ledger, [1], reason="goodwill"),
    "cancel": lambda ledger: reversals.ask_to_cancel(ledger, "sent"),
    "retry": sealing.retry,
    "settle_doubt": lambda ledger: settle_doubt(ledger, ["doubted"], delivered=True),
    "forget": lambda ledger: forget(ledger, email="ann@example.com"),
    "forget a lead": lambda ledger: Leads(ledger).forget("s1"),
    "capture": lambda ledger: Leads(ledger).capture("s2", email="eve@example.com"),
    "restored": epoch.restored,
    "prune": prune,
}


@pytest.mark.parametrize("name", ACTS)
def test_what_a_person_decides_goes_to_the_file_that_is_there(shop: Shop, name: str) -> None:
    now, ann = shop.ledger.now(), Reference("email", "ann@example.com")
    shop.ledger.record([
        Entry("held", "m", 1, now, ReadingState.HELD, reference=ann),
        Entry("old", "m", 1, now - 40 * 24 * HOUR, ReadingState.HELD, "cus_1"),
        Entry("skipped", "m", 1, now - 50 * 24 * HOUR, ReadingState.SKIPPED),
    ])  # fmt: skip
    shop.record("sent", "doubted")
    shop.deliver()
    with shop.ledger.deliver_lane().transaction() as connection:
        doubted = update(events).where(events.c.identifier == "doubted")
        connection.execute(doubted.values(state="doubtful"))
    Leads(shop.ledger).capture("s1", email="ann@example.com")
    backup(shop.ledger, shop.copy)
    untouched = seen(shop.copy)
    swap(shop)
    ACTS[name](shop.ledger)
    assert seen(shop.path) != untouched


def seen(path: Path) -> list[Any]:
    """Every row that a person's act could change, as another process sees it."""
    tables = ("readings", "events", "leads", "acts", "notes")
    with closing(sqlite3.connect(path)) as connection:
        return [connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables]


# -- PostgreSQL, and what an operator says


def test_on_postgresql_an_operator_says_that_it_was_restored(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shop = Shop(tmp_path)
    try:
        shop.ledger = Ledger(postgres_url, clock=shop.sandbox.now)
        shop.record("pending", at=shop.ledger.now() - 30 * HOUR)
        shop.record("young")
        monkeypatch.setenv("STRIPE_METER_LEDGER", postgres_url)
        result = CliRunner().invoke(app, ["ledger", "restored", "--json"])
        assert json.loads(result.stdout) == {"restored": True}
        shop.record("later", at=shop.ledger.now() - 30 * HOUR)
        shop.deliver()
        assert shop.states() == {"pending": "doubtful", "young": "delivered", "later": "delivered"}
        assert "operator" in str(views.status(shop.ledger).restored)
        assert not shop.sidecar.exists()
    finally:
        shop.ledger.close()
        shop.sandbox.stop()


def test_what_was_rejected_before_a_restore_is_compared_when_a_person_retries_it(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    shop.record("second")
    shop.sandbox.fail(refuse(400, message="The value is no number."))
    shop.deliver(until=lambda: shop.states()["second"] == "rejected")
    shop.sandbox.advance(hours=30)
    epoch.restored(shop.ledger)
    sealing.retry(shop.ledger)
    shop.deliver()
    assert shop.states()["second"] == "doubtful"
