"""Leads: what is captured for a session pays for it, from then on or from its first message, exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_invariant, wait_until
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from sqlalchemy import event, func, select

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, first_of, from_lead, from_metadata
from langchain_stripe_meter.core.customers import Facts, FirstOf
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.core.states import STALE_AFTER, ReadingState
from langchain_stripe_meter.core.tenants import lead_session, session_digest
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger.keeping import DAY, Pruned, prune
from langchain_stripe_meter.ledger.leads import UNKNOWN_AMOUNT, Leads
from langchain_stripe_meter.ledger.schema import leads, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


class Desk:
    """A sandbox with Ann as a customer, and handlers on one ledger that goes by the sandbox's clock."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sandbox = StripeSandbox().start()
        self.sandbox.create_meter("tokens")
        self.ann = self.sandbox.create_customer(email="ann@example.com", phone="+4930901820")
        self.handlers: list[StripeMeterCallbackHandler] = []
        self.ledger = Ledger(url, clock=self.sandbox.now)

    def handler(self, *meters: Meter, **options: Any) -> StripeMeterCallbackHandler:
        from langchain_stripe_meter.gateway.client import Gateway

        gateway = Gateway(self.sandbox.api_key, api_base=self.sandbox.url)
        usual = {"customer": from_lead(), "ledger": self.url, "stripe": gateway.client, "clock": self.sandbox.now}
        made = StripeMeterCallbackHandler(*meters or (Tokens("tokens"),), **{**usual, **options})
        self.handlers.append(made)
        return made

    def billed(self) -> dict[str, Decimal]:
        for handler in self.handlers:
            assert handler.flush(60).pending == 0
        return self.sandbox.billed("tokens")

    def states(self) -> dict[str, int]:
        query = select(readings.c.state, func.count()).group_by(readings.c.state)
        with self.ledger.read() as connection:
            return dict(iter(connection.execute(query)))

    def close(self) -> None:
        for handler in self.handlers:
            handler.close()
        assert_invariant(self.ledger, self.sandbox)
        self.ledger.close()
        self.sandbox.stop()


@pytest.fixture
def desk(url: str) -> Iterator[Desk]:
    desk = Desk(url)
    yield desk
    desk.close()


def chat(handler: StripeMeterCallbackHandler, session: str = "s1", **metadata: Any) -> None:
    message = AIMessage("Hi", usage_metadata=USAGE)  # type: ignore[arg-type]
    config = {"callbacks": [handler], "metadata": {"session_id": session, **metadata}}
    GenericFakeChatModel(messages=iter([message])).invoke("Hello", config)  # type: ignore[arg-type]


def job(handler: StripeMeterCallbackHandler, id: str, session: str = "s1", tokens: int = 1, **more: Any) -> None:
    handler.record_usage({"input_tokens": tokens}, id=id, metadata={"session_id": session}, **more)


# -- from now, or from the first message


def test_a_lead_pays_from_now_and_never_for_what_was_skipped(desk: Desk) -> None:
    handler = desk.handler()
    chat(handler)
    assert handler.leads.capture("s1", email="ann@example.com") == 0
    chat(handler)
    assert desk.billed() == {desk.ann: 15}
    assert desk.states() == {"skipped": 1, "sealed": 1}


def test_a_lead_pays_from_the_first_message_for_its_own_session_and_once(desk: Desk) -> None:
    handler = desk.handler()
    for session in ("s1", "s1", "another"):
        chat(handler, session)
    assert handler.leads.capture("s1", email="ann@example.com", bill_from="first_message") == 2
    assert handler.leads.capture("s1", email="ann@example.com", bill_from="first_message") == 0
    assert handler.leads.capture("s1", email="bob@example.com", bill_from="first_message") == 0
    assert desk.billed() == {desk.ann: 30}
    assert desk.states() == {"skipped": 1, "sealed": 2}


def test_what_was_skipped_can_be_claimed_after_a_capture_that_left_it(desk: Desk) -> None:
    handler = desk.handler()
    chat(handler)
    handler.leads.capture("s1", email="ann@example.com")
    assert handler.leads.capture("s1", name="Ann", bill_from="first_message") == 1
    assert desk.billed() == {desk.ann: 15}


