"""Who pays: from the facts of a run to a customer reference, or the reason to skip.

A source is plain data; ``identify`` reads it against the facts. Nobody is ever guessed: a source gives a reference
that is exactly what was said, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from langchain_stripe_meter.core import tokens
from langchain_stripe_meter.core.events import check_account
from langchain_stripe_meter.core.references import FIELDS, MAX_TEXT, By, Reference, check_region, normalise
from langchain_stripe_meter.core.values import valueclass
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

_SESSION_KEYS = ("session_id", "thread_id", "conversation_id")
_EXAMPLES = {"id": "'cus_123'", "email": "'ann@example.com'", "name": "'Ann Lee'", "phone": "'+49 30 901820'"}


@valueclass
class Facts:
    """What is known of a run when it must be decided who pays.

    ``metadata`` is the run's, ``configurable`` the texts in its configurable and ``context`` LangGraph's runtime
    context: all three the client's word where ``on_server``, which is true of a run that an agent server or
    ``metered_config`` started for a client. ``auth_user`` is the user whom the server or the application
    authenticated; where the application named that user for this very run, ``named`` is what was read of them then.
    ``lead`` looks up what the application captured for a session, ``now`` is when the run started, in Unix seconds.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    auth_user: Any = field(default=None, repr=False)
    context: Any = field(default=None, repr=False)
    on_server: bool = False
    named: Mapping[str, Any] | None = field(default=None, repr=False)
    lead: Callable[[str], Mapping[str, str] | None] | None = None
    configurable: Mapping[str, str] = field(default_factory=dict, repr=False)
    now: int | None = field(default=None, compare=False)

    def trusted(self) -> Facts:
        """What of this a client has no say in, for choosing whose business a run is."""
        return Facts(auth_user=self.auth_user, on_server=True, now=self.now) if self.on_server else self

    def session(self, *, trust_client: bool) -> str | None:
        """The conversation: ``session_id``, ``thread_id`` or ``conversation_id`` of the run's metadata.

        An agent server sets ``thread_id`` itself, over whatever its client sent; the other two are the client's word,
        and would let it name the session of somebody else.
        """
        trusted = trust_client or not self.on_server
        for key in _SESSION_KEYS if trusted else ("thread_id",):
            value = self.metadata.get(key)
            if value is not None and value != "":
                return str(value)
        return None


@valueclass
class Skip:
    """Nobody to bill, and why; ``reason`` never holds personal data."""

    reason: str


@valueclass
class Disbelieved(Skip):
    """Somebody was named by an id or a token that is none: nobody else is to pay."""


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
        where = "metadata, unlike the configurable," if self.key in facts.configurable else "metadata"
        return _by_id(facts.metadata.get(self.key), where, self.key)


@dataclass(frozen=True, slots=True)
class FromAuthUser:
    """A ``cus_…`` id under ``key`` of the user that the agent server, or the application, authenticated."""

    key: str

    def identify(self, facts: Facts) -> Reference | Skip:
        user = facts.named if facts.named and self.key in facts.named else facts.auth_user
        return _by_id(_get(user, self.key), "the authenticated user", self.key)


@dataclass(frozen=True, slots=True)
class FromContext:
    """A ``cus_…`` id under ``key`` of LangGraph's runtime context. On a server, the client sends the context."""

    key: str
    trust_client: bool = False

    def identify(self, facts: Facts) -> Reference | Skip:
        if facts.on_server and not self.trust_client:
            return Skip("the context comes from the client of an agent server")
        return _by_id(_get(facts.context, self.key), "the context", self.key)


@dataclass(frozen=True, slots=True)
class FromLead:
    """The collected lead: what the application captured for the session, else ``lead`` in the run's metadata."""

    by: By
    trust_client: bool = False
    region: str | None = None

    def identify(self, facts: Facts) -> Reference | Skip:
        session = facts.session(trust_client=self.trust_client)
        captured = facts.lead(session) if facts.lead and session else None
        if captured and captured.get(self.by):
            return _reference(self.by, captured[self.by], self.region)
        if facts.on_server and not self.trust_client:
            return Skip(f"no lead with {self.by} was captured by the server")
        lead = facts.metadata.get("lead")
        told = _get(lead, self.by)
        if not _is_absent(told):
            return _reference(self.by, told, self.region)
        if session is None and lead is None:
            return Skip("metadata has no 'lead', and no 'session_id', 'thread_id' or 'conversation_id' to find one by")
        return Skip(f"the lead has no {self.by}")


@dataclass(frozen=True, slots=True)
class FromSignedToken:
    """A token under ``key`` of the run's metadata or configurable, believed whoever sent it: it is signed."""

    key: str
    secrets: tokens.Secrets
    account: str | None = None

    def __post_init__(self) -> None:
        _key(self.key)
        check_account(self.account or "")

    def identify(self, facts: Facts) -> Reference | Skip:
        skip = Skip(f"there is no signed token under {self.key!r}")
        for token in (facts.metadata.get(self.key), facts.configurable.get(self.key)):
            if _is_absent(token):
                continue
            try:
                return Reference("id", tokens.read(token, self.secrets, facts.now, self.account))
            except InvalidValueError as error:
                skip = Disbelieved(str(error))
        return skip


