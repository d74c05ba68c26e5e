"""Runs that a client starts through a server that does not authenticate it for LangChain: LangServe, FastAPI, your own.

Such a server hands the client's config to the chain, and nothing in it tells the client's word from the application's:
its metadata would be believed. ``metered_config`` makes the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig

from langchain_stripe_meter.core.customers import CustomerSource, Facts, FromAuthUser, Skip, Static, flat
from langchain_stripe_meter.core.events import check_customer_id
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError
from langchain_stripe_meter.handler import StripeMeterCallbackHandler
from langchain_stripe_meter.observed import CLIENT_RUN, ClientRun

USUAL_KEY = "stripe_customer_id"
"""Where ``from_auth_user`` finds a customer that was passed as a ``cus_…`` id."""

_CLAIMS = frozenset({"stripe_customer_id", "lead", "session_id", "thread_id", "conversation_id"})
"""What metadata says about who pays, and about whose conversation it is."""
_NOT_THE_CLIENTS = frozenset({"context", "run_id"})
"""LangGraph's context, and the run's id: from it come the identifiers of what is billed, each of which counts once."""


def metered_config(
    meter: StripeMeterCallbackHandler,
    *,
    customer: object,
    config: Mapping[str, Any] | None = None,
    session: str | None = None,
) -> RunnableConfig:
    """The config for a run that a client asked for: metered, and paid by whom the application authenticated.

    ``config`` is what the client sent. What it says about who pays is taken out, and the run is marked as a client's:
    from then on ``from_metadata``, ``from_context`` and ``from_lead`` believe nothing that is left of it, unless they
    were told to (``trust_client=True``), and ``from_auth_user`` reads ``customer``, who pays whatever stands before it
    in ``first_of``. A signed token is believed still, where ``customer`` names nobody.

    ``customer`` is a ``cus_…`` id, for ``from_auth_user("stripe_customer_id")``; or the user as a mapping or an object,
    for a key of your own; or None (or a user whose key is None, or ``""``) for somebody without a Stripe customer, who
    is not billed, and counted as skipped. ``session`` is the conversation under which your application captures its
    leads (``meter.leads.capture``), for ``from_lead``: only pass one that is this user's own.

    It fits LangServe's ``per_req_config_modifier``; see the README.

    Raises:
        ConfigurationError: The handler's ``customer=`` does not read the ``customer`` that is passed here, so that
            nobody, or somebody else, would pay; or another argument is none.
        InvalidValueError: ``customer`` names somebody, and not by a ``cus_…`` id.
    """
    _check_arguments(meter, config, session)
    given = config or {}
    user = _named(customer)
    if user is not None:
        _check_pays(meter, user)
    said = ClientRun(user, session)
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


def _check_arguments(meter: object, config: object, session: object) -> None:
    if not isinstance(meter, StripeMeterCallbackHandler):
        raise ConfigurationError(f"metered_config() takes a StripeMeterCallbackHandler, not {type(meter).__name__}.")
    if config is not None and not isinstance(config, Mapping):
        raise ConfigurationError(
            f"config= is what the client sent as its run's config, a mapping or None, not {type(config).__name__}."
        )
    if session is not None and not isinstance(session, str):
        raise ConfigurationError(
            f"session= is text, as it was passed to meter.leads.capture, or None; not {type(session).__name__}."
        )


def _named(customer: object) -> object:
    """The user whom ``customer`` is, or None for nobody."""
    if not isinstance(customer, str):
        return customer
    if not customer:
        return None
    _check_id(customer)
    return {USUAL_KEY: customer}


def _check_pays(meter: StripeMeterCallbackHandler, user: object) -> None:
    """Refuse a user whom the handler would not bill: the application named them to be billed."""
    recorder = meter._recorder
    tenant = recorder._tenant_of_all or recorder._tenant(Facts(auth_user=user, on_server=True, now=meter._ledger.now()))
    if isinstance(tenant, Skip):  # by the application's own word
        return
    keys = list(_user_keys(tenant.customer or meter.customer))
    if not keys:
        raise ConfigurationError(
            "metered_config(customer=...) names who pays, but the handler does not read it. Make the handler with "
            f"customer=from_auth_user({USUAL_KEY!r}), or put that first in first_of(...); or pass customer=None "
            "(with from_lead, session= says whose lead pays)."
        )
    named = [key for key in keys if _has(user, key)]
    if not named:
        raise ConfigurationError(
            f"The handler reads {' or '.join(map(repr, keys))} of the authenticated user, which metered_config("
            f"customer=...) does not have. Pass customer={{{keys[0]!r}: 'cus_…'}} or a user that has it; for a plain "
            f"'cus_…' id, make the handler with customer=from_auth_user({USUAL_KEY!r})."
        )
    values = [_get(user, key) for key in named]
    value = next((value for value in values if value is not None and value != ""), None)
    if value is not None:
        _check_id(value)


def _user_keys(source: CustomerSource) -> Iterator[str]:
    """The keys of the user that are read, as far as no fixed customer pays before."""
    for one in flat(source):
        if isinstance(one, Static):
            return
        if isinstance(one, FromAuthUser):
            yield one.key


def _has(user: object, key: str) -> bool:
    return key in user if isinstance(user, Mapping) else hasattr(user, key)


def _get(user: object, key: str) -> object:
    return user[key] if isinstance(user, Mapping) else getattr(user, key)


def _check_id(value: object) -> None:
    try:
        check_customer_id(value)
    except InvalidValueError:  # not chained: it may quote an address
        known = False
    else:
        known = True
    if not known:
        raise InvalidValueError(
            "metered_config(customer=...) is no 'cus_…' id. Somebody known by e-mail, name or phone pays as a lead: "
            "make the handler with customer=from_lead(), call meter.leads.capture(session, email=...), and pass "
            "customer=None, session=session."
        )


def _items(config: Mapping[str, Any], place: str) -> list[tuple[str, Any]]:
    """A part of a client's config, which may be anything."""
    part = config.get(place)
    return [(str(key), value) for key, value in part.items()] if isinstance(part, Mapping) else []


def _is_the_servers(key: str) -> bool:
    """Whether a key in the configurable is LangGraph's own, or its server's: no client has a say in these."""
    return key.startswith(("__", "langgraph_"))


def _with(meter: StripeMeterCallbackHandler, given: Any) -> list[BaseCallbackHandler]:
    """The handlers of ``given`` and the meter. A client can send no handler, so these are the application's."""
    there = given if isinstance(given, list) else getattr(given, "handlers", [])
    others = [one for one in there if isinstance(one, BaseCallbackHandler) and one is not meter]
    return [*others, meter]
