"""Keeping a ledger: what is pruned is in its sums, at every moment, and a copy is of one moment."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update
from typer.testing import CliRunner

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import keeping, outbox, sealing, views
from langchain_stripe_meter.ledger.epoch import backup
from langchain_stripe_meter.ledger.keeping import DAY, PruneChore, Pruned, prune
from langchain_stripe_meter.ledger.schema import acts, events, pruned, readings, webhook_events
from langchain_stripe_meter.ledger.store import Entry, Ledger

NOW = 1_800_000_000
OLD = NOW - 50 * DAY


class Clock:
    """The ledger's time, which the tests move."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger(url, clock=Clock())
    yield ledger
    ledger.close()


def reading(key: str, at: int, value: object = 1, **more: Any) -> Entry:
    facts: dict[str, Any] = {"state": ReadingState.RESOLVED, "customer": "cus_1", "event_name": "m", **more}
    return Entry(key, value=None if value is None else Decimal(str(value)), at=at, **facts)


def settle(
    ledger: Ledger,
    state: str = "delivered",
    settled_at: int = OLD,
    roll_up: int | None = None,
    shift: int = 30 * DAY,
) -> None:
    """All that is resolved becomes events in ``state``, as a courier of that time would have left them."""
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).values(at=readings.c.at + shift))  # too old to be sealed now
        while sealing.seal(connection, NOW, roll_up):
            pass
        for table in (readings, events):
            connection.execute(update(table).values(at=table.c.at - shift))
        connection.execute(update(events).where(events.c.state == "pending").values(state=state, settled_at=settled_at))


def totals(ledger: Ledger, since: int = 0) -> dict[tuple[str, str], dict[str, Decimal]]:
    """By customer and meter; states that came to nothing are left out."""
    found = views.totals(ledger, since)
    return {key: {state: value for state, value in states.items() if value} for key, states in found.items()}


def rows(ledger: Ledger) -> int:
    with ledger.read() as connection:
        return sum(
            int(connection.execute(select(func.count()).select_from(table)).scalar_one())
            for table in (readings, events)
        )


def state_of_all(ledger: Ledger) -> dict[str, str]:
    return {row.identifier: row.state for row in views.tail(ledger, 1000)}


# -- what goes, and what stays


def test_what_is_final_and_old_goes_and_everything_else_stays(ledger: Ledger) -> None:
    ledger.record([reading("sent", OLD), reading("skipped", OLD, state=ReadingState.SKIPPED, customer=None)])
    ledger.record([reading("given-up", OLD, None, state=ReadingState.WRITTEN_OFF)])
    settle(ledger)
    ledger.record([reading("event-given-up", OLD, 7)])
    settle(ledger, "written_off")
    ledger.record([reading("refused", OLD)])
    settle(ledger, "rejected")
    ledger.record([reading("unclear", OLD)])
    settle(ledger, "doubtful")
    ledger.record([reading("accepted-lately", OLD)])
    settle(ledger, settled_at=NOW - DAY)
    ledger.record([reading("new", NOW - 39 * DAY), reading("skipped-lately", NOW, state=ReadingState.SKIPPED)])
    ledger.record([reading("held", OLD, state=ReadingState.HELD)])
    settle(ledger)
    before = totals(ledger)
    assert prune(ledger, 40) == Pruned(readings=4, events=2)
    assert set(state_of_all(ledger)) == {"refused", "unclear", "accepted-lately", "new", "skipped-lately", "held"}
    assert totals(ledger) == before
    assert views.status(ledger).pruned == 4
    assert prune(ledger, 40) == Pruned()


@pytest.mark.parametrize("days", [0, 35, -1, True, 36.5])
def test_nothing_that_stripe_could_still_take_is_pruned(ledger: Ledger, days: Any) -> None:
    with pytest.raises(ConfigurationError, match="36 days"):
        prune(ledger, days)
    with pytest.raises(ConfigurationError, match="36 days"):
        StripeMeterCallbackHandler(Tokens("m"), customer="cus_1", stripe="sk_test_x", prune_after_days=days)