def test_asynchronous_runs_are_claimed_too(desk: Desk) -> None:
    handler = desk.handler()

    async def talk() -> int:
        message = AIMessage("Hi", usage_metadata=USAGE)  # type: ignore[arg-type]
        model = GenericFakeChatModel(messages=iter([message] * 5))
        config: Any = {"callbacks": [handler], "metadata": {"thread_id": "s1"}}
        await asyncio.gather(*(model.ainvoke("Hello", config) for _ in range(5)))
        return await handler.leads.acapture("s1", email="ann@example.com", bill_from="first_message")

    assert asyncio.run(talk()) == 5
    assert desk.billed() == {desk.ann: 75}


def test_the_field_that_the_handler_reads_decides_who_is_billed(desk: Desk) -> None:
    handler = desk.handler(customer=first_of(from_metadata("cid"), from_lead("phone", region="DE"), from_lead("email")))
    chat(handler)
    assert handler.leads.capture("s1", name="Ann", bill_from="first_message") == 0
    captured = handler.leads.capture("s1", email="bob@example.com", phone="030 901820", bill_from="first_message")
    assert captured == 1
    assert desk.billed() == {desk.ann: 15}


def test_what_another_handler_skipped_is_claimed_by_what_that_one_reads(desk: Desk) -> None:
    """Two products on one ledger, and a lead's address is not the customer of who goes by the number."""
    mails, phones = desk.handler(), desk.handler(customer=from_lead("phone"))
    chat(mails)
    chat(phones)
    lead: Any = {"email": "bob@example.com", "bill_from": "first_message"}
    assert mails.leads.capture("s1", **lead) == 1
    assert desk.states() == {"recorded": 1, "skipped": 1}
    assert mails.leads.capture("s1", **lead, phone="+4930901820") == 1
    assert desk.billed() == {desk.ann: 15}
    (held,) = mails.held()
    assert held.reference == "email:bob@example.com"


def test_a_number_without_a_country_is_read_in_the_region_that_is_given(desk: Desk) -> None:
    handler = desk.handler(customer=from_lead("phone"))
    with pytest.raises(ConfigurationError, match="region=") as refused:
        handler.leads.capture("s1", phone="030 901820")
    assert "901820" not in str(refused.value).replace("+49 30 901820", "")
    handler.leads.capture("s1", phone="030 901820", region="DE")
    assert handler.leads.find("s1") == {"phone": "+4930901820"}


def test_the_session_of_one_account_is_not_that_of_another(desk: Desk) -> None:
    leads = Leads(desk.ledger)
    facts: dict[str, Any] = {
        "value": Decimal(1),
        "at": desk.ledger.now(),
        "state": ReadingState.SKIPPED,
        "session": "s",
    }
    facts["reads"] = ("email",)
    leads.record([Entry(f"k{account}", "tokens", **facts, account=account) for account in ("", "acct_1")])
    leads.capture("s", email="ann@example.com", account="acct_1")
    assert (leads.find("s"), leads.find("s", "acct_1")) == (None, {"email": "ann@example.com"})
    assert leads.capture("s", email="bob@example.com", account="acct_2", bill_from="first_message") == 0
    assert leads.capture("s", email="bob@example.com", bill_from="first_message") == 1
    with desk.ledger.read() as connection:
        rows = connection.execute(select(readings.c.account, readings.c.reference))
        told = dict(iter(rows))
    assert told == {"": "email:bob@example.com", "acct_1": None}


def test_claimed_usage_that_stripe_would_no_longer_take_is_held(desk: Desk) -> None:
    handler = desk.handler()
    job(handler, "old", at=desk.sandbox.now() - STALE_AFTER + 600)
    desk.sandbox.advance(seconds=3600)
    assert handler.leads.capture("s1", email="ann@example.com", bill_from="first_message") == 1
    assert desk.billed() == {}
    (held,) = handler.held()
    assert "34 days" in held.reason


def test_a_claimed_reading_without_an_amount_waits_for_one(desk: Desk) -> None:
    handler = desk.handler(on_missing_usage="hold")
    GenericFakeChatModel(messages=iter(["Hi"])).invoke(
        "Hello", {"callbacks": [handler], "metadata": {"session_id": "s1"}}
    )
    assert desk.states() == {"skipped": 1}
    assert handler.leads.capture("s1", email="ann@example.com", bill_from="first_message") == 1
    (held,) = handler.held()
    assert (held.value, held.reason) == (None, UNKNOWN_AMOUNT)
    handler.assign(held, desk.ann, 7)
    assert desk.billed() == {desk.ann: 7}


# -- whose session it is, and what is kept of it


