"""What is counted, each on one Stripe meter: ``Tokens``, ``Messages``, ``Credits``, ``Cost``.

A meter turns facts into readings: a pure function, so that the same run gives the same readings everywhere.
``Tokens`` and ``Cost`` count calls (one model call each); ``Messages`` and ``Credits`` count answered user messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import ClassVar, Literal

from langchain_stripe_meter.core.events import check_dimensions, check_event_name, check_value, significant_digits
from langchain_stripe_meter.core.usage import INPUT_PARTS, KINDS, OUTPUT_PARTS, Usage
from langchain_stripe_meter.core.values import EXACT, valueclass
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

Number = int | Decimal
Pricer = Callable[[Usage, str, str | None], Decimal]
"""Prices a usage of a model (and provider) in US dollars; raises ``LookupError`` for a model it does not know."""


@valueclass
class Call:
    """One finished model call. ``usage`` is ``None`` where nobody knows what it consumed, and ``doubt`` says why."""

    usage: Usage | None
    model: str | None = None
    provider: str | None = None
    doubt: str | None = None


@valueclass
class Reading:
    """What one run adds to one meter. ``value`` is ``None`` where it must be held, and ``doubt`` says why."""

    event_name: str
    value: Number | None
    dimensions: Mapping[str, str] = field(default_factory=dict)
    estimated: bool = False
    doubt: str | None = None


def _weights(weights: object) -> dict[str, Decimal]:
    if not isinstance(weights, Mapping):
        raise ConfigurationError("Tokens(weights=...) takes weights by kind, such as {'input': 1}.")
    checked = _by_kind(weights, "Tokens cannot weigh")
    if not checked or any(weight < 0 for weight in checked.values()):
        raise ConfigurationError("Tokens(weights=...) takes at least one kind, and no weight below 0.")
    return checked


def _prices(model: str, prices: object) -> dict[str, Decimal]:
    """Both sums must have a price, so that none is free by omission."""
    whose = f"Cost(prices=...) of {model!r}"
    if not isinstance(prices, Mapping):
        raise ConfigurationError(f"{whose} takes prices by kind, such as {{'input': 1, 'output': 2}}.")
    checked = _by_kind(prices, f"{whose} cannot price")
    if any(price < 0 for price in checked.values()):
        raise ConfigurationError(f"{whose} takes no price below 0.")
    missing = next((whole for whole in ("input", "output") if whole not in checked), None)
    if missing:
        raise ConfigurationError(f"{whose} has no price for {missing!r}. Where it costs nothing, say 0.")
    return checked


def _by_kind(numbers: Mapping[str, Number], cannot: str) -> dict[str, Decimal]:
    unknown = sorted(set(map(str, numbers)) - set(KINDS))
    if unknown:
        raise ConfigurationError(f"{cannot} {unknown[0]!r}; the kinds are {', '.join(KINDS)}.")
    return {kind: check_value(number) for kind, number in numbers.items()}


def _full_weights(weights: Mapping[str, Decimal]) -> dict[str, Decimal]:
    """Give each part that was not named the weight of its whole, so that no token is free by omission."""
    full = {}
    for whole, parts in (("input", INPUT_PARTS), ("output", OUTPUT_PARTS)):
        full[whole] = weights.get(whole, Decimal(0))
        full.update({part: weights.get(part, full[whole]) for part in parts})
    return full


def _weighted(given: Mapping[str, Number], usage: Usage) -> Decimal:
    weights = _full_weights({kind: Decimal(weight) for kind, weight in given.items()})
    with localcontext(EXACT):
        return sum((weights[kind] * count for kind, count in usage.exclusive().items()), Decimal(0))


@dataclass(frozen=True)
class Tokens:
    """Tokens of every model call.

    ``count`` is ``"total"``, ``"input"`` or ``"output"`` (full sums). ``weights`` instead bills a weighted sum of
    exclusive parts: ``input`` is then what was neither read from nor written to a cache; a part without a weight of
    its own takes that of its whole, ``input`` or ``output``; a whole without one is not billed; the sum is rounded to
    15 significant digits, Stripe's limit. ``split=True`` sends one event per kind with
    ``model`` (``provider/model``) and ``token_type`` in the payload, as Stripe's token billing expects.
    """

    event_name: str
    count: Literal["total", "input", "output"] = "total"
    weights: Mapping[str, Number] | None = None
    split: bool = False
    per: ClassVar[str] = "call"

    def __post_init__(self) -> None:
        check_event_name(self.event_name)
        if self.count not in ("total", "input", "output"):
            raise ConfigurationError(f"Tokens(count={self.count!r}): use 'total', 'input' or 'output'.")
        if (self.count != "total") + (self.weights is not None) + bool(self.split) > 1:
            raise ConfigurationError("Tokens takes one of count=, weights= and split=, not several.")
        if self.weights is not None:
            object.__setattr__(self, "weights", _weights(self.weights))

    def readings(self, call: Call) -> list[Reading]:
        """What ``call`` adds to this meter; nothing where it consumed nothing."""
        usage = call.usage
        count = None if usage is None else getattr(usage, self.count)
        if usage is None or count is None:
            return [Reading(self.event_name, None, doubt=call.doubt or "the provider reported no usage")]
        if self.split:
            return self._split(usage, call)
        if self.weights is not None:
            count = round_digits(_weighted(self.weights, usage))
        return _reading(self.event_name, count, usage.estimated)

    def _split(self, usage: Usage, call: Call) -> list[Reading]:
        parts = usage.exclusive()
        kinds = {
            "input": parts["input"] + parts["audio_input"],
            "cached_input": parts["cache_read"],
            "cached_write": parts["cache_write"],
            "output": usage.output or 0,
        }
        model = token_billing_model(call.provider, call.model)
        if model is None:
            return [Reading(self.event_name, None, doubt="the run has no model name")]
        try:
            check_dimensions({"model": model})  # Bedrock's ARNs can be too long
        except InvalidValueError as error:
            return [Reading(self.event_name, None, doubt=str(error))]
        readings = []
        for kind, count in kinds.items():
            readings += _reading(self.event_name, count, usage.estimated, {"model": model, "token_type": kind})
        return readings


@dataclass(frozen=True)
class Messages:
    """1 for each answered user message, however many model calls the agent needed for it."""

    event_name: str
    per: ClassVar[str] = "message"

    def __post_init__(self) -> None:
        check_event_name(self.event_name)

    def readings(self, call: Call) -> list[Reading]:
        """``call`` is the one that answered the message."""
        return [Reading(self.event_name, 1)]


@dataclass(frozen=True)
class Credits:
    """Message credits: each answered message costs what the model that answered it is worth.

    ``credits`` maps model names to credits. A dated name (``gpt-4o-2024-08-06``) takes the credits of its plain
    name; any other model costs ``default``, and without a ``default`` it is held with its name.
    ``per="call"`` bills every model call instead of every message.
    """

    event_name: str
    credits: Mapping[str, Number]
    default: Number | None = None
    per: Literal["message", "call"] = "message"

    def __post_init__(self) -> None:
        check_event_name(self.event_name)
        if self.per not in ("message", "call"):
            raise ConfigurationError(f"Credits(per={self.per!r}): use 'message' or 'call'.")
        if not isinstance(self.credits, Mapping):
            raise ConfigurationError("Credits takes credits by model, such as {'gpt-4o': 10, 'gpt-4o-mini': 1}.")
        unnamed = next((model for model in self.credits if not isinstance(model, str)), None)
        if unnamed is not None:
            raise ConfigurationError(f"Credits takes credits by a model's name, not by {unnamed!r}.")
        values = [*self.credits.values(), *(() if self.default is None else (self.default,))]
        if not values or any(check_value(value) < 0 for value in values):
            raise ConfigurationError("Credits takes credits for at least one model or a default, none below 0.")
        checked = {model: check_value(value) for model, value in self.credits.items()}
        object.__setattr__(self, "credits", checked)
        object.__setattr__(self, "default", None if self.default is None else check_value(self.default))

    def readings(self, call: Call) -> list[Reading]:
        """``call`` is the one that answered (or, with ``per="call"``, each one)."""
        model = call.model or ""
        value = self.credits.get(model, self.credits.get(plain_model(model), self.default))
        if value is None:
            return [Reading(self.event_name, None, doubt=f"no credits are set for the model {call.model!r}")]
        return _reading(self.event_name, value, estimated=False)


UNITS = {"usd": Decimal(1), "cents": Decimal(100), "micro_usd": Decimal(1_000_000)}


@dataclass(frozen=True)
class Cost:
    """The price of every model call, times ``markup``, in ``unit`` (``usd``, ``cents`` or ``micro_usd``).

    Prices come from genai-prices (extra ``[prices]``), or from ``prices``: dollars per million tokens by model and
    kind, such as ``{"my-model": {"input": Decimal("0.5"), "output": 2}}``; both of these are needed, and a part without
    a price of its own takes that of its whole. A model without a price is held with its name, never billed as 0.
    The result is rounded to 15 significant digits, Stripe's limit.
    """

    event_name: str
    markup: Number = 1
    unit: Literal["usd", "cents", "micro_usd"] = "micro_usd"
    prices: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    pricer: Pricer | None = field(default=None, repr=False, compare=False)
    per: ClassVar[str] = "call"

    def __post_init__(self) -> None:
        check_event_name(self.event_name)
        if self.unit not in UNITS:
            raise ConfigurationError(f"Cost(unit={self.unit!r}): use {', '.join(UNITS)}.")
        if check_value(self.markup) < 0:
            raise ConfigurationError(f"Cost(markup={self.markup}) must not be below 0.")
        object.__setattr__(self, "markup", check_value(self.markup))
        if not isinstance(self.prices, Mapping):
            raise ConfigurationError(
                "Cost takes prices by model and kind, such as {'my-model': {'input': 1, 'output': 2}}."
            )
        checked = {model: _prices(model, kinds) for model, kinds in self.prices.items()}
        object.__setattr__(self, "prices", checked)

    def readings(self, call: Call) -> list[Reading]:
        """What ``call`` cost."""
        usage = call.usage
        if usage is None or usage.total is None:
            return [Reading(self.event_name, None, doubt=call.doubt or "the provider reported no usage")]
        try:
            dollars = self._dollars(usage, call)
        except LookupError:
            provider = repr(call.provider) if call.provider else "no named provider"
            doubt = f"no price is known for the model {call.model!r} of {provider}; give one with Cost(prices=...)"
            return [Reading(self.event_name, None, doubt=doubt)]
        with localcontext(EXACT):
            value = dollars * Decimal(self.markup) * UNITS[self.unit]
        return _reading(self.event_name, round_digits(value), usage.estimated)

    def _dollars(self, usage: Usage, call: Call) -> Decimal:
        if not call.model:
            raise LookupError
        own = self.prices.get(call.model) or self.prices.get(plain_model(call.model))
        if own is not None:
            return _weighted(own, usage).scaleb(-6, EXACT)
        if self.pricer is None:
            raise LookupError
        return self.pricer(usage, call.model, call.provider)


Meter = Tokens | Messages | Credits | Cost


def dimensions_of(meter: Meter) -> tuple[str, ...]:
    """The payload keys that a meter's readings bring along."""
    return ("model", "token_type") if isinstance(meter, Tokens) and meter.split else ()


