"""Disks that fail: what is not stored is said to be not stored, and what is stored is billed."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from faults import deliver, settled, tally
from sqlalchemy import select
from typer.testing import CliRunner

from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.ledger import sealing, views
from langchain_stripe_meter.ledger.schema import readings
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

RECORDER = """
import sys, time
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import LedgerError
from langchain_stripe_meter.ledger.store import Entry, Ledger

ledger = Ledger(sys.argv[1])
for number in range(6):
    entry = Entry(f"run-{number}", "ai_tokens", 1, int(time.time()), ReadingState.RESOLVED, "cus_1")
    try:
        ledger.record([entry])
    except LedgerError as error:
        print("refused", entry.key, error)
    else:
        print("stored", entry.key)
"""


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        sandbox.create_customer(id="cus_1")
        yield sandbox


def record_while(url: str, injected: str) -> tuple[set[str], list[str]]:
    """What a process could store while its system calls fail as ``injected`` says, and what it was told else."""
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64,fsync,fdatasync", "-e", injected]
    child = [sys.executable, "-W", "error", "-c", RECORDER, url]
    done = subprocess.run([*command, *child], capture_output=True, text=True, check=True, timeout=60)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    return {line[1] for line in lines if line[0] == "stored"}, [line[2] for line in lines if line[0] == "refused"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which makes system calls fail, is absent")
@pytest.mark.parametrize("when", ["1", "2", "3", "4", "6", "8", "1+", "5+"])
@pytest.mark.parametrize(
    ("failing", "fault"),
    [
        ("fsync,fdatasync:error=EIO", "I/O errors on fsync"),
        ("pwrite64:error=EIO", "I/O errors on write"),
        ("pwrite64:error=ENOSPC", "no space left while it writes"),
    ],
    ids=["fsync", "write", "full"],
)
def test_a_disk_that_fails_is_told_and_what_was_acknowledged_is_billed(
    tmp_path: Path, sandbox: StripeSandbox, failing: str, fault: str, when: str
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    if when not in ("1", "1+"):  # else it fails while the ledger is being made
        ledger = Ledger(url)
        ledger.set_note("made", "1")
        ledger.close()
    stored, refused = record_while(url, f"inject={failing}:when={when}")
    assert len(stored) + len(refused) == 6
    assert all("disk" in line and "what is stored is safe" in line for line in refused)
    if when.endswith("+"):
        assert refused
    else:
        assert len(refused) <= 1
    ledger = Ledger(url, clock=sandbox.now)
    deliver(ledger, sandbox)
    tally(fault, tried=0, needed_a_person=len(refused), varies=True)
    settled(ledger, sandbox, fault=fault, acknowledged=stored)
    ledger.close()


def test_a_flipped_byte_that_sqlite_sees_is_refused_in_a_sentence_and_the_file_left_as_it_is(tmp_path: Path) -> None:
    """SQLite keeps no checksums, so a flip inside a row's own bytes may go unseen: those are not counted here."""
    path, broken = tmp_path / "ledger.db", tmp_path / "broken.db"
    with_rows(path, 40)
    whole = path.read_bytes()
    refused = 0
    for place in (*range(100), *range(100, len(whole), 61)):
        for mask in (0xFF, 0x01):
            content = bytearray(whole)
            content[place] ^= mask
            for old in tmp_path.glob("broken.db*"):
                old.unlink()
            broken.write_bytes(content)
            refused += not is_usable(broken)
    assert refused > 50
    tally("a flipped byte that SQLite cannot read over", tried=refused, needed_a_person=refused, varies=True)


def with_rows(path: Path, count: int) -> None:
    ledger = Ledger(f"sqlite:///{path}")
    for number in range(count):
        ledger.record([reading(f"run-{number}")])
    ledger.close()


def reading(key: str) -> Entry:
    return Entry(key, "ai_tokens", 1, 1_800_000_000, ReadingState.RESOLVED, "cus_1")


WHAT_TO_DO = r"Restore a backup|writable|its own file|Upgrade the package"


