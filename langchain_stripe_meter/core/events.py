"""A meter event: what Stripe will be told, checked against every limit of Stripe's where it is made."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import lru_cache

from langchain_stripe_meter.core.values import shown
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

MAX_NAME_LENGTH = 100
"""Characters in an event name and in an identifier (Stripe's API reference)."""
MAX_DIGITS = 15
"""Significant digits in a value; more are refused with ``meter_event_value_too_many_digits``."""
PAST_LIMIT = 35 * 86_400
"""How far back, in seconds, a timestamp may lie (35 calendar days)."""
FUTURE_LIMIT = 5 * 60
"""How far ahead, in seconds, a timestamp may lie."""

_ALWAYS_SHORT = 10**MAX_DIGITS
_IDENTIFIER = re.compile(r"[!-~](?:[ -~]{0,98}[!-~])?\Z")
_PLAIN_LEAD = re.compile(r"(?!x[0-9a-f]{24}\Z)[A-Za-z0-9_-]{1,60}\Z")
_ACCOUNT_ID = re.compile(r"acct_[A-Za-z0-9_]{1,100}\Z")
_CUSTOMER_ID = re.compile(r"cus_[A-Za-z0-9_]{1,100}\Z")


def check_event_name(name: object) -> str:
    """The event name of a meter: 1 to 100 printable characters."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InvalidValueError(
            f"The event name of a meter must be printable text, not {shown(name)}. "
            "Use the event name that the meter has in Stripe, such as 'ai_tokens'."
        )
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidValueError(
            f"The event name {shown(name)} has {len(name)} characters; Stripe allows {MAX_NAME_LENGTH}."
        )
    return name


def check_identifier(identifier: object) -> str:
    """An identifier: 1 to 100 printable characters of ASCII (narrower than Stripe's, so it is safe in any header)."""
    if not isinstance(identifier, str) or not _IDENTIFIER.match(identifier):
        raise InvalidValueError(
            f"The identifier {shown(identifier)} must be 1 to {MAX_NAME_LENGTH} characters of plain ASCII, "
            "no space around."
        )
    return identifier


def check_customer_id(customer: object) -> str:
    """A Stripe customer id: ``cus_`` and what Stripe puts behind it."""
    if not isinstance(customer, str):
        raise InvalidValueError(
            f"A Stripe customer id must be text such as 'cus_NffrFeUfNV2Hib', not {type(customer).__name__}."
        )
    if not _CUSTOMER_ID.match(customer):  # not repeated unless it is nearly one: it could be an e-mail or a name
        said = shown(customer) if customer.startswith("cus_") and "@" not in customer else "This text"
        raise InvalidValueError(f"{said} is not a Stripe customer id. It must look like 'cus_NffrFeUfNV2Hib'.")
    return customer


def check_account(account: object) -> str:
    """A connected account's id, ``acct_`` and what Stripe puts behind it; ``""`` is the key's own account."""
    if not isinstance(account, str) or (account and not _ACCOUNT_ID.match(account)):
        said = shown(account) if str(account).startswith("acct_") else "This value"
        raise InvalidValueError(f"{said} is no connected account. It must look like 'acct_1032D82eZvKYlo2C'.")
    return account


def check_value(value: object) -> Decimal:
    """An exact, finite number of at most 15 significant digits; negative values are corrections.

    ``float`` is taken by its shortest decimal form (0.1 is 0.1), since that is what its author wrote.
    """
    number = _decimal(value)
    if not number.is_finite():
        raise InvalidValueError(f"The value {shown(value)} is not finite; Stripe cannot bill it.")
    text = number_text(number)
    digits = _count_digits(text)
    if digits > MAX_DIGITS:
        raise InvalidValueError(
            f"The value {shown(value)} has {digits} significant digits; Stripe allows {MAX_DIGITS}. Round it first."
        )
    return Decimal(text)


def _decimal(value: object) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    text = str(value).strip() if isinstance(value, float | str) else ""
    if not text.isascii() or "_" in text:  # Decimal would take '1_000' and digits of any script
        text = ""
    try:
        return Decimal(text)
    except ArithmeticError:
        raise InvalidValueError(f"The value {shown(value)} is not a number. Pass an int or a Decimal.") from None


def significant_digits(number: Decimal) -> int:
    """Digits that must be written down, without an exponent, to state ``number`` exactly."""
    return _count_digits(number_text(number))


def _count_digits(text: str) -> int:
    return len(text.lstrip("-").replace(".", "").lstrip("0"))


def number_text(number: Decimal | int) -> str:
    """``number`` as Stripe takes it: plain decimal notation, never an exponent, no idle zeros."""
    if type(number) is int and -_ALWAYS_SHORT < number < _ALWAYS_SHORT:
        return str(number)
    number = number if isinstance(number, Decimal) else Decimal(number)
    if not number:  # whatever its exponent: "0e-999999999" would otherwise be a gigabyte of zeros
        return "0"
    if not number.is_finite() or abs(number.adjusted()) > 200:  # as would "1e999999"
        raise InvalidValueError(f"The value {shown(number)} is far beyond what Stripe can bill.")
    text = str(number)
    if "E" in text:
        text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text


def check_timestamp(timestamp: object, now: int) -> int:
    """Unix seconds from 35 days before ``now`` to 5 minutes after it."""
    if isinstance(timestamp, bool) or not isinstance(timestamp, int):
        raise InvalidValueError(f"The timestamp {shown(timestamp)} must be whole Unix seconds, such as {now}.")
    if timestamp < now - PAST_LIMIT:
        raise InvalidValueError(
            f"The timestamp {timestamp} is more than 35 days in the past. "
            f"Stripe takes {now - PAST_LIMIT} at the earliest."
        )
    if timestamp > now + FUTURE_LIMIT:
        raise InvalidValueError(
            f"The timestamp {timestamp} is more than 5 minutes in the future. "
            f"Stripe takes {now + FUTURE_LIMIT} at the latest; was it given in milliseconds?"
        )
    return timestamp


def check_dimensions(dimensions: Mapping[str, str]) -> dict[str, str]:
    """Further payload keys: text to text, short enough for Stripe to take."""
    for key, value in dimensions.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidValueError(f"The dimension {shown(key)} must map text to text, not to {shown(value)}.")
        if not 0 < len(key) <= MAX_NAME_LENGTH or not 0 < len(value) <= MAX_NAME_LENGTH:
            raise InvalidValueError(
                f"The dimension {shown(key)} and its value must have 1 to {MAX_NAME_LENGTH} characters."
            )
        if not key.isprintable() or not value.isprintable():
            raise InvalidValueError(f"The dimension {shown(key)} and its value must be printable text.")
    return dict(dimensions)


def derive_identifier(run: str, event_name: str, dimensions: Mapping[str, str] | None = None, account: str = "") -> str:
    """The identifier of what ``run`` adds to one meter of an account: the same on every machine and every repetition.

    ``run`` leads, so that identifiers of uuid7 runs are ordered by time and the ledger's unique index stays flat;
    behind it stands a digest of the meter and its dimensions. A run that is no plain name (``record_usage(id=...)``
    takes any text) becomes a digest too, and so does one that could be taken for such a digest.
    """
    lead = run if _PLAIN_LEAD.match(run) else f"x{_digest(run)}"
    if not dimensions and not account:
        return f"{lead}-{_digest(event_name)}"
    parts = [part for pair in sorted((dimensions or {}).items()) for part in pair]
    return f"{lead}-{_digest(event_name, *parts, *([account] if account else []))}"


@lru_cache(maxsize=1024)
def _digest(*facts: str) -> str:
    """24 hexadecimal digits for these facts; their lengths are part of them, so that no two lists collide."""
    told = "".join(f"{len(fact)}:{fact}" for fact in facts)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class MeterEvent:
    """One meter event, ready to send: every field has passed Stripe's limits except the time window,
    which depends on when it is sent (see ``check_timestamp``).

    ``value`` is in the meter's own unit; ``timestamp`` in Unix seconds, when the usage happened. ``account`` is the
    connected account (``acct_…``) that the customer and the meter belong to, or ``""`` for the key's own.
    """

    event_name: str
    customer: str
    value: Decimal
    identifier: str
    timestamp: int
    dimensions: Mapping[str, str] = field(default_factory=dict)
    account: str = ""

    def __post_init__(self) -> None:
        check_account(self.account)
        check_event_name(self.event_name)
        check_customer_id(self.customer)
        check_identifier(self.identifier)
        check_dimensions(self.dimensions)
        object.__setattr__(self, "value", check_value(self.value))

    def payload(self, customer_key: str = "stripe_customer_id", value_key: str = "value") -> dict[str, str]:
        """The payload under the keys that the meter was created with (Stripe's defaults unless told)."""
        return {**self.dimensions, customer_key: self.customer, value_key: number_text(self.value)}


# -- arguments that would fail late, or never be noticed: refused where they are given

LAST_SECOND = 10**11
"""Beyond this, a number of seconds was meant as milliseconds."""


def is_async(function: object) -> bool:
    """Whether a call of ``function`` does nothing until it is awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def check_on_error(on_error: object) -> None:
    """None, or what a plain call with an error tells it to."""
    if on_error is None:
        return
    if not callable(on_error):
        raise ConfigurationError(f"on_error= takes a function of one MeteringError, or None, not {_kind(on_error)}.")
    if is_async(on_error):
        raise ConfigurationError("on_error= takes a plain function; an async one would never be awaited.")


def check_tenant(tenant: object) -> None:
    """None, or what a plain call with a run's facts gives its tenant."""
    if tenant is None:
        return
    if not callable(tenant):
        raise ConfigurationError(
            f"tenant= takes a function from a run's facts to its Tenant, or None, not {_kind(tenant)}. "
            "For one account, use stripe_account='acct_…'."
        )
    if is_async(tenant):
        raise ConfigurationError("tenant= takes a plain function; an async one would never be awaited.")


def check_webhook_secret(secret: object, name: str = "webhook_secret=") -> str | None:
    """A signing secret as Stripe makes them, without space around it; None (or ``""``) stays None. Never repeated."""
    if secret in (None, ""):
        return None
    stripped = secret.strip() if isinstance(secret, str) else ""
    if not stripped.removeprefix("whsec_") or not stripped.startswith("whsec_"):
        raise ConfigurationError(
            f"{name} must be the signing secret of the webhook's endpoint, 'whsec_' and what Stripe puts behind it. "
            "(An API key is none.)"
        )
    return stripped


def seconds(moment: datetime | int, name: str) -> int:
    """A datetime with a time zone, or Unix seconds, as Unix seconds."""
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ConfigurationError(f"{name}={moment!r} has no time zone; use datetime(..., tzinfo=timezone.utc).")
        return int(moment.timestamp())
    if type(moment) is not int:
        raise ConfigurationError(
            f"{name}= takes a datetime with a time zone or Unix seconds (an int), not {_kind(moment)}."
        )
    if abs(moment) > LAST_SECOND:
        raise ConfigurationError(f"{name}={moment} is too far away for Unix seconds; are these milliseconds?")
    return moment


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
