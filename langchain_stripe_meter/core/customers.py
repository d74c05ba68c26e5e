"""Who pays: from the facts of a run to a customer reference, or the reason to skip.

A source is plain data; ``identify`` reads it against the facts. Nobody is ever guessed: a source gives a reference
that is exactly what was said, or nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain_stripe_meter.core.events import check_customer_id
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

By = Literal["id", "email", "name", "phone"]
_FIELDS: tuple[By, ...] = ("id", "email", "name", "phone")
MAX_TEXT = 512
"""Characters in a reference; Stripe itself takes no longer e-mail, name or phone."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Somebody who pays: a Stripe customer ``id``, or an ``email``, ``name`` or ``phone`` that names exactly one."""

    by: By
    value: str = field(repr=False)

    def __post_init__(self) -> None:
        if self.by not in _FIELDS:
            raise ConfigurationError(f"A customer is identified by {', '.join(_FIELDS)}, not by {self.by!r}.")
        object.__setattr__(self, "value", normalise(self.by, self.value))


def normalise(by: By, value: object) -> str:
    """The exact form in which a reference is kept and compared.

    Text is NFKC and trimmed, an e-mail is lower-cased in its domain only (the mailbox may be case-sensitive).
    """
    if by == "id":
        return check_customer_id(value)
    if not isinstance(value, str):
        raise InvalidValueError(f"The customer's {by} must be text, not {type(value).__name__}.")
    if len(value) > MAX_TEXT:
        raise InvalidValueError(f"The customer's {by} has {len(value)} characters; at most {MAX_TEXT} are taken.")
    text = " ".join(unicodedata.normalize("NFKC", value).split())
    if not text or not text.isprintable():
        raise InvalidValueError(f"The customer's {by} is empty or holds control characters.")
    return _normalise_email(text) if by == "email" else _normalise_phone(text) if by == "phone" else text


def _normalise_email(text: str) -> str:
    mailbox, at, domain = text.rpartition("@")
    if not at or not mailbox or "." not in domain or " " in text:
        raise InvalidValueError("The customer's email is not an e-mail address.")
    return f"{mailbox}@{domain.lower()}"


def _normalise_phone(text: str) -> str:
    digits = "".join(char for char in text if char not in " ()-./")
    plain = digits.removeprefix("+")
    if not (plain.isascii() and plain.isdigit() and 6 <= len(plain) <= 15):
        raise InvalidValueError("The customer's phone is not a phone number of 6 to 15 digits.")
    return digits


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a run when it must be decided who pays.

    ``metadata`` is the run's (on an agent server: the client's word), ``auth_user`` the user whom the server
    authenticated, ``context`` LangGraph's runtime context, ``lead`` looks up what the application captured for a
    session.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    auth_user: Any = None
    context: Any = None
    on_server: bool = False
    lead: Callable[[str], Mapping[str, str] | None] | None = None

    @property
    def session(self) -> str | None:
        """The conversation: ``session_id``, ``thread_id`` or ``conversation_id`` of the run's metadata."""
        for key in ("session_id", "thread_id", "conversation_id"):
            value = self.metadata.get(key)
            if value is not None and value != "":
                return str(value)
        return None


@dataclass(frozen=True, slots=True)
class Skip:
    """Nobody to bill, and why; ``reason`` never holds personal data."""

    reason: str


@dataclass(frozen=True, slots=True)
class Static:
    """One fixed customer pays for everything."""

    reference: Reference

    def identify(self, facts: Facts) -> Reference | Skip:
        return self.reference


@dataclass(frozen=True, slots=True)
class FromMetadata:
    """A ``cus_…`` id under ``key`` in the run's metadata."""

    key: str
    trust_client: bool = False

    def identify(self, facts: Facts) -> Reference | Skip:
        if facts.on_server and not self.trust_client:
            return Skip("metadata comes from the client of an agent server")
        return _reference("id", facts.metadata.get(self.key), f"metadata has no {self.key!r}")


@dataclass(frozen=True, slots=True)
class FromAuthUser:
    """A ``cus_…`` id under ``key`` of the user that the agent server authenticated."""

    key: str

    def identify(self, facts: Facts) -> Reference | Skip:
        return _reference("id", _get(facts.auth_user, self.key), f"the authenticated user has no {self.key!r}")


