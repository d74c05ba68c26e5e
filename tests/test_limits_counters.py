"""What each payer has used, told from the ledger: at once whoever recorded it, exactly, on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from books import ANN, CUS_1, Books, Clock, entry, seconds
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import create_engine, insert, select, text

from langchain_stripe_meter.core.periods import Period, Spent
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError, LedgerError
from langchain_stripe_meter.ledger import counters, resolving, sealing
from langchain_stripe_meter.ledger.schema import acts, events, notes, pruned, readings
from langchain_stripe_meter.ledger.schema import payers as payers_table
from langchain_stripe_meter.ledger.store import Entry


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books(url: str, clock: Clock) -> Iterator[Books]:
    books = Books(url, clock)
    yield books
    books.close()


@pytest.fixture
def others(url: str, clock: Clock) -> Iterator[Books]:
    """Another process on the same ledger, as far as memory goes."""
    others = Books(url, clock)
    yield others
    others.close()


# -- periods


@pytest.mark.parametrize(
    ("per", "at", "start", "end"),
    [
        ("day", "2026-05-20 23:59:59", "2026-05-20 00:00:00", "2026-05-21 00:00:00"),
        ("day", "2026-05-21 00:00:00", "2026-05-21 00:00:00", "2026-05-22 00:00:00"),
        ("week", "2026-05-24 23:59:59", "2026-05-18 00:00:00", "2026-05-25 00:00:00"),  # a Sunday, and its Monday
        ("week", "2026-05-25 00:00:00", "2026-05-25 00:00:00", "2026-06-01 00:00:00"),
        ("month", "2024-02-29 12:00:00", "2024-02-01 00:00:00", "2024-03-01 00:00:00"),
        ("month", "2026-12-31 23:59:59", "2026-12-01 00:00:00", "2027-01-01 00:00:00"),
        (timedelta(hours=1), "2026-05-20 12:34:56", "2026-05-20 12:00:00", "2026-05-20 13:00:00"),
    ],
)
def test_a_period_begins_and_ends_in_utc(per: object, at: str, start: str, end: str) -> None:
    assert Period(per).bounds(seconds(at)) == (seconds(start), seconds(end))  # type: ignore[arg-type]


def test_all_time_never_ends() -> None:
    assert Period("ever").bounds(seconds("2026-05-20 12:00:00")) == (0, None)


@pytest.mark.parametrize("per", ["year", timedelta(0), timedelta(seconds=1.5), timedelta(seconds=-1), 3600])
def test_what_is_no_period_is_refused(per: object) -> None:
    with pytest.raises(ConfigurationError, match="per="):
        Period(per)  # type: ignore[arg-type]


@given(
    st.sampled_from(["day", "week", "month", timedelta(hours=5)]), st.integers(0, 4_000_000_000), st.integers(0, 10**7)
)
def test_every_second_is_in_one_period(per: object, at: int, step: int) -> None:
    start, end = Period(per).bounds(at)  # type: ignore[arg-type]
    assert end is not None
    assert start <= at < end
    assert Period(per).bounds(start) == Period(per).bounds(end - 1) == (start, end)  # type: ignore[arg-type]
    assert Period(per).bounds(end)[0] == end  # type: ignore[arg-type]


@example([("a", 4_924_800, Decimal("1E-9")), ("a", 5_011_200, Decimal(0)), ("a", 5_097_600, Decimal(0))])
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**7), st.decimals(-(10**6), 10**6, places=9))))
def test_sums_are_exact_and_moving_them_loses_nothing(used: list[tuple[str, int, Decimal]]) -> None:
    ever, day = Period("ever"), Period("day")
    spent = Spent((ever, day))
    now = 5_000_000
    spent.add([(name, ("", "t"), at, amount) for name, at, amount in used], now)
    start, end = day.bounds(now)
    today = [amount for _, at, amount in used if end is not None and start <= at < end]
    assert spent.of("ab", ("", "t"), ever, now) == sum((amount for *_, amount in used), Decimal(0))
    assert spent.of("ab", ("", "t"), day, now) == sum(today, Decimal(0))
    spent.move("a", "b")
    assert spent.of("b", ("", "t"), ever, now) == sum((amount for *_, amount in used), Decimal(0))
    assert spent.of("a", ("", "t"), ever, now) == 0


# -- what counts


def test_what_is_recorded_counts_at_once_and_exactly(books: Books) -> None:
    assert books.used() == 0
    books.record(entry("a", "0.1"), entry("b", "0.2"))
    assert books.used() == Decimal("0.3")
    books.record(entry("c", "100000000000000"), entry("d", "0.00000000000001"))
    assert books.used() == Decimal("100000000000000.30000000000001")


def test_what_another_process_records_counts_at_once(books: Books, others: Books) -> None:
    assert (books.used(), others.used()) == (0, 0)
    for number in range(1, 4):
        others.record(entry(f"theirs-{number}"))
        assert books.used() == 2 * number - 1
        books.record(entry(f"ours-{number}"))
        assert others.used() == 2 * number


def test_each_payer_and_each_meter_counts_for_itself(books: Books) -> None:
    books.record(entry("a", 1), entry("b", 2, Reference("id", "cus_2")), entry("c", 4, event_name="messages"))
    books.record(entry("d", 8, ANN), entry("e", 16, None), entry("f", 32, Reference("phone", "+493090182000")))
    assert books.used() == 1
    assert books.used(Reference("id", "cus_2")) == 2
    assert books.used(event_name="messages") == 4
    assert books.used(ANN) == 8
    assert books.used(Reference("email", "bob@example.com")) == 0


def test_a_reading_that_is_told_twice_counts_once(books: Books) -> None:
    books.record(entry("a", 5))
    assert books.used() == 5
    books.record(entry("a", 5), entry("b", 1))
    assert books.used() == 6


def test_unknown_amounts_count_nothing_and_corrections_count_against(books: Books) -> None:
    books.record(entry("a", None, state=ReadingState.HELD), entry("b", 10), entry("c", -4))
    assert books.used() == 6


def test_a_new_period_begins_at_midnight_utc(books: Books, clock: Clock) -> None:
    clock.set("2026-05-31 23:59:59")
    books.record(entry("a", 10))
    assert books.used() == 10
    clock.set("2026-06-01 00:00:00")
    assert books.used() == 0
    books.record(entry("b", 3), entry("late", 5, at=seconds("2026-05-31 23:59:58")))
    assert books.used() == 3


def test_usage_of_a_process_whose_clock_is_ahead_counts_where_it_belongs(url: str) -> None:
    early, late = Clock("2026-05-31 23:59:59"), Clock("2026-06-01 00:00:01")
    ours, theirs = Books(url, early), Books(url, late)
    ours.record(entry("ours", 1))
    theirs.record(entry("theirs", 2))
    assert (ours.used(), theirs.used()) == (1, 2)
    early.set("2026-06-01 00:00:00")
    assert ours.used() == 2
    early.set("2026-05-31 23:59:59")  # and back
    assert ours.used() == 1
    ours.close()
    theirs.close()


def test_several_periods_are_told_apart(url: str, clock: Clock) -> None:
    ever, hour = Period("ever"), Period(timedelta(hours=1))
    books = Books(url, clock, Period("month"), ever, hour)
    books.record(
        entry("a", 1, at=seconds("2024-01-01 00:00:00")),
        entry("b", 2, at=seconds("2026-05-02 00:00:00")),
        entry("c", 4),
    )
    assert [books.used(period=period) for period in (hour, Period("month"), ever)] == [4, 6, 7]
    books.close()


def test_a_ledger_of_many_pages_is_counted_in_full(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "PAGE", 7)
    monkeypatch.setattr(counters, "TAIL", 10)
    books.record(*(entry(f"run-{number}", number) for number in range(100)))
    books.record(*(entry(f"old-{number}", 1000, at=1) for number in range(30)))
    books.record(*(entry(f"new-{number}", 1) for number in range(5)))
    assert books.used() == sum(range(100)) + 5


# -- what becomes of it later


def test_a_lead_does_not_forget_what_it_used_when_its_customer_is_found(books: Books, others: Books) -> None:
    books.record(entry("a", 1, ANN), entry("b", 2, ANN))
    assert books.used(ANN) == 3
    others.resolve(ANN, "cus_1")
    assert books.used(ANN) == 3
    assert others.used(ANN) == 3  # that only ever saw the customer
    books.record(entry("c", 4, ANN))
    assert books.used(ANN) == others.used(ANN) == 7
    others.resolve(ANN, "cus_1")
    assert books.used(ANN) == others.used(ANN) == 7


def test_what_a_lead_used_is_what_its_customer_used(books: Books, others: Books, clock: Clock) -> None:
    books.record(entry("a", 1, ANN), entry("b", 2))
    assert (books.used(), books.used(ANN)) == (2, 1)
    others.resolve(ANN, "cus_1")
    clock.now += counters.LATER_SECONDS
    assert (books.used(), books.used(ANN)) == (3, 3)
    books.record(entry("c", 4, ANN))
    assert (books.used(), books.used(ANN)) == (7, 7)


def test_when_an_address_moves_to_another_customer_every_process_comes_to_count_the_same(
    books: Books, others: Books, clock: Clock
) -> None:
    """What was counted for the old customer by the address alone is the new one's, also where nobody asks by it."""
    both = CUS_1, Reference("id", "cus_2")
    books.resolve(ANN, "cus_1")
    books.record(entry("a", 1, ANN))
    assert books.used(ANN) == 1
    books.record(entry("b", 2, ANN))
    assert [books.used(one) for one in both] == [3, 0]
    others.resolve(ANN, "cus_2")
    books.record(entry("c", 4, ANN))
    assert books.used(ANN) >= 4
    clock.now += counters.RECOUNT_SECONDS
    assert [books.used(one) for one in both] == [others.used(one) for one in both] == [0, 7]
    others.resolve(ANN, "cus_1")
    others.record(entry("d", 8, ANN))
    clock.now += counters.RECOUNT_SECONDS
    assert [books.used(one) for one in both] == [others.used(one) for one in both] == [12, 3]
    assert books.used(ANN) == others.used(ANN)


