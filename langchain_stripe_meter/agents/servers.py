"""Runs that a client starts through a server that does not authenticate it for LangChain: LangServe, FastAPI, your own.

Such a server hands the client's config to the chain, and nothing in it tells the client's word from the application's:
its metadata would be believed. ``metered_config`` makes the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig

from langchain_stripe_meter.observed import CLIENT_RUN, ClientRun

_CLAIMS = frozenset({"stripe_customer_id", "lead", "session_id", "thread_id", "conversation_id"})
"""What metadata says about who pays, and about whose conversation it is."""
_NOT_THE_CLIENTS = frozenset({"context", "run_id"})
"""LangGraph's context, and the run's id: from it come the identifiers of what is billed, each of which counts once."""


def metered_config(
    meter: BaseCallbackHandler,
    *,
    customer: object,
    config: Mapping[str, Any] | None = None,
    session: str | None = None,
) -> RunnableConfig:
    """The config for a run that a client asked for: metered, and paid by whom the application authenticated.

    ``config`` is what the client sent. What it says about who pays is taken out, and the run is marked as a client's:
    from then on ``from_metadata``, ``from_context`` and ``from_lead`` believe nothing that is left of it, unless they
    were told to (``trust_client=True``), and ``from_auth_user`` reads ``customer``. A signed token is believed still.

    ``customer`` is a ``cus_…`` id, for ``from_auth_user("stripe_customer_id")``; or the user as a mapping or an object,
    for a key of your own; or None for a stranger, who is not billed, and counted as skipped. ``session`` is the
    conversation under which your application captures its leads (``meter.leads.capture``), for ``from_lead``: only pass
    one that is this user's own.

    It fits LangServe's ``per_req_config_modifier``; see the README.
    """
    given = config or {}
    said = ClientRun({"stripe_customer_id": customer} if isinstance(customer, str) else customer, session)
    metadata = {key: value for key, value in _items(given, "metadata") if key not in _CLAIMS}
    configurable = {key: value for key, value in _items(given, "configurable") if not _is_the_servers(key)}
    if session is not None:
        metadata["session_id"] = session
    made = {
        **{key: value for key, value in given.items() if key not in _NOT_THE_CLIENTS},
        "callbacks": _with(meter, given.get("callbacks")),
        "metadata": {**metadata, CLIENT_RUN: said},
        "configurable": {**configurable, CLIENT_RUN: said},  # LangServe may drop metadata that it does not expect
    }
    return cast("RunnableConfig", made)


def _items(config: Mapping[str, Any], place: str) -> list[tuple[str, Any]]:
    """A part of a client's config, which may be anything."""
    part = config.get(place)
    return [(str(key), value) for key, value in part.items()] if isinstance(part, Mapping) else []


def _is_the_servers(key: str) -> bool:
    """Whether a key in the configurable is LangGraph's own, or its server's: no client has a say in these."""
    return key.startswith(("__", "langgraph_"))


def _with(meter: BaseCallbackHandler, given: Any) -> list[BaseCallbackHandler]:
    """The handlers of ``given`` and the meter. A client can send no handler, so these are the application's."""
    there = given if isinstance(given, list) else getattr(given, "handlers", [])
    others = [one for one in there if isinstance(one, BaseCallbackHandler) and one is not meter]
    return [*others, meter]
