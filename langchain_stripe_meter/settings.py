"""The handler's choices as one validated, serialisable model, for configuration files and environment-driven apps."""

from __future__ import annotations

import json
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from langchain_stripe_meter.core import customers, meters
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.handler import StripeMeterCallbackHandler


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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

    ``static`` takes exactly one of ``id``, ``email``, ``name``, ``phone``; ``metadata``, ``auth_user`` and
    ``context`` take ``key``; ``lead`` takes ``by``; ``first_of`` takes ``sources``. ``region`` (``"DE"``) is where a
    phone without a leading ``+`` is dialled.
    """

    source: Literal["static", "metadata", "auth_user", "context", "lead", "first_of"]
    id: str | None = None
    email: str | None = Field(default=None, repr=False)
    name: str | None = Field(default=None, repr=False)
    phone: str | None = Field(default=None, repr=False)
    key: str = "stripe_customer_id"
    by: Literal["email", "name", "phone"] = "email"
    region: str | None = None
    trust_client: bool = False
    sources: tuple[CustomerSettings, ...] = ()

    def build(self) -> customers.CustomerSource:
        """The source itself."""
        if self.source == "static":
            return customers.static(id=self.id, email=self.email, name=self.name, phone=self.phone, region=self.region)
        if self.source == "first_of":
            return customers.first_of(*(one.build() for one in self.sources))
        if self.source == "lead":
            return customers.from_lead(self.by, trust_client=self.trust_client, region=self.region)
        if self.source == "auth_user":
            return customers.from_auth_user(self.key)
        if self.source == "context":
            return customers.from_context(self.key, trust_client=self.trust_client)
        return customers.from_metadata(self.key, trust_client=self.trust_client)


class MeteringSettings(_Strict):
    """Everything but the API key, which stays in the environment.

    ``MeteringSettings.model_validate_json(text).handler()`` makes the handler. Bad input raises pydantic's
    ``ValidationError``, which names the field and the value.
    """

    meters: tuple[MeterSettings, ...] = Field(min_length=1)
    customer: CustomerSettings | None = None
    ledger: str | None = None
    deliver: bool = True
    on_missing_usage: Literal["estimate", "hold", "ignore"] = "estimate"
    bill_cache_hits: bool = False
    create_missing: bool = False
    on_unidentified: Literal["skip", "raise"] | CustomerSettings = "skip"
    concurrency: int = Field(default=16, ge=1)

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
            told = "; ".join(map(_explain, error.errors(include_url=False, include_context=False)))
            raise ConfigurationError(f"{path}: {told}.") from None

    @model_validator(mode="after")
    def _builds(self) -> Self:
        """Refuse at the door what the handler would refuse later."""
        try:
            for meter in self.meters:
                meter.build()
            for source in (self.customer, self.on_unidentified):
                if isinstance(source, CustomerSettings):
                    source.build()
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
            create_missing=self.create_missing,
            on_unidentified=self._otherwise(),
            concurrency=self.concurrency,
            **options,
        )

    def _otherwise(self) -> Literal["skip", "raise"] | customers.CustomerSource:
        policy = self.on_unidentified
        return policy.build() if isinstance(policy, CustomerSettings) else policy


_REMEDIES = {
    "extra_forbidden": "there is no such setting; correct its name or leave it out",
    "missing": "it is missing; add it",
    "too_short": "it needs at least one",
}
_PERSONAL = {"email", "name", "phone"}


def _explain(error: Any) -> str:
    """One fault: which field, which value, and what to do about it."""
    where = ".".join(str(part) for part in error["loc"])
    message = _REMEDIES.get(error["type"], str(error["msg"]).removeprefix("Value error, "))
    shown = isinstance(error["input"], str | int | float) and not _PERSONAL & set(error["loc"])
    value = f" = {error['input']!r}" if shown else ""
    return f"{where or 'the settings'}{value}: {message}".rstrip(".")