@dataclass(frozen=True, slots=True)
class FromContext:
    """A ``cus_…`` id under ``key`` of LangGraph's runtime context. On a server, the client sends the context."""

    key: str
    trust_client: bool = False

    def identify(self, facts: Facts) -> Reference | Skip:
        if facts.on_server and not self.trust_client:
            return Skip("the context comes from the client of an agent server")
        return _reference("id", _get(facts.context, self.key), f"the context has no {self.key!r}")


@dataclass(frozen=True, slots=True)
class FromLead:
    """The collected lead: what the application captured for the session, else ``lead`` in the run's metadata."""

    by: By
    trust_client: bool = False

    def identify(self, facts: Facts) -> Reference | Skip:
        captured = facts.lead(facts.session) if facts.lead and facts.session else None
        if captured and captured.get(self.by):
            return _reference(self.by, captured[self.by], "")
        if facts.on_server and not self.trust_client:
            return Skip(f"no lead with {self.by} was captured by the server")
        lead = facts.metadata.get("lead")
        return _reference(self.by, _get(lead, self.by), f"the lead has no {self.by}")


@dataclass(frozen=True, slots=True)
class FirstOf:
    """The first source that names somebody."""

    sources: tuple[CustomerSource, ...]

    def identify(self, facts: Facts) -> Reference | Skip:
        reasons = []
        for source in self.sources:
            who = source.identify(facts)
            if isinstance(who, Reference):
                return who
            reasons.append(who.reason)
        return Skip("; ".join(reasons))


CustomerSource = Static | FromMetadata | FromAuthUser | FromContext | FromLead | FirstOf


def _get(source: Any, key: str) -> Any:
    return source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)


def _reference(by: By, value: Any, missing: str) -> Reference | Skip:
    """An absent value is a skip; a present one that cannot be true is a skip too, for nobody is billed on a guess."""
    if value is None or value == "":
        return Skip(missing)
    try:
        return Reference(by, value)
    except InvalidValueError:
        return Skip(f"the customer's {by} is malformed")


def static(
    *, id: str | None = None, email: str | None = None, name: str | None = None, phone: str | None = None
) -> Static:
    """One fixed customer pays for everything; exactly one of the four names it."""
    given: list[tuple[By, str]] = []
    for by, value in zip(_FIELDS, (id, email, name, phone), strict=True):
        if value is not None:
            given.append((by, value))
    if len(given) != 1:
        raise ConfigurationError("static() takes exactly one of id=, email=, name= and phone=.")
    return Static(Reference(*given[0]))


def from_metadata(key: str, *, trust_client: bool = False) -> FromMetadata:
    """Read a ``cus_…`` id from the run's metadata.

    Under an agent server the metadata is whatever the client sent, so it is not believed there unless
    ``trust_client=True``.
    """
    return FromMetadata(_key(key), trust_client)


def from_auth_user(key: str) -> FromAuthUser:
    """Read a ``cus_…`` id from the user that a deployed agent server authenticated."""
    return FromAuthUser(_key(key))


def from_context(key: str, *, trust_client: bool = False) -> FromContext:
    """Read a ``cus_…`` id from LangGraph's runtime context (``context=`` of the call)."""
    return FromContext(_key(key), trust_client)


def from_lead(by: By = "email", *, trust_client: bool = False) -> FromLead:
    """Read the lead's ``email``, ``name`` or ``phone``: captured for the session, or in ``metadata["lead"]``.

    Under an agent server, only a lead that the server's own code captured is believed, unless ``trust_client=True``.
    """
    if by not in ("email", "name", "phone"):
        raise ConfigurationError(f"from_lead(by={by!r}): use 'email', 'name' or 'phone'.")
    return FromLead(by, trust_client)


def first_of(*sources: CustomerSource) -> FirstOf:
    """Try the sources in order; the first that names somebody decides."""
    if not sources:
        raise ConfigurationError("first_of() takes at least one source.")
    return FirstOf(tuple(as_source(source) for source in sources))


def needs_lookup(source: CustomerSource) -> bool:
    """Whether identifying may ask the ledger for a captured lead."""
    if isinstance(source, FirstOf):
        return any(needs_lookup(one) for one in source.sources)
    return isinstance(source, FromLead)


def as_source(customer: CustomerSource | str) -> CustomerSource:
    """A source as it is; a plain string is a static ``cus_…`` id."""
    if isinstance(customer, str):
        return static(id=customer)
    if not isinstance(customer, CustomerSource):
        raise ConfigurationError(
            f"customer= takes a 'cus_…' id or a source such as from_metadata(...), not {type(customer).__name__}."
        )
    return customer


def _key(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"A customer source needs the name of a key, not {key!r}.")
    return key
