"""The demo: what a newcomer runs first, so it must be quick, alone, and tell nothing but the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from langchain_stripe_meter.cli import app, stage
from langchain_stripe_meter.cli.stage import Compared, Played
from langchain_stripe_meter.sandbox import StripeSandbox


def play(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script, in a process of its own that takes warnings for errors."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("STRIPE_")}
    code = "from langchain_stripe_meter.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "demo", *arguments],
        capture_output=True, text=True, check=False, env={**ours, "COLUMNS": "80", **environment},
    )  # fmt: skip


def test_it_bills_exactly_what_it_recorded_without_an_account_or_a_network(tmp_path: Path) -> None:
    demo = play(HTTPS_PROXY="http://127.0.0.1:9", TMPDIR=str(tmp_path))
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    assert list(tmp_path.iterdir()) == []
    text = " ".join(demo.stdout.split())
    for said in (
        "Rows on disk when the run returned: 1",
        "ann 120, bob 240, 1 skipped",
        "The 2 before it are skipped",
        "recorded (credits): ann 11",
        "3 events pending. Stripe is back: 3 delivered, 0 pending",
        "rows in the ledger: 1",
        "Sent under one identifier: 2 times; billed: 1.",
        "Recorded and billed agree",
    ):
        assert said in text
    assert "refused 1 requests" not in text
    for amounts in ("acme 185 185", "ann 120 120", "bob 390 390", "lead 90 90", "ann 11 11"):
        assert amounts in text
    assert max(map(len, demo.stdout.splitlines())) <= 80


def test_as_json_it_says_the_same_to_a_program() -> None:
    demo = play("--json")
    assert demo.returncode == 0, demo.stderr
    found = json.loads(demo.stdout)
    assert found["agrees"] is True
    assert {(row["meter"], row["customer"], row["billed"]) for row in found["compared"]} == {
        ("ai_tokens", "acme", "185"), ("ai_tokens", "ann", "120"), ("ai_tokens", "bob", "390"),
        ("ai_tokens", "lead", "90"), ("message_credits", "ann", "11"),
    }  # fmt: skip


def live(sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> str:
    """The live demo, with a stand-in for Stripe's servers."""
    for name, value in sandbox.environment().items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["demo", "--live"], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_live_it_uses_new_meters_and_leaves_out_what_needs_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    with StripeSandbox() as sandbox:
        first, second = live(sandbox, monkeypatch), live(sandbox, monkeypatch)
        meters = {event.event_name for event in sandbox.events}
    assert len(meters) == 4
    assert "does not go down when asked" in first
    assert "Left in your test account" in second


def test_it_fails_where_stripe_bills_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LIVE_WAIT_SECONDS", 0)
    with StripeSandbox(summary_lag=3600) as sandbox:
        assert "Recorded and billed differ" in live(sandbox, monkeypatch, code=1)


def test_nothing_recorded_is_no_success() -> None:
    none, one = Decimal(0), Decimal(1)
    assert not Played((), 0, 1.0).agrees
    assert not Played((Compared("m", "ann", none, one),), 0, 1.0).agrees
    assert Played((Compared("m", "ann", one, one),), 1, 1.0).agrees


def test_it_says_what_the_key_may_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with StripeSandbox() as sandbox:
        sandbox.allow(sandbox.api_key, {"meter_events:write", "meters:read", "meters:write"})
        assert "create a customer" in live(sandbox, monkeypatch, code=2)


def test_it_refuses_a_live_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPE_API_KEY", "sk_live_123")
    result = CliRunner().invoke(app, ["demo", "--live"])
    assert result.exit_code == 2
    assert "test key" in result.stderr


def test_without_the_agents_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "langchain.py").write_text("raise ImportError")
    demo = play(PYTHONPATH=str(tmp_path))
    assert demo.returncode == 2
    assert "pip install 'langchain-stripe-meter[agents]'" in demo.stderr
