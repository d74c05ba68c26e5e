"""Who is believed where strangers start the runs: LangServe, FastAPI, an agent server, an application of one's own.

A server that does not authenticate its clients for LangChain hands their config to the chain, and nothing in it tells
the client's word from the application's: its metadata would be believed. ``metered_config`` makes the difference.
``sign_customer`` and ``from_signed_token`` are for front ends that carry the customer's id themselves: the secret comes
from the caller, else from the environment. ``capture_lead_tool`` lets an agent note the address that a user types into
the chat; **a typed address proves nothing**, so it is off unless you make it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool
from pydantic import Field, create_model

from langchain_stripe_meter.core import tokens
from langchain_stripe_meter.core.customers import (
    CustomerSource,
    Facts,
    FromAuthUser,
    FromSignedToken,
    Skip,
    Static,
    flat,
)
from langchain_stripe_meter.core.events import check_customer_id
from langchain_stripe_meter.core.references import By
from langchain_stripe_meter.core.tenants import lead_fields
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError, MeteringError, logger
from langchain_stripe_meter.handler import StripeMeterCallbackHandler
from langchain_stripe_meter.ledger.leads import BillFrom
from langchain_stripe_meter.observed import CLIENT_RUN, ClientRun

USUAL_KEY = "stripe_customer_id"
"""Where ``from_auth_user`` finds a customer that was passed as a ``cus_…`` id."""

_CLAIMS = frozenset({"stripe_customer_id", "lead", "session_id", "thread_id", "conversation_id"})
"""What metadata says about who pays, and about whose conversation it is."""
_MODELS_OWN = "ls_"
"""How the metadata begins by which a model says its name and provider, and so what it is priced by."""
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

    ``config`` is what the client sent. What it says about who pays, and of the model, is taken out, and the run
    is marked as a client's: from then on ``from_metadata``, ``from_context`` and ``from_lead`` believe nothing that is
    left of it, unless they were told to (``trust_client=True``), and ``from_auth_user`` reads ``customer``, who pays
    whatever stands before it in ``first_of``. A signed token is believed still, where ``customer`` names nobody.

    ``customer`` is a ``cus_…`` id, for ``from_auth_user("stripe_customer_id")``; or the user as a mapping or an object,
    for a key of your own, which is read now; or None (or a user whose key is None, or ``""``) for somebody without a
    Stripe customer, who is not billed, and counted as skipped. ``session`` is the conversation under which your
    application captures its leads (``meter.leads.capture``), for ``from_lead``: only pass one that is this user's own.

    It fits LangServe's ``per_req_config_modifier``; see the README.

    Raises:
        ConfigurationError: The handler's ``customer=`` does not read the ``customer`` that is passed here, so that
            nobody, or somebody else, would pay; or another argument is none.
        InvalidValueError: ``customer`` names somebody, and not by a ``cus_…`` id.
    """
    _check_arguments(meter, config, session)
    given = config or {}
    user = _named(customer)
    said = ClientRun(user, session, None if user is None else _read(meter, user))
    metadata = {
        key: value for key, value in _items(given, "metadata") if key not in _CLAIMS and not key.startswith(_MODELS_OWN)
    }
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


def _read(meter: StripeMeterCallbackHandler, user: object) -> dict[str, object]:
    """What the handler reads of a user. One whom it would not bill is refused: the application named them to be
    billed."""
    tenant = meter._recorder.tenant_of(Facts(auth_user=user, on_server=True, now=meter._ledger.now()))
    if isinstance(tenant, Skip):  # by the application's own word
        return {}
    keys = list(_user_keys(tenant.customer or meter.customer))
    if not keys:
        raise ConfigurationError(
            "metered_config(customer=...) names who pays, but the handler does not read it. Make the handler with "
            f"customer=from_auth_user({USUAL_KEY!r}), or put that first in first_of(...); or pass customer=None "
            "(with from_lead, session= says whose lead pays)."
        )
    named = {key: _get(user, key) for key in keys if _has(user, key)}
    if not named:
        raise ConfigurationError(
            f"The handler reads {' or '.join(map(repr, keys))} of the authenticated user, which metered_config("
            f"customer=...) does not have. Pass customer={{{keys[0]!r}: 'cus_…'}} or a user that has it; for a plain "
            f"'cus_…' id, make the handler with customer=from_auth_user({USUAL_KEY!r})."
        )
    value = next((value for value in named.values() if value is not None and value != ""), None)
    if value is not None:
        _check_id(value)
    return named


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
    except InvalidValueError:
        raise InvalidValueError(
            "metered_config(customer=...) is no 'cus_…' id. Somebody known by e-mail, name or phone pays as a lead: "
            "make the handler with customer=from_lead(), call meter.leads.capture(session, email=...), and pass "
            "customer=None, session=session."
        ) from None


def _items(config: Mapping[str, Any], place: str) -> list[tuple[str, Any]]:
    """A part of a client's config, which may be anything."""
    part = config.get(place)
    return [(str(key), value) for key, value in part.items()] if isinstance(part, Mapping) else []


def _is_the_servers(key: str) -> bool:
    """Whether a key in the configurable is LangGraph's own, its server's or a model's: no client has a say in these."""
    return key.startswith(("__", "langgraph_", _MODELS_OWN))