@dataclass(frozen=True, slots=True)
class FirstOf:
    """The first source that names somebody, if wrongly; whom the application named for this run goes before them."""

    sources: tuple[CustomerSource, ...]

    def identify(self, facts: Facts) -> Reference | Skip:
        reasons, doubted, order = [], None, self.sources
        if facts.named is not None:
            order = tuple(sorted(order, key=lambda one: type(one) is not FromAuthUser))
        for source in order:
            if doubted is not None and not (facts.on_server and _is_servers_word(source)):
                continue
            who = source.identify(facts)
            if isinstance(who, Reference):
                return who
            doubted = who if isinstance(who, Disbelieved) else doubted
            reasons.append(who.reason)
        return doubted or Skip("; ".join(reasons))


CustomerSource = Static | FromMetadata | FromAuthUser | FromContext | FromLead | FromSignedToken | FirstOf


def flat(source: CustomerSource) -> tuple[CustomerSource, ...]:
    """The sources that ``source`` tries, in order."""
    return source.sources if isinstance(source, FirstOf) else (source,)


def _is_servers_word(source: CustomerSource) -> bool:
    """Whether it tells of a client what its server knows: else a token that is none would be a free ride."""
    return isinstance(source, FromAuthUser) or (isinstance(source, FromLead) and not source.trust_client)


def _get(source: Any, key: str) -> Any:
    if source is None:
        return None
    return source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)


def _by_id(value: Any, where: str, key: str) -> Reference | Skip:
    is_plain = value is None or (type(value) is str and len(value) <= MAX_TEXT)
    return (_remembered if is_plain else _who)(value, where, key)


def _who(value: Any, where: str, key: str) -> Reference | Skip:
    return Skip(f"{where} has no {key!r}") if _is_absent(value) else _reference("id", value)


_remembered = lru_cache(maxsize=1024)(_who)  # the same few customers pay for many runs


def _is_absent(value: Any) -> bool:
    """A blank of whatever kind claims nothing."""
    return value is None or (isinstance(value, str | bytes | int | list | dict) and not str(value or "").strip())


def _reference(by: By, value: Any, region: str | None = None) -> Reference | Skip:
    """A value that cannot be true is a skip, for nobody is billed on a guess. A lead may be what anybody typed."""
    try:
        return Reference(by, value if region is None else normalise(by, value, region))
    except InvalidValueError:
        return (Disbelieved if by == "id" else Skip)(f"the customer's {by} is malformed; it looks like {_EXAMPLES[by]}")


def static(
    *,
    id: str | None = None,
    email: str | None = None,
    name: str | None = None,
    phone: str | None = None,
    region: str | None = None,
) -> Static:
    """One fixed customer pays for everything; exactly one of the first four names it. ``region`` (``"DE"``) is where a
    ``phone`` without a leading ``+`` is dialled."""
    given = [(by, value) for by, value in zip(FIELDS, (id, email, name, phone), strict=True) if value is not None]
    if len(given) != 1:
        raise ConfigurationError("static() takes exactly one of id, email, name and phone.")
    by, value = given[0]
    return Static(Reference(by, normalise(by, value, _phone_region(by, region))))


def from_metadata(key: str, *, trust_client: bool = False) -> FromMetadata:
    """Read a ``cus_…`` id from the run's metadata. On an agent server that is whatever the client sent, so it is not
    believed there unless ``trust_client=True``."""
    return FromMetadata(_key(key), trust_client)


def from_auth_user(key: str) -> FromAuthUser:
    """Read a ``cus_…`` id from the user whom an agent server authenticated, or ``metered_config`` named."""
    return FromAuthUser(_key(key))


def from_context(key: str, *, trust_client: bool = False) -> FromContext:
    """Read a ``cus_…`` id from LangGraph's runtime context (``context=`` of the call)."""
    return FromContext(_key(key), trust_client)


def from_lead(by: By = "email", *, trust_client: bool = False, region: str | None = None) -> FromLead:
    """Read the lead's ``email``, ``name`` or ``phone``: captured for the session, or in ``metadata["lead"]``.
    Under an agent server, only a lead that the server's own code captured is believed, unless ``trust_client=True``.
    ``region`` (``"DE"``) is where a phone number without a leading ``+`` is dialled."""
    if by not in ("email", "name", "phone"):
        raise ConfigurationError(f"from_lead(by={by!r}): use 'email', 'name' or 'phone'.")
    return FromLead(by, trust_client, _phone_region(by, region))


def _phone_region(by: By, region: str | None) -> str | None:
    if region is not None and by != "phone":
        raise ConfigurationError(f"region={region!r} is for phone numbers; a customer known by {by} has none.")
    return check_region(region)


def first_of(*sources: CustomerSource | str) -> FirstOf:
    """Try the sources (a plain string is a ``cus_…`` id) in order; the first that names somebody decides, and one that
    does so wrongly, by an id or a signed token that is none, leaves nobody to pay, or on a server only whom it knows
    itself. (Whom your application passes to ``metered_config`` pays before any of them.)"""
    if not sources:
        raise ConfigurationError("first_of() takes at least one source.")
    return FirstOf(tuple(one for source in sources for one in flat(as_source(source))))


def as_source(customer: CustomerSource | str) -> CustomerSource:
    """A source as it is; a plain string is a static ``cus_…`` id."""
    customer = static(id=customer) if isinstance(customer, str) else customer
    if not isinstance(customer, CustomerSource):
        raise ConfigurationError(
            f"customer= takes a 'cus_…' id or a source such as from_metadata(...), not {type(customer).__name__}."
        )
    return customer


def _key(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"A customer source needs the name of a key, not {key!r}.")
    return key
