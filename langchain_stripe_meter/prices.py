"""Prices from genai-prices (extra ``[prices]``), as ``Decimal``."""

from __future__ import annotations

from decimal import Decimal
from importlib.util import find_spec

from langchain_stripe_meter.core.usage import Usage


def is_installed() -> bool:
    """Whether the extra is there."""
    return find_spec("genai_prices") is not None


def genai_price(usage: Usage, model: str, provider: str | None) -> Decimal:
    """The price of ``usage`` in US dollars; ``LookupError`` for a model that genai-prices does not know."""
    import genai_prices

    counted = genai_prices.Usage(
        input_tokens=usage.input or 0,
        output_tokens=usage.output or 0,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write,
        input_audio_tokens=usage.audio_input,
        output_audio_tokens=usage.audio_output,
    )
    try:
        price = genai_prices.calc_price(counted, model_ref=model, provider_id=_PROVIDERS.get(provider or "", provider))
    except LookupError:
        price = genai_prices.calc_price(counted, model_ref=model)
    return price.total_price


_PROVIDERS = {"azure_openai": "azure", "google_genai": "google", "google_vertexai": "google", "amazon_bedrock": "aws"}
"""LangChain's names for providers, where genai-prices has others."""