def test_the_table_that_remembers_leads_does_not_hold_them(books: Books) -> None:
    books.record(entry("a", 1, ANN))
    books.resolve(ANN, "cus_1")
    with books.ledger.read() as connection:
        (row,) = connection.execute(select(payers_table)).all()
        key = connection.execute(select(notes.c.value).where(notes.c.name == resolving.SECRET)).scalar_one()
    assert (row.customer, row.at) == ("cus_1", books.ledger.now())
    assert row.digest == resolving.digest(bytes.fromhex(key), "", "email:ann@example.com")
    assert row.digest != resolving.digest(bytes(32), "", "email:ann@example.com")
    assert "ann" not in "".join(map(str, row))


def test_two_people_whose_addresses_differ_in_upper_and_lower_case_have_a_limit_each(
    books: Books, others: Books
) -> None:
    capital = Reference("email", ANN.value.title())
    books.resolve(ANN, "cus_1")
    books.resolve(capital, "cus_2")
    books.record(entry("a", 1, ANN), entry("b", 2, capital))
    for one in (books, others):
        assert [one.used(who) for who in (ANN, capital, CUS_1, Reference("id", "cus_2"))] == [1, 2, 1, 2]
    with books.ledger.read() as connection:
        assert connection.execute(select(acts)).all() == []  # neither took the place of the other


