"""``stripe-meter init``: a few questions, looked at with Stripe, become a file of settings that meters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from langchain_stripe_meter import Credits, Messages, MeteringSettings, Tokens, from_lead, from_metadata, static
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.sandbox import StripeSandbox


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StripeSandbox]:
    monkeypatch.chdir(tmp_path)
    with StripeSandbox(api_key="sk_test_initinitinit") as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        sandbox.create_meter("ai_tokens")
        sandbox.create_customer(id="cus_1")
        yield sandbox


def call(*arguments: str, answers: str = "", code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["init", *arguments], input=answers, env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


CHOICES: list[tuple[list[str], Any, Any]] = [
    (
        ["--count", "tokens", "--pays", "static", "--by", "id", "--customer", "cus_1"],
        Tokens("ai_tokens"),
        static(id="cus_1"),
    ),
    (["--count", "tokens", "--pays", "static", "--customer", "cus_1"], Tokens("ai_tokens"), static(id="cus_1")),
    (["--count", "messages", "--pays", "lead", "--by", "phone"], Messages("ai_tokens"), from_lead("phone")),
    (
        ["--count", "credits", "--pays", "metadata"],
        Credits("ai_tokens", {}, default=1),
        from_metadata("stripe_customer_id"),
    ),
    (
        ["--count", "tokens", "--pays", "static", "--by", "name", "--customer", 'Ann "A" \\ Ö'],
        Tokens("ai_tokens"),
        static(name='Ann "A" \\ Ö'),
    ),
]


@pytest.mark.parametrize("file", ["stripe_meter.toml", "stripe_meter.json"])
@pytest.mark.parametrize(("options", "meter", "customer"), CHOICES)
def test_options_become_settings_that_say_the_same(
    sandbox: StripeSandbox, file: str, options: list[str], meter: object, customer: object
) -> None:
    said = call(file, "--meter", "ai_tokens", *options).stdout
    settings = MeteringSettings.from_file(file)
    assert settings.meters[0].build() == meter
    assert settings.customer is not None
    assert settings.customer.build() == customer
    assert "initinitinit" not in Path(file).read_text() + said


def test_what_it_prints_is_python_that_bills(sandbox: StripeSandbox) -> None:
    """Its last line needs a chain; the others run as they are."""
    said = call(
        "--meter", "ai_tokens", "--count", "tokens", "--pays", "static", "--by", "id", "--customer", "cus_1"
    ).stdout
    *setup, use = [line for line in said.splitlines() if line.startswith(("from ", "meter", "chain"))]
    names: dict[str, Any] = {}
    exec("\n".join(setup), names)
    assert use == 'chain.invoke(question, config={"callbacks": [meter]})'
    with names["meter"] as meter:
        meter.record_usage({"input_tokens": 5}, id="job")
        assert meter.flush(timeout=10).delivered == 1
    assert sandbox.billed("ai_tokens", "cus_1") == 5


def test_it_asks_for_what_is_not_given_and_again_for_what_is_none_of_the_choices(sandbox: StripeSandbox) -> None:
    said = call("other.toml", answers="ai_token\nai_tokens\nwords\nmessages\nlead\nemail\n").stdout
    assert "Who pays (lead, static, metadata, auth_user) [lead]: " in said
    assert "Identified by (email, name, phone) [email]: " in said
    assert '"lead": {"email":' in said
    settings = MeteringSettings.from_file("other.toml")
    assert settings.in_words()["counted"] == "messages on 'ai_tokens'"
    assert settings.in_words()["who_pays"] == "the lead, by email"


def test_enter_takes_what_is_recommended(sandbox: StripeSandbox) -> None:
    call(answers="\n\n\n\n")
    settings = MeteringSettings.from_file("stripe_meter.toml")
    assert settings.in_words()["counted"] == "tokens on 'ai_tokens'"
    assert settings.in_words()["who_pays"] == "the lead, by email"


WHOLE = ["--meter", "ai_tokens", "--count", "tokens", "--pays", "lead", "--by", "email"]


def test_a_file_that_is_there_is_left_alone_unless_forced(sandbox: StripeSandbox) -> None:
    file = Path("stripe_meter.toml")
    file.write_text("mine")
    assert "--force" in call(*WHOLE, code=2).stderr
    assert file.read_text() == "mine"
    call(*WHOLE, "--force")
    assert MeteringSettings.from_file(file).meters[0].kind == "tokens"


def test_json_asks_nothing_and_says_what_is_missing(sandbox: StripeSandbox) -> None:
    assert json.loads(call(*WHOLE, "--json").stdout)["file"] == "stripe_meter.toml"
    assert "--pays" in json.loads(call("x.toml", *WHOLE[:4], "--json", code=2).stdout)["error"]
    assert not Path("x.toml").exists()


@pytest.mark.parametrize("given", [0, 2, 4, 6])
def test_where_nobody_answers_it_says_what_is_missing(sandbox: StripeSandbox, given: int) -> None:
    said = call(*WHOLE[:given], code=2).stderr
    assert f"{WHOLE[given]} is missing" in said
    assert "Aborted" not in said


def test_a_file_of_another_kind_is_refused_before_stripe_is_asked(sandbox: StripeSandbox) -> None:
    assert "settings are a .toml or a .json file" in call("x.yaml", code=2).stderr
    assert not sandbox.requests


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--meter", "nope"], "no meter with the event name 'nope'"),
        (["--meter", "newest"], "newest"),
        (["--pays", "metadata"], "--by"),
        (["--pays", "lead", "--by", "id"], "--by"),
        (["--customer", "cus_1"], "--customer"),
        (["--pays", "static", "--by", "id", "--customer", "Ann"], "cus_"),
        (["--count", "words"], "words"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_nothing_is_written(
    sandbox: StripeSandbox, options: list[str], says: str
) -> None:
    sandbox.create_meter("newest", formula="last")
    assert says in call(*WHOLE, *options, code=2).stderr
    assert not Path("stripe_meter.toml").exists()


def test_without_a_meter_it_says_how_one_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        assert "stripe-meter meters create" in call(code=2).stderr
        sandbox.revoke(sandbox.api_key)
        assert "Expired API Key" in call(code=2).stderr
    monkeypatch.delenv("STRIPE_API_KEY")
    assert "STRIPE_API_KEY" in call(code=2).stderr


def test_a_file_that_cannot_be_written_is_told(sandbox: StripeSandbox) -> None:
    assert "cannot be written" in call("nowhere/x.toml", *WHOLE, code=2).stderr
