"""What the core says when it refuses or skips, word for word: what happened, to which value, what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from langchain_stripe_meter.core.customers import (
    Facts,
    Skip,
    as_source,
    first_of,
    from_auth_user,
    from_context,
    from_lead,
    from_metadata,
    static,
)
from langchain_stripe_meter.core.events import (
    check_account,
    check_customer_id,
    check_dimensions,
    check_event_name,
    check_identifier,
    check_timestamp,
    check_value,
)
from langchain_stripe_meter.core.meters import Call, Cost, Credits, Meter, Tokens
from langchain_stripe_meter.core.references import Reference, check_region, normalise
from langchain_stripe_meter.core.states import EventState, Move, ReadingState, next_event_state, next_reading_state
from langchain_stripe_meter.core.tokens import Secrets, sign
from langchain_stripe_meter.core.usage import Usage, usage_from_metadata, usage_from_token_usage
from langchain_stripe_meter.core.values import counted
from langchain_stripe_meter.errors import ConfigurationError, IllegalMoveError, MeteringError, UsageError

NOW = 1_780_000_000
SECRETS = Secrets("x" * 32)
ONE_PART = {"input_tokens": 9, "output_tokens": 9, "input_token_details": {"cache_read": "3"}}
IMPOSSIBLE: Any = "impossible"


def says(kind: type[Exception], act: Callable[[], object], words: str) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert str(caught.value) == words


# -- events


@pytest.mark.parametrize(
    ("check", "value", "words"),
    [
        (check_event_name, 7, ("The event name of a meter must be printable text, not 7. "
         "Use the event name that the meter has in Stripe, such as 'ai_tokens'.")),
        (check_event_name, "n" * 101, f"The event name '{'n' * 56}... has 101 characters; Stripe allows 100."),
        (check_identifier, "a\n", "The identifier 'a\\n' must be 1 to 100 characters of plain ASCII, no space around."),
        (check_customer_id, 7, "A Stripe customer id must be text such as 'cus_NffrFeUfNV2Hib', not int."),
        (check_customer_id, "Ann", "This text is not a Stripe customer id. It must look like 'cus_NffrFeUfNV2Hib'."),
        (check_customer_id, "cus_-", "'cus_-' is not a Stripe customer id. It must look like 'cus_NffrFeUfNV2Hib'."),
        (check_account, "acct_-", "'acct_-' is no connected account. It must look like 'acct_1032D82eZvKYlo2C'."),
        (check_account, "ann@example.com",
         "This value is no connected account. It must look like 'acct_1032D82eZvKYlo2C'."),
        (check_account, None, "This value is no connected account. It must look like 'acct_1032D82eZvKYlo2C'."),
        (check_value, Decimal("NaN"), "The value NaN is not finite; Stripe cannot bill it."),
        (check_value, "1234567890123456",
         "The value '1234567890123456' has 16 significant digits; Stripe allows 15. Round it first."),
        (check_value, "ten", "The value 'ten' is not a number. Pass an int or a Decimal."),
        (check_value, Decimal("1e999"), "The value 1E+999 is far beyond what Stripe can bill."),
        (check_dimensions, {"k": 1}, "The dimension 'k' must map text to text, not to 1."),
        (check_dimensions, {"k": ""}, "The dimension 'k' and its value must have 1 to 100 characters."),
        (check_dimensions, {"k": "\0"}, "The dimension 'k' and its value must be printable text."),
    ],
)  # fmt: skip
def test_what_stripe_would_refuse_is_named_with_its_limit(
    check: Callable[[Any], object], value: object, words: str
) -> None:
    says(ConfigurationError, lambda: check(value), words)


@pytest.mark.parametrize(
    ("timestamp", "words"),
    [
        ("soon", "The timestamp 'soon' must be whole Unix seconds, such as 1780000000."),
        (1_776_975_999, ("The timestamp 1776975999 is more than 35 days in the past. "
         "Stripe takes 1776976000 at the earliest.")),
        (1_780_000_301, ("The timestamp 1780000301 is more than 5 minutes in the future. "
         "Stripe takes 1780000300 at the latest; was it given in milliseconds?")),
    ],
)  # fmt: skip
def test_a_timestamp_is_refused_with_what_stripe_would_take(timestamp: Any, words: str) -> None:
    says(ConfigurationError, lambda: check_timestamp(timestamp, NOW), words)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (" " + "x" * 57, f"' {'x' * 57}'"), (" " + "x" * 58, f"' {'x' * 55}..."),
        (2**1000 - 1, f"{2**1000 - 1}"[:57] + "..."), (2**1000, "(a number of 1001 bits)"),
    ],
    ids=["60 characters", "61 characters", "1000 bits", "1001 bits"],
)  # fmt: skip
def test_a_long_value_is_shown_by_its_beginning_or_by_its_size(value: Any, shown: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_identifier(value)
    assert str(caught.value).startswith(f"The identifier {shown} must be")


# -- customers


@pytest.mark.parametrize(
    ("by", "value", "words"),
    [
        ("email", 7, "The customer's email must be text, not int."),
        ("name", "x" * 513, "The customer's name has 513 characters; at most 512 are taken."),
        ("name", "  ", "The customer's name is empty or holds control characters."),
        ("phone", "a\0", "The customer's phone is empty or holds control characters."),
        ("name", "\ufdfa" * 512, "The customer's name has 9216 characters when normalised, not 1 to 512."),
        ("email", "ann", "The customer's email is not an e-mail address."),
        ("phone", "030 901820", ("The customer's phone is not one complete phone number. Write it with + and the "
         "country code, such as '+49 30 901820', or say where it is dialled with region='DE'.")),
    ],
)  # fmt: skip
def test_what_cannot_be_somebody_is_refused_without_its_value(by: Any, value: object, words: str) -> None:
    says(ConfigurationError, lambda: normalise(by, value), words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reference(IMPOSSIBLE, "1"),
         "A customer is identified by id, email, name, phone, not by 'impossible'."),
        (static, "static() takes exactly one of id, email, name and phone."),
        (lambda: from_lead(IMPOSSIBLE), "from_lead(by='impossible'): use 'email', 'name' or 'phone'."),
        (lambda: static(name="Ann", region="DE"),
         "region='DE' is for phone numbers; a customer known by name has none."),
        (lambda: check_region("de"), "region='de' is no region of phone numbers; use two letters such as 'DE'."),
        (first_of, "first_of() takes at least one source."),
        (lambda: as_source(7), "customer= takes a 'cus_…' id or a source such as from_metadata(...), not int."),
        (lambda: from_metadata(""), "A customer source needs the name of a key, not ''."),
    ],
)  # fmt: skip
def test_a_source_that_makes_no_sense_is_named_with_those_that_do(make: Callable[[], object], words: str) -> None:
    says(ConfigurationError, make, words)


@pytest.mark.parametrize(
    ("source", "facts", "reason"),
    [
        (from_metadata("k"), Facts(), "metadata has no 'k'"),
        (from_metadata("k"), Facts({"k": ""}), "metadata has no 'k'"),
        (from_metadata("k"), Facts(configurable={"k": "cus_1"}), "metadata, unlike the configurable, has no 'k'"),
        (from_metadata("k"), Facts({"k": "ann"}), "the customer's id is malformed; it looks like 'cus_123'"),
        (from_metadata("k"), Facts({"k": "cus_1"}, on_server=True),
         "metadata comes from the client of an agent server"),
        (from_auth_user("k"), Facts(), "the authenticated user has no 'k'"),
        (from_context("k"), Facts(), "the context has no 'k'"),
        (from_context("k"), Facts(context={"k": "cus_1"}, on_server=True),
         "the context comes from the client of an agent server"),
        (from_lead(), Facts(),
         "metadata has no 'lead', and no 'session_id', 'thread_id' or 'conversation_id' to find one by"),
        (from_lead(), Facts({"thread_id": "t"}), "the lead has no email"),
        (from_lead("name"), Facts({"lead": {"name": ""}}), "the lead has no name"),
        (from_lead("phone"), Facts({"lead": {"phone": 7}}),
         "the customer's phone is malformed; it looks like '+49 30 901820'"),
        (from_lead("phone"), Facts({"thread_id": "t"}, on_server=True),
         "no lead with phone was captured by the server"),
    ],
)  # fmt: skip
def test_a_skip_says_where_nobody_was_found(source: Any, facts: Facts, reason: str) -> None:
    skip = source.identify(facts)
    assert (isinstance(skip, Skip), skip.reason) == (True, reason)


# -- meters


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tokens("t", count=IMPOSSIBLE), "Tokens(count='impossible'): use 'total', 'input' or 'output'."),
        (lambda: Tokens("t", count="input", weights={"input": 1}),
         "Tokens takes one of count=, weights= and split=, not several."),
        (lambda: Tokens("t", count="input", split=True),
         "Tokens takes one of count=, weights= and split=, not several."),
        (lambda: Tokens("t", weights={"in": 1, "a": 1}), ("Tokens cannot weigh 'a'; the kinds are input, output, "
         "cache_read, cache_write, audio_input, reasoning, audio_output.")),
        (lambda: Tokens("t", weights={}), "Tokens(weights=...) takes at least one kind, and no weight below 0."),
        (lambda: Credits("c", {5: 1}), "Credits takes credits by a model's name, not by 5."),  # type: ignore[dict-item]
        (lambda: Tokens("t", weights=IMPOSSIBLE), "Tokens(weights=...) takes weights by kind, such as {'input': 1}."),
        (lambda: Cost("c", prices=IMPOSSIBLE),
         "Cost takes prices by model and kind, such as {'my-model': {'input': 1, 'output': 2}}."),
        (lambda: Cost("c", prices={"m": IMPOSSIBLE}),
         "Cost(prices=...) of 'm' takes prices by kind, such as {'input': 1, 'output': 2}."),
        (lambda: Cost("c", prices={"m": {"in": 1}}), ("Cost(prices=...) of 'm' cannot price 'in'; the kinds are input, "
         "output, cache_read, cache_write, audio_input, reasoning, audio_output.")),
        (lambda: Cost("c", prices={"m": {"input": -1, "output": 1}}),
         "Cost(prices=...) of 'm' takes no price below 0."),
        (lambda: Cost("c", prices={"m": {"input": 1}}),
         "Cost(prices=...) of 'm' has no price for 'output'. Where it costs nothing, say 0."),
        (lambda: Cost("c", prices={"m": {"output": 1}}),
         "Cost(prices=...) of 'm' has no price for 'input'. Where it costs nothing, say 0."),
        (lambda: Credits("c", {"m": 1}, per=IMPOSSIBLE), "Credits(per='impossible'): use 'message' or 'call'."),
        (lambda: Credits("c", {}), "Credits takes credits for at least one model or a default, none below 0."),
        (lambda: Cost("c", unit=IMPOSSIBLE), "Cost(unit='impossible'): use usd, cents, micro_usd."),
        (lambda: Cost("c", markup=-1), "Cost(markup=-1) must not be below 0."),
    ],
)  # fmt: skip
def test_a_meter_that_makes_no_sense_is_named_with_what_it_takes(make: Callable[[], object], words: str) -> None:
    says(ConfigurationError, make, words)


@pytest.mark.parametrize(
    ("meter", "call", "doubt"),
    [
        (Tokens("e"), Call(None), "the provider reported no usage"),
        (Tokens("e", split=True), Call(Usage(1, 1)), "the run has no model name"),
        (Tokens("e", split=True), Call(Usage(1, 1), "m" * 101, "p"),
         "The dimension 'model' and its value must have 1 to 100 characters."),
        (Credits("e", {"m": 1}), Call(None, "n"), "no credits are set for the model 'n'"),
        (Cost("e"), Call(Usage(1, None)), "the provider reported no usage"),
        (Cost("e"), Call(Usage(1, 1), "n"),
         "no price is known for the model 'n' of no named provider; give one with Cost(prices=...)"),
        (Cost("e"), Call(Usage(1, 1), "n", "openai"),
         "no price is known for the model 'n' of 'openai'; give one with Cost(prices=...)"),
    ],
)  # fmt: skip
def test_a_reading_that_is_held_says_why_and_of_which_meter(meter: Meter, call: Call, doubt: str) -> None:
    (held,) = meter.readings(call)
    assert (held.event_name, held.value, held.doubt) == ("e", None, doubt)


@pytest.mark.parametrize(("count", "words"), [(0, "0 readings"), (1, "1 reading"), (1000, "1,000 readings")])
def test_one_is_told_as_one(count: int, words: str) -> None:
    assert counted(count, "reading") == words


# -- usage


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: usage_from_metadata(ONE_PART),
         "The provider reported cache_read = a str; a token count is a whole number from 0 up."),
        (lambda: Usage(-(10**5000), 0),
         "The provider reported input = (a number of 16610 bits); a token count is a whole number from 0 up."),
        (lambda: Usage(-1, 0), "The provider reported input = -1; a token count is a whole number from 0 up."),
        (lambda: usage_from_metadata({"output_token_details": [1]}),
         "The provider reported output_token_details as list, not as counts by name."),
        (lambda: usage_from_token_usage({"prompt_tokens": 1, "prompt_tokens_details": "x"}),
         "The provider reported prompt_tokens_details as str, not as counts by name."),
        (lambda: Usage(5, 5, cache_read=3, cache_write=3),
         "The provider reported cache_read + cache_write = 6, which is more than input = 5."),
        (lambda: Usage(5, 5, audio_input=6), "The provider reported audio_input = 6, which is more than input = 5."),
        (lambda: Usage(5, 5, reasoning=3, audio_output=3),
         "The provider reported reasoning + audio_output = 6, which is more than output = 5."),
        (lambda: usage_from_metadata({"total_tokens": 7}),
         "The provider reported total_tokens = 7, but input = None and output = None."),
        (lambda: usage_from_token_usage({"prompt_tokens": 0, "total_tokens": 7}),
         "The provider reported total_tokens = 7, but input = 0 and output = None."),
    ],
)  # fmt: skip
def test_a_report_that_contradicts_itself_is_quoted(read: Callable[[], object], words: str) -> None:
    says(UsageError, read, words)


# -- tokens and states


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Secrets([]), "Signing tokens takes at least one secret."),
        (lambda: Secrets([IMPOSSIBLE, 7]), ("A secret that signs tokens has 10 bytes; at least 32 are needed. "
         "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'")),
        (lambda: Secrets([7]), "A secret that signs tokens is text or bytes, not int."),  # type: ignore[list-item]
        (lambda: sign("cus_1", SECRETS, expires_at=-1),
         "expires_at=-1 is neither Unix seconds (an int) nor a datetime."),
        (lambda: sign("cus_1", SECRETS, expires_at=datetime(2027, 1, 1)),  # noqa: DTZ001 - it has no time zone
         "expires_at=datetime.datetime(2027, 1, 1, 0, 0) has no time zone; use datetime(..., tzinfo=timezone.utc)."),
    ],
)  # fmt: skip
def test_what_signs_no_token_is_named_with_its_remedy(make: Callable[[], object], words: str) -> None:
    says(ConfigurationError, make, words)


def test_a_secret_says_why_it_cannot_be_pickled_and_shows_only_how_many_it_is() -> None:
    says(
        TypeError,
        lambda: pickle.dumps(SECRETS),
        "The secret that signs tokens is never pickled. Make the source where it is used.",
    )
    assert repr(SECRETS) == "<a secret>"
    assert repr(Secrets(["x" * 32, "y" * 32])) == "<2 secrets>"


def test_an_illegal_move_names_the_state_and_the_move() -> None:
    words = "A reading that is sealed cannot claimed by a lead."
    says(IllegalMoveError, lambda: next_reading_state(ReadingState.SEALED, Move.CLAIM), words)
    words = "An event that is delivered cannot send."
    says(MeteringError, lambda: next_event_state(EventState.DELIVERED, Move.SEND), words)
