"""The command line, as a person and as a script use it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_lead
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.sandbox import StripeSandbox

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
    call("assign", str(held["ids"][0]), "--customer", bob)
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
        call("deliver", "--once", "--timeout", "0.5", code=1)


def test_verify_agrees_or_names_the_difference(sandbox: StripeSandbox, recorded: None) -> None:
    call("deliver", "--once")
    assert as_json("verify")[0]["at_stripe"] == "100"
    sandbox.reject(sandbox.events[0].identifier)
    result = call("verify", code=1)
    assert "cus_1 on ai_tokens by -100" in " ".join(result.stderr.split())


def test_tail_and_export_show_each_reading_once(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    call("deliver", "--once")
    assert [row["state"] for row in as_json("tail")] == ["delivered", "held"]
    rows = list(csv.DictReader(io.StringIO(call("export").stdout)))
    assert [row["value"] for row in rows] == ["100", "7"]
    call("export", str(tmp_path / "all.jsonl"), "--json")
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["event_name"] for line in lines] == ["ai_tokens", "ai_tokens"]
    assert "example.com" not in call("export").stdout


def test_meters_are_listed_with_what_is_wrong_with_them_and_can_be_made(sandbox: StripeSandbox) -> None:
    sandbox.create_meter("last_one", formula="last")
    found = {meter["event_name"]: meter for meter in as_json("meters")}
    assert found["ai_tokens"]["problem"] is None
    assert "'last'" in found["last_one"]["problem"]
    call("meters", "create", "new_one", "--display-name", "A new one")
    assert "A new one" in call("meters").stdout


def test_leads_are_captured_and_forgotten(sandbox: StripeSandbox, recorded: None) -> None:
    call("leads", "capture", "chat-1", "--email", "ann@example.com")
    call("leads", "forget", "chat-1")
    call("leads", "forget", "chat-1", code=1)
    result = call("leads", "capture", "chat-1", "--email", "not an address", code=2)
    assert "not an address" not in result.stderr


def test_doctor_finds_everything_in_order_or_says_what_to_do(sandbox: StripeSandbox, recorded: None) -> None:
    findings = {finding["what"]: finding for finding in as_json("doctor", "--meter", "ai_tokens")}
    assert findings["key"]["said"] == "a key for test mode"
    assert findings["meter ai_tokens"]["state"] == "ok"
    sandbox.create_meter("windowed", event_time_window="day")
    bad = {f["what"]: f for f in as_json("doctor", "--meter", "windowed", "--meter", "absent", code=1)}
    assert "event_time_window" in bad["meter windowed"]["said"]
    assert "meters create absent" in bad["meter absent"]["said"]


def test_without_a_key_or_a_ledger_the_error_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "STRIPE_API_KEY" in call("meters", code=2).stderr
    assert "no ledger" in call("status", code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_the_ledgers_place_and_its_upgrade(sandbox: StripeSandbox, recorded: None, tmp_path: Path) -> None:
    assert str(tmp_path / "l.db") in call("ledger", "path").stdout
    assert "up to date" in call("ledger", "upgrade").stdout


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    heavy = {"stripe", "sqlalchemy", "langchain_core"}
    code = f"import sys; from langchain_stripe_meter.cli import app; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_sandbox_command_prints_what_to_set_and_stops_at_sigterm() -> None:
    process = subprocess.Popen([COMMAND, "sandbox", "--port", "0", "--meter", "m"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    process.stdout.close()
    assert said[0] == "# meter m\n"
    assert {line.split("=")[0] for line in said[1:]} == {"export STRIPE_API_KEY", "export STRIPE_METER_API_BASE"}


def test_the_demo_bills_exactly_what_it_recorded_without_an_account_or_a_network() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRIPE_")}
    demo = subprocess.run([COMMAND, "demo"], capture_output=True, text=True, check=False, env=environment)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    text = " ".join(demo.stdout.split())
    assert "2 messages before it were skipped" in text
    assert "3 events pending" in text
    assert "sent 2 times under one identifier" in text
    assert "Recorded and billed agree" in text
    for amount in ("ann 120 120", "bob 390 390", "acme 185 185", "lead 90 90", "ann 11 11"):
        assert amount in text


def test_the_demo_refuses_a_live_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPE_API_KEY", "sk_live_123")
    assert "test key" in call("demo", "--live", code=2).stderr