def test_sums_are_exact_and_grow(ledger: Ledger) -> None:
    huge, small = "123456789012345678901234567890.000000000000000001", "0.000000000000000000001"
    for value in (huge, small, "-3.5"):
        ledger.record([reading(f"run{value}", OLD, value, state=ReadingState.WRITTEN_OFF)])
        assert prune(ledger).readings == 1
    exactly = Decimal("123456789012345678901234567886.500000000000000001001")
    assert totals(ledger) == {("m", "cus_1"): {"written_off": exactly}}
    with ledger.read() as connection:
        assert connection.execute(select(pruned.c.readings)).scalars().all() == [3]


def test_sums_are_of_the_account_meter_customer_and_day(ledger: Ledger) -> None:
    day = OLD - OLD % DAY
    ledger.record([reading("a", day, 1), reading("b", day + DAY - 1, 2), reading("c", day + DAY, 4)])
    ledger.record([reading("d", day, 8, customer="cus_2"), reading("e", day, 16, event_name="n")])
    settle(ledger)
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).where(readings.c.key == "a").values(account="acct_1"))
    prune(ledger)
    assert views.accounts(ledger) == ["", "acct_1"]
    assert views.totals(ledger, account="acct_1") == {("m", "cus_1"): {"delivered": 1}}
    assert totals(ledger, day + DAY) == {("m", "cus_1"): {"delivered": 4}}
    assert totals(ledger, day)["m", "cus_2"] == {"delivered": 8}
    assert totals(ledger, day)["n", "cus_1"] == {"delivered": 16}
    with pytest.raises(ConfigurationError, match=f"midnight, {day}, or the next, {day + DAY}"):
        totals(ledger, day + 60)
    assert totals(ledger, day - 60) == totals(ledger)


def test_what_was_rolled_up_goes_together_and_counts_on_its_events_day(ledger: Ledger, monkeypatch: Any) -> None:
    monkeypatch.setattr(keeping, "BATCH", 4)
    midnight = OLD - OLD % DAY
    ledger.record([reading(f"run-{number}", midnight - 50 + 10 * number, 2) for number in range(12)])
    settle(ledger, roll_up=100)
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).values(at=midnight))  # an earlier version's spans did not end there
        straddling = connection.execute(select(func.min(events.c.at))).scalar_one()
    before = {since: totals(ledger, since) for since in (0, midnight - DAY, midnight, midnight + DAY)}
    assert straddling < midnight
    assert prune(ledger).readings == 12
    assert rows(ledger) == 0
    assert {since: totals(ledger, since) for since in before} == before


def test_notifications_and_acts_about_what_has_gone_are_pruned(ledger: Ledger) -> None:
    ledger.record([reading("sent", OLD), reading("held", OLD, state=ReadingState.HELD)])
    settle(ledger)
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(insert(webhook_events), [{"id": "evt_1", "at": OLD}, {"id": "evt_2", "at": NOW}])
        facts = [("sent", OLD), ("held", OLD), ("sent", NOW)]
        connection.execute(insert(acts), [{"act": "assigned", "subject": subject, "at": at} for subject, at in facts])
    assert prune(ledger) == Pruned(readings=1, events=1, notifications=1, acts=1)
    with ledger.read() as connection:
        assert connection.execute(select(webhook_events.c.id)).scalars().all() == ["evt_2"]
        assert connection.execute(select(func.count()).select_from(acts)).scalar() == 2


def test_a_row_that_changes_between_the_look_and_the_delete_stays(ledger: Ledger) -> None:
    """A webhook rejects an event, a lead claims a skipped run, while the pruning goes on."""
    ledger.record([reading("sent", OLD, 5), reading("skipped", OLD, state=ReadingState.SKIPPED)])
    settle(ledger)

    def meanwhile(*_: Any) -> None:
        with ledger.deliver_lane().transaction() as connection:
            connection.execute(update(events).values(state="rejected"))
            connection.execute(update(readings).where(readings.c.key == "skipped").values(state="recorded"))

    real = keeping._sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "_sizes", lambda *given: (real(*given), meanwhile())[0])
        assert prune(ledger) == Pruned()
    assert state_of_all(ledger) == {"sent": "rejected", "skipped": "recorded"}
    assert totals(ledger)["m", "cus_1"] == {"rejected": 5, "recorded": 1}


