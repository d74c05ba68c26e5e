"""The epoch's file beside a ledger: what it and the ledger may say, kills between the two, and several at once."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from restored_shop import Shop, killed
from sqlalchemy import event

from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.epoch import Epoch, Sidecar, compare, sidecar_path


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.ledger.close()
    shop.sandbox.stop()


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ("", None, None),
        ("", Sidecar("", "", 0), None),  # only recorded into
        ("a", Sidecar("", "", 0), "restored from a backup"),
        ("", Sidecar("", "a", 1), None),  # killed in the very first change
        ("a", Sidecar("", "a", 1), None),  # killed before it was confirmed
        ("a", Sidecar("a", "b", 1), None),  # killed before the database changed
        ("b", Sidecar("a", "b", 1), None),
        ("a", Sidecar("a", "", 1), None),
        ("a", Sidecar("b", "", 1), "restored from a backup"),
        ("a", Sidecar("b", "c", 1), "restored from a backup"),
        ("a", Sidecar("?", "c", 1), "restored from a backup"),
        ("a", None, "without its .epoch file"),
        ("", Sidecar("a", "", 1), "an earlier one was here"),
        ("", Sidecar("a", "b", 1), "an earlier one was here"),
    ],
)
def test_what_the_two_places_may_say(ours: str, theirs: Sidecar | None, found: str | None) -> None:
    said = compare(ours, theirs)
    assert said is None if found is None else found in str(said)


DYING = """
import os, signal, sys
from sqlalchemy import Engine
from sqlalchemy.event import listen
from langchain_stripe_meter.ledger.epoch import Epoch
from langchain_stripe_meter.ledger.store import Ledger

