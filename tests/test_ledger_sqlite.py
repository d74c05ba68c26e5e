"""What holds of a ledger in a SQLite file: who may read it, what is refused, forks, other processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import wait_until
from faults import tally

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError, ForeignLedgerError, LedgerError, NewerLedgerError
from langchain_stripe_meter.ledger import opening, outbox, resolving, sealing, views
from langchain_stripe_meter.ledger.opening import tighten
from langchain_stripe_meter.ledger.store import Entry, Ledger

NOW = 1_800_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(path, "?timeout=60")
    yield ledger
    ledger.close()


def open_ledger(path: Path, options: str = "") -> Ledger:
    return Ledger(f"sqlite:///{path}{options}", clock=lambda: NOW)


def record(ledger: Ledger, *names: str) -> None:
    ledger.record([Entry(name, "ai_tokens", 1, NOW, ReadingState.RESOLVED, "cus_1") for name in names])


def count(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(connection.execute("SELECT count(*) FROM readings").fetchone()[0])
    finally:
        connection.close()


def pragma(ledger: Ledger, name: str) -> object:
    lane = ledger.database.lane("record")
    with lane.lock:
        return lane.connection.exec_driver_sql(f"PRAGMA {name}").scalar()


# -- the file


def test_the_file_and_its_companions_are_for_their_owner_alone(ledger: Ledger, path: Path) -> None:
    old = os.umask(0)
    try:
        record(ledger, "a")
    finally:
        os.umask(old)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["ledger.db", "ledger.db-shm", "ledger.db-wal", "ledger.db.epoch"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_file_that_others_may_read_is_tightened_and_that_is_told(
    ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(ledger, "a")
    with closing(sqlite3.connect(path)) as holder:  # keeps the log
        holder.execute("SELECT count(*) FROM readings").fetchone()
        ledger.close()
        files = [file for file in sorted(path.parent.iterdir()) if file.suffix != ".epoch"]
        assert [file.name for file in files] == ["ledger.db", "ledger.db-shm", "ledger.db-wal"]
        for file in files:
            file.chmod(0o664)
        record(ledger, "b")
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    (line,) = [one.getMessage() for one in caplog.records]
    assert "0664" in line
    assert "now it is for its owner" in line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_of_somebody_else_that_others_may_read_is_refused() -> None:
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "ledger.db")
        path.touch()
        path.chmod(0o666)
        with pytest.raises(LedgerError, match=r"0666.*somebody else"), as_somebody_else():
            tighten(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666


@contextmanager
def as_somebody_else() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_who_looks_at_a_ledger_that_was_deleted_does_not_make_it_anew(ledger: Ledger, path: Path) -> None:
    record(ledger, "a")
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(LedgerError, match="deleted"):
        views.status(ledger)
    assert not path.exists()
    record(ledger, "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert views.status(ledger).pending == 1


def test_a_commit_is_on_the_disk_before_it_is_acknowledged(ledger: Ledger) -> None:
    assert pragma(ledger, "journal_mode") == "wal"
    assert pragma(ledger, "synchronous") == 2
    assert pragma(ledger, "secure_delete") == 1


def test_normal_is_for_those_who_ask_for_it(path: Path) -> None:
    ledger = Ledger(f"sqlite:///{path}", synchronous="NORMAL")
    assert pragma(ledger, "synchronous") == 1
    ledger.close()
    with pytest.raises(ConfigurationError, match="OFF"):
        Ledger(f"sqlite:///{path}", synchronous="OFF")


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link.db").symlink_to(tmp_path / "target")
    with pytest.raises(LedgerError, match="symbolic link"):
        record(open_ledger(tmp_path / "link.db"), "a")
    assert (tmp_path / "target").read_bytes() == b""


@pytest.mark.parametrize("where", ["missing/ledger.db", "."])
def test_a_path_that_cannot_hold_a_file_is_refused_in_a_sentence(tmp_path: Path, where: str) -> None:
    with pytest.raises(LedgerError, match="cannot be opened for writing"):
        record(open_ledger(tmp_path / where), "a")


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "mysql://h/n", "nonsense", "postgresql+asyncpg://h/n", "sqlite+aiosqlite:///f"],
)
def test_an_address_that_cannot_be_a_ledger_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError):
        Ledger(url)


def test_a_password_in_an_address_is_never_shown() -> None:
    for address in ("me:hunter2@host/name", "host/name?user=me&password=hunter2"):
        assert "hunter2" not in repr(Ledger(f"postgresql+psycopg://{address}"))
    with pytest.raises(ConfigurationError) as caught:
        Ledger("nonsense://me:hunter2@host/name")
    assert "hunter2" not in str(caught.value)


# -- what is refused, and left as it is


def refused(path: Path, error: type[LedgerError], match: str) -> None:
    before, beside = path.read_bytes(), sorted(path.parent.iterdir())
    ledger = open_ledger(path)
    for _ in range(2):
        with pytest.raises(error, match=match):
            record(ledger, "a")
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == beside


def test_a_database_of_something_else_is_refused_and_left_byte_for_byte(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.commit()
    connection.close()
    path.chmod(0o644)
    refused(path, ForeignLedgerError, "recipes")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_newer_ledger_is_refused_by_the_name_of_its_schema(ledger: Ledger, path: Path) -> None:
    record(ledger, "a")
    with ledger.deliver_lane().transaction() as connection:
        connection.exec_driver_sql("UPDATE stripe_meter_version SET version_num = '0999'")
    ledger.close()
    refused(path, NewerLedgerError, "0999")


def test_a_file_that_is_no_database_is_refused_and_left_byte_for_byte(path: Path) -> None:
    path.write_bytes(os.urandom(10_000))
    refused(path, LedgerError, "corrupt or no SQLite database")
    tally("a file that is no database", needed_a_person=1)


def test_a_corrupt_ledger_is_refused_and_never_made_anew(ledger: Ledger, path: Path) -> None:
    record(ledger, *(f"run-{number}" for number in range(500)))
    ledger.close()
    content = bytearray(path.read_bytes())
    content[100:4096] = os.urandom(3996)  # the header stays; the schema and its first pages do not
    path.write_bytes(content)
    refused(path, LedgerError, "corrupt")


# -- other processes


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
"""