def test_a_run_that_is_recorded_again_after_its_row_was_pruned_is_new(ledger: Ledger) -> None:
    ledger.record([reading("job", OLD)])
    settle(ledger)
    ledger.record([reading("job", NOW)])
    assert views.status(ledger).pending == 0
    prune(ledger)
    ledger.record([reading("job", NOW)])
    assert views.status(ledger).pending == 1


def test_others_record_and_claim_while_it_prunes(ledger: Ledger) -> None:
    ledger.record([reading(f"old-{number}", OLD) for number in range(3000)])
    settle(ledger)
    ledger.record([reading("due", NOW)])
    seen: list[int] = []

    def others(done: int, _all: int) -> None:
        ledger.record([reading(f"new-{done}-{len(seen)}", NOW)])
        with ledger.deliver_lane().transaction() as connection:
            sealing.seal(connection, NOW)
            seen.append(len(outbox.claim(connection, 1, NOW)))

    assert prune(ledger, progress=others).readings == 3000
    assert sum(seen) == 1  # the others wait for it: one at a time per customer and meter
    assert totals(ledger)["m", "cus_1"]["delivered"] == 3000
    assert rows(ledger) == 2 * (1 + len(seen))


def test_several_processes_may_prune_at_once(url: str) -> None:
    ledgers = [Ledger(url, clock=Clock()) for _ in range(3)]
    ledgers[0].record([reading(f"old-{number}", OLD, number) for number in range(2000)])
    settle(ledgers[0])
    done: list[Pruned] = []
    threads = [threading.Thread(target=lambda one=one: done.append(prune(one))) for one in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.readings for one in done) == 2000
    assert totals(ledgers[0]) == {("m", "cus_1"): {"delivered": sum(range(2000))}}
    for ledger in ledgers:
        ledger.close()


# -- killed

PRUNING = """
import os, signal, sys
from sqlalchemy import event
from langchain_stripe_meter.ledger.keeping import prune
from langchain_stripe_meter.ledger.store import Ledger

url, now = sys.argv[1], int(sys.argv[2])

def child(die_at):
    ledger, said = Ledger(url, clock=lambda: now), 0
    def count(*_):
        nonlocal said
        said += 1
        if said == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    event.listen(ledger.database.engine, "before_cursor_execute", count)
    prune(ledger)
    ledger.close()

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            child(int(line))
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Each line of its input is a statement at which a child of it dies."""


