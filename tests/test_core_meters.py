"""Meters: what Tokens, Messages, Credits and Cost make of a call."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_UP, Context, Decimal, localcontext
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_stripe_meter.core.events import check_value, significant_digits
from langchain_stripe_meter.core.meters import (
    Call,
    Cost,
    Credits,
    Messages,
    Meter,
    Reading,
    Tokens,
    dimensions_of,
    plain_model,
    round_digits,
    token_billing_model,
)
from langchain_stripe_meter.core.usage import KINDS, Usage
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

counts = st.integers(0, 10**7)
weights = st.decimals(min_value=0, max_value=1000, places=8)
kind_weights = st.dictionaries(st.sampled_from(KINDS), weights, min_size=1)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    read, written, fresh, said, thought, spoken = (draw(counts) for _ in range(6))
    total = read + written + fresh
    audio = draw(st.integers(0, total))
    return Usage(total, said + thought + spoken, read, written, audio, thought, spoken, draw(st.booleans()))


def value_of(meter: Meter, call: Call) -> Decimal:
    """The one amount that ``call`` adds to ``meter``; 0 where it adds nothing."""
    readings = meter.readings(call)
    if not readings:
        return Decimal(0)
    (reading,) = readings
    assert reading.event_name == meter.event_name
    assert reading.value is not None
    return reading.value


def doubt_of(meter: Meter, call: Call) -> str:
    """Why ``call`` must be held."""
    (reading,) = meter.readings(call)
    assert reading.event_name == meter.event_name
    assert reading.value is None
    assert reading.doubt is not None
    return reading.doubt


# -- Tokens


@given(usages())
def test_tokens_bill_the_total_or_one_full_sum(usage: Usage) -> None:
    call = Call(usage, "m")
    assert value_of(Tokens("t"), call) == usage.total
    assert value_of(Tokens("t", count="input"), call) == usage.input
    assert value_of(Tokens("t", count="output"), call) == usage.output


@given(usages())
def test_equal_weights_bill_the_total(usage: Usage) -> None:
    assert value_of(Tokens("t", weights={"input": 1, "output": 1}), Call(usage)) == usage.total


@given(usages(), kind_weights)
def test_a_part_that_is_not_named_takes_the_weight_of_its_whole(usage: Usage, given_: dict[str, Decimal]) -> None:
    wholes = {"cache_read": "input", "cache_write": "input", "audio_input": "input"}
    wholes |= {"reasoning": "output", "audio_output": "output"}
    full = {kind: given_.get(kind, given_.get(wholes.get(kind, kind), Decimal(0))) for kind in KINDS}
    exact = sum((full[kind] * count for kind, count in usage.exclusive().items()), Decimal(0))
    assert value_of(Tokens("t", weights=given_), Call(usage)) == round_digits(exact)


def test_weights_apply_to_what_was_neither_read_from_nor_written_to_a_cache() -> None:
    meter = Tokens("units", weights={"input": 1, "cache_read": Decimal("0.1"), "output": 4})
    assert value_of(meter, Call(Usage(100, 10, cache_read=60, cache_write=30))) == 10 + 6 + 30 + 40


def test_a_whole_without_a_weight_is_not_billed() -> None:
    assert Tokens("t", weights={"output": 4}).readings(Call(Usage(100, 0, cache_read=50))) == []


def test_a_long_weighted_sum_is_rounded_rather_than_lost() -> None:
    meter = Tokens("t", weights={"input": Decimal("0.3333333333"), "output": 1})
    assert value_of(meter, Call(Usage(1_234_567, 0))) == Decimal("411522.333292181")


def test_the_applications_decimal_context_does_not_change_a_bill() -> None:
    call = Call(Usage(1_234_567, 89), "m")
    meters: list[Meter] = [
        Tokens("t", weights={"input": Decimal("1.0625"), "output": 4}),
        Cost("c", markup=Decimal("1.3"), prices={"m": {"input": Decimal("0.55"), "output": Decimal("2.19")}}),
    ]
    bills = [value_of(meter, call) for meter in meters]
    with localcontext(Context(prec=3)):
        assert [value_of(meter, call) for meter in meters] == bills


def test_only_split_tokens_bring_payload_keys_of_their_own() -> None:
    assert dimensions_of(Tokens("t", split=True)) == ("model", "token_type")
    assert dimensions_of(Tokens("t")) == dimensions_of(Messages("m")) == ()


@given(usages())
def test_split_readings_add_up_to_the_total_and_name_model_and_kind(usage: Usage) -> None:
    readings = Tokens("t", split=True).readings(Call(usage, "gpt-4o-2024-08-06", "openai"))
    assert sum(reading.value or 0 for reading in readings) == usage.total
    kinds = [reading.dimensions["token_type"] for reading in readings]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) <= {"input", "cached_input", "cached_write", "output"}
    assert {reading.event_name for reading in readings} <= {"t"}
    assert {reading.dimensions["model"] for reading in readings} <= {"openai/gpt-4o"}
    assert {reading.estimated for reading in readings} <= {usage.estimated}


@pytest.mark.parametrize(("model", "provider"), [(None, "openai"), ("gpt-4o", None), (None, None), ("", "openai")])
def test_a_split_reading_without_a_model_is_held(model: str | None, provider: str | None) -> None:
    assert "no model name" in doubt_of(Tokens("t", split=True), Call(Usage(1, 1), model, provider))


@pytest.mark.parametrize("model", ["arn:aws:bedrock:us-east-1:123456789012:inference-profile/" + "m" * 60, "a\0b"])
def test_a_split_reading_whose_model_stripe_would_refuse_is_held(model: str) -> None:
    assert "dimension" in doubt_of(Tokens("t", split=True), Call(Usage(1, 1), model, "amazon_bedrock"))


@pytest.mark.parametrize(
    ("provider", "model", "billed_as"),
    [
        ("openai", "gpt-4o-2024-08-06", "openai/gpt-4o"),
        ("openai", "gpt-4o-2024-05-13", "openai/gpt-4o-2024-05-13"),
        ("openai", "gpt-4.1-mini", "openai/gpt-4.1-mini"),
        ("anthropic", "claude-3-5-sonnet-20241022", "anthropic/claude-3.5-sonnet"),
        ("anthropic", "claude-3-7-sonnet-latest", "anthropic/claude-3.7-sonnet"),
        ("anthropic", "claude-sonnet-4-5-20250929", "anthropic/claude-sonnet-4.5"),
        ("anthropic", "claude-opus-4-1", "anthropic/claude-opus-4.1"),
        ("anthropic", "claude-sonnet-4-20250514", "anthropic/claude-sonnet-4"),
        ("google_genai", "gemini-2.5-flash", "google/gemini-2.5-flash"),
        ("google_vertexai", "gemini-2.5-pro", "google/gemini-2.5-pro"),
        ("ollama", "llama3", "ollama/llama3"),
    ],
)
def test_a_model_is_named_as_stripes_token_billing_names_it(provider: str, model: str, billed_as: str) -> None:
    assert token_billing_model(provider, model) == billed_as


@pytest.mark.parametrize("meter", [Tokens("t"), Tokens("t", split=True), Tokens("t", weights={"input": 1}), Cost("c")])
def test_an_unknown_usage_is_held_with_its_reason_never_billed_as_zero(meter: Meter) -> None:
    for usage in (None, Usage(5, None), Usage(None, 5)):
        assert doubt_of(meter, Call(usage, "m", "p")) == "the provider reported no usage"
    assert doubt_of(meter, Call(None, "m", "p", doubt="parts exceed their sum")) == "parts exceed their sum"


def test_one_known_sum_is_enough_where_only_that_is_billed() -> None:
    assert value_of(Tokens("t", count="input"), Call(Usage(5, None))) == 5
    assert doubt_of(Tokens("t", count="output"), Call(Usage(5, None)))


@pytest.mark.parametrize("estimated", [True, False])
def test_an_estimate_is_marked_on_the_reading(estimated: bool) -> None:
    call = Call(Usage(1, 1, estimated=estimated), "m")
    assert Tokens("t").readings(call) == [Reading("t", Decimal(2), estimated=estimated)]
    prices = {"m": {"input": 1, "output": 1}}
    assert Cost("c", prices=prices).readings(call) == [Reading("c", Decimal(2), estimated=estimated)]
    assert Credits("c", {"m": 3}).readings(call) == [Reading("c", Decimal(3), estimated=False)]


def test_a_call_that_consumed_nothing_gives_no_reading() -> None:
    call = Call(Usage(0, 0), "m", "p")
    for meter in (
        Tokens("t"),
        Tokens("t", split=True),
        Tokens("t", weights={"input": 3}),
        Cost("c", prices={"m": {"input": 1, "output": 1}}),
    ):
        assert meter.readings(call) == []


def test_more_tokens_than_stripe_can_write_are_refused_by_number() -> None:
    with pytest.raises(InvalidValueError, match="1000000000000000 has 16"):
        Tokens("t").readings(Call(Usage(10**15, 0)))
    with pytest.raises(InvalidValueError, match="significant digits"):
        Tokens("t", weights={"input": 10**9}).readings(Call(Usage(10**9, 0)))


def test_credits_are_by_model() -> None:
    with pytest.raises(ConfigurationError, match="Credits takes credits by model, such as"):
        Credits("credits", ["gpt-4o"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": "all"}, {"weights": {}}, {"weights": {"in": 1}}, {"weights": {"input": -1}},
        {"weights": {"input": "NaN"}}, {"weights": {"input": True}}, {"weights": {"input": 1}, "split": True},
        {"weights": {"input": 1}, "count": "input"}, {"split": True, "count": "output"}, {"event_name": ""},
    ],
)  # fmt: skip
def test_tokens_that_contradict_themselves_are_refused_at_the_door(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Tokens(**{"event_name": "t", **arguments})


# -- Messages and Credits


@given(st.none() | usages())
def test_a_message_is_one_whatever_it_consumed(usage: Usage | None) -> None:
    assert Messages("m").readings(Call(usage)) == [Reading("m", Decimal(1))]


@pytest.mark.parametrize(
    ("model", "credits"),
    [
        ("gpt-4o", 10), ("gpt-4o-2024-08-06", 10), ("gpt-4o-mini-2024-07-18", 1), ("gpt-4-0613", 30),
        ("claude-3-5-sonnet-20241022", 5), ("claude-3-5-sonnet@20240620", 5), ("gpt-4o-2024-05-13", 12),
        ("unheard-of", 2), (None, 2), ("", 2), ("20240806", 2),
    ],
)  # fmt: skip
def test_a_message_costs_the_credits_of_the_model_that_answered(model: str | None, credits: int) -> None:
    table = {"gpt-4o": 10, "gpt-4o-mini": 1, "gpt-4": 30, "claude-3-5-sonnet": 5, "gpt-4o-2024-05-13": 12}
    assert value_of(Credits("c", table, default=2), Call(None, model)) == credits


def test_credits_may_be_billed_for_every_call() -> None:
    meter = Credits("c", {"m": 3}, per="call")
    assert (meter.per, value_of(meter, Call(None, "m"))) == ("call", 3)


def test_without_a_default_an_unknown_model_is_held_by_name() -> None:
    assert "'other'" in doubt_of(Credits("c", {"gpt-4o": 1}), Call(None, "other"))


def test_a_free_model_gives_no_reading() -> None:
    assert Credits("c", {"free": 0}, default=1).readings(Call(None, "free")) == []


def test_credits_may_be_given_as_floats_without_their_binary_tail() -> None:
    meter = Credits("c", {"a": 0.1}, default=0.3)  # type: ignore[dict-item, arg-type]
    assert value_of(meter, Call(None, "a")) == Decimal("0.1")
    assert value_of(meter, Call(None, "b")) == Decimal("0.3")


@pytest.mark.parametrize("arguments", [{"credits": {}}, {"credits": {"a": -1}}, {"default": -1}, {"per": "day"}])
def test_credits_that_make_no_sense_are_refused_at_the_door(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Credits(**{"event_name": "c", "credits": {"a": 1}, **arguments})


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"), ("claude-3-opus-20240229", "claude-3-opus"), ("x@20240229", "x"),
        ("gpt-3.5-turbo-0125", "gpt-3.5-turbo"), ("gpt-4o", "gpt-4o"), ("llama3-70b-8192", "llama3-70b-8192"),
        ("mistral-large-2411", "mistral-large-2411"), ("20240806", "20240806"), ("", ""),
    ],
)  # fmt: skip
def test_a_plain_model_name_is_the_dated_one_without_its_date(model: str, plain: str) -> None:
    assert plain_model(model) == plain


# -- Cost

PRICES: Mapping[str, Mapping[str, Any]] = {"m": {"input": Decimal("0.5"), "cache_read": Decimal("0.05"), "output": 2}}


@given(usages())
def test_a_cost_is_dollars_per_million_tokens_times_markup_and_unit(usage: Usage) -> None:
    parts = usage.exclusive()
    fresh = parts["input"] + parts["cache_write"] + parts["audio_input"]
    micro = Decimal("0.5") * fresh + Decimal("0.05") * parts["cache_read"] + 2 * (usage.output or 0)
    call = Call(usage, "m-2025-01-01")
    assert value_of(Cost("c", prices=PRICES), call) == micro
    assert value_of(Cost("c", prices=PRICES, unit="cents", markup=Decimal("1.3")), call) == micro * Decimal("0.00013")
    assert value_of(Cost("c", prices=PRICES, unit="usd"), call) == micro / 1_000_000


@given(usages(), weights, weights, weights)
def test_a_cost_always_fits_into_stripes_digits(usage: Usage, price: Decimal, other: Decimal, markup: Decimal) -> None:
    meter = Cost("c", prices={"m": {"input": price, "output": other}}, markup=markup, unit="usd")
    check_value(value_of(meter, Call(usage, "m")))


def test_a_markup_a_price_or_a_weight_given_as_a_float_has_no_binary_tail() -> None:
    assert Tokens("t", weights={"input": 0.1}).weights == {"input": Decimal("0.1")}  # type: ignore[dict-item]
    assert Cost("c", markup=1.3).markup == Decimal("1.3")  # type: ignore[arg-type]
    prices: Any = {"m": {"input": 0.1, "output": 2}}
    assert Cost("c", prices=prices).prices == {"m": {"input": Decimal("0.1"), "output": Decimal(2)}}


def test_own_prices_come_before_the_price_list() -> None:
    asked = []

    def pricer(usage: Usage, model: str, provider: str | None) -> Decimal:
        asked.append((usage, model, provider))
        return Decimal("0.25")

    meter = Cost("c", prices=PRICES, pricer=pricer, unit="usd")
    assert value_of(meter, Call(Usage(2, 0), "m", "p")) == Decimal("0.000001")
    assert value_of(meter, Call(Usage(2, 0), "n", "p")) == Decimal("0.25")
    assert asked == [(Usage(2, 0), "n", "p")]


def test_the_price_of_a_dated_model_comes_before_that_of_its_plain_name() -> None:
    meter = Cost("c", prices={"m": {"input": 1, "output": 0}, "m-2025-01-01": {"input": 7, "output": 0}})
    assert value_of(meter, Call(Usage(1, 0), "m-2025-01-01")) == 7
    assert value_of(meter, Call(Usage(1, 0), "m-2025-02-02")) == 1


def test_a_model_without_a_price_is_held_by_name() -> None:
    def pricer(usage: Usage, model: str, provider: str | None) -> Decimal:
        raise LookupError(model)

    for meter in (Cost("c"), Cost("c", pricer=pricer)):
        assert "'n'" in doubt_of(meter, Call(Usage(1, 1), "n"))
        assert "None" in doubt_of(meter, Call(Usage(1, 1), None))


@pytest.mark.parametrize(
    "arguments",
    [{"unit": "eur"}, {"markup": -1}, {"markup": "NaN"}, {"prices": {"m": {}}}, {"prices": {"m": {"in": 1}}}],
)
def test_a_cost_that_makes_no_sense_is_refused_at_the_door(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Cost(**{"event_name": "c", **arguments})


# -- rounding


@given(st.decimals(allow_nan=False, allow_infinity=False), st.integers(-150, 14))
def test_rounding_leaves_fifteen_digits_and_hardly_any_error(number: Decimal, magnitude: int) -> None:
    assume(number)
    value = number.scaleb(magnitude - number.adjusted(), Context(prec=100))
    rounded = round_digits(value)
    with localcontext(Context(prec=300)):
        assert abs(rounded - value) <= abs(value) * Decimal("5e-15")
    if abs(rounded) < 10**15:
        assert significant_digits(rounded) <= 15


@given(st.integers(-(10**15) + 1, 10**15 - 1), st.integers(-100, 0))
def test_rounding_leaves_alone_what_already_fits(digits: int, exponent: int) -> None:
    value = Decimal(digits).scaleb(exponent)
    assert round_digits(value) == value


def test_rounding_is_half_to_even_and_keeps_whole_numbers_whole() -> None:
    assert round_digits(Decimal("0.1234567890123445")) == Decimal("0.123456789012344")
    assert round_digits(Decimal("0.1234567890123455")) == Decimal("0.123456789012346")
    assert round_digits(Decimal("1234567890123456.7")) == 1234567890123457


def test_rounding_is_half_to_even_whatever_the_applications_decimal_context() -> None:
    with localcontext(Context(prec=3, rounding=ROUND_UP)):
        assert round_digits(Decimal("0.1234567890123445")) == Decimal("0.123456789012344")