def test_a_lock_of_another_process_is_waited_for_and_then_an_error_for_all_at_once(path: Path) -> None:
    ledger = open_ledger(path, "?timeout=0.3")
    record(ledger, "before")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        barrier = threading.Barrier(40)

        def attempt(number: int) -> str:
            barrier.wait()
            with pytest.raises(LedgerError, match="Another process holds it") as caught:
                record(ledger, f"run-{number}")
            return str(caught.value)

        group, tries = ledger._group, list[int]()
        write = group._write

        def try_once(entries: Any) -> Any:
            tries.append(len(entries))
            wait_until(lambda: sum(tries) + len(group._jobs) == 40)  # the others have come while the first one waits
            return write(entries)

        group._write = try_once
        with ThreadPoolExecutor(40) as pool:
            assert len(list(pool.map(attempt, range(40)))) == 40
        group._write = write
        assert len(tries) == 2  # they waited together, not one after the other
        holder.communicate(b"\n")
    record(ledger, "after")
    ledger.close()
    assert count(path) == 2
    tally("another process holds the ledger's lock for too long", needed_a_person=40)


OPENER = """
import sys
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger.store import Entry, Ledger
ledger = Ledger(f"sqlite:///{sys.argv[1]}")
import sqlalchemy, alembic.command
print("ready", flush=True)
sys.stdin.readline()
ledger.record([Entry(sys.argv[2], "ai_tokens", 1, 1, ReadingState.RESOLVED, "cus_1")])
ledger.close()
"""


