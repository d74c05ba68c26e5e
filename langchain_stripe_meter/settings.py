"""The handler's choices as one validated, serialisable model, for configuration files and environment-driven apps."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from langchain_stripe_meter.agents.tokens import SECRET, from_signed_token, secrets_in
from langchain_stripe_meter.core import customers, meters
from langchain_stripe_meter.core.tokens import MIN_SECRET
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

    ``static`` takes exactly one of ``id``, ``email``, ``name``, ``phone``; ``metadata``, ``auth_user``, ``context`` and
    ``signed_token`` take ``key`` (by default ``stripe_customer_id``, for a token ``stripe_customer_token``); ``lead``
    takes ``by``; ``first_of`` takes ``sources``. ``secret_env`` is the *name* of the environment variable that holds
    the secret of signed tokens, and ``account`` the Stripe account that they are bound to.
    """

    source: Literal["static", "metadata", "auth_user", "context", "lead", "signed_token", "first_of"]
    id: str | None = None
    email: str | None = Field(default=None, repr=False)
    name: str | None = Field(default=None, repr=False)
    phone: str | None = Field(default=None, repr=False)
    key: str | None = None
    by: Literal["email", "name", "phone"] = "email"
    trust_client: bool = False
    secret_env: str = Field(default=SECRET, repr=False)
    account: str | None = None
    sources: tuple[CustomerSettings, ...] = ()

    def build(self, secrets: Callable[[str], list[str]] = secrets_in) -> customers.CustomerSource:
        """The source itself; ``secrets`` gives those in an environment variable."""
        if self.source == "static":
            return customers.static(id=self.id, email=self.email, name=self.name, phone=self.phone)
        if self.source == "first_of":
            return customers.first_of(*(one.build(secrets) for one in self.sources))
        if self.source == "lead":
            return customers.from_lead(self.by, trust_client=self.trust_client)
        if self.source == "signed_token":
            key = self.key or "stripe_customer_token"
            return from_signed_token(key, secrets(self.secret_env), account=self.account)
        key = self.key or "stripe_customer_id"
        if self.source == "auth_user":
            return customers.from_auth_user(key)
        if self.source == "context":
            return customers.from_context(key, trust_client=self.trust_client)
        return customers.from_metadata(key, trust_client=self.trust_client)


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
    billing_day: int = Field(default=1, ge=1, le=31)

    @model_validator(mode="after")
    def _builds(self) -> Self:
        """Refuse at the door what the handler would refuse later, except for a secret that is missing here: settings
        are also read where nothing is metered."""
        try:
            for meter in self.meters:
                meter.build()
            if self.customer is not None:
                self.customer.build(lambda variable: [variable.ljust(MIN_SECRET)])
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
            **options,
        )
