"""MeteringSettings: the handler's choices as data."""

from __future__ import annotations

import json
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from langchain_stripe_meter import MeteringSettings, from_lead, from_metadata, static
from langchain_stripe_meter.core.customers import FirstOf
from langchain_stripe_meter.core.meters import Cost, Credits, Messages, Tokens

PRICES = {"m": {"input": "2", "output": 0}}
FULL: dict[str, Any] = {
    "meters": [
        {"kind": "tokens", "event_name": "units", "weights": {"input": "1", "cache_read": "0.1", "output": "4"}},
        {"kind": "messages", "event_name": "bot_messages"},
        {"kind": "credits", "event_name": "credits", "credits": {"gpt-4o": "10"}, "default": "1"},
        {"kind": "cost", "event_name": "cost", "markup": "1.3", "unit": "cents", "prices": PRICES},
    ],
    "customer": {
        "source": "first_of",
        "sources": [
            {"source": "metadata", "key": "cid"},
            {"source": "lead", "by": "email"},
            {"source": "static", "id": "cus_1"},
        ],
    },
    "ledger": "sqlite:///usage.db",
    "deliver": False,
    "on_missing_usage": "hold",
}


def test_settings_survive_json_unchanged() -> None:
    settings = MeteringSettings.model_validate(FULL)
    assert MeteringSettings.model_validate_json(settings.model_dump_json()) == settings
    assert json.loads(settings.model_dump_json())["meters"][0]["weights"]["cache_read"] == "0.1"


def test_settings_survive_toml_unchanged() -> None:
    settings = MeteringSettings.model_validate({**FULL, "on_unidentified": "cus_2", "stripe_account": "acct_1"})
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
    assert MeteringSettings.model_validate(tomllib.loads(text)) == settings


def test_settings_can_be_written_as_toml() -> None:
    text = '[[meters]]\nkind = "tokens"\nevent_name = "ai_tokens"\n[customer]\nsource = "lead"\nby = "phone"\n'
    settings = MeteringSettings.model_validate(tomllib.loads(text))
    assert settings.customer is not None
    assert settings.customer.build() == from_lead(by="phone")


def test_settings_make_the_same_meters_and_sources_as_python_does(tmp_path: Path) -> None:
    settings = MeteringSettings.model_validate({**FULL, "ledger": f"sqlite:///{tmp_path}/l.db"})
    with settings.handler() as handler:
        tokens, messages, credit, cost = handler.meters
        assert tokens == Tokens("units", weights={"input": 1, "cache_read": Decimal("0.1"), "output": 4})
        assert messages == Messages("bot_messages")
        assert credit == Credits("credits", {"gpt-4o": 10}, default=1)
        assert cost == Cost("cost", markup=Decimal("1.3"), unit="cents", prices={"m": {"input": 2, "output": 0}})
        assert handler.customer == FirstOf((from_metadata("cid"), from_lead(by="email"), static(id="cus_1")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"meters": []}, "meters"),
        ({"meters": [{"kind": "tokens", "event_name": "x" * 101}]}, "101 characters"),
        ({"meters": [{"kind": "messages", "event_name": "m", "unit": "usd"}]}, "takes no 'unit'"),
        ({"meters": [{"kind": "tokens", "event_name": "t", "weights": {"inptu": 1}}]}, "inptu"),
        ({"customer": {"source": "static", "id": "ann"}}, "cus_"),
        ({"customer": {"source": "static"}}, "exactly one"),
        ({"colour": "red"}, "colour"),
        ({"on_missing_usage": "guess"}, "on_missing_usage"),
    ],
)
def test_bad_settings_are_refused_naming_the_field_or_value(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        MeteringSettings.model_validate({**FULL, **change})
