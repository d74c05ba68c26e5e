"""The public face as a user's type checker sees it. mypy (strict) must accept this file; it is never run."""

from decimal import Decimal
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig

from langchain_stripe_meter import (
    Cost,
    Credits,
    Messages,
    MeteringError,
    MeteringSettings,
    StripeMeterCallbackHandler,
    StripeMeterEvent,
    Tokens,
    create_meter,
    first_of,
    from_auth_user,
    from_context,
    from_lead,
    from_metadata,
    list_meters,
    static,
    stripe_meter,
)
from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.tenants import Tenant


def told(error: MeteringError) -> None: ...


handler = StripeMeterCallbackHandler(
    Tokens("ai_tokens"),
    Tokens("units", weights={"input": 1, "cache_read": Decimal("0.1"), "output": 4}),
    Messages("bot_messages"),
    Credits("message_credits", {"gpt-4o": 10, "gpt-4o-mini": 1}, default=1),
    Cost("ai_cost", markup=Decimal("1.3"), unit="micro_usd"),
    customer=first_of(
        from_auth_user("id"), from_context("id"), from_metadata("id"), from_lead(by="email"), static(id="cus_1")
    ),
    ledger="sqlite:///stripe_meter.db",
    stripe="sk_test_123",
    deliver=False,
    on_missing_usage="hold",
    on_error=told,
)
by_default = StripeMeterCallbackHandler(Tokens("ai_tokens"), customer="cus_123")


def tenant(facts: Facts) -> Tenant | None:
    account = facts.metadata.get("tenant")
    return Tenant(str(account)) if account else None


of_tenants = StripeMeterCallbackHandler(Tokens("ai_tokens"), tenant=tenant, roll_up=60, on_unidentified="raise")


def use(chain: Runnable[dict[str, str], str]) -> None:
    config: RunnableConfig = {"callbacks": [handler], "metadata": {"stripe_customer_id": "cus_123"}}
    chain.invoke({"question": "..."}, config)
    with stripe_meter(handler) as same:
        claimed: int = same.leads.capture("session", email="ann@example.com", bill_from="first_message")
    delivered: int = handler.flush(timeout=10).delivered
    paused: str | None = handler.status().paused
    for held in handler.held():
        handler.assign(held, "cus_123", account="acct_1")
    moved: int = handler.retry()
    handler.record_usage({"input_tokens": 812}, model="text-embedding-3-small", customer="cus_123", id="job-7")
    unbilled: list[Decimal] = [skipped.value for skipped in handler.skips()]
    gone: bool = handler.forget(email="ann@example.com").complete
    print(delivered, paused, moved, claimed, unbilled, gone)


names: list[str] = [meter.event_name for meter in list_meters("sk_test_123") if meter.problem is None]
made = create_meter("ai_tokens", price=Decimal("0.002"), currency="usd", interval="month")
price: str | None = made.price.id if made.price else None

out: dict[str, Any] = StripeMeterEvent().invoke({"event_name": "e", "customer_id": "cus_1", "value": 1})
again: StripeMeterCallbackHandler = MeteringSettings.model_validate({}).handler()
