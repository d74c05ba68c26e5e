"""The handler's choices as one validated, serialisable model, for configuration files and environment-driven apps."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from langchain_stripe_meter.agents.servers import SECRET, from_signed_token, secrets_in
from langchain_stripe_meter.core import customers, meters
from langchain_stripe_meter.core.events import check_account
from langchain_stripe_meter.core.tokens import MIN_SECRET
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.handler import MAX_ROLL_UP, StripeMeterCallbackHandler
from langchain_stripe_meter.ledger.opening import without_password


class _Strict(BaseModel):
    # What is wrong may be a key or name a person, so pydantic's own message must not quote it.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


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
        foreign = sorted(set(arguments) - set(kind.__dataclass_fields__))
        if foreign:
            raise ConfigurationError(f"A meter of kind {self.kind!r} takes no {foreign[0]!r}.")
        built: meters.Meter = kind(**arguments)
        return built


class CustomerSettings(_Strict):
    """Who pays: ``source`` and what that source reads.

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

    def build(self, secrets: Callable[[str], list[str]] = secrets_in) -> customers.CustomerSource:
        """The source itself; ``secrets`` gives those in an environment variable. ``ConfigurationError`` names a field
        that this source does not read."""
        fields = type(self).model_fields
        foreign = [name for name in fields if name not in _READ[self.source] and self._says(name)]
        if foreign:
            raise ConfigurationError(f"source = {self.source!r} does not read {foreign[0]!r}; leave it out.")
        if self.source == "static":
            return customers.static(id=self.id, email=self.email, name=self.name, phone=self.phone, region=self.region)
        if self.source == "first_of":
            return customers.first_of(*(one.build(secrets) for one in self.sources))
        if self.source == "lead":
            return customers.from_lead(self.by, trust_client=self.trust_client, region=self.region)
        if self.source == "signed_token":
            key = self.key or "stripe_customer_token"
            return from_signed_token(key, secrets(self.secret_env), account=self.account)
        key = self.key or "stripe_customer_id"
        if self.source == "auth_user":
            return customers.from_auth_user(key)
        if self.source == "context":
            return customers.from_context(key, trust_client=self.trust_client)
        return customers.from_metadata(key, trust_client=self.trust_client)

    def _says(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def in_words(self) -> str:
        """Who pays, for people; the customer of a static source is not named."""
        if self.source == "first_of":
            return ", else ".join(one.in_words() for one in self.sources)
        if self.source == "static":
            by = next(by for by in ("id", "email", "name", "phone") if getattr(self, by) is not None)
            return f"one fixed customer, known by {by}"
        return f"the lead, by {self.by}" if self.source == "lead" else f"{self.source}, under {self.key or 'its key'}"


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
    ledger: str | None = Field(default=None, repr=False)
    deliver: bool = True
    on_missing_usage: Literal["estimate", "hold", "ignore"] = "estimate"
    bill_cache_hits: bool = False
    billing_day: int = Field(default=1, ge=1, le=31)
    prune_after_days: int | None = Field(default=None, ge=36)
    stripe_account: str | None = None
    create_missing: bool = False
    on_unidentified: Literal["skip", "raise"] | CustomerSettings = "skip"
    concurrency: int = Field(default=16, ge=1)
    roll_up: int | None = Field(default=None, ge=1, le=MAX_ROLL_UP)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The settings in a ``.toml`` or ``.json`` file.

        Raises ``ConfigurationError``, which names the file, the field and what to do, but repeats no personal data.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}. Give another path.") from None
        except ValueError as error:  # TOML, JSON and UTF-8 alike
            kind = "TOML" if path.suffix == ".toml" else "JSON"
            raise ConfigurationError(f"{path} is no {kind}: {error}.") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False)
            told = "; ".join(_explain(fault) for fault in faults if not _is_noise(fault))
            raise ConfigurationError(f"{path}: {told}.") from None

    @model_validator(mode="after")
    def _builds(self) -> Self:
        """Refuse at the door what the handler would refuse later, except for a secret that is missing here: settings
        are also read where nothing is metered."""
        try:
            for meter in self.meters:
                meter.build()
            for source in (self.customer, self.on_unidentified):
                if isinstance(source, CustomerSettings):
                    source.build(lambda variable: [variable.ljust(MIN_SECRET)])
            check_account(self.stripe_account or "")
        except ConfigurationError as error:
            raise ValueError(str(error)) from error
        return self

    def handler(self, **options: Any) -> StripeMeterCallbackHandler:
        """The handler with these settings; ``options`` are more of its own arguments (``stripe=``, ``on_error=``)."""
        return StripeMeterCallbackHandler(
            *(meter.build() for meter in self.meters),
            customer=self.customer.build() if self.customer else None,
            ledger=self.ledger,
            deliver=self.deliver,
            on_missing_usage=self.on_missing_usage,
            bill_cache_hits=self.bill_cache_hits,
            billing_day=self.billing_day,
            prune_after_days=self.prune_after_days,
            stripe_account=self.stripe_account,
            create_missing=self.create_missing,
            on_unidentified=self._otherwise(),
            concurrency=self.concurrency,
            roll_up=self.roll_up,
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
            else "the authenticated user, else the run's metadata",
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

    def _otherwise(self) -> Literal["skip", "raise"] | customers.CustomerSource:
        policy = self.on_unidentified
        return policy.build() if isinstance(policy, CustomerSettings) else policy


_REMEDIES = {
    "extra_forbidden": "there is no such setting; correct its name or leave it out",
    "missing": "it is missing; add it",
    "too_short": "it needs at least one",
}
_PERSONAL = {"email", "name", "phone"}


def _is_noise(error: Any) -> bool:
    """Of a choice between a word and a table, pydantic tells what is wrong with either."""
    is_table = isinstance(error["input"], dict)
    is_word_fault = any(str(part).startswith("literal[") for part in error["loc"])
    return (is_word_fault and is_table) or (error["type"] == "model_type" and not is_table and len(error["loc"]) > 1)


def _explain(error: Any) -> str:
    """One fault: which field, which value, and what to do about it."""
    kinds = ("CustomerSettings", "literal[")
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith(kinds))
    message = _REMEDIES.get(error["type"], str(error["msg"]).removeprefix("Value error, "))
    unknown = error["type"] == "extra_forbidden"  # nobody knows what it holds: it may be a key
    shown = not unknown and isinstance(error["input"], str | int | float) and not _PERSONAL & set(error["loc"])
    value = f" = {error['input']!r}" if shown else ""
    return f"{where or 'the settings'}{value}: {message}".rstrip(".")