def test_a_lead_is_remembered_once(books: Books) -> None:
    books.resolve(ANN, "cus_1")
    books.resolve(ANN, "cus_1")
    books.resolve(ANN, "cus_2")
    with books.ledger.read() as connection:
        assert connection.execute(select(payers_table.c.customer)).scalars().all() == ["cus_2"]


def test_two_processes_that_need_the_secret_first_share_one(books: Books, others: Books) -> None:
    barrier = threading.Barrier(2)

    def resolve(one: Books, who: Reference) -> None:
        barrier.wait()
        one.resolve(who, "cus_1")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(resolve, (books, others), (ANN, Reference("name", "Ann"))))
    books.record(entry("a", 1))
    assert books.used(ANN) == others.used(Reference("name", "Ann")) == 1


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (entry("a", 5), {"state": "written_off"}),
        (entry("a", None, state=ReadingState.HELD), {"value": "7", "state": "resolved"}),
        (entry("a", 5, None), {"state": "resolved", "customer": "cus_1"}),
        (entry("a", 5), {"customer": "cus_2"}),
    ],
)
def test_what_a_person_changes_later_is_seen(
    books: Books, others: Books, clock: Clock, before: Entry, change: dict[str, str]
) -> None:
    books.record(before)
    then = books.used()
    others.change("a", **change)
    clock.now += counters.RECOUNT_SECONDS
    assert books.used() == others.used() != then  # the others count for the first time


