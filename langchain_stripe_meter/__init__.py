"""Bill LLM usage through Stripe meters: recorded durably before a run returns, delivered once.

Names are imported when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_stripe_meter.blocks import stripe_meter
    from langchain_stripe_meter.component import StripeMeterEvent
    from langchain_stripe_meter.core.customers import (
        first_of,
        from_auth_user,
        from_context,
        from_lead,
        from_metadata,
        static,
    )
    from langchain_stripe_meter.core.meters import Cost, Credits, Messages, Tokens
    from langchain_stripe_meter.errors import MeteringError
    from langchain_stripe_meter.gateway.meters import create_meter, list_meters
    from langchain_stripe_meter.handler import StripeMeterCallbackHandler
    from langchain_stripe_meter.settings import MeteringSettings

_HOMES = {
    "blocks": ["stripe_meter"],
    "component": ["StripeMeterEvent"],
    "core.customers": ["first_of", "from_auth_user", "from_context", "from_lead", "from_metadata", "static"],
    "core.meters": ["Cost", "Credits", "Messages", "Tokens"],
    "errors": ["MeteringError"],
    "gateway.meters": ["create_meter", "list_meters"],
    "handler": ["StripeMeterCallbackHandler"],
    "settings": ["MeteringSettings"],
}

__all__ = ["Cost", "Credits", "Messages", "MeteringError", "MeteringSettings"]
__all__ += ["StripeMeterCallbackHandler", "StripeMeterEvent", "Tokens", "create_meter", "first_of", "from_auth_user"]
__all__ += ["from_context", "from_lead", "from_metadata", "list_meters", "static", "stripe_meter"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
