"""The handler's choices as one validated, serialisable model, for configuration files and environment-driven apps."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from langchain_stripe_meter.agents.servers import SECRET, USUAL_KEY, from_signed_token, secrets_in
from langchain_stripe_meter.core import customers, meters
from langchain_stripe_meter.core.events import check_account
from langchain_stripe_meter.core.tokens import MIN_SECRET
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.handler import MAX_ROLL_UP, StripeMeterCallbackHandler
from langchain_stripe_meter.ledger.opening import parse_url, without_password
from langchain_stripe_meter.prices import refuse_twice


class _Strict(BaseModel):
    # What is wrong may be a key or name a person, so pydantic's own message must not quote it.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="after")
    def _builds(self) -> Self:
        """Refuse at the door, and at its place, what the handler would refuse later."""
        try:
            self._try()
        except ConfigurationError as error:
            raise ValueError(str(error)) from error
        return self

    def _try(self) -> None:
        """Build what needs no key and no secret: settings are also read where nothing is metered."""


def _no_truth(given: object) -> object:
    """Pydantic takes True for 1."""
    if isinstance(given, bool):
        raise ValueError("it takes a whole number")  # noqa: TRY004 - pydantic reports ValueErrors
    return given


def _address(ledger: str) -> str:
    try:
        parse_url(ledger)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None
    return ledger


_Whole = Annotated[int, BeforeValidator(_no_truth)]


class MeterSettings(_Strict):
    """One meter: ``kind`` and the arguments of that kind (see ``Tokens``, ``Messages``, ``Credits``, ``Cost``)."""

    kind: Literal["tokens", "messages", "credits", "cost"]
    event_name: str
    count: Literal["total", "input", "output"] | None = None
    weights: dict[str, Decimal] | None = None
    split: bool | None = None
    credits: dict[str, Decimal] | None = None
    default: Decimal | None = None
    per: Literal["message", "call"] | None = None
    markup: Decimal | None = None
    unit: Literal["usd", "cents", "micro_usd"] | None = None
    prices: dict[str, dict[str, Decimal]] | None = None

    def build(self) -> meters.Meter:
        """The meter itself; ``ConfigurationError`` names an argument that its kind does not take."""
        arguments = self.model_dump(exclude={"kind"}, exclude_none=True)
        if self.kind == "credits":
            arguments.setdefault("credits", {})  # then ``default`` says what every model is worth
        kinds: dict[str, Any] = {
            "tokens": meters.Tokens, "messages": meters.Messages, "credits": meters.Credits, "cost": meters.Cost,
        }  # fmt: skip
        kind = kinds[self.kind]
        foreign = sorted(set(arguments) - {field.name for field in fields(kind)})
        if foreign:
            raise ConfigurationError(f"A meter of kind {self.kind!r} takes no {foreign[0]!r}.")
        built: meters.Meter = kind(**arguments)
        return built

    def _try(self) -> None:
        self.build()


class CustomerSettings(_Strict):
    """Who pays: ``source`` and what that source reads; a plain ``"cus_…"`` is the ``static`` customer of this id.

    ``static`` takes exactly one of ``id``, ``email``, ``name``, ``phone``; ``metadata``, ``auth_user``, ``context`` and
    ``signed_token`` take ``key`` (by default ``stripe_customer_id``, for a token ``stripe_customer_token``); ``lead``
    takes ``by``; ``first_of`` takes ``sources``. ``secret_env`` is the *name* of the environment variable that holds
    the secret of signed tokens, and ``account`` the Stripe account that they are bound to. ``region``
    (``"DE"``) is where a phone without a leading ``+`` is dialled.
    """

    source: Literal["static", "metadata", "auth_user", "context", "lead", "signed_token", "first_of"]
    id: str | None = None
    email: str | None = Field(default=None, repr=False)
    name: str | None = Field(default=None, repr=False)
    phone: str | None = Field(default=None, repr=False)
    key: str | None = None
    by: Literal["email", "name", "phone"] = "email"
    region: str | None = None
    trust_client: bool = False
    secret_env: str = Field(default=SECRET, repr=False)
    account: str | None = None
    sources: tuple[CustomerSettings, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _plain_id(cls, given: Any) -> Any:
        return {"source": "static", "id": given} if isinstance(given, str) and given.startswith("cus_") else given

    def _try(self) -> None:
        self.build(lambda variable: [variable.ljust(MIN_SECRET)])

    def build(self, secrets: Callable[[str], list[str]] = secrets_in) -> customers.CustomerSource:
        """The source itself; ``secrets`` gives those in an environment variable. ``ConfigurationError`` names a field
        that this source does not read."""
        foreign = [name for name in type(self).model_fields if name not in _READ[self.source] and self._says(name)]
        if foreign:
            raise ConfigurationError(f"source = {self.source!r} does not read {foreign[0]!r}; leave it out.")
        if self.source == "static":
            return customers.static(id=self.id, email=self.email, name=self.name, phone=self.phone, region=self.region)
        if self.source == "first_of":
            return customers.first_of(*(one.build(secrets) for one in self.sources))
        if self.source == "lead":
            return customers.from_lead(self.by, trust_client=self.trust_client, region=self.region)
        if self.source == "signed_token":
            return from_signed_token(self._key, secrets(self.secret_env), account=self.account)
        if self.source == "auth_user":
            return customers.from_auth_user(self._key)
        if self.source == "context":
            return customers.from_context(self._key, trust_client=self.trust_client)
        return customers.from_metadata(self._key, trust_client=self.trust_client)

    @property
    def _key(self) -> str:
        return self.key or ("stripe_customer_token" if self.source == "signed_token" else USUAL_KEY)

    def _says(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def in_words(self) -> str:
        """Who pays, for people; the customer of a static source is not named."""
        if self.source == "first_of":
            return ", else ".join(one.in_words() for one in self.sources)
        if self.source == "static":
            by = next(by for by in ("id", "email", "name", "phone") if getattr(self, by) is not None)
            return f"one fixed customer, known by {by}"
        return f"the lead, by {self.by}" if self.source == "lead" else f"{self.source}, under {self._key}"


_READ = {
    "static": {"source", "id", "email", "name", "phone", "region"},
    "metadata": {"source", "key", "trust_client"},
    "auth_user": {"source", "key"},
    "context": {"source", "key", "trust_client"},
    "lead": {"source", "by", "trust_client", "region"},
    "signed_token": {"source", "key", "secret_env", "account"},
    "first_of": {"source", "sources"},
}
"""The fields that each source reads."""


class MeteringSettings(_Strict):
    """Everything but the API key, which stays in the environment.

    ``MeteringSettings.model_validate_json(text).handler()`` makes the handler. Bad input raises pydantic's
    ``ValidationError``, which names the field and what is wrong with it. A password in ``ledger`` is shown nowhere.
    """

    meters: tuple[MeterSettings, ...] = Field(min_length=1)
    customer: CustomerSettings | None = None
    ledger: Annotated[str, AfterValidator(_address)] | None = Field(default=None, repr=False)
    deliver: bool = True
    on_missing_usage: Literal["estimate", "hold", "ignore"] = "estimate"
    bill_cache_hits: bool = False
    billing_day: _Whole = Field(default=1, ge=1, le=31)
    prune_after_days: _Whole | None = Field(default=None, ge=36)
    stripe_account: str | None = None
    create_missing: bool = False
    on_unidentified: Literal["skip", "raise"] | CustomerSettings = "skip"
    concurrency: _Whole = Field(default=16, ge=1)
    roll_up: _Whole | None = Field(default=None, ge=1, le=MAX_ROLL_UP)

    @field_validator("meters")
    @classmethod
    def _each_with_a_name_of_its_own(cls, given: tuple[MeterSettings, ...]) -> tuple[MeterSettings, ...]:
        try:
            refuse_twice([meter.event_name for meter in given])
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
        return given

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The settings in a ``.toml`` or ``.json`` file.

        Raises ``ConfigurationError``, which names the file, the field and what to do, but repeats no personal data.
        """
        path = Path(path)
        kind = kind_of(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text) if kind == "TOML" else json.loads(text)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}. Give another path.") from None
        except ValueError as error:  # TOML, JSON and UTF-8 alike
            raise ConfigurationError(f"{path} is no {kind}: {error}.") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigurationError(f"{path}: {in_one_line(error)}.") from None

    def _try(self) -> None:
        check_account(self.stripe_account or "")

    def handler(self, **options: Any) -> StripeMeterCallbackHandler:
        """The handler with these settings; ``options`` are more of its own arguments (``stripe=``, ``on_error=``)."""
        policy = self.on_unidentified
        return StripeMeterCallbackHandler(
            *(meter.build() for meter in self.meters),
            customer=self.customer.build() if self.customer else None,
            on_unidentified=policy.build() if isinstance(policy, CustomerSettings) else policy,
            **self.model_dump(exclude={"meters", "customer", "on_unidentified"}),
            **options,
        )

    def in_words(self) -> dict[str, str]:
        """What the settings mean, one line for each; nobody is named."""
        delivered = "at once" if self.roll_up is None else f"as one event for each customer and {self.roll_up} seconds"
        otherwise = self.on_unidentified if isinstance(self.on_unidentified, str) else self.on_unidentified.in_words()
        unknown = "is made a customer" if self.create_missing else "is held until Stripe knows them"
        return {
            "counted": "; ".join(f"{one.kind} on {one.event_name!r}" for one in self.meters),
            "who_pays": self.customer.in_words()
            if self.customer
            else f"the authenticated user, else the run's metadata, under {USUAL_KEY}",
            "if_nobody_is_named": otherwise,
            "whom_stripe_does_not_know": unknown,
            "ledger": self.shown_ledger() or "$STRIPE_METER_LEDGER, else stripe_meter.db in the working directory",
            "delivered": delivered if self.deliver else "by another process: stripe-meter deliver",
            "usage_that_is_not_reported": {"estimate": "is estimated", "hold": "is held", "ignore": "is not billed"}[
                self.on_missing_usage
            ],
        }

    def shown_ledger(self) -> str | None:
        """The ledger's address as people may see it: without its password."""
        return None if self.ledger is None else without_password(self.ledger)


