"""Meters made ready to count: prices from genai-prices (extra ``[prices]``), as ``Decimal``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from importlib.util import find_spec

from langchain_stripe_meter.core.meters import Cost, Meter
from langchain_stripe_meter.core.usage import Usage
from langchain_stripe_meter.errors import ConfigurationError


def genai_price(usage: Usage, model: str, provider: str | None) -> Decimal:
    """The price of ``usage`` in US dollars; ``LookupError`` for a model that genai-prices does not know.

    A provider's own price is the only one that counts: the same model costs nothing where a user runs it. But OpenAI's
    client speaks to anybody's server, and a run that names no provider leaves only the model to go by.
    """
    import genai_prices

    counted = genai_prices.Usage(
        input_tokens=usage.input or 0,
        output_tokens=usage.output or 0,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write,
        cache_write_1h_tokens=usage.cache_write_1h,
        input_audio_tokens=usage.audio_input,
        output_audio_tokens=usage.audio_output,
    )
    with localcontext(_CONTEXT):  # genai-prices divides in the current context, which may be the application's own
        try:
            price = genai_prices.calc_price(
                counted, model_ref=model, provider_id=_PROVIDERS.get(provider or "", provider)
            )
        except LookupError:
            if provider not in _ANYBODY:
                raise
            price = genai_prices.calc_price(counted, model_ref=model)
    return price.total_price


_CONTEXT = Context(prec=28, rounding=ROUND_HALF_EVEN, traps=[])
_ANYBODY = (None, "", "openai")
_PROVIDERS = {"azure_openai": "azure", "google_genai": "google", "google_vertexai": "google", "amazon_bedrock": "aws"}
"""LangChain's names for providers, where genai-prices has others."""


def checked_meters(meters: tuple[Meter, ...]) -> tuple[Meter, ...]:
    """What a handler can count: at least one meter, each with a name of its own, and prices where they are needed."""
    if not meters:
        raise ConfigurationError("A handler needs at least one meter, such as Tokens('ai_tokens').")
    for meter in meters:
        if not isinstance(meter, Meter):
            how = " Pass several one after another, not as a list." if isinstance(meter, list | tuple) else ""
            raise ConfigurationError(f"{meter!r} is not a meter. Use Tokens, Messages, Credits or Cost.{how}")
    refuse_twice([meter.event_name for meter in meters])
    return tuple(_priced(meter) for meter in meters)


def refuse_twice(names: Sequence[str]) -> None:
    """Each meter of a handler has an event name of its own."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigurationError(f"Two meters have the event name {twice!r}; each needs its own, or one would be lost.")


def _priced(meter: Meter) -> Meter:
    if not isinstance(meter, Cost) or meter.pricer is not None:
        return meter
    if find_spec("genai_prices") is None:
        if meter.prices:
            return meter
        raise ConfigurationError("Cost needs prices: pip install 'langchain-stripe-meter[prices]', or pass prices=.")
    with suppress(LookupError):  # the first price is read from disk, for which no event loop shall wait
        genai_price(Usage(1, 1), "gpt-4o", "openai")
    return replace(meter, pricer=genai_price)