def test_processes_that_start_together_on_a_new_file_all_record(path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", OPENER, str(path)]
    starters = [
        subprocess.Popen([*command, f"run-{number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for number in range(6)
    ]
    for starter in starters:
        assert starter.stdout is not None
        starter.stdout.readline()
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write(b"\n")
        starter.stdin.flush()
    for starter in starters:
        starter.communicate()
        assert starter.returncode == 0
    assert count(path) == 6


def test_a_ledger_that_another_process_makes_between_two_looks_is_no_foreign_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made.db"
    with closing(open_ledger(made)) as other:
        record(other, "run-1")
    ask = opening._version
    asked = []

    def ask_then_be_overtaken(connection: Any) -> str | None:
        version = ask(connection)
        if not asked:
            with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(path)) as target:
                target.executescript("\n".join(source.iterdump()))
        asked.append(version)
        return version

    monkeypatch.setattr(opening, "_version", ask_then_be_overtaken)
    with closing(open_ledger(path)) as ledger:
        record(ledger, "run-2")
    assert asked[0] is None
    assert count(path) == 2


def test_threads_that_open_different_new_ledgers_at_once_each_get_their_own(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def use(number: int) -> int:
        ledger = open_ledger(tmp_path / f"{number}.db")
        barrier.wait()
        record(ledger, f"run-{number}")
        ledger.close()
        return count(tmp_path / f"{number}.db")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [1] * 8


def test_a_second_ledger_on_the_file_does_not_drop_the_first_ones_locks(ledger: Ledger, path: Path) -> None:
    """Were they dropped, a third process that comes and goes would throw away the log that the first writes to."""
    record(ledger, "before")
    second = open_ledger(path)
    record(second, "by the second")
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM notes'); c.close()"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert path.with_name("ledger.db-wal").exists()
    record(ledger, "after")
    second.close()
    ledger.close()
    assert count(path) == 3


# -- the plan


def test_no_courier_reads_the_whole_table(ledger: Ledger) -> None:
    somebody = resolving.Unknown("", Reference("email", "ann@example.com"))
    asked: list[str] = []
    with ledger.deliver_lane().transaction() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.set_trace_callback(asked.append)
        resolving.unresolved(connection, NOW)
        resolving.resolve(connection, somebody, "cus_1", NOW)
        resolving.hold(connection, somebody, "nobody", NOW)
        resolving.hold_usage(connection, ("", "ai_tokens"), "inactive", NOW)
        resolving.hold_usage(connection, ("acct_1", None), "closed", NOW)
        resolving.release(connection, "", "ai_tokens", NOW)
        resolving.waiting_meters(connection, NOW)
        sealing.withdraw(connection, "acct_1", "closed", NOW)
        sealing.seal(connection, NOW, None, ["", "acct_1"])
        outbox.reap(connection, NOW)
        outbox.claim(connection, 10, NOW, ["acct_1"])
        outbox.next_due(connection)
        driver.set_trace_callback(None)
        plans = [row[3] for query in asked for row in driver.execute(f"EXPLAIN QUERY PLAN {query}")]
    looked = [plan for plan in plans if "readings" in plan or "events" in plan]
    assert len(looked) > 10
    assert [plan for plan in looked if "INDEX" not in plan and "PRIMARY KEY" not in plan] == []


def test_claiming_and_sealing_read_the_small_indexes_and_not_the_table(ledger: Ledger) -> None:
    record(ledger, "a")
    asked: list[str] = []
    lane = ledger.deliver_lane()
    with lane.transaction() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.set_trace_callback(asked.append)
        sealing.seal(connection, NOW)
        outbox.claim(connection, 10, NOW)
        driver.set_trace_callback(None)
        plans = {
            query: " ".join(row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {query}"))
            for query in asked
            if query.startswith("SELECT") and "notes" not in query
        }
    to_seal, refused, forgotten, due, claimed = plans.values()
    assert "INDEX readings_open" in to_seal
    assert "INDEX acts_subject" in refused
    assert "INDEX events_unknown" in forgotten
    assert "INDEX events_due" in due
    assert "PRIMARY KEY" in claimed


# -- forks


def in_child(act: Callable[[], None]) -> int:
    """Run ``act`` in a forked child, which ends without cleaning up, and return its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12: this process has other threads
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(60)
        act()
        code = 0
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_never_touches_the_connection_of_its_parent(ledger: Ledger, path: Path) -> None:
    record(ledger, "parent-0")
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            with ledger.deliver_lane().transaction() as connection:
                connection.exec_driver_sql("SELECT * FROM readings").all()

    def child() -> None:
        record(ledger, "child")
        ledger.close()

    other = threading.Thread(target=busy)  # forks happen while it holds SQLite's write lock
    other.start()

    for number in range(8):
        pid = in_child(child)
        record(ledger, f"parent-during-{number}")
        assert end_of(pid) == 0
        record(ledger, f"parent-after-{number}")
    stop.set()
    other.join()
    ledger.close()
    assert count(path) == 1 + 16 + 1


def test_threads_of_a_fresh_child_all_record_though_none_has_gone_first(ledger: Ledger, path: Path) -> None:
    record(ledger, "parent")

    def child() -> None:
        barrier = threading.Barrier(16)

        def work(number: int) -> None:
            barrier.wait()
            record(ledger, f"{os.getpid()}-{number}")

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))

    children = [in_child(child) for _ in range(6)]
    assert [end_of(pid) for pid in children] == [0] * 6
    ledger.close()
    assert count(path) == 1 + 6 * 16


def test_a_child_that_was_forked_while_its_parent_records_does_not_wait_for_the_parents_locks(
    ledger: Ledger, path: Path
) -> None:
    record(ledger, "parent")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._group._leader:
            entered.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    wait_until(entered.is_set)
    pid = in_child(lambda: record(ledger, "child"))
    assert end_of(pid) == 0
    leave.set()
    holder.join()
    ledger.close()
    assert count(path) == 2


def test_an_interrupt_while_writing_for_others_loses_nothing_of_theirs(ledger: Ledger, path: Path) -> None:
    record(ledger, "before")
    lane, group = ledger.database.lane("record"), ledger._group
    with lane.lock, ThreadPoolExecutor(4) as pool:
        theirs = [pool.submit(record, ledger, f"run-{number}") for number in range(4)]
        wait_until(lambda: len(group._jobs) == 3)  # one of them leads and waits for the connection
        original, group._write = group._write, interrupted
        try:
            with pytest.raises(KeyboardInterrupt):
                group._write_batch()
        finally:
            group._write = original
        lane.lock.release()
        try:
            for each in theirs:
                each.result(60)
        finally:
            lane.lock.acquire()
    ledger.close()
    assert count(path) == 5


def interrupted(_entries: object) -> None:
    raise KeyboardInterrupt


def test_closing_a_ledger_waits_for_nobody_who_must_open_it(tmp_path: Path) -> None:
    """Whoever holds the lane may be about to read, and so to open the ledger that is being closed."""
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    lane = ledger.deliver_lane()
    with lane.lock:
        closing = threading.Thread(target=ledger.close, daemon=True)
        closing.start()
        wait_until(lambda: ledger.database._opened is None)
        assert ledger.note("anything") is None  # it was opened again meanwhile
    closing.join(60)
    assert not closing.is_alive()
    ledger.close()