def test_changes_that_come_fast_are_counted_anew_once_and_none_is_forgotten(
    books: Books, others: Books, clock: Clock
) -> None:
    books.record(entry("a", 1), entry("b", 2), entry("c", 4))
    books.used()
    clock.now += counters.RECOUNT_SECONDS
    others.change("a", state="written_off")
    assert books.used() == 6
    others.change("b", state="written_off")
    clock.now += counters.LATER_SECONDS
    assert books.used() == 6  # not yet again
    clock.now += counters.RECOUNT_SECONDS
    assert books.used() == 4


def test_an_event_that_was_cancelled_does_not_count(books: Books, others: Books, clock: Clock) -> None:
    books.record(entry("a", 5), entry("b", 2))
    books.do(sealing.seal, books.ledger.now())
    assert books.used() == 7
    with others.ledger.deliver_lane().transaction() as connection:
        connection.execute(events.update().where(events.c.identifier == "a").values(state="written_off"))
        connection.execute(insert(acts).values(at=others.ledger.now(), act="cancelled", subject="a"))
    clock.now += counters.RECOUNT_SECONDS
    assert books.used() == others.used() == 2


def test_what_was_pruned_still_counts(books: Books, others: Books, url: str, clock: Clock) -> None:
    ever = Period("ever")
    one, another = Books(url, clock, ever), Books(url, clock, ever)
    one.record(entry("a", 5), entry("b", 2), entry("c", 1))
    assert one.used(period=ever) == 8
    day = seconds("2026-05-20 00:00:00")
    with one.ledger.deliver_lane().transaction() as connection:
        same = {"event_name": "ai_tokens", "customer": "cus_1", "day": day, "readings": 1}
        connection.execute(insert(pruned).values(state="delivered", amount="5", **same))
        connection.execute(insert(pruned).values(state="written_off", amount="2", **same))
        connection.execute(readings.delete().where(readings.c.key.in_(["a", "b"])))
    assert one.used(period=ever) == 8  # until it counts anew, it does not know that b was written off
    assert another.used(period=ever) == 6
    one.close()
    another.close()


def test_numbers_that_come_again_after_everything_was_pruned_are_not_missed(books: Books, others: Books) -> None:
    """SQLite numbers rows from the highest that is there."""
    books.record(entry("a", 1), entry("b", 1))
    assert books.used() == 2
    others.remove("a", "b")
    others.record(entry("c", 10), entry("d", 10), entry("e", 10))
    assert books.used() == 30


# -- PostgreSQL commits out of order