def _with(meter: StripeMeterCallbackHandler, given: Any) -> list[BaseCallbackHandler]:
    """The handlers of ``given`` and the meter. A client can send no handler, so these are the application's."""
    there = given if isinstance(given, list) else getattr(given, "handlers", [])
    others = [one for one in there if isinstance(one, BaseCallbackHandler) and one is not meter]
    return [*others, meter]


# -- signed tokens

SECRET = "STRIPE_METER_TOKEN_SECRET"  # noqa: S105 - the name of a variable
"""The environment variable that holds the secret; during a change of secrets the new one, a space, the old one."""

Secret = str | bytes | Sequence[str | bytes]


def sign_customer(
    customer: str, secret: Secret | None = None, *, expires_at: int | datetime, account: str | None = None
) -> str:
    """A compact, URL-safe token that says who pays, for a front end to pass on with its runs.

    Make it on your server for the user whom you authenticated. Whoever holds it is believed until ``expires_at`` (Unix
    seconds, or a datetime with a time zone), so keep that near. ``secret`` defaults to ``$STRIPE_METER_TOKEN_SECRET``;
    of several, the first signs. ``account`` (``acct_…``) makes it good for that Stripe account only.

    Raises ``ConfigurationError`` for a secret that is missing or has less than 32 bytes, and for values that make no
    token, such as a time in the past.
    """
    made = tokens.sign(customer, _secrets(secret), expires_at=expires_at, account=account)
    moment = expires_at.timestamp() if isinstance(expires_at, datetime) else expires_at
    if moment <= time.time():
        raise InvalidValueError(
            f"expires_at={expires_at!r} is in the past, so nobody would believe the token. Say until when it is good, "
            "such as int(time.time()) + 3600 for an hour."
        )
    return made


def from_signed_token(
    key: str = "stripe_customer_token", secret: Secret | None = None, *, account: str | None = None
) -> FromSignedToken:
    """Read a token that ``sign_customer`` made from the run's metadata or configurable, under ``key``.

    It is believed on any server, whoever sent it, for only the holder of the secret can have made it. One that has
    expired when the run starts, or that is not whole, is skipped with the reason. ``secret`` defaults to
    ``$STRIPE_METER_TOKEN_SECRET``; several are all accepted. ``account`` must be the one that the token is bound to.

    Raises ``ConfigurationError`` for a secret that is missing or has less than 32 bytes.
    """
    return FromSignedToken(key, _secrets(secret), account)


def secrets_in(variable: str) -> list[str]:
    """The secrets in an environment variable, divided by spaces; ``ConfigurationError`` if there is none."""
    found = os.environ.get(variable, "").split()
    if not found:
        shown = f"${variable}" if variable.isidentifier() and variable.isupper() else "The environment variable"
        raise ConfigurationError(f"{shown} holds no secret to sign tokens with. Set it, or pass secret=.")
    return found


def _secrets(secret: Secret | None) -> tokens.Secrets:
    return tokens.Secrets(secrets_in(SECRET) if secret is None else secret)


# -- leads

_CALLED: dict[str, str] = {"email": "e-mail address", "name": "full name", "phone": "phone number with country code"}


def capture_lead_tool(
    meter: StripeMeterCallbackHandler, by: By = "email", *, region: str | None = None, bill_from: BillFrom = "now"
) -> BaseTool:
    """A LangChain tool ``capture_lead`` that remembers who the user says they are, for ``from_lead(by=...)``.

    **A typed address proves nothing**: with this tool, whoever types somebody else's address has them billed.

    The session is that of the run (``thread_id``, ``session_id`` or ``conversation_id`` of its metadata, on an agent
    server only the ``thread_id``); the model never chooses it. ``region`` and ``bill_from`` are as in
    ``meter.leads.capture``. What was captured before, by your application or by this tool, is not replaced. The tool
    never raises into the agent, and never repeats what was typed.

    Raises:
        ConfigurationError: The handler's ``customer=`` does not read the lead's ``by``.
    """
    if by not in lead_fields(meter.customer):
        raise ConfigurationError(f"capture_lead_tool(by={by!r}) needs a handler with customer=from_lead(by={by!r}).")
    meter.leads.check_bill_from(bill_from)
    called = _CALLED[by]
    there = f"{'An' if by == 'email' else 'A'} {called} was noted before and stays as it is. Do not ask for it again."
    sorry = f"That is not a complete {called}. Ask the user to write it once more."

    def capture_lead(config: RunnableConfig, **typed: str) -> str:
        place = meter._recorder.place_of_lead(meter.facts_at_start(config.get("metadata")))
        if place is None:
            return "This conversation has no session, so nothing can be noted. Go on without it."
        try:
            account, session = place
            if not meter.leads.note(session, **typed, account=account, region=region, bill_from=bill_from):
                return there
        except InvalidValueError:
            return sorry
        except MeteringError as error:  # the chat must not break over it
            logger.error("stripe-meter: a lead could not be captured: %s", error)
            return "This cannot be noted just now. Go on without it."
        return f"The {called} is noted. Thank the user."

    fields: Any = {by: (str, Field(description=f"The user's {called}, exactly as the user wrote it."))}
    return StructuredTool.from_function(
        capture_lead,
        description=f"Note the user's own {called}, after the user gave it of their own accord.",
        args_schema=create_model("CaptureLead", **fields),
        handle_validation_error=sorry,
    )
