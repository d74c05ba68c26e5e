"""Who somebody is: a Stripe customer's id, or an e-mail, name or phone number in the one form in which it is kept."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from dataclasses import field
from typing import Literal

from langchain_stripe_meter.core.events import check_customer_id
from langchain_stripe_meter.core.values import valueclass
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

By = Literal["id", "email", "name", "phone"]
FIELDS: tuple[By, ...] = ("id", "email", "name", "phone")
"""By what somebody may be known."""
_PHONE = re.compile(r"\(?\+?[\d ().\u2010-\u2015\u2212-]+")
MAX_TEXT = 512
"""Characters in a reference; Stripe itself takes no longer e-mail, name or phone."""


@valueclass
class Reference:
    """Somebody who pays: a Stripe customer ``id``, or an ``email``, ``name`` or ``phone`` that names exactly one."""

    by: By
    value: str = field(repr=False)

    def __post_init__(self) -> None:
        if self.by not in FIELDS:
            raise ConfigurationError(f"A customer is identified by {', '.join(FIELDS)}, not by {self.by!r}.")
        object.__setattr__(self, "value", normalise(self.by, self.value))

    @property
    def text(self) -> str:
        """As the ledger writes it, such as ``email:ann@example.com``."""
        return f"{self.by}:{self.value}"

    @classmethod
    def of(cls, text: str) -> Reference:
        """What ``text`` was written for; ``MeteringError`` where it names nobody."""
        by, _, value = text.partition(":")
        return cls(by, value)  # type: ignore[arg-type]


def normalise(by: By, value: object, region: str | None = None) -> str:
    """The exact form in which a reference is kept and compared; it is its own normal form.

    A name is NFKC with single spaces. An e-mail keeps its mailbox as it is (Stripe's filter tells ``Ann@`` from
    ``ann@``) and has its domain in lower case. A phone number becomes E.164; one without a leading ``+`` is read as
    dialled in ``region`` (``"DE"``), and without a region it is refused. No error repeats the value.
    """
    if by == "id":
        return check_customer_id(value)
    if not isinstance(value, str):
        raise InvalidValueError(f"The customer's {by} must be text, not {type(value).__name__}.")
    if len(value) > MAX_TEXT:
        raise InvalidValueError(f"The customer's {by} has {len(value)} characters; at most {MAX_TEXT} are taken.")
    text = " ".join(value.split())
    if not text or not text.isprintable():
        raise InvalidValueError(f"The customer's {by} is empty or holds control characters.")
    if by == "email":
        return _normalise_email(text)
    return _normalise_phone(text, region) if by == "phone" else _normalise_name(text)


def _normalise_name(text: str) -> str:
    name = " ".join(unicodedata.normalize("NFKC", text).split())
    if not name or len(name) > MAX_TEXT:  # NFKC can lengthen a text up to eighteenfold
        raise InvalidValueError(f"The customer's name has {len(name)} characters when normalised, not 1 to {MAX_TEXT}.")
    return name


def _normalise_email(text: str) -> str:
    from email_validator import EmailNotValidError, validate_email

    domain = None
    with suppress(EmailNotValidError):  # not chained: its text quotes the address
        domain = validate_email(text, check_deliverability=False).domain
    if domain is None:
        raise InvalidValueError("The customer's email is not an e-mail address.")
    mailbox, _, written = text.rpartition("@")  # the library would lower-case some mailboxes, such as Postmaster
    return f"{unicodedata.normalize('NFC', mailbox)}@{written.lower() if written.isascii() else domain}"


def _normalise_phone(text: str, region: str | None) -> str:
    number = _e164(text, region)
    if number is None or number != _e164(number):  # oddities such as +49 0000 shrink each time that they are read
        raise InvalidValueError(
            "The customer's phone is not one complete phone number. Write it with + and the country code, such as "
            "'+49 30 901820', or say where it is dialled with region='DE'."
        )
    return number


def _e164(text: str, region: str | None = None) -> str | None:
    import phonenumbers

    # The library reads letters as keys, joins what a star or a slash divides and drops extensions: those are guesses.
    if not _PHONE.fullmatch(unicodedata.normalize("NFKC", text)):
        return None
    with suppress(phonenumbers.NumberParseException):
        number = phonenumbers.parse(text, region)
        if phonenumbers.is_possible_number_with_reason(number) == phonenumbers.ValidationResult.IS_POSSIBLE:
            return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    return None


def check_region(region: str | None) -> str | None:
    """A region in which phone numbers are dialled: two capital letters such as ``DE``; None for no region."""
    if region is not None:
        import phonenumbers

        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise ConfigurationError(f"region={region!r} is no region of phone numbers; use two letters such as 'DE'.")
    return region