def test_only_the_digest_of_a_session_is_kept_and_only_where_a_lead_could_pay(desk: Desk) -> None:
    chat(desk.handler(), "secret-session")
    chat(desk.handler(customer=from_metadata("cid")), "secret-session")
    chat(desk.handler(), "")
    with desk.ledger.read() as connection:
        kept = connection.execute(select(readings.c.session).order_by(readings.c.id)).scalars().all()
    assert kept == [session_digest("", "secret-session"), None, None]
    assert session_digest("a", "bc") != session_digest("ab", "c")


def test_on_a_server_only_the_servers_own_thread_can_be_claimed() -> None:
    facts = Facts({"session_id": "victim", "thread_id": "own"}, on_server=True)
    assert lead_session(from_lead(), facts) == "own"
    assert lead_session(from_lead(), Facts({"session_id": "victim"}, on_server=True)) is None
    assert lead_session(from_lead(trust_client=True), facts) == "victim"
    assert lead_session(first_of(from_lead(trust_client=True), from_lead("phone")), facts) == "own"
    assert lead_session(FirstOf((from_metadata("cid"),)), facts) is None


@pytest.mark.parametrize("session", ["", "x" * 256, "a\0b", "\ud800", 7])
def test_a_session_that_cannot_be_one_is_refused_when_captured_and_nobodys_when_run(desk: Desk, session: Any) -> None:
    handler = desk.handler()
    with pytest.raises(ConfigurationError, match="1 to 255"):
        handler.leads.capture(session, email="ann@example.com")
    chat(handler, session)
    assert desk.billed() == {}
    assert handler.status().unrecorded == 0
    assert not handler.leads.forget(session)


def test_what_cannot_be_captured_is_refused_and_changes_nothing(desk: Desk) -> None:
    handler = desk.handler()
    with pytest.raises(ConfigurationError, match="bill_from='yesterday'"):
        handler.leads.capture("s1", email="ann@example.com", bill_from="yesterday")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="region='Germany'"):
        handler.leads.capture("s1", phone="030 901820", region="Germany")
    with pytest.raises(ConfigurationError, match="at least one"):
        handler.leads.capture("s1")
    fixed = desk.handler(customer="cus_1")
    with pytest.raises(ConfigurationError, match="from_lead"):
        fixed.leads.capture("s1", email="ann@example.com", bill_from="first_message")
    assert handler.leads.find("s1") is None


# -- races and crashes


def test_a_run_that_ends_while_its_lead_is_captured_is_billed_from_either_side(desk: Desk) -> None:
    """It found no lead, and before it is stored the lead is captured: nothing may slip in between."""
    leads, now = Leads(desk.ledger), desk.ledger.now()
    waits: Any = {"reason": "x", "session": "s1", "reads": ("email",)}
    decided = Entry("run", "tokens", Decimal(3), now, ReadingState.SKIPPED, **waits)
    leads.capture("s1", email="ann@example.com", bill_from="first_message")
    (stored,) = leads.record([decided])
    assert (stored.state, stored.session) == (ReadingState.RECORDED, None)
    desk.handler()
    assert desk.billed() == {desk.ann: 3}


def test_threads_that_record_while_a_lead_is_captured_lose_nothing(desk: Desk) -> None:
    handlers = [desk.handler(), desk.handler()]
    start = threading.Barrier(9)

    def record(number: int) -> None:
        start.wait()
        for turn in range(10):
            job(handlers[number % 2], f"{number}-{turn}")

    def capture() -> int:
        start.wait()
        return handlers[0].leads.capture("s1", email="ann@example.com", bill_from="first_message")

    with ThreadPoolExecutor(9) as pool:
        done = [pool.submit(record, number) for number in range(8)]
        pool.submit(capture).result()
        for one in done:
            one.result()
    assert desk.billed() == {desk.ann: 80}
    assert desk.states() == {"sealed": 80}


