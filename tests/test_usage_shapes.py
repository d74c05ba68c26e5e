"""Usage as LangChain's integrations report it, in the shapes recorded from providers that have no stand-in here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from langchain_stripe_meter import Credits, StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.core.usage import Usage, usage_from_token_usage
from langchain_stripe_meter.ledger.views import Row, tail
from langchain_stripe_meter.observed import received

SHAPES: dict[str, tuple[dict[str, Any] | None, dict[str, int]]] = {
    # thoughts are in the output, a tool-use prompt in the input
    "Google Gemini": (
        {
            "input_tokens": 120,
            "output_tokens": 330,
            "total_tokens": 450,
            "input_token_details": {"cache_read": 100},
            "output_token_details": {"reasoning": 300},
        },
        {"fresh": 20, "cached": 100, "output": 330, "reasoning": 300},
    ),
    "Bedrock Converse": (
        {
            "input_tokens": 1210,
            "output_tokens": 50,
            "total_tokens": 1260,
            "input_token_details": {"cache_creation": 200, "cache_read": 1000},
        },
        {"fresh": 10, "cached": 1000, "written": 200, "output": 50},
    ),
    "Mistral": ({"input_tokens": 16, "output_tokens": 34, "total_tokens": 50}, {"fresh": 16, "output": 34}),
    "Groq": (
        {
            "input_tokens": 80,
            "output_tokens": 60,
            "total_tokens": 140,
            "input_token_details": {"cache_read": 64},
            "output_token_details": {"reasoning": 41},
        },
        {"fresh": 16, "cached": 64, "output": 60, "reasoning": 41},
    ),
    "Ollama": ({"input_tokens": 26, "output_tokens": 298, "total_tokens": 324}, {"fresh": 26, "output": 298}),
    "an OpenAI-compatible gateway": (
        {
            "input_tokens": 100,
            "output_tokens": 20,
            "total_tokens": 120,
            "input_token_details": {},
            "output_token_details": {},
        },
        {"fresh": 100, "output": 20},
    ),
    "OpenAI with audio": (
        {
            "input_tokens": 100,
            "output_tokens": 40,
            "total_tokens": 140,
            "input_token_details": {"audio": 30, "cache_read": 20},
            "output_token_details": {"audio": 25, "reasoning": 0},
        },
        {"fresh": 50, "cached": 20, "heard": 30, "output": 40, "spoken": 25},
    ),
}
METERS = (
    Tokens("total"),
    Tokens("output", count="output"),
    Tokens("fresh", weights={"input": 1, "cache_read": 0, "cache_write": 0, "audio_input": 0}),
    Tokens("cached", weights={"cache_read": 1}),
    Tokens("written", weights={"cache_write": 1}),
    Tokens("heard", weights={"audio_input": 1}),
    Tokens("reasoning", weights={"reasoning": 1}),
    Tokens("spoken", weights={"audio_output": 1}),
)


def run(folder: Path, usage: dict[str, Any] | None, **options: Any) -> dict[str, Row]:
    return bill(folder, AIMessage("one two three", usage_metadata=usage), **options)


def bill(folder: Path, message: AIMessage, **options: Any) -> dict[str, Row]:
    with StripeMeterCallbackHandler(
        *METERS, customer="cus_1", deliver=False, ledger=f"sqlite:///{folder}/l.db", **options
    ) as handler:
        GenericFakeChatModel(messages=iter([message])).invoke("Hi", {"callbacks": [handler]})
        return {row.event_name: row for row in tail(handler._ledger, 100)}


@pytest.mark.parametrize("provider", SHAPES)
def test_the_parts_of_each_providers_report_are_billed_once_and_add_up(provider: str, tmp_path: Path) -> None:
    usage, parts = SHAPES[provider]
    rows = run(tmp_path, usage)
    billed = {name: int(row.value or 0) for name, row in rows.items()}
    assert usage is not None
    assert billed.pop("total") == usage["total_tokens"]
    assert billed == parts
    inputs = sum(parts.get(name, 0) for name in ("fresh", "cached", "written", "heard"))
    assert (inputs, parts["output"]) == (usage["input_tokens"], usage["output_tokens"])
    assert not any(row.estimated for row in rows.values())


def test_ollama_reports_nothing_where_a_count_is_missing_and_is_estimated(tmp_path: Path) -> None:
    rows = run(tmp_path, None)
    assert rows["output"].estimated
    assert rows["output"].value == 3


def test_an_absurd_amount_is_held_on_its_meter_and_the_other_meters_are_billed(tmp_path: Path) -> None:
    usage = {"input_tokens": 10**16 + 1, "output_tokens": 5, "total_tokens": 10**16 + 6}
    rows = run(tmp_path, usage)
    assert (rows["output"].state, rows["output"].value) == ("resolved", 5)
    assert (rows["total"].state, rows["total"].value) == ("held", None)
    assert "significant digits" in str(rows["total"].reason)


@pytest.mark.parametrize(
    ("usage", "says"),
    [
        ({"input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "input_token_details": {"cache_read": 20}}, "20"),
        ({"input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "output_token_details": {"reasoning": 6}}, "6"),
        ({"input_tokens": 0, "output_tokens": 0, "total_tokens": 3000}, "total_tokens = 3000"),
    ],
)
def test_a_report_that_contradicts_itself_is_held_by_name_never_billed(
    usage: dict[str, Any], says: str, tmp_path: Path
) -> None:
    rows = run(tmp_path, usage)
    assert {row.state for row in rows.values()} == {"held"}
    assert {row.value for row in rows.values()} == {None}
    assert all(says in str(row.reason) for row in rows.values())


@pytest.mark.parametrize("report", [SimpleNamespace(input_tokens=10, output_tokens=5), ["input_tokens"], 15])
def test_a_report_of_a_shape_that_nobody_expects_is_held_by_its_name(report: Any, tmp_path: Path) -> None:
    message = AIMessage("Hello")
    message.usage_metadata = report
    rows = bill(tmp_path, message)
    assert {(row.state, row.value) for row in rows.values()} == {("held", None)}
    assert all(type(report).__name__ in str(row.reason) for row in rows.values())


def test_a_stream_that_breaks_off_after_such_a_report_is_held_too() -> None:
    observed = received({"input_tokens": 0, "output_tokens": 0, "total_tokens": 7}, ["Hi"])
    assert (observed.usage, "total_tokens = 7" in str(observed.doubt)) == (None, True)


@pytest.mark.parametrize("total", [0, 5, 100])
def test_a_total_beside_parts_is_left_as_it_is(total: int, tmp_path: Path) -> None:
    """Integrations count caches and thoughts in different ways."""
    assert run(tmp_path, {"input_tokens": 10, "output_tokens": 5, "total_tokens": total})["total"].value == 15


@pytest.mark.parametrize("total", [0, None, "many"])
def test_no_parts_and_no_total_are_no_contradiction(total: object) -> None:
    assert usage_from_token_usage({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": total}) == Usage(0, 0)


@pytest.mark.parametrize("name", ["gpt-4o", "gpt-4ogpt-4o", "gpt-4ogpt-4ogpt-4o"])
def test_a_model_whose_name_a_gateway_says_again_and_again_is_that_model(name: str, tmp_path: Path) -> None:
    usage = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    answer = AIMessage("Hi", usage_metadata=usage, response_metadata={"model_name": name})
    worth = Credits("credits", {"gpt-4o": 10}, default=1)
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    with StripeMeterCallbackHandler(worth, customer="cus_1", ledger=ledger, deliver=False) as handler:
        GenericFakeChatModel(messages=iter([answer])).invoke("Hi", {"callbacks": [handler]})
        assert [row.value for row in tail(handler._ledger)] == [10]