def is_usable(path: Path) -> bool:
    """Whether something can be recorded; where not, the file is the same byte for byte, and the error says what to
    do."""
    before = path.read_bytes()
    ledger = Ledger(f"sqlite:///{path}")
    try:
        ledger.record([reading("new")])
    except LedgerError:
        with pytest.raises(LedgerError, match=WHAT_TO_DO):
            ledger.record([reading("new")])
        assert path.read_bytes() == before
        return False
    finally:
        ledger.close()
    return True


def test_what_cannot_be_read_is_never_repeated_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    ann = Reference("email", "ann@example.com")
    ledger.record([Entry("run", "ai_tokens", 1, 1_800_000_000, ReadingState.RECORDED, reference=ann)])
    ledger.close()
    path.write_bytes(path.read_bytes().replace(b"email:ann@", b"email:\xffnn@"))
    with pytest.raises(LedgerError, match="corrupt") as caught:
        views.tail(Ledger(f"sqlite:///{path}"))
    assert "example.com" not in str(caught.value)


def test_a_schema_that_never_was_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with_rows(path, 1)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE stripe_meter_version SET version_num = '0000'")
    assert not is_usable(path)


# -- full, and not to be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root with the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_what_was_stored_still_drains(small_disk: Path) -> None:
    path = small_disk / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    stored: list[str] = []

    def fill() -> None:
        for number in range(100_000):
            record(ledger, f"run-{number:060d}")
            stored.append(f"run-{number:060d}")

    with pytest.raises(LedgerError, match="Free some disk space"):
        fill()
    with ledger.read() as connection:
        assert list(connection.execute(select(readings.c.key).order_by(readings.c.id)).scalars()) == stored
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with ledger.deliver_lane().transaction() as connection:
        assert sealing.seal(connection, ledger.now())
    record(ledger, "after")
    assert len(list(views.every(ledger))) == len(stored) + 1
    ledger.close()
    tally("a full disk", needed_a_person=1)


def test_the_doctor_fails_a_disk_that_is_full_to_the_last_byte(small_disk: Path) -> None:
    url = f"sqlite:///{small_disk}/ledger.db"
    ledger = Ledger(url)
    record(ledger, "a")
    filler = small_disk / "filler"
    room = os.statvfs(small_disk)
    filler.write_bytes(b"x" * room.f_bavail * room.f_frsize)
    assert os.statvfs(small_disk).f_bavail == 0
    found = look(url)
    assert (found["state"], "Free some disk space" in found["said"]) == ("fail", True)
    filler.unlink()
    found = look(url)
    assert (found["state"], found["said"]) == ("ok", "writable: 1 pending, 0 delivered")
    ledger.close()


def look(url: str) -> dict[str, str]:
    """What the doctor finds of the ledger."""
    found = CliRunner().invoke(app, ["doctor", "--ledger", url, "--json"])
    (ledger,) = [one for one in json.loads(found.stdout) if one["what"] == "ledger"]
    return ledger


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A ledger that may be read and not written, in a folder that may not be written either."""
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    record(ledger, "a")
    ledger.close()
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    if os.access(path, os.W_OK):  # root may write anywhere
        commands = [
            ["mount", "--bind", str(tmp_path), str(tmp_path)],
            ["mount", "-o", "remount,ro,bind", str(tmp_path)],
        ]
        if any(subprocess.run(mount, capture_output=True, check=False).returncode for mount in commands):
            pytest.skip("root may write anywhere, and may not mount here")
    yield path
    subprocess.run(["umount", str(tmp_path)], capture_output=True, check=False)
    tmp_path.chmod(0o700)


def test_what_may_not_be_written_is_an_error_in_a_sentence_and_the_doctor_says_so(frozen: Path) -> None:
    url = f"sqlite:///{frozen}"
    with pytest.raises(LedgerError, match=r"read-only.*what it holds is safe") as caught:
        record(Ledger(url), "b")
    assert "Give" not in str(caught.value)  # another path would begin a second ledger
    found = look(url)
    assert (found["state"], "read-only" in found["said"]) == ("fail", True)
    exported = CliRunner().invoke(app, ["export", "--ledger", url])
    assert exported.exit_code == 2
    assert exported.stdout == ""
    tally("a file system that may not be written", needed_a_person=1)


def record(ledger: Ledger, key: str) -> None:
    ledger.record([Entry(key, "ai_tokens", 1, ledger.now(), ReadingState.RESOLVED, "cus_1")])