def test_on_postgresql_a_capture_waits_for_a_run_that_is_just_being_stored(postgres_url: str) -> None:
    """The run has looked for its lead and is not yet stored; another process captures at that moment."""
    one, other = Ledger(postgres_url), Ledger(postgres_url)
    looked, stored_or_waiting = threading.Event(), threading.Event()

    def before(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO readings"):
            looked.set()
            assert stored_or_waiting.wait(60)

    event.listen(one.database.engine, "before_cursor_execute", before)
    entry = Entry("run", "tokens", Decimal(1), 1_800_000_000, ReadingState.SKIPPED, session="s1", reads=("email",))

    def capture() -> int:
        try:
            return Leads(other).capture("s1", email="ann@example.com", bill_from="first_message")
        finally:
            stored_or_waiting.set()

    def somebody_waits() -> bool:
        with other.read() as connection:
            return bool(connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar())

    with ThreadPoolExecutor(2) as pool:
        stored = pool.submit(Leads(one).record, [entry])
        assert looked.wait(60)
        captured = pool.submit(capture)
        wait_until(lambda: stored_or_waiting.is_set() or somebody_waits())
        stored_or_waiting.set()
        assert (len(stored.result()), captured.result()) == (1, 1)
    one.close()
    other.close()


CLERK = """
import os, signal, sys
from sqlalchemy import event
from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_lead

act, url, name = sys.argv[1:]
handler = StripeMeterCallbackHandler(Tokens("tokens"), customer=from_lead(), ledger=url, deliver=False)

def record():
    for number in range(20):
        handler.record_usage({"input_tokens": 1}, id=f"{name}-{number}", metadata={"session_id": "s1"})

if act in ("before", "after"):
    def crash(connection, cursor, statement, *_):
        if statement == "COMMIT":
            os.kill(os.getpid(), signal.SIGKILL)
    event.listen(handler._ledger.database.engine, f"{act}_cursor_execute", crash)
else:
    print("ready", flush=True)
    sys.stdin.readline()
    record()
print(handler.leads.capture("s1", email="ann@example.com", bill_from="first_message"), flush=True)
if act == "both":
    name += "-more"
    record()
"""


def clerk(act: str, url: str, name: str = "run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CLERK, act, url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


def test_two_processes_that_record_and_capture_bill_everything_once(desk: Desk) -> None:
    desk.handler().flush()
    clerks = [clerk("both", desk.url, name) for name in "ab"]
    for one in clerks:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in clerks:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in clerks:
        one.communicate(timeout=60)
        assert one.returncode == 0
    assert desk.billed() == {desk.ann: 80}
    assert desk.states() == {"sealed": 80}


@pytest.mark.parametrize(("crash", "billed"), [("before", 0), ("after", 15)])
def test_a_crash_while_capturing_leaves_all_or_nothing(desk: Desk, crash: str, billed: int) -> None:
    handler = desk.handler()
    chat(handler)
    one = clerk(crash, desk.url)
    one.communicate(timeout=60)
    assert one.returncode == -signal.SIGKILL
    assert (handler.leads.find("s1") is not None) == bool(billed)
    assert desk.billed() == ({desk.ann: billed} if billed else {})
    assert handler.leads.capture("s1", email="ann@example.com", bill_from="first_message") == (0 if billed else 1)
    assert desk.billed() == {desk.ann: 15}


# -- for how long


def test_a_lead_that_nothing_has_asked_for_in_a_year_is_pruned(desk: Desk) -> None:
    handler = desk.handler()
    for session in ("s1", "s2"):
        handler.leads.capture(session, email="ann@example.com")
    desk.sandbox.advance(days=200)
    job(handler, "job-1", session="s1")
    assert desk.billed() == {desk.ann: 1}
    desk.sandbox.advance(days=200)
    assert prune(desk.ledger, older_than_days=300) == Pruned(leads=1)
    assert handler.leads.find("s2") is None
    job(handler, "job-2", session="s1")
    assert desk.billed() == {desk.ann: 2}


def test_that_a_lead_was_asked_for_is_noted_once_a_day(desk: Desk) -> None:
    known, seen = Leads(desk.ledger), []
    known.capture("s", email="ann@example.com")
    for _ in range(4):
        desk.sandbox.advance(seconds=DAY // 2 + 1)
        assert known.find("s") == {"email": "ann@example.com"}
        with desk.ledger.read() as connection:
            seen.append(connection.execute(select(leads.c.captured_at)).scalar_one())
    assert len(set(seen)) == 3


def test_a_lead_is_found_also_where_that_cannot_be_noted(tmp_path: Path) -> None:
    now = [1_800_000_000]
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db?timeout=0", clock=lambda: now[0])
    Leads(ledger).capture("s", email="ann@example.com")
    now[0] += 2 * DAY
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        assert Leads(ledger).find("s") == {"email": "ann@example.com"}
    ledger.close()


def test_a_run_that_asks_for_a_lead_waits_for_nobody_who_reads_the_ledger(url: str) -> None:
    ledger = Ledger(url)
    known = Leads(ledger)
    known.capture("thread-1", email="ann@example.com")
    with ThreadPoolExecutor(1) as pool, ledger.read() as connection:
        connection.execute(select(readings))
        assert pool.submit(known.find, "thread-1").result(timeout=30) == {"email": "ann@example.com"}
    ledger.close()
