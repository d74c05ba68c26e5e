"""Meter events: Stripe's limits as checks, exact values, deterministic identifiers."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langchain_stripe_meter.core.events import (
    FUTURE_LIMIT,
    PAST_LIMIT,
    MeterEvent,
    check_account,
    check_customer_id,
    check_dimensions,
    check_event_name,
    check_identifier,
    check_on_error,
    check_tenant,
    check_timestamp,
    check_value,
    check_webhook_secret,
    derive_identifier,
    number_text,
    seconds,
    significant_digits,
)
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d*[1-9])?\Z", re.ASCII)
NOW = 1_780_000_000

fifteen_digits = st.builds(
    lambda digits, exponent: Decimal(digits).scaleb(exponent),
    st.integers(-(10**15) + 1, 10**15 - 1),
    st.integers(-15, 0),
)
texts = st.text(max_size=80)
plain_runs = st.from_regex(r"\A[A-Za-z0-9_-]{1,60}\Z")
dimensions = st.dictionaries(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8), max_size=3)


# -- values


@given(fifteen_digits)
def test_a_value_of_up_to_fifteen_digits_is_kept_exactly(value: Decimal) -> None:
    assert check_value(value) == value
    assert check_value(str(value)) == value


@given(fifteen_digits)
def test_a_value_is_written_in_plain_decimal_notation_that_means_the_same(value: Decimal) -> None:
    text = number_text(value)
    assert PLAIN_NUMBER.match(text)
    assert Decimal(text) == value
    assert significant_digits(value) <= 15


@given(st.integers(-(10**15) + 1, 10**15 - 1))
def test_whole_numbers_are_values(value: int) -> None:
    assert number_text(check_value(value)) == number_text(value) == str(value)


def test_a_number_is_written_out_up_to_two_hundred_places_from_its_point() -> None:
    assert number_text(Decimal("1e200")) == "1" + "0" * 200
    assert number_text(Decimal("-1e-200")) == "-0." + "0" * 199 + "1"
    for beyond in ("1e201", "-1e-201"):
        with pytest.raises(InvalidValueError, match="far beyond"):
            number_text(Decimal(beyond))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_read_as_it_is_written_or_refused(value: float) -> None:
    try:
        checked = check_value(value)
    except InvalidValueError:
        return
    assert checked == Decimal(repr(value))
    assert significant_digits(checked) <= 15


def test_a_float_brings_no_binary_tail() -> None:
    assert number_text(check_value(0.1)) == "0.1"
    assert number_text(check_value(1e14)) == "100000000000000"
    with pytest.raises(InvalidValueError, match=r"0\.30000000000000004 has 17 significant digits"):
        check_value(0.1 + 0.2)


@pytest.mark.parametrize(
    "value",
    [
        True, False, None, "", " ", "abc", "1_000", "١٢", "１２", "1,5", "0x10", "--1", "1.2.3", "1\x00",
        b"1", [1], 1j, Fraction(3), float("nan"), float("inf"), float("-inf"), "nan", "-Infinity", "sNaN", "inf",
        Decimal("NaN"), Decimal("sNaN"), Decimal("-Infinity"), "1e999", Decimal("1e999999"), "1e-999", "-1e999",
        "1e99999999999999999999", 10**15 + 1, 10**16, "1234567890123456", "0.1234567890123456", 10**5000, -(10**5000),
        "9" * 100_000, float("1e300"),
    ],
    ids=lambda value: type(value).__name__,  # some are too long to be written out
)  # fmt: skip
def test_what_stripe_could_not_bill_exactly_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidValueError, match="value") as caught:
        check_value(value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("zero", ["0", "-0", "0.000", "0e-999999999", "0e999999999", Decimal("-0E+900000")])
def test_zero_is_zero_whatever_its_exponent(zero: Any) -> None:
    assert number_text(check_value(zero)) == "0"


@given(st.decimals(), st.integers(-(10**18), 10**18))
def test_any_decimal_at_any_exponent_is_taken_or_refused_at_once(number: Decimal, exponent: int) -> None:
    for value in (number, f"{number}e{exponent}", f"1e{exponent}"):
        try:
            text = number_text(check_value(value))
        except InvalidValueError:
            continue
        assert PLAIN_NUMBER.match(text)
        assert len(text) < 250


@given(st.text(max_size=20))
def test_any_text_is_an_exact_number_or_refused(text: str) -> None:
    try:
        value = check_value(text)
    except InvalidValueError:
        return
    assert re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?", text.strip(), re.ASCII)
    assert value == Decimal(text.strip())


def test_idle_zeros_do_not_count_as_digits_and_are_not_kept() -> None:
    assert str(check_value("1." + "0" * 50)) == "1"
    assert str(check_value("000000000000000000001.50")) == "1.5"


@pytest.mark.parametrize(
    "number", [Decimal("NaN"), Decimal("Infinity"), Decimal("1e999"), 10**5000], ids=["nan", "infinite", "e999", "int"]
)
def test_what_has_no_plain_notation_is_never_written(number: Decimal | int) -> None:
    with pytest.raises(InvalidValueError):
        number_text(number)


# -- identifiers


@given(texts, texts, dimensions)
def test_an_identifier_is_always_safe_in_any_header(run: str, name: str, dims: dict[str, str]) -> None:
    identifier = derive_identifier(run, name, dims)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,100}", identifier, re.ASCII)
    assert check_identifier(identifier) == identifier


@given(texts, texts, dimensions)
def test_the_same_facts_give_the_same_identifier(run: str, name: str, dims: dict[str, str]) -> None:
    turned = dict(reversed(list(dims.items())))
    assert derive_identifier(run, name, dims) == derive_identifier(run, name, turned)
    assert derive_identifier(run, name, None) == derive_identifier(run, name, {})


facts = st.tuples(texts | plain_runs, texts, dimensions)


@given(facts, facts)
def test_different_facts_give_different_identifiers(one: Any, other: Any) -> None:
    assume(one != other)
    assert derive_identifier(*one) != derive_identifier(*other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("run", "ab", {"c": "d"}), ("run", "a", {"bc": "d"})),
        (("run", "m", {"a": "bc"}), ("run", "m", {"ab": "c"})),
        (("run", "m", {"a": "b", "c": "d"}), ("run", "m", {"a": "b1:c1:d"})),
        (("run", "m\0a", {}), ("run", "m", {"\0a": "x"})),
        (("a-b", "c", {}), ("a", "b-c", {})),
        (("run", "1:m", {}), ("run", "m", {"1": ":"})),
        (("job 1", "m", {}), ("job 2", "m", {})),
        (("x", "m", {}), ("", "m", {})),
    ],
)
def test_facts_that_run_together_alike_stay_apart(one: Any, other: Any) -> None:
    assert derive_identifier(*one) != derive_identifier(*other)


def test_a_plain_run_cannot_pass_for_the_digest_of_another() -> None:
    digest = hashlib.sha256(b"5:job 1").hexdigest()[:24]
    assert derive_identifier("job 1", "m").startswith(f"x{digest}-")
    assert derive_identifier(f"x{digest}", "m") != derive_identifier("job 1", "m")


@pytest.mark.parametrize(
    ("facts", "identifier"),
    [
        (("run-1", "ai_tokens"), "run-1-6ccdf44ade58c6efcd1cf2ee"),
        (("run-1", "ai_tokens", {"model": "openai/gpt-4o", "token_type": "input"}), "run-1-0ae2a3cdde519e24015315e0"),
        (("run-1", "ai_tokens", None, "acct_1"), "run-1-15a07edfcacbacb73c46bf6e"),
        (("run-1", "ai_tokens", {"model": "m"}, "acct_1"), "run-1-eaa73fc9d7b8a9604fef1b13"),
        (("job 1", "ai_tokens"), "x9f0d6fa023e18530857e522d-6ccdf44ade58c6efcd1cf2ee"),
        (("\ud800", "ai_tokens"), "xc30f346af72a93ac2ab4bc9e-6ccdf44ade58c6efcd1cf2ee"),
    ],
)
def test_an_upgrade_does_not_change_identifiers_for_stripe_would_bill_again(facts: Any, identifier: str) -> None:
    assert derive_identifier(*facts) == identifier


def test_one_run_has_an_identifier_of_its_own_on_each_account() -> None:
    for dims in ({}, {"model": "m"}):
        assert len({derive_identifier("run-1", "m", dims, account) for account in ("", "acct_1", "acct_2")}) == 3


def test_identifiers_of_later_runs_sort_later() -> None:
    runs = [UUID(int=(0x0190 << 112) + n * 7919).hex for n in range(50)]
    assert sorted(derive_identifier(run, "m") for run in runs) == [derive_identifier(run, "m") for run in runs]


@pytest.mark.parametrize("identifier", ["", "a" * 101, " a", "a ", "a\n", "ä", "a\r\nX: 1", "a\0", None, 7])
def test_an_unsafe_identifier_is_refused(identifier: Any) -> None:
    with pytest.raises(InvalidValueError, match="identifier"):
        check_identifier(identifier)


@pytest.mark.parametrize(("length", "lead"), [(60, "r" * 60), (61, "x")])
def test_a_plain_run_of_up_to_sixty_characters_leads_its_identifier(length: int, lead: str) -> None:
    assert derive_identifier("r" * length, "m").startswith(lead)


# -- names, customers, dimensions


@pytest.mark.parametrize(
    ("check", "prefix"), [(check_identifier, ""), (check_customer_id, "cus_"), (check_account, "acct_")]
)
def test_ids_have_up_to_a_hundred_characters_behind_their_prefix_and_no_line_end(check: Any, prefix: str) -> None:
    for length in (1, 100):
        assert check(prefix + "a" * length) == prefix + "a" * length
    for bad in ("a" * 101, "a\n"):
        with pytest.raises(InvalidValueError):
            check(prefix + bad)


@pytest.mark.parametrize("name", ["", "  ", "a" * 101, "a\nb", "a\0", "\ud800", None, 7, b"a"])
def test_an_event_name_is_one_to_a_hundred_printable_characters(name: Any) -> None:
    with pytest.raises(InvalidValueError, match="event name"):
        check_event_name(name)
    assert check_event_name("a" * 100) == "a" * 100


@pytest.mark.parametrize("customer", ["", "cus_", "acct_1", "cus_1\n", "cus_1 ", " cus_1", "CUS_1", "cus_ä", None, 7])
def test_a_customer_id_is_cus_and_what_stripe_puts_behind_it(customer: Any) -> None:
    with pytest.raises(InvalidValueError, match="customer id"):
        check_customer_id(customer)
    assert check_customer_id("cus_NffrFeUfNV2Hib") == "cus_NffrFeUfNV2Hib"


@pytest.mark.parametrize("personal", ["ann@example.com", "Ann Smith", "+49 30 901820", "cus_ann@example.com"])
def test_what_is_no_customer_id_is_not_repeated_for_it_may_be_personal(personal: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        check_customer_id(personal)
    assert personal not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [{"": "x"}, {"x": ""}, {"k" * 101: "x"}, {"k": "v" * 101}, {"k": 1}, {1: "v"}, {"k": "a\0b"}, {"k": "\ud800"}],
)
def test_dimensions_are_short_printable_texts(bad: Any) -> None:
    with pytest.raises(InvalidValueError, match="dimension"):
        check_dimensions(bad)


def test_dimensions_may_have_one_to_a_hundred_characters() -> None:
    for length in (1, 100):
        dims = {"k" * length: "v" * length}
        assert check_dimensions(dims) == dims


# -- timestamps


@given(st.integers(-PAST_LIMIT, FUTURE_LIMIT))
def test_a_timestamp_inside_stripes_window_passes_with_both_edges(offset: int) -> None:
    assert check_timestamp(NOW + offset, NOW) == NOW + offset


@given(st.integers(max_value=-PAST_LIMIT - 1) | st.integers(min_value=FUTURE_LIMIT + 1))
def test_a_timestamp_outside_stripes_window_is_refused(offset: int) -> None:
    with pytest.raises(InvalidValueError, match=r"35 days in the past|5 minutes in the future"):
        check_timestamp(NOW + offset, NOW)


def test_the_window_is_thirty_five_days_back_and_five_minutes_ahead() -> None:
    assert (PAST_LIMIT, FUTURE_LIMIT) == (35 * 24 * 60 * 60, 5 * 60)
    for edge in (NOW - PAST_LIMIT, NOW + FUTURE_LIMIT):
        assert check_timestamp(edge, NOW) == edge


@pytest.mark.parametrize("timestamp", [True, None, "1780000000", 1.5, float(NOW), Decimal(NOW)])
def test_a_timestamp_is_whole_seconds(timestamp: Any) -> None:
    with pytest.raises(InvalidValueError, match="whole Unix seconds"):
        check_timestamp(timestamp, NOW)


# -- the event


def test_an_event_carries_its_payload_under_the_meters_own_keys() -> None:
    event = MeterEvent("m", "cus_1", Decimal("1.50"), "run-1", NOW, {"model": "openai/gpt-4o"})
    assert event.payload() == {"model": "openai/gpt-4o", "stripe_customer_id": "cus_1", "value": "1.5"}
    assert event.payload("who", "amount") == {"model": "openai/gpt-4o", "who": "cus_1", "amount": "1.5"}


@pytest.mark.parametrize(
    "change",
    [{"event_name": ""}, {"customer": "x"}, {"value": Decimal("NaN")}, {"identifier": "a "}, {"dimensions": {"": ""}}],
)
def test_an_event_cannot_be_made_against_stripes_limits(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "event_name": "m", "customer": "cus_1", "value": Decimal(1), "identifier": "i", "timestamp": NOW
    }  # fmt: skip
    MeterEvent(**good)
    with pytest.raises(InvalidValueError):
        MeterEvent(**{**good, **change})


# -- what an application hands over


async def awaited(_: object) -> None: ...


class Awaited:
    async def __call__(self, _: object) -> None: ...


since = partial(seconds, name="since")
SECRET_TOLD = (
    "must be the signing secret of the webhook's endpoint, 'whsec_' and what Stripe puts behind it. (An API key is "
    "none.)"
)
TENANT_TOLD = (
    "tenant= takes a function from a run's facts to its Tenant, or None, not str. For one account, use "
    "stripe_account='acct_…'."
)


@pytest.mark.parametrize(
    ("check", "value", "told"),
    [
        (check_on_error, 7, "on_error= takes a function of one MeteringError, or None, not int."),
        (check_on_error, awaited, "on_error= takes a plain function; an async one would never be awaited."),
        (check_on_error, Awaited(), "on_error= takes a plain function; an async one would never be awaited."),
        (check_tenant, "acct_1", TENANT_TOLD),
        (check_tenant, awaited, "tenant= takes a plain function; an async one would never be awaited."),
        (check_webhook_secret, 7, f"webhook_secret= {SECRET_TOLD}"),
        (check_webhook_secret, "whsec_", f"webhook_secret= {SECRET_TOLD}"),
        (check_webhook_secret, "rk_test_whsec_1", f"webhook_secret= {SECRET_TOLD}"),
        (since, None, "since= takes a datetime with a time zone or Unix seconds (an int), not None."),
        (since, "2027", "since= takes a datetime with a time zone or Unix seconds (an int), not str."),
        (since, 10**11 + 1, "since=100000000001 is too far away for Unix seconds; are these milliseconds?"),
        (
            since,
            datetime(2027, 1, 2),  # noqa: DTZ001 - that is the mistake
            "since=datetime.datetime(2027, 1, 2, 0, 0) has no time zone; use datetime(..., tzinfo=timezone.utc).",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_pass_instead(check: Any, value: Any, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(value)
    assert str(caught.value) == told


def test_what_can_be_meant_is_taken() -> None:
    for check in (check_on_error, check_tenant):
        for value in (None, print):
            check(value)
    assert [check_webhook_secret(secret) for secret in (None, "", " whsec_1\n")] == [None, None, "whsec_1"]
    assert [seconds(moment, "at") for moment in (10**11, datetime(1970, 1, 2, tzinfo=UTC))] == [10**11, 86_400]