def test_killed_at_any_statement_rows_and_sums_still_add_up(url: str) -> None:
    ledger = Ledger(url, clock=Clock())
    kinds = {"skipped": ReadingState.SKIPPED, "sent": ReadingState.RESOLVED, "given-up": ReadingState.WRITTEN_OFF}
    code, at = -signal.SIGKILL, 0
    command = [sys.executable, "-W", "error", "-c", PRUNING, url, str(NOW)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pruning:
        assert pruning.stdin is not None
        assert pruning.stdout is not None
        while code:
            at += 1
            ledger.record([reading(f"{kind}-{at}", OLD, at, state=state) for kind, state in kinds.items()])
            settle(ledger)
            before, counted = totals(ledger), _counted(ledger)
            ledger.close()  # as if it were another process's
            pruning.stdin.write(f"{at}\n")
            pruning.stdin.flush()
            code = int(pruning.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            assert (totals(ledger), _counted(ledger)) == (before, counted)
        pruning.stdin.close()
    assert at > 20  # statements were died at
    assert rows(ledger) == 0
    ledger.close()


def _counted(ledger: Ledger) -> int:
    now = views.status(ledger)
    return now.pruned + now.skipped + now.delivered + now.written_off


# -- the file


@pytest.fixture
def on_file(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", clock=Clock())
    yield ledger
    ledger.close()


def test_space_is_used_again_the_log_is_given_back_and_shrink_makes_the_file_smaller(
    on_file: Ledger, tmp_path: Path
) -> None:
    file, log = tmp_path / "ledger.db", tmp_path / "ledger.db-wal"
    sizes = []
    for turn in range(3):
        on_file.record([reading(f"{turn}-{number}", OLD) for number in range(2000)])
        settle(on_file)
        prune(on_file)
        assert log.stat().st_size == 0
        sizes.append(file.stat().st_size)
    assert sizes[2] <= sizes[0] * 1.1
    keeping.shrink(on_file)
    assert file.stat().st_size < sizes[0] / 5
    assert totals(on_file) == {("m", "cus_1"): {"delivered": 6000}}


def test_a_chore_prunes_a_little_at_a_time_and_rests_when_it_is_through(
    on_file: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "CHORE_SECONDS", -1)  # one step at a time
    on_file.record([reading(f"old-{number}", OLD) for number in range(1200)])
    settle(on_file)
    chore, left = PruneChore(on_file, 40, on_file.now), []
    for minute in range(60):
        chore(NOW + minute * 60)
        left.append(rows(on_file))
    assert left[0] == 2400 - 2 * (keeping.BATCH // 2)
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    on_file.record([reading("late", OLD)])
    settle(on_file)
    chore(NOW + 60 * 60)
    assert rows(on_file) == 2
    for minute in range(20):
        chore(NOW + 2 * 3600 + minute * 60)
    assert rows(on_file) == 0


def test_a_chore_prunes_what_is_old_by_stripes_clock_too(on_file: Ledger) -> None:
    on_file.record([reading("sent", OLD), reading("skipped", NOW, state=ReadingState.SKIPPED)])
    settle(on_file)
    date: list[int | None] = [None, NOW, NOW, NOW + 50 * DAY]
    chore, left = PruneChore(on_file, 40, lambda: date.pop(0)), []
    for now in (NOW, NOW + 50 * DAY, NOW + 1, NOW + 50 * DAY):  # the second time, it is ahead
        chore(now)
        left.append(rows(on_file))
    assert left == [3, 1, 1, 0]


def test_the_handler_prunes_on_request(tmp_path: Path) -> None:
    clock = Clock()
    url = f"sqlite:///{tmp_path}/ledger.db"
    with StripeMeterCallbackHandler(Tokens("m"), deliver=False, customer="cus_1", ledger=url, clock=clock) as meter:
        meter.record_usage({"input_tokens": 3}, id="job")
        clock.now += 60 * DAY
        assert meter.prune() == Pruned()
        settle(meter._ledger, settled_at=NOW, shift=0)
        assert meter.prune(older_than_days=50) == Pruned(readings=1, events=1)
        assert "readings" in meter.prune()._repr_html_()
        assert meter.status().pruned == 1


# -- the commands


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def command_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """Its clock is the real one."""
    monkeypatch.setenv("STRIPE_METER_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield ledger
    ledger.close()


def test_the_prune_command_says_what_it_did(command_ledger: Ledger) -> None:
    at = command_ledger.now() - 50 * DAY
    command_ledger.record([reading(f"run-{number}", at, state=ReadingState.SKIPPED) for number in range(3)])
    assert "36 days" in call("prune", "--older-than", "35", code=2).stderr
    assert "0 readings of more than 60 days" in call("prune", "--older-than", "60").stdout
    found = json.loads(call("prune", "--older-than", "40", "--shrink", "--json").stdout)
    assert found == {"readings": 3, "events": 0, "notifications": 0, "acts": 0, "leads": 0}
    assert json.loads(call("status", "--json").stdout)["pruned"] == 3


def test_a_backup_is_a_ledger_that_only_its_owner_may_read_and_overwrites_nothing(
    command_ledger: Ledger, tmp_path: Path
) -> None:
    command_ledger.record([reading("run", command_ledger.now(), 12)])
    copy = tmp_path / "copy.db"
    found = json.loads(call("ledger", "backup", str(copy), "--json").stdout)
    assert found == {"file": str(copy), "bytes": copy.stat().st_size}
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    before = copy.read_bytes()
    assert "exists already" in call("ledger", "backup", str(copy), code=2).stderr
    assert copy.read_bytes() == before
    assert "cannot be made" in call("ledger", "backup", str(tmp_path / "no" / "copy.db"), code=2).stderr
    assert not list(tmp_path.glob("*.partial"))
    opened = Ledger(f"sqlite:///{copy}")
    assert totals(opened) == {("m", "cus_1"): {"resolved": 12}}
    opened.close()


def test_a_backup_through_a_link_overwrites_nothing_either(on_file: Ledger, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    link = tmp_path / "copy.db"
    link.symlink_to(target)
    with pytest.raises(ConfigurationError, match="exists already"):
        backup(on_file, link)
    assert not target.exists()


def test_a_backup_of_postgresql_says_whose_work_that_is(postgres_url: str, tmp_path: Path) -> None:
    ledger = Ledger(postgres_url)
    with pytest.raises(ConfigurationError, match="pg_dump"):
        backup(ledger, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
    ledger.close()


WRITER = """
import sys
from decimal import Decimal
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger.store import Entry, Ledger
ledger, number = Ledger(sys.argv[1], synchronous="NORMAL"), 0
while True:  # always in pairs, so that a copy of one moment has an even number
    ledger.record([Entry(f"w{number}-{half}", "m", Decimal(1), 1, ReadingState.HELD) for half in (1, 2)])
    number += 1
    print(number, flush=True)
"""


@pytest.fixture
def writer(on_file: Ledger) -> Iterator[subprocess.Popen[str]]:
    """Another process, which goes on recording pairs."""
    url = on_file.database.url.render_as_string()
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        thread = threading.Thread(target=lambda: writer.stdout.read())  # type: ignore[union-attr]
        thread.start()
        yield writer
        writer.kill()
        thread.join()


def test_a_backup_and_an_export_are_of_one_moment_while_others_write(
    on_file: Ledger, writer: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_stripe_meter.ledger.epoch.PAGES", 5)
    on_file.record([reading(f"old-{number}", OLD) for number in range(5000)])
    told: list[int] = []
    backup(on_file, tmp_path / "copy.db", progress=lambda done, _all: told.append(done))
    assert len(told) > 20  # it was no single step
    assert told == sorted(told)
    exported = [row.identifier for row in views.every(on_file)]
    assert writer.poll() is None
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        copied = [key for (key,) in copy.execute("SELECT key FROM readings ORDER BY id")]
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for keys in (copied, exported):
        assert sum(key.startswith("old-") for key in keys) == 5000
        pairs = [key for key in keys if key.startswith("w")]
        assert len(pairs) % 2 == 0
        assert pairs


def test_a_killed_backup_leaves_nothing_under_its_name(on_file: Ledger, tmp_path: Path) -> None:
    on_file.record([reading(f"old-{number}", OLD) for number in range(500)])
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from langchain_stripe_meter.ledger import epoch as module\n"
        "from langchain_stripe_meter.ledger.store import Ledger\n"
        "module.PAGES = 2\n"
        "module.backup(Ledger(sys.argv[1]), Path(sys.argv[2]), "
        "progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    url, copy = on_file.database.url.render_as_string(), tmp_path / "copy.db"
    run = subprocess.run([sys.executable, "-c", code, url, str(copy)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not copy.exists()
    with pytest.raises(ConfigurationError, match="partial cannot be made"):
        backup(on_file, copy)
    (tmp_path / "copy.db.partial").unlink()
    assert backup(on_file, copy)


def test_an_export_of_many_rows_takes_little_memory(command_ledger: Ledger, tmp_path: Path) -> None:
    many = 60_000
    for start in range(0, many, 5000):
        command_ledger.record([reading(f"run-{start + number}", 1) for number in range(5000)])
    with command_ledger.deliver_lane().transaction() as connection:
        connection.execute(delete(readings).where(readings.c.id % 7 == 0))
        left = int(connection.execute(select(func.count()).select_from(readings)).scalar_one())
    code = (
        "import resource, sys\n"
        "from langchain_stripe_meter.cli import app\n"
        "from langchain_stripe_meter.ledger import views\n"
        "from langchain_stripe_meter.ledger.store import Ledger\n"
        "views.tail(Ledger('sqlite:///' + sys.argv[2]), 1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "app(['export', sys.argv[1]], standalone_mode=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    file = tmp_path / "all.csv"
    arguments = [sys.executable, "-c", code, str(file), str(tmp_path / "ledger.db")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    grown = int(run.stdout.splitlines()[-1])
    assert f"{left:,} readings written" in run.stdout
    assert len(file.read_text().splitlines()) == left + 1
    assert grown < 15_000  # KiB; the rows as Python objects would take four times that
