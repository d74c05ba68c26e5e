"""Killed with kill -9 at every single statement: nothing acknowledged is lost, and nothing is billed twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from crashing import WHOLE, batches
from faults import deliver, settled, tally
from sqlalchemy import create_engine

from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.opening import VERSION_TABLE, migrate
from langchain_stripe_meter.ledger.schema import HEAD
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import RecordedRequest, StripeSandbox, delay, drop_request

Order = Callable[..., dict[str, Any]]


@pytest.fixture
def pid_file(quick_folder: Path) -> Path:
    """Where the child that works writes its process id."""
    return quick_folder / "pid"


@pytest.fixture
def order(pid_file: Path) -> Iterator[Order]:
    """Let a child of another process do something, and die at the n-th statement."""
    program = [sys.executable, "-W", "error", str(Path(__file__).with_name("crashing.py"))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def give(act: str, url: str, die_at: int = 0, sandbox: StripeSandbox | None = None) -> dict[str, Any]:
            what = {"act": act, "url": url, "die_at": die_at, "pid_file": str(pid_file)}
            stripe = {"key": sandbox.api_key, "stripe": sandbox.url} if sandbox else {}
            print(json.dumps({**what, **stripe}), file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            assert answer["code"] in (0, -signal.SIGKILL)
            return answer

        yield give
        process.stdin.close()


@contextmanager
def a_sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for name in ("cus_1", "cus_2", "cus_ann"):
            sandbox.create_customer(id=name, email="ann@example.com" if name == "cus_ann" else None)
        yield sandbox


def start_again(url: str, sandbox: StripeSandbox, acknowledged: list[str], fault: str, *, varies: bool = True) -> None:
    """What was acknowledged is there; the application repeats what was not, and everything is billed once."""
    ledger = Ledger(url, clock=sandbox.now)
    assert {row.identifier for row in views.every(ledger)}.issuperset(acknowledged)
    for batch in batches(ledger.now()):
        ledger.record(batch)
    deliver(ledger, sandbox)
    settled(ledger, sandbox, fault=fault, acknowledged=acknowledged, varies=varies)
    assert sandbox.billed("ai_tokens") == WHOLE
    ledger.close()


def sweep(order: Order, fresh: Callable[[], str], fault: str, first: int, step: int) -> int:
    """Die at the ``first`` statement, ``step`` later, ... until a child comes to its end. Returns how many died."""
    died = repeated = 0
    while True:
        url = fresh()
        with a_sandbox() as sandbox:
            answer = order("all", url, first + died * step, sandbox)
            start_again(url, sandbox, answer["acknowledged"], fault)
            repeated += sum(request.status == 400 for request in sandbox.requests)
        if not answer["code"]:
            assert repeated  # some died when Stripe had accepted and they had not noted it yet
            return died
        died += 1


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_killed_at_each_statement_of_recording_resolving_sealing_sending_and_settling(
    order: Order, quick_folder: Path, first: int
) -> None:
    """In four parts, each of which dies at every fourth statement."""
    template, path = quick_folder / "template", quick_folder / "ledger.db"
    ledger = Ledger(f"sqlite:///{template}")
    ledger.set_note("made", "1")
    ledger.close()

    def fresh() -> str:
        for old in quick_folder.glob("ledger.db*"):
            old.unlink()
        shutil.copy(template, path)
        return f"sqlite:///{path}"

    assert sweep(order, fresh, "kill -9 at each statement, from recording to settling (SQLite)", first, 4) > 20


def test_killed_at_every_third_statement_on_postgresql(order: Order, postgres_url: str) -> None:
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")

    def fresh() -> str:
        with engine.connect() as connection:
            connection.exec_driver_sql("TRUNCATE readings, events, leads, notes")
        return postgres_url

    assert sweep(order, fresh, "kill -9 at every third statement, from recording to settling (PostgreSQL)", 1, 3) > 20
    engine.dispose()


@pytest.mark.parametrize("first", ["", "0001"], ids=["of nothing", "of the first schema"])
def test_killed_at_each_statement_that_brings_a_ledger_up_to_date(order: Order, quick_folder: Path, first: str) -> None:
    template = quick_folder / "template"
    if first:
        engine = create_engine(f"sqlite:///{template}")
        with engine.begin() as connection:
            migrate(connection, first)
        engine.dispose()
    died = 0
    while True:
        path = quick_folder / f"{died}.db"
        if first:
            shutil.copy(template, path)
        url = f"sqlite:///{path}"
        answer = order("open", url, died + 1)
        old_or_new(path, first)
        ledger = Ledger(url)
        ledger.record(next(batches(ledger.now())))
        assert [row.identifier for row in views.tail(ledger)] == ["one"]
        ledger.close()
        tally("kill -9 at each statement of a migration", varies=True)
        if not answer["code"]:
            break
        died += 1
    assert died > 15


def old_or_new(path: Path, first: str) -> None:
    """The schema is whole or as it was."""
    if not path.exists():
        return
    with closing(sqlite3.connect(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables:
            assert tables >= {"readings", "events", "leads", "notes", VERSION_TABLE}
            [(version,)] = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()
            assert version in {HEAD, first}
            assert ("acts" in tables) == (version == HEAD)


@pytest.mark.parametrize("carried_out", [True, False], ids=["accepted", "not accepted"])
@pytest.mark.parametrize("post", [1, 2, 3, 4])
def test_killed_between_the_arrival_of_each_request_and_its_answer(
    order: Order, pid_file: Path, quick_folder: Path, post: int, carried_out: bool
) -> None:
    """The sandbox kills the sender when its request has arrived, and only then carries it out, or does not."""
    url = f"sqlite:///{quick_folder}/ledger.db"
    arrived: list[RecordedRequest] = []

    def kill_the_sender(request: RecordedRequest) -> bool:
        arrived.append(request)
        if len(arrived) != post:
            return False
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        return True

    with a_sandbox() as sandbox:
        sandbox.fail(delay(0) if carried_out else drop_request(), where=kill_the_sender)
        answer = order("all", url, 0, sandbox)
        assert answer["code"] == -signal.SIGKILL
        assert len(answer["acknowledged"]) == 4
        sandbox.clear_faults()
        fault = "kill -9 between a request's arrival at Stripe and its answer"
        start_again(url, sandbox, answer["acknowledged"], fault, varies=False)
        assert [request.status for request in sandbox.requests].count(400) == carried_out