_ALWAYS_FITS = 10**15
"""Amounts below it fit into 15 digits: they are whole, or were checked or rounded before."""


def _reading(name: str, value: Number, estimated: bool, dimensions: Mapping[str, str] | None = None) -> list[Reading]:
    if not value:
        return []
    if value >= _ALWAYS_FITS:
        check_value(value)
    return [Reading(name, value, dimensions or {}, estimated)]


def round_digits(value: Decimal, digits: int = 15) -> Decimal:
    """``value`` to at most ``digits`` significant digits, half to even.

    Whole numbers stay whole: what has more digits before the point is too large for Stripe, and rounding hides nothing.
    """
    if significant_digits(value) <= digits:
        return value
    exponent = min(value.adjusted() - digits + 1, 0)
    return value.quantize(Decimal((0, (1,), exponent)), ROUND_HALF_EVEN, EXACT)


_DATE = re.compile(r"(?<=.)[-@]?(?:\d{4}-\d{2}-\d{2}|\d{8})\Z")
_SHORT_DATE = re.compile(r"(?<=.)-(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\Z")


def plain_model(model: str) -> str:
    """A model's name without its date suffix: ``gpt-4o-2024-08-06`` is ``gpt-4o``, ``gpt-4-0613`` is ``gpt-4``."""
    return _SHORT_DATE.sub("", _DATE.sub("", model))


def token_billing_model(provider: str | None, model: str | None) -> str | None:
    """``provider/model`` as Stripe's token billing names it (after @stripe/token-meter, Stripe's own sender): no date
    in OpenAI's and Anthropic's names, no ``-latest`` in Claude's and dots in its versions; Google's names as they are.
    """
    if not provider or not model:
        return None
    provider = _TOKEN_BILLING_PROVIDERS.get(provider, provider)
    if provider == "anthropic":
        model = _CLAUDE_VERSION.sub(r"-\1.\2", _DATE.sub("", model).removesuffix("-latest"))
    elif provider == "openai" and model != "gpt-4o-2024-05-13":  # priced apart from gpt-4o
        model = _DATE.sub("", model)
    return f"{provider}/{model}"


_CLAUDE_VERSION = re.compile(r"-(\d+)-(\d{1,2})(?!\d)")
_TOKEN_BILLING_PROVIDERS = {"google_genai": "google", "google_vertexai": "google"}
"""LangChain's names for providers, where Stripe has others."""