left = 0
def die(event, *_):
    global left
    if left and event in ("open", "os.rename", "os.remove"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
listen(Engine, "before_cursor_execute", lambda *_: die("open"))

def child(at):
    global left
    ledger, said = Ledger(sys.argv[1]), []
    watched = Epoch(ledger, said.append)
    left = at
    watched.begin()
    left = 0
    return 3 if said else 0

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = child(int(line))
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Each line of its input is a step at which a child of it dies: a statement, or an act on the file (0: at none)."""
ALARM = 3


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Callable[[int], int]]:
    """Begin an epoch in a process of its own that is killed at a step; its exit code."""
    command = [sys.executable, "-W", "error", "-c", DYING, f"sqlite:///{tmp_path}/ledger.db"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def begin(die_at: int) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{die_at}\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            assert code in (0, ALARM, -signal.SIGKILL)
            return code

        yield begin
        assert process.stdin is not None
        process.stdin.close()


def test_killed_anywhere_while_the_epoch_changes_raises_no_alarm(dying: Callable[[int], int]) -> None:
    at = 1
    while dying(at):
        assert dying(0) == 0
        at += 1
    assert at > 10


def test_killed_anywhere_while_a_ledger_is_made_and_its_first_epoch_begins_raises_no_alarm(
    dying: Callable[[int], int], shop: Shop
) -> None:
    at, code = 0, -signal.SIGKILL
    while code:
        at += 1
        shop.ledger.close()
        for file in shop.path.parent.iterdir():
            file.unlink()
        code = dying(at)
        assert dying(0) == 0
    assert at > 10


def test_killed_anywhere_while_a_restore_is_noticed_does_not_forget_it(shop: Shop, dying: Callable[[int], int]) -> None:
    shop.send_since_a_backup()
    shop.sandbox.advance(hours=30)
    genuine, at, code = shop.sidecar.read_bytes(), 0, -signal.SIGKILL
    while code < 0:
        at += 1
        shop.restore()
        shop.sidecar.write_bytes(genuine)
        code = dying(at)
        assert dying(0) in (0, ALARM)
        assert "restored from a backup" in str(views.status(shop.ledger).restored)
        shop.deliver(until=lambda: shop.states()["second"] == "doubtful")
        assert shop.billed() == ["first", "second"]
    assert code == ALARM
    assert at > 10


def test_the_file_is_its_owners_alone_and_says_nothing_of_anybody(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    assert stat.S_IMODE(shop.sidecar.stat().st_mode) == 0o600
    found = json.loads(shop.sidecar.read_text())
    assert set(found) == {"epoch", "next", "at", "sent"}
    assert found["epoch"] == shop.ledger.note("epoch")


@pytest.mark.parametrize("when", ["always", "later"])
def test_where_the_file_cannot_be_written_usage_is_recorded_and_sent_and_it_is_told_once(shop: Shop, when: str) -> None:
    if when == "later":
        shop.record("early")
        shop.deliver()
    (shop.path.parent / "ledger.db.epoch.new").mkdir()  # root may write anywhere, but not over a folder
    for number in range(3):
        shop.record(f"run-{number}")
        shop.sandbox.advance(seconds=100)
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    courier = Courier(shop.ledger, gateway, on_error=shop.errors.append)
    wait_until(lambda: (courier.turn(), set(shop.states().values()) == {"delivered"})[1])
    shop.record("late")
    shop.sandbox.advance(seconds=100)
    wait_until(lambda: (courier.turn(), set(shop.states().values()) == {"delivered"})[1])
    courier.close(5)
    gateway.close()
    (told,) = shop.told
    assert "would not be noticed" in told
    (shop.path.parent / "ledger.db.epoch.new").rmdir()
    shop.record("writable-again")
    shop.deliver()
    assert len(shop.told) == 1
    assert shop.sidecar.exists()


def test_a_restore_is_dealt_with_even_where_the_file_cannot_be_written(shop: Shop) -> None:
    shop.send_since_a_backup()
    shop.sandbox.advance(hours=30)
    shop.restore()
    (shop.path.parent / "ledger.db.epoch.new").mkdir()
    shop.deliver()
    assert shop.states()["second"] == "doubtful"
    assert shop.billed() == ["first", "second"]


def test_a_file_of_rubbish_counts_as_another_ledgers(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    shop.sidecar.write_text("{")
    shop.record("second")
    shop.deliver()
    assert "restored" in shop.told[0]
    assert shop.billed() == ["first", "second"]


# -- several at once


def test_couriers_of_many_processes_raise_no_alarm(shop: Shop) -> None:
    code = (
        "import sys\n"
        "from langchain_stripe_meter.ledger.epoch import Epoch\n"
        "from langchain_stripe_meter.ledger.store import Ledger\n"
        "said = []\n"
        "ledger = Ledger(sys.argv[1])\n"
        "print(flush=True); sys.stdin.readline()\n"
        "for _ in range(40):\n"
        "    Epoch(ledger, said.append).begin()\n"
        "print(said or '')"
    )
    url = f"sqlite:///{shop.path}"
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([sys.executable, "-c", code, url], stdin=pipe, stdout=pipe, text=True) for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    said = [worker.communicate(timeout=100)[0] for worker in workers]
    assert said == ["\n"] * 4


def test_forked_children_raise_no_alarm_and_begin_epochs_of_their_own(shop: Shop) -> None:
    shop.record("first")
    shop.deliver()
    gateway = Gateway(shop.sandbox.api_key, api_base=shop.sandbox.url)
    courier = Courier(shop.ledger, gateway, on_error=shop.errors.append)
    courier.turn()
    before = shop.ledger.note("epoch")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            shop.record("of-the-child")
            while "of-the-child" not in shop.states() or shop.states()["of-the-child"] != "delivered":
                courier.turn()
            courier.close(5)
            code = 7 if shop.errors else 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert shop.ledger.note("epoch") != before
    shop.record("second")
    wait_until(lambda: (courier.turn(), set(shop.states().values()) == {"delivered"})[1])
    courier.close(5)
    gateway.close()
    assert shop.told == []
    assert shop.billed() == ["first", "of-the-child", "second"]


def test_the_epoch_changes_while_sending_goes_on_and_rests_otherwise(shop: Shop) -> None:
    seen: list[str] = []
    watched = Epoch(shop.ledger)
    for second in range(0, 600, 5):
        watched.keep(shop.ledger.now() + second)
        if second < 300:
            watched.sends()
        seen.append(str(shop.ledger.note("epoch")))
    assert 5 <= len(set(seen[:61])) <= 7
    assert len(set(seen[73:])) == 1


def test_that_something_may_have_been_sent_is_noted_before_its_claim_is_stored(shop: Shop) -> None:
    """Else a ledger that is busy in between would leave a claim that nobody sends."""
    noted: list[bool] = []

    def when_stored(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement == "COMMIT" and not noted and "sending" in shop.states().values():
            known = Sidecar.read(shop.sidecar)
            noted.append(known is not None and known.sent)

    event.listen(shop.ledger.database.engine, "after_cursor_execute", when_stored)
    shop.record("run")
    shop.deliver()
    assert noted == [True]


def test_sending_marks_an_epoch_once(shop: Shop) -> None:
    with killed(shop) as send:
        shop.record("first")
        send()
        marked = shop.sidecar.read_bytes()
        assert json.loads(marked)["sent"]
        shop.record("second")
        send()
        assert shop.sidecar.read_bytes() == marked


def test_the_sidecar_is_beside_the_database(shop: Shop) -> None:
    assert sidecar_path(shop.ledger) == shop.sidecar
