"""Settings in files: what is read is what was written, and what is wrong is named with what to do."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from langchain_stripe_meter import Credits, MeteringSettings, first_of, from_lead, static
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger.opening import without_password

TOML = """
ledger = "sqlite:///usage.db"
create_missing = true
concurrency = 4
roll_up = 60

[[meters]]
kind = "tokens"
event_name = "ai_tokens"

[customer]
source = "lead"
by = "phone"
region = "DE"

[on_unidentified]
source = "static"
phone = "030 901820"
region = "DE"
"""


def write(folder: Path, text: str, name: str = "metering.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_every_choice_survives_toml_and_json(tmp_path: Path) -> None:
    settings = MeteringSettings.from_file(write(tmp_path, TOML))
    assert settings == MeteringSettings.model_validate(tomllib.loads(TOML))
    again = MeteringSettings.from_file(write(tmp_path, settings.model_dump_json(), "metering.json"))
    assert again == settings
    assert (again.create_missing, again.concurrency, again.roll_up) == (True, 4, 60)


def test_the_handler_is_made_as_the_file_says(tmp_path: Path) -> None:
    settings = MeteringSettings.from_file(write(tmp_path, TOML))
    settings = settings.model_copy(update={"ledger": f"sqlite:///{tmp_path}/l.db"})
    with settings.handler(stripe="sk_test_1") as handler:
        phone = static(phone="030 901820", region="DE")
        assert handler.customer == first_of(from_lead("phone", region="DE"), phone)
        handler.leads.capture("s", phone="030 901820")
        assert handler.leads.find("s") == {"phone": "+4930901820"}


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_policy_can_be_a_word(tmp_path: Path, policy: str) -> None:
    text = TOML.partition("[on_unidentified]")[0].replace("create", f'on_unidentified = "{policy}"\ncreate')
    settings = MeteringSettings.from_file(write(tmp_path, text))
    assert settings.in_words()["if_nobody_is_named"] == policy


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("concurrency = 4", "concurrency = 0", "concurrency = 0: .*greater than or equal to 1"),
        ("concurrency = 4", 'colour = "red"', "colour: there is no such setting"),
        ('event_name = "ai_tokens"', "", r"meters\.0\.event_name: it is missing; add it"),
        ('kind = "tokens"', 'kind = "token"', r"meters\.0\.kind = 'token': .*'tokens', 'messages'"),
        ('by = "phone"\nregion = "DE"', 'by = "phone"\nregion = "Germany"', "region='Germany'.*two letters"),
        ('source = "static"', 'source = "statics"', r"on_unidentified.*'statics': .*'static', 'metadata'"),
        (
            '[on_unidentified]\nsource = "static"',
            '[on_unidentified]\nkind = "static"',
            r"toml: on_unidentified\.source: it is",
        ),
        (
            "create_missing",
            'on_unidentified = "refuse"\n[other]\ncreate_missing',
            "on_unidentified = 'refuse': .*'skip'",
        ),
        ("roll_up = 60", "roll_up = 99999", "roll_up = 99999: .*3600"),
        ("create_missing = true", "create_missing = {", "metering.toml is no TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_what_to_do(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in TOML
    text = TOML.partition("[on_unidentified]")[0] if "refuse" in new else TOML
    file = write(tmp_path, text.replace(old, new))
    with pytest.raises(ConfigurationError, match=says):
        MeteringSettings.from_file(file)


def test_no_person_is_named_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        MeteringSettings.from_file(write(tmp_path, TOML.replace("030 901820", "030 canary")))
    assert "canary" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        MeteringSettings.from_file(tmp_path / "absent.toml")
    with pytest.raises(ConfigurationError, match="no JSON"):
        MeteringSettings.from_file(write(tmp_path, "{", "bad.json"))


METER = {"kind": "tokens", "event_name": "ai_tokens"}
"""One that is right."""


@pytest.mark.parametrize("field", ["customer", "on_unidentified"])
def test_a_plain_id_pays_in_a_file_as_it_does_in_python(tmp_path: Path, field: str) -> None:
    sources = {"source": "first_of", "sources": [{"source": "lead"}, "cus_1"]}
    for given, meant in (("cus_1", static(id="cus_1")), (sources, first_of(from_lead(), "cus_1"))):
        text = json.dumps({"meters": [METER], field: given})
        read = getattr(MeteringSettings.from_file(write(tmp_path, text, "m.json")), field)
        assert read.build() == meant


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"customer": {"source": "first_of", "sources": ["ann"]}}, "customer.sources.0: it takes a table"),
        ({"customer": "ann@canary.com"}, "customer: it takes a table with a source, or a plain 'cus_…' id"),
        ({"customer": "cus_1 2"}, "customer = 'cus_1 2': 'cus_1 2' is not a Stripe customer id"),
        ({"on_unidentified": "explode"}, "on_unidentified = 'explode': Input should be 'skip' or 'raise'"),
        ({"on_unidentified": 7}, "on_unidentified"),
        ({"meters": ["tokens"]}, "meters.0: it takes a table with a kind and an event_name"),
        ({"meters": METER}, "meters: it takes a list"),
        ({"meters": []}, "meters: it needs at least one"),
        ({"meters": [{**METER, "per": "call"}]}, "meters.0: A meter of kind 'tokens' takes no 'per'"),
        ({"meters": [METER, METER]}, "meters: Two meters have the event name"),
        ({"ledger": "mysql://host/db"}, "ledger: ledger= takes SQLite or PostgreSQL, not mysql"),
        ({"ledger": "nonsense"}, "ledger: ledger='nonsense' is not a database address"),
        ({"roll_up": True}, "roll_up = True: "),
        ({"concurrency": True}, "concurrency = True: "),
        ({"meters": [{**METER, "kind": "nope"}]}, "meters.0.kind = 'nope': Input should be"),
        ({"meters": [METER, {**METER, "weights": {"inptu": 1}}]}, "meters.1: Tokens cannot weigh 'inptu'"),
        ({"customer": {"source": "metadata", "email": "canary"}}, "customer: source = 'metadata' does not read"),
    ],
)
def test_each_fault_is_told_once_at_its_place(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = write(tmp_path, json.dumps({"meters": [METER], **change}), "m.json")
    with pytest.raises(ConfigurationError) as refused:
        MeteringSettings.from_file(file)
    assert str(refused.value).startswith(f"{file}: {says}")
    assert f"; {next(iter(change))}" not in str(refused.value)
    assert "canary" not in str(refused.value)


def test_a_file_of_another_kind_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"m\.yaml: settings are a \.toml or a \.json file"):
        MeteringSettings.from_file(tmp_path / "m.yaml")
    assert MeteringSettings.from_file(write(tmp_path, TOML, "M.TOML")).concurrency == 4


@pytest.mark.parametrize(
    ("customer", "says"),
    [
        (None, "the authenticated user, else the run's metadata, under stripe_customer_id"),
        ({"source": "metadata"}, "metadata, under stripe_customer_id"),
        ({"source": "auth_user", "key": "cid"}, "auth_user, under cid"),
        ({"source": "signed_token"}, "signed_token, under stripe_customer_token"),
    ],
)
def test_who_pays_is_told_with_the_key_that_is_read(customer: dict[str, Any] | None, says: str) -> None:
    settings = MeteringSettings.model_validate({"meters": [METER], "customer": customer})
    assert settings.in_words()["who_pays"] == says


def test_the_command_says_what_a_file_means(tmp_path: Path) -> None:
    def call(code: int, *arguments: str) -> Any:
        result = CliRunner().invoke(app, ["settings", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result

    file = write(tmp_path, TOML)
    shown = call(0, str(file)).stdout
    for words in ("tokens on 'ai_tokens'", "the lead, by phone", "one fixed customer, known by phone", "60 seconds"):
        assert words in shown
    assert "901820" not in shown
    assert json.loads(call(0, str(file), "--json").stdout)["concurrency"] == 4
    assert "there is no such setting" in call(2, str(write(tmp_path, f"colour = 1\n{TOML}"))).stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("concurrency = 4", 'stripe = "sk_live_canary"'),
        ('by = "phone"', 'by = "phone"\nsecret = "canary-of-32-bytes"'),
        ("concurrency = 4", 'concurrency = 4\nwebhook = ["canary"]'),
    ],
)
def test_a_key_in_the_wrong_place_is_never_repeated(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no such setting") as refused:
        MeteringSettings.from_file(write(tmp_path, TOML.replace(old, new, 1)))
    assert "canary" not in str(refused.value)
    with pytest.raises(ValidationError) as told:
        MeteringSettings.model_validate(tomllib.loads(TOML.replace(old, new, 1)))
    assert "canary" not in f"{told.value} {told.value!r}"


ADDRESS = "postgresql+psycopg://bill:canary@db/x"


def test_the_ledgers_password_is_shown_nowhere(tmp_path: Path) -> None:
    file = write(tmp_path, TOML.replace("sqlite:///usage.db", ADDRESS))
    settings = MeteringSettings.from_file(file)
    assert settings.ledger == ADDRESS
    shown = [repr(settings), str(settings), *settings.in_words().values()]
    for form in ([], ["--json"]):
        shown += [CliRunner().invoke(app, ["settings", str(file), *form], env={"COLUMNS": "200"}).output]
    assert "canary" not in " ".join(shown)
    assert "db/x" in shown[-1]


@pytest.mark.parametrize(
    "url", [ADDRESS, "postgresql+psycopg:/bill:canary@db/x", "bill:canary@db", f"{ADDRESS}?password=canary"]
)
def test_an_address_is_shown_without_its_password_also_where_it_is_mistyped(url: str) -> None:
    assert "canary" not in without_password(url)
    assert "db" in without_password(url)


def test_an_address_without_a_password_is_shown_as_it_is() -> None:
    assert without_password("sqlite:///usage.db") == "sqlite:///usage.db"


@pytest.mark.parametrize(
    ("customer", "foreign"),
    [
        ({"source": "metadata", "sources": [{"source": "auth_user"}]}, "sources"),
        ({"source": "static", "id": "cus_1", "account": "acct_1"}, "account"),
        ({"source": "auth_user", "id": "cus_123"}, "id"),
        ({"source": "auth_user", "trust_client": True}, "trust_client"),
        ({"source": "lead", "key": "crm_lead"}, "key"),
        ({"source": "first_of", "sources": [{"source": "lead", "name": "canary"}]}, "name"),
    ],
)
def test_a_field_that_its_source_does_not_read_is_refused_by_name(customer: dict[str, Any], foreign: str) -> None:
    with pytest.raises(ValidationError, match=f"does not read '{foreign}'") as refused:
        MeteringSettings.model_validate({"meters": [{"kind": "messages", "event_name": "m"}], "customer": customer})
    assert "canary" not in str(refused.value)


def test_credits_need_no_table_where_every_model_is_worth_the_same() -> None:
    settings = MeteringSettings.model_validate({"meters": [{"kind": "credits", "event_name": "c", "default": 1}]})
    assert settings.meters[0].build() == Credits("c", {}, default=1)


def test_an_address_in_a_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"meters": [{"kind": "tokens", "event_name": "t"}], "on_unidentified": "ann@b.example"}))
    with pytest.raises(ConfigurationError, match="on_unidentified: Input should be 'skip' or 'raise'"):
        MeteringSettings.from_file(path)