def kind_of(path: Path) -> Literal["TOML", "JSON"]:
    """What a file of settings is written in, by its name; ``ConfigurationError`` for any other."""
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise ConfigurationError(f"{path}: settings are a .toml or a .json file. Give it such a name.")
    return "TOML" if suffix == ".toml" else "JSON"


_REMEDIES = {
    "extra_forbidden": "there is no such setting; correct its name or leave it out",
    "missing": "it is missing; add it",
    "too_short": "it needs at least one",
    "tuple_type": "it takes a list",
}
_TABLES = {
    "MeteringSettings": "they are a table of settings by name",
    "MeterSettings": "it takes a table with a kind and an event_name",
    "CustomerSettings": "it takes a table with a source, or a plain 'cus_…' id",
}
_HIDDEN = {"email", "name", "phone", "ledger"}
"""What may name a person, or hold a password."""


def in_one_line(error: ValidationError) -> str:
    """What is wrong with settings, without personal data."""
    faults = error.errors(include_url=False)
    told = [fault for fault in faults if not _is_noise(fault, faults)]
    return "; ".join(_explain(fault) for fault in told or faults)


def _is_noise(error: Any, faults: Sequence[Any]) -> bool:
    """Of a choice between a word and a table, pydantic tells what is wrong with either; and that a list is too short,
    where its items are wrong."""
    where = error["loc"]
    if error["type"] == "too_short":
        return any(len(other["loc"]) > len(where) and other["loc"][: len(where)] == where for other in faults)
    if isinstance(error["input"], dict):
        return any(str(part).startswith("literal[") for part in where)
    return error["type"] == "model_type" and any(map(_is_branch, where))


def _is_branch(part: object) -> bool:
    """Whether a part of a place is pydantic's name for one of the choices there."""
    return str(part).startswith("literal[") or "CustomerSettings" in str(part)


def _explain(error: Any) -> str:
    """One fault: which field, which value, and what to do about it."""
    where = ".".join(str(part) for part in error["loc"] if not _is_branch(part))
    kind = error["type"]
    if kind == "model_type":
        message = _TABLES.get(error["ctx"]["class_name"], "it takes a table")
    else:
        message = _REMEDIES.get(kind, str(error["msg"]).removeprefix("Value error, "))
    # Nobody knows what the value of an unknown setting is, or what stands in a table's place: a key, or a person.
    known = kind not in ("extra_forbidden", "model_type") and not _HIDDEN & set(error["loc"])
    known = known and "@" not in str(error["input"])
    value = f" = {error['input']!r}" if known and isinstance(error["input"], str | int | float) else ""
    return f"{where or 'the settings'}{value}: {message}".rstrip(".")