def test_a_reading_that_is_committed_after_later_ones_is_not_missed(postgres_url: str, clock: Clock) -> None:
    books = Books(postgres_url, clock)
    engine = create_engine(postgres_url)
    slow = engine.connect()
    row = {"event_name": "ai_tokens", "customer": "cus_1", "at": clock.now, "estimated": 0, "state": "resolved"}
    try:
        for loads_meanwhile in (True, False):
            slow.execute(insert(readings).values(key=f"slow-{loads_meanwhile}", value="100", **row))
            books.record(entry(f"fast-{loads_meanwhile}", 1))
            assert books.used() == (1 if loads_meanwhile else 102)
            slow.commit()
            assert books.used() == (101 if loads_meanwhile else 202)
            assert books.used() == (101 if loads_meanwhile else 202)
    finally:
        slow.close()
        engine.dispose()
        books.close()


def test_numbers_that_are_never_used_are_not_asked_for_without_end(postgres_url: str, clock: Clock) -> None:
    books = Books(postgres_url, clock)
    books.record(entry("a", 1))
    for number in range(5):
        books.record(entry("a", 1), entry(f"b-{number}", 1))  # the first takes a number and leaves it
    assert books.used() == 6
    assert len(books.counters._gaps.open(clock.now)) == 5
    assert books.counters._gaps.open(clock.now + counters.GAP_SECONDS) == []
    with books.ledger.deliver_lane().transaction() as connection:
        connection.execute(text("SELECT setval(pg_get_serial_sequence('readings', 'id'), 1000000)"))
    books.record(entry("c", 1))
    assert books.used() == 7
    assert len(books.counters._gaps.open(clock.now)) == counters.TAIL
    books.close()


def test_an_act_that_is_committed_after_later_ones_is_not_missed(postgres_url: str, clock: Clock) -> None:
    books = Books(postgres_url, clock)
    books.record(entry("a", 1), entry("b", 2))
    engine = create_engine(postgres_url)
    with engine.connect() as slow:
        slow.execute(readings.update().where(readings.c.key == "a").values(state="written_off"))
        slow.execute(insert(acts).values(at=clock.now, act="written off", subject="a"))
        books.change("b", state="written_off")
        assert books.used() == 1
        slow.commit()
    clock.now += counters.RECOUNT_SECONDS
    assert books.used() == 0
    engine.dispose()
    books.close()


# -- threads, forks, faults


def test_threads_that_ask_at_once_each_see_what_they_recorded_before(books: Books) -> None:
    barrier = threading.Barrier(8)

    def work(thread: int) -> bool:
        barrier.wait()
        own = Reference("id", f"cus_{thread}")
        return all(
            books.record(entry(f"{thread}-{number}", 1, own)) or books.used(own) == number + 1  # type: ignore[func-returns-value]
            for number in range(50)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_forked_child_goes_on_counting(books: Books) -> None:
    books.record(entry("a", 1))
    assert books.used() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        try:
            books.record(entry("b", 2))
            code = 0 if books.used() == 3 else 2
            books.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    books.record(entry("c", 4))
    assert books.used() == 7


def test_a_child_that_was_forked_amid_a_count_counts_anew(books: Books) -> None:
    books.record(entry("a", 1))
    books.used()
    with books.counters._lock:  # as another thread of the parent would hold it
        books.counters._spent.add([("cus_1", ("", "ai_tokens"), books.clock.now, Decimal(100))], books.clock.now)
        books.counters.after_fork()
    assert books.used() == 1


def test_a_ledger_that_cannot_be_read_is_a_ledger_error_and_recovers(tmp_path: Path, clock: Clock) -> None:
    books = Books(f"sqlite:///{tmp_path}/ledger.db", clock)
    books.record(entry("a", 1))
    with books.ledger.deliver_lane().transaction() as connection:
        connection.execute(text("ALTER TABLE readings RENAME TO elsewhere"))
    with pytest.raises(LedgerError, match="no such table"):
        books.used(CUS_1)
    with books.ledger.deliver_lane().transaction() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO readings"))
    assert books.used(CUS_1) == 1
    books.close()
