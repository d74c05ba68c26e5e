"""The command line, as a person and as a script use it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import stripe
from conftest import wait_until
from sqlalchemy import update
from typer.testing import CliRunner, Result

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_lead, list_meters, static
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.cli.shared import in_commands
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.schema import HEAD, events
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, refuse

COMMAND = str(Path(sys.executable).with_name("stripe-meter"))


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("STRIPE_METER_LEDGER", f"sqlite:///{tmp_path}/l.db")
        sandbox.create_meter("ai_tokens")
        sandbox.create_customer(id="cus_1", email="ann@example.com")
        yield sandbox


@pytest.fixture
def recorded(sandbox: StripeSandbox) -> None:
    """One reading of a known customer, and one of somebody whom Stripe does not know."""
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_1", deliver=False) as handler:
        handler.record_usage({"input_tokens": 100}, id="job-1")
        handler.record_usage(
            {"input_tokens": 7}, id="job-2", customer=from_lead(), metadata={"lead": {"email": "bob@example.com"}}
        )


def test_a_lead_is_captured_from_the_first_message_by_what_the_handler_reads(sandbox: StripeSandbox) -> None:
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer=from_lead(), deliver=False) as handler:
        handler.record_usage({"input_tokens": 5}, id="job", metadata={"session_id": "chat-1"})
    found = as_json("leads", "capture", "chat-1", "--email", "ann@example.com", "--from-first-message")
    assert found["claimed"] == 1
    call("deliver", "--once")
    assert sandbox.billed("ai_tokens", "cus_1") == 5


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


def test_what_was_only_recorded_is_delivered_by_another_process(sandbox: StripeSandbox, recorded: None) -> None:
    assert as_json("status")["pending"] == 2
    assert "1 delivered" in call("deliver", "--once").stdout
    assert as_json("status")["delivered"] == 1
    assert sandbox.billed("ai_tokens", "cus_1") == 100


def test_a_person_settles_what_is_held(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    (held,) = as_json("held")
    assert held["reference"] == "email:bob@example.com"
    assert "no customer" in held["reason"]
    bob = sandbox.create_customer(email="bob@elsewhere.example")
    assert as_json("assign", str(held["ids"][0]), "--customer", bob) == {"moved": 1, "asked": 1}
    call("deliver", "--once")
    assert sandbox.billed("ai_tokens", bob) == 7
    assert "Nothing is held" in call("held").stdout


def test_retry_finds_a_customer_who_has_come_to_exist(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    bob = sandbox.create_customer(email="bob@example.com")
    assert "1 will be tried again" in call("retry").stdout
    call("deliver", "--once")
    assert sandbox.billed("ai_tokens", bob) == 7


def test_deliver_says_with_its_exit_code_that_something_is_still_pending(
    sandbox: StripeSandbox, recorded: None
) -> None:
    with sandbox.outage():
        result = call("deliver", "--once", "--timeout", "0.5", "--json", code=1)
    assert json.loads(result.stdout)["pending"] == 2
    assert "Not everything could be sent: Stripe did not let us read the account: HTTP 503" in result.stderr
    assert "It is kept; run this again later." in result.stderr


def test_what_a_sandbox_cannot_make_a_customer_of_is_named() -> None:
    said = call("sandbox", "--port", "0", "--customer", "ann", code=2).stderr
    assert "--customer ann: give an e-mail" in " ".join(said.split())


def test_deliver_with_a_timeout_says_so_too(sandbox: StripeSandbox, recorded: None) -> None:
    with sandbox.outage():
        assert "Not everything could be sent" in call("deliver", "--timeout", "0.5", code=1).stderr


def test_deliver_says_when_stripe_refused_the_key(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    sandbox.revoke(sandbox.api_key)

    def stop_once_it_is_noticed() -> None:
        ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
        wait_until(lambda: views.status(ledger).paused)
        ledger.close()
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop_once_it_is_noticed)
        assert "401" in call("deliver", "--once", "--timeout", "100", code=1).stderr
        stopped.result()


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_deliver_once_fails_where_another_process_holds_the_ledger(
    sandbox: StripeSandbox, tmp_path: Path, begin: str
) -> None:
    StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_1", deliver=False).close()
    holder = sqlite3.connect(tmp_path / "l.db", isolation_level=None)
    holder.execute(begin)
    result = call("deliver", "--once", "--ledger", f"sqlite:///{tmp_path}/l.db?timeout=0", code=1)
    holder.close()
    assert "Another process holds it" in result.stderr
    assert "pending" not in result.stdout
    call("deliver", "--once")


def test_deliver_once_sends_all_that_was_held_for_a_meter_that_is_there_now(sandbox: StripeSandbox) -> None:
    with StripeMeterCallbackHandler(Tokens("newm"), customer="cus_1", deliver=False) as handler:
        for number in range(12):
            handler.record_usage({"input_tokens": 1}, id=f"job-{number}")
    assert as_json("deliver", "--once")["held"] == 12
    assert as_json("deliver", "--once")["held"] == 12
    call("meters", "create", "newm")
    done = as_json("deliver", "--once")
    assert (done["delivered"], done["pending"], done["held"]) == (12, 0, 0)
    assert sandbox.billed("newm", "cus_1") == 12


def test_deliver_once_looks_again_at_whoever_is_due(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    call("deliver", "--once")
    bob = sandbox.create_customer(email="bob@example.com")
    assert as_json("deliver", "--once")["held"] == 1  # looked at seconds ago
    with sqlite3.connect(tmp_path / "l.db") as ledger:
        ledger.execute("UPDATE readings SET due = 1 WHERE state = 'held'")
    ledger.close()
    assert as_json("deliver", "--once")["delivered"] == 1
    assert sandbox.billed("ai_tokens", bob) == 7


def test_a_courier_that_is_started_first_makes_the_ledger(
    sandbox: StripeSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fleet").mkdir()
    monkeypatch.chdir(tmp_path / "fleet")
    monkeypatch.setenv("STRIPE_METER_LEDGER", "sqlite:///first.db")
    result = call("deliver", "--once", "--meter", "ai_tokens", code=1)
    assert f"Nothing to deliver: there is no ledger at {tmp_path}/fleet/first.db yet" in result.stderr
    assert list(Path().iterdir()) == []
    process = subprocess.Popen([COMMAND, "deliver", "--meter", "ai_tokens"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert f"makes it: {tmp_path}/fleet/first.db" in process.stderr.readline()
    wait_until(lambda: Path("first.db.epoch").exists())
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_1", deliver=False) as handler:
        handler.record_usage({"input_tokens": 100}, id="job-1")
    wait_until(lambda: sandbox.billed("ai_tokens", "cus_1") == 100)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_deliver_fails_when_stripe_refused_an_event_for_good(sandbox: StripeSandbox, recorded: None) -> None:
    sandbox.fail(refuse(400, message="The value is no number."))
    assert "1 rejected" in call("deliver", "--once", code=1).stdout


def test_deliver_rolls_up_what_has_waited_long_enough(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once", "--roll-up", "1")
    assert sandbox.billed("ai_tokens", "cus_1") == 100


def test_deliver_gives_the_signal_handlers_back(sandbox: StripeSandbox, recorded: None) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    call("deliver", "--once")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_deliver_goes_on_until_sigterm_and_ends_well(sandbox: StripeSandbox, recorded: None) -> None:
    process = subprocess.Popen([COMMAND, "deliver"], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: sandbox.billed("ai_tokens", "cus_1") == 100)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "1 delivered, 0 rejected, 0 pending, 1 held, 0 doubtful.\n"


def test_a_run_of_held_readings_is_shown_and_assigned_as_a_range(sandbox: StripeSandbox) -> None:
    with StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer=static(email="bob@example.com"), deliver=False
    ) as handler:
        for number in range(30):
            handler.record_usage({"input_tokens": 1}, id=f"job-{number}")
    call("deliver", "--once")
    assert "1 of 1 reading will" in call("assign", "30", "--customer", "cus_1").stdout
    assert "1-29" in call("held").stdout
    assert "29 of 29 readings" in call("assign", "1-12", "13", "14-29", "--customer", "cus_1").stdout
    call("deliver", "--once")
    assert sandbox.billed("ai_tokens", "cus_1") == 30


def test_held_shows_the_connected_account_where_there_is_one(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    assert "account" not in call("held").stdout.splitlines()[0]
    sandbox.connect("acct_1Other").create_meter("ai_tokens")
    with StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer=static(email="bob@example.com"), stripe_account="acct_1Other", deliver=False
    ) as handler:
        handler.record_usage({"input_tokens": 9}, id="job-3")
    call("deliver", "--once")
    assert [line.split()[0] for line in call("held").stdout.splitlines() if "acct_1Other" in line] == ["3"]
    assert [one["account"] for one in as_json("held")] == ["", "acct_1Other"]
    assert "acct_1Other and the key's own" in call("assign", "2-3", "--customer", "cus_1", code=2).stderr


def test_assign_says_what_is_missing_or_no_id(sandbox: StripeSandbox, recorded: None) -> None:
    assert "--customer" in call("assign", "2", code=2).stderr
    assert "'two'" in call("assign", "two", "--customer", "cus_1", code=2).stderr
    assert "no reading 999" in call("assign", "999", "--customer", "cus_1", code=2).stderr
    assert "reading 1 (" in (said := call("assign", "1", "--customer", "cus_1", code=2).stderr)
    assert "is resolved, not held" in said


@pytest.mark.parametrize("command", [["assign", "--customer", "cus_1"], ["retime"], ["write-off", "--reason", "x"]])
@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ("7-3", "'7-3' ends before it begins. Give 3-7."),
        ("1-99999999999999", "'1-99999999999999' is more than 100,000 readings. Give fewer at a time."),
        ("99999999999999999999", "'99999999999999999999'"),
    ],
)
def test_a_range_that_can_only_be_a_slip_is_refused(
    sandbox: StripeSandbox, recorded: None, command: list[str], ids: str, says: str
) -> None:
    assert says in call(*command, ids, code=2).stderr
    assert says in as_json(*command, ids, code=2)["error"]


def test_status_tells_why_runs_were_skipped_and_nothing_that_it_cannot_know(sandbox: StripeSandbox) -> None:
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer=from_lead(), deliver=False) as handler:
        handler.record_usage({"input_tokens": 1}, id="job")
    found = as_json("status")
    why = "metadata has no 'lead', and no 'session_id', 'thread_id' or 'conversation_id' to find one by"
    assert found["why_skipped"] == {why: 1}
    assert "open_runs" not in found
    assert f"1  {why}" in " ".join(call("status").stdout.split(" "))


@pytest.mark.parametrize("name", ["[agents]", "a[bold]b", ":key:"])
def test_names_are_shown_as_they_are(sandbox: StripeSandbox, name: str) -> None:
    call("meters", "create", name)
    assert name in call("meters").stdout
    assert name in call("status", "--ledger", f"sqlite:///{name}.db", code=2).stderr


def test_verify_agrees_or_names_the_difference(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    agreed = as_json("verify")[0]
    assert (agreed["at_stripe"], agreed["difference"], agreed["agrees"]) == ("100", "0", True)
    assert (agreed["at_least"], agreed["uncertain"]) == ("0", "100")
    assert "was delivered or cancelled within the last two hours" in call("verify").stdout
    sandbox.reject(sandbox.events[0].identifier)
    assert as_json("verify")[0]["agrees"]
    time_passes(hours=2)
    differs = as_json("verify", code=1)[0]
    assert (differs["at_stripe"], differs["difference"], differs["agrees"]) == ("0", "-100", False)
    result = call("verify", code=1)
    assert "last two hours" not in result.stdout
    said = " ".join(result.stderr.split())
    assert "Stripe has less than was delivered: cus_1 on ai_tokens by -100." in said
    assert "stripe-meter tail" in said
    assert "stripe-meter retry" in said
    assert "more than" not in said


def time_passes(hours: int) -> None:
    """Since what is in the ledger was delivered."""
    with closing(Ledger(os.environ["STRIPE_METER_LEDGER"])) as ledger, ledger.write() as connection:
        connection.execute(update(events).values(settled_at=events.c.settled_at - hours * 3600))


def test_verify_says_where_an_excess_may_come_from_and_what_to_do(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    payload = {"stripe_customer_id": "cus_1", "value": "7"}
    stranger = stripe.StripeClient(sandbox.api_key, base_addresses={"api": sandbox.url})
    stranger.v1.billing.meter_events.create({"event_name": "ai_tokens", "payload": payload})
    said = " ".join(call("verify", code=1).stderr.split())
    assert "Stripe has more than this ledger knows of: cus_1 on ai_tokens by +7." in said
    for step in ("restored from a backup", "stripe-meter acts", "stripe-meter correct"):
        assert step in said
    assert "less than" not in said


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Correct it: correct(...).", "Correct it: stripe-meter correct."),
        ("Look (verify()); then write_off() it.", "Look (stripe-meter verify); then stripe-meter write-off it."),
        ("settle_doubt() them, leads.capture() it", "stripe-meter doubtful settle them, stripe-meter leads capture it"),
        ("one of email=, phone= and session=.", "one of --email, --phone and --session."),
        ("since=5 and account='acct_1'", "--since 5 and --account 'acct_1'"),
        ("stripe_account='acct_1', tenant=, flush()", "stripe_account='acct_1', tenant=, flush()"),
        ("incorrect(), a=b&name=Ann", "incorrect(), a=b&name=Ann"),
        ("no ledger at /a/name=x/id=3.db", "no ledger at /a/name=x/id=3.db"),
    ],
)
def test_words_of_python_are_told_as_commands(said: str, told: str) -> None:
    assert in_commands(said) == told


def test_what_is_told_on_the_command_line_names_commands(
    sandbox: StripeSandbox, recorded: None, caplog: pytest.LogCaptureFixture
) -> None:
    call("deliver", "--once")
    time_passes(hours=25)
    too_old = call("cancel", as_json("tail")[0]["identifier"], code=2).stderr
    assert "Correct the customer's total instead: stripe-meter correct." in " ".join(too_old.split())
    assert json.loads(call("forget", "--json", code=2).stdout)["error"].startswith("stripe-meter forget takes")
    with StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_1", deliver=False) as handler:
        handler.record_usage({"input_tokens": 1}, id="old", at=sandbox.now() - 35 * 86_400 + 600)
    assert "stripe-meter retime it or stripe-meter write-off it" in as_json("status")["alarms"][0]
    call("deliver", "--once")
    assert "stripe-meter retime it" in caplog.text
    assert "retime()" not in caplog.text


def test_verify_takes_a_beginning_and_an_end(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    now = sandbox.now()
    assert as_json("verify", "--since", str(now - 600), "--until", str(now + 600))[0]["at_stripe"] == "100"
    assert as_json("verify", "--until", str(now - 600)) == []
    assert (
        "--until 5 must be at least a minute after --since 5"
        in call("verify", "--since", "5", "--until", "5", code=2).stderr
    )


def test_a_meter_that_is_there_keeps_its_name_and_that_is_said(sandbox: StripeSandbox) -> None:
    call("meters", "create", "new_tokens", "--display-name", "Tokens")
    assert "still called" not in call("meters", "create", "new_tokens", "--display-name", "Tokens").stdout
    assert "is still called 'Tokens'" in call("meters", "create", "new_tokens", "--display-name", "Other").stdout


def test_tail_and_export_show_each_reading_once(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    call("deliver", "--once")
    assert [row["state"] for row in as_json("tail")] == ["delivered", "held"]
    rows = list(csv.DictReader(io.StringIO(call("export").stdout)))
    assert [row["value"] for row in rows] == ["100", "7"]
    call("export", str(tmp_path / "all.jsonl"), "--json")
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["event_name"] for line in lines] == ["ai_tokens", "ai_tokens"]
    assert "example.com" not in call("export").stdout
    assert "cannot be written" in call("export", str(tmp_path / "no" / "where.csv"), code=2).stderr


@pytest.mark.parametrize("name", ["l.db", "l.db-wal", "l.db-shm", "l.db.epoch", "link.csv"])
def test_an_export_never_goes_over_the_ledger(
    sandbox: StripeSandbox, recorded: None, tmp_path: Path, name: str
) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "l.db")
    (tmp_path / "l.db.epoch").touch()
    assert "is the ledger's own" in call("export", str(tmp_path / name), code=2).stderr
    assert as_json("status")["pending"] == 2


def test_an_export_that_fails_leaves_the_one_before_it(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    before = tmp_path / "all.csv"
    before.write_text("the one before")
    (tmp_path / "other.db").write_bytes(b"not a database" * 100)
    call("export", str(before), "--ledger", f"sqlite:///{tmp_path}/other.db", code=2)
    assert before.read_text() == "the one before"
    assert not list(tmp_path.glob("*.partial"))
    call("export", str(before))
    assert len(before.read_text().splitlines()) == 3
    before.chmod(0o600)
    call("export", str(before))
    assert before.stat().st_mode & 0o777 == 0o600
    piped = subprocess.run([COMMAND, "export", "/dev/stdout"], capture_output=True, text=True, check=True).stdout
    assert len(piped.splitlines()) == 3 + 1  # and how many were written
    assert not list(tmp_path.glob(".*"))


def test_an_export_tells_accounts_and_kinds_of_tokens_apart(sandbox: StripeSandbox) -> None:
    usage = {"input_tokens": 100, "output_tokens": 7, "input_token_details": {"cache_read": 40}}
    split = Tokens("split", split=True)
    for account in ("acct_A", "acct_B"):
        with StripeMeterCallbackHandler(split, customer="cus_1", stripe_account=account, deliver=False) as handler:
            handler.record_usage(usage, id="job", model="gpt-4o", provider="openai")
    kinds = [{"model": "openai/gpt-4o", "token_type": kind} for kind in ("input", "cached_input", "output")]
    rows = list(csv.DictReader(io.StringIO(call("export").stdout)))
    told = [(row["account"], json.loads(row["dimensions"])) for row in rows]
    assert told == [(account, kind) for account in ("acct_A", "acct_B") for kind in kinds]
    lines = [json.loads(line) for line in call("export", "--json").stdout.splitlines()]
    assert [(line["account"], line["dimensions"]) for line in lines] == told
    assert [(row["account"], row["dimensions"]) for row in as_json("tail")] == told


@pytest.mark.parametrize("command", [["skips", "--since"], ["verify", "--since"], ["verify", "--until"]])
def test_milliseconds_are_not_taken_for_seconds(sandbox: StripeSandbox, recorded: None, command: list[str]) -> None:
    said = call(*command, "1764000000000", code=2).stderr
    assert f"{command[1]} 1764000000000 is too far away" in said
    assert "milliseconds?" in said


@pytest.mark.parametrize(
    "command", [["tail", "-n"], ["acts", "-n"], ["skips", "--since"], ["verify", "--since"], ["prune", "--older-than"]]
)
def test_a_number_that_no_ledger_can_hold_is_refused(
    sandbox: StripeSandbox, recorded: None, command: list[str]
) -> None:
    assert command[1] in call(*command, "9" * 23, code=2).stderr


def test_what_tail_shows_can_be_copied_whole_from_a_pipe(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    piped = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    shown = subprocess.run([COMMAND, "tail"], capture_output=True, text=True, check=True, env=piped).stdout
    for row in as_json("tail"):
        assert row["identifier"] in shown
        assert (row["reason"] or "") in shown
    assert len(shown.splitlines()) == 3
    call("cancel", shown.splitlines()[1].split()[0])
    assert sandbox.billed("ai_tokens", "cus_1") == 0


def test_held_ends_with_what_to_do(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    last = call("held").stdout.splitlines()[-1]
    for act in ("assign", "retry", "retime", "write-off"):
        assert f"stripe-meter {act}" in last
    assert "To do" not in call("held", "--json").stdout


def test_meters_are_listed_with_what_is_wrong_with_them_and_can_be_made(sandbox: StripeSandbox) -> None:
    sandbox.create_meter("last_one", formula="last")
    found = {meter["event_name"]: meter for meter in as_json("meters")}
    assert found["ai_tokens"]["problem"] is None
    assert "'last'" in found["last_one"]["problem"]
    assert as_json("meters", "create", "new_one", "--display-name", "A new one")["formula"] == "sum"
    assert "A new one" in call("meters").stdout


def test_leads_are_captured_and_forgotten(sandbox: StripeSandbox, recorded: None) -> None:
    assert as_json("leads", "capture", "chat-1", "--email", "ann@example.com")["captured"]
    assert as_json("leads", "capture", "chat-1", "--phone", "030 901820", "--region", "DE")["claimed"] == 0
    assert as_json("leads", "show-count") == {"sessions": 1}
    assert as_json("leads", "forget", "chat-1")["forgotten"]
    assert "0 sessions" in call("leads", "show-count").stdout
    call("leads", "forget", "chat-1", code=1)
    call("leads", "capture", "chat-1", "--email", "ann@example.com", "--account", "acct_9")
    call("leads", "forget", "chat-1", code=1)
    assert as_json("leads", "forget", "chat-1", "--account", "acct_9")["forgotten"]
    assert "Nothing in this ledger named" in call("forget", "--session", "chat-1").stdout
    result = call("leads", "capture", "chat-1", "--email", "not an address", code=2)
    assert "not an address" not in result.stderr


def test_doctor_finds_everything_in_order_or_says_what_to_do(sandbox: StripeSandbox, recorded: None) -> None:
    findings = {finding["what"]: finding for finding in as_json("doctor", "--meter", "ai_tokens")}
    assert findings["key"]["said"] == "a key for test mode"
    assert findings["Stripe"]["said"] == "answers, and has 1 meter"
    assert findings["meter ai_tokens"]["state"] == "ok"
    sandbox.create_meter("windowed", event_time_window="day")
    bad = {f["what"]: f for f in as_json("doctor", "--meter", "windowed", "--meter", "absent", code=1)}
    assert "event_time_window" in bad["meter windowed"]["said"]
    assert "meters create absent" in bad["meter absent"]["said"]


ASKING = [["meters"], ["meters", "create", "x"], ["init", "x.toml"], ["verify"], ["cancel"], ["doctor"],
          ["demo", "--live"]]  # fmt: skip


@pytest.mark.parametrize("command", ASKING, ids=" ".join)
def test_whoever_asks_stripe_in_vain_is_told_what_to_do(
    sandbox: StripeSandbox, recorded: None, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    call("deliver", "--once")
    identifiers = [sandbox.events[0].identifier] if command == ["cancel"] else []

    def said() -> str:
        told = call(*command, *identifiers, code=1 if command == ["doctor"] else 2)
        return " ".join(f"{told.stdout} {told.stderr}".split())

    base = os.environ["STRIPE_METER_API_BASE"]
    sandbox.revoke(sandbox.api_key)
    assert "401" in (refused := said())
    assert ". Set $STRIPE_API_KEY to a key that is in use." in refused
    sandbox.stop()
    for address in (base, "nonsense"):
        monkeypatch.setenv("STRIPE_METER_API_BASE", address)
        assert "no answer from Stripe" in (unanswered := said())
        assert ". Check the network, and $STRIPE_METER_API_BASE: " in unanswered


def test_python_is_told_the_same_and_nothing_of_an_address_that_is_not_set(
    sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = os.environ["STRIPE_METER_API_BASE"]
    sandbox.stop()
    with pytest.raises(StripeError, match=r"\. Check the network, and \$STRIPE_METER_API_BASE: "):
        list_meters()
    monkeypatch.delenv("STRIPE_METER_API_BASE")
    with closing(Gateway(api_base=base)) as gateway, pytest.raises(StripeError, match=r"\. Check the network\.$"):
        gateway.meters()


def test_doctor_says_what_to_do_about_a_key_of_another_mode(
    sandbox: StripeSandbox, recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("deliver", "--once")
    monkeypatch.setenv("STRIPE_API_KEY", "sk_live_" + "a" * 24)
    found, *others = [one for one in as_json("doctor", code=1) if one["what"] == "ledger"]
    assert found["state"] == "fail"
    assert "ok" not in {other["state"] for other in others}
    assert "Use a key for test mode, or give live mode a ledger of its own." in found["said"]


def test_doctor_only_warns_of_a_key_that_may_send_but_not_read_meters(
    sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.allow("rk_test_narrow", {"meter_events:write"})
    monkeypatch.setenv("STRIPE_API_KEY", "rk_test_narrow")
    assert "Billing meters: Read" in " ".join(call("doctor").stdout.split())
    call("doctor", "--meter", "ai_tokens", code=1)


def test_doctor_warns_of_a_key_that_may_not_look_up_whom_an_email_names(
    sandbox: StripeSandbox, recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "customers" not in {finding["what"] for finding in as_json("doctor")}
    sandbox.allow("rk_test_narrow", {"meter_events:write", "meters:read"})
    monkeypatch.setenv("STRIPE_API_KEY", "rk_test_narrow")
    (said,) = [finding for finding in as_json("doctor") if finding["what"] == "customers"]
    assert (said["state"], "Customers: Read" in said["said"]) == ("warn", True)
    sandbox.allow("rk_test_narrow", {"meter_events:write", "meters:read", "customers:read"})
    sandbox.fail(refuse(500), path="/v1/customers", times=None)
    (said,) = [finding for finding in as_json("doctor") if finding["what"] == "customers"]
    assert (said["state"], "500" in said["said"]) == ("warn", True)


def test_doctor_looks_at_the_ledger(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    assert "writable: 2 pending" in " ".join(call("doctor").stdout.split())
    (tmp_path / "other.db").write_bytes(b"not a database" * 100)
    assert "not a database" in call("doctor", "--ledger", f"sqlite:///{tmp_path}/other.db", code=1).stdout
    nowhere = f"sqlite:///{tmp_path}/no/where.db"
    assert "no folder" in " ".join(call("doctor", "--ledger", nowhere, code=1).stdout.split())


def test_without_a_key_or_a_ledger_the_error_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "STRIPE_API_KEY" in call("meters", code=2).stderr
    said = call("status", code=2).stderr
    assert f"no ledger at {tmp_path}/stripe_meter.db yet" in said
    for maker in ("first run", "stripe-meter deliver", "stripe-meter ledger upgrade", "--ledger"):
        assert maker in said
    assert call("ledger", "path").stdout.strip() == f"sqlite:///{tmp_path}/stripe_meter.db"
    assert list(tmp_path.iterdir()) == []


def test_with_json_the_error_is_json_too_and_its_remedy_is_one_for_a_command_line(
    sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away = ["--ledger", f"sqlite:///{tmp_path}/away.db"]
    for command in (["status"], ["assign", "1", "--customer", "cus_1"], ["verify"], ["tail"], ["export"]):
        assert "There is no ledger at" in as_json(*command, *away, code=2)["error"]
    assert "Nothing to deliver" in as_json("deliver", "--once", *away, code=1)["error"]
    assert "cannot be read" in as_json("settings", "absent.toml", code=2)["error"]
    assert "--customer" in as_json("assign", "1", code=2)["error"]
    monkeypatch.delenv("STRIPE_API_KEY")
    for command in (["meters"], ["meters", "create", "tokens"]):
        assert as_json(*command, code=2)["error"] == "There is no Stripe API key. Set $STRIPE_API_KEY to yours."
    assert as_json("doctor", code=1)[0]["said"] == "There is no Stripe API key. Set $STRIPE_API_KEY to yours."


def test_the_ledgers_place_and_its_upgrade(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    assert str(tmp_path / "l.db") in call("ledger", "path").stdout
    assert str(tmp_path / "l.db") in as_json("ledger", "path")["ledger"]
    assert "up to date" in call("ledger", "upgrade").stdout
    assert as_json("ledger", "upgrade") == {"schema": HEAD}


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version").stdout.strip() == version("langchain-stripe-meter")


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    heavy = {"stripe", "sqlalchemy", "langchain_core"}
    code = f"import sys; from langchain_stripe_meter.cli import app; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_sandbox_command_prints_what_to_set_and_stops_at_sigterm() -> None:
    who = ["--customer", "cus_ann", "--customer", "bob@example.com"]
    command = [COMMAND, "sandbox", "--port", "0", "--meter", "m", *who]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(5)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()
    assert said[:2] == ["# meter m\n", "# customer cus_ann\n"]
    assert re.fullmatch(r"# customer cus_\w+ bob@example\.com\n", said[2])
    assert {line.split("=")[0] for line in said[3:]} == {"export STRIPE_API_KEY", "export STRIPE_METER_API_BASE"}


def test_the_sandbox_command_says_that_a_port_is_taken(sandbox: StripeSandbox) -> None:
    assert "--port" in call("sandbox", "--port", sandbox.url.rpartition(":")[2], code=2).stderr
