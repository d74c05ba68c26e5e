"""Connected accounts: each tenant's customers pay on the tenant's own account, and nothing crosses over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from langchain_stripe_meter import (
    Messages,
    StripeMeterCallbackHandler,
    StripeMeterEvent,
    Tokens,
    from_lead,
    from_metadata,
)
from langchain_stripe_meter.agents.limits import Budget, SpendLimit
from langchain_stripe_meter.core.customers import Facts, static
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.tenants import Tenant
from langchain_stripe_meter.counting import entry_of, lost_of
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError, SpendLimitError
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry
from langchain_stripe_meter.sandbox import StripeSandbox
from langchain_stripe_meter.sandbox.stripe_sandbox import AccountHandle

ANNA, BERT = "acct_anna", "acct_bert"
USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


def answer(handler: StripeMeterCallbackHandler, **metadata: Any) -> None:
    """One run of a chat model that consumes 15 tokens."""
    model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=USAGE)]))
    model.invoke("Hello", {"callbacks": [handler], "metadata": metadata})


@dataclass
class Platform:
    """A platform account with two connected ones, each with the meter and a customer ``cus_1`` of its own."""

    sandbox: StripeSandbox
    anna: AccountHandle
    bert: AccountHandle
    ledger: str

    def handler(self, *meters: Any, **options: Any) -> StripeMeterCallbackHandler:
        return StripeMeterCallbackHandler(*(meters or [Tokens("ai_tokens")]), ledger=self.ledger, **options)

    def billed(self) -> tuple[Decimal, Decimal, Decimal]:
        """What ``cus_1`` owes: on the platform's account, on Anna's, on Bert's."""
        accounts = (self.sandbox, self.anna, self.bert)
        return tuple(account.billed("ai_tokens", "cus_1") for account in accounts)  # type: ignore[return-value]


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        accounts = [sandbox.connect(ANNA), sandbox.connect(BERT)]
        for account in (sandbox, *accounts):
            account.create_meter("ai_tokens")
            account.create_customer(id="cus_1")
        yield Platform(sandbox, *accounts, ledger=f"sqlite:///{tmp_path}/ledger.db")


def of_metadata(facts: Facts) -> Tenant | None:
    name = facts.metadata.get("tenant")
    return Tenant(f"acct_{name}") if name else None


def test_a_handler_bills_on_its_connected_account(platform: Platform) -> None:
    with platform.handler(customer="cus_1", stripe_account=ANNA) as handler:
        answer(handler)
        assert handler.flush().delivered == 1
        assert handler.verify().agrees
    assert platform.billed() == (0, 15, 0)


def test_each_run_is_billed_on_its_tenants_account_though_the_customers_have_the_same_id(platform: Platform) -> None:
    with platform.handler(customer="cus_1", tenant=of_metadata) as handler:
        for name in ("anna", "bert", "anna", None):
            answer(handler, tenant=name)
        assert handler.flush().skipped == 1
        verified = handler.verify()
        assert [row.reason for row in views.tail(handler._ledger) if row.state == "skipped"] == ["no tenant"]
    assert platform.billed() == (0, 30, 15)
    assert verified.agrees
    assert [(one.account, one.at_stripe) for one in verified.comparisons] == [(ANNA, 30), (BERT, 15)]


def test_two_handlers_on_one_ledger_bill_one_run_on_two_accounts(platform: Platform) -> None:
    """One row would swallow the other if identifiers were the same on every account."""
    with (
        platform.handler(customer="cus_1", stripe_account=ANNA) as hers,
        platform.handler(customer="cus_1", stripe_account=BERT) as his,
        platform.handler(customer="cus_1") as ours,
    ):
        model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=USAGE)]))
        model.invoke("Hello", {"callbacks": [hers, his, ours]})
        assert ours.flush().pending == 0
    assert platform.billed() == (15, 15, 15)


def test_a_tenant_may_count_and_identify_in_its_own_way(platform: Platform) -> None:
    platform.bert.create_meter("messages")

    def tenant(facts: Facts) -> Tenant:
        if facts.metadata.get("tenant") == "bert":
            return Tenant(BERT, meters=(Messages("messages"),), customer="cus_1")  # type: ignore[arg-type]
        return Tenant(ANNA)

    with platform.handler(customer=from_metadata("customer"), tenant=tenant) as handler:
        answer(handler, tenant="bert")
        answer(handler, tenant="anna", customer="cus_1")
        assert handler.flush().pending == 0
    assert platform.billed() == (0, 15, 0)
    assert platform.bert.billed("messages", "cus_1") == 1


def test_a_person_is_looked_up_on_the_tenants_account_only(platform: Platform) -> None:
    platform.anna.create_customer(id="cus_annas_eve", email="eve@example.com")
    platform.sandbox.create_customer(id="cus_platforms_eve", email="eve@example.com")
    with platform.handler(customer=from_lead(by="email"), tenant=of_metadata) as handler:
        for name in ("anna", "bert", "anna"):
            answer(handler, tenant=name, lead={"email": "eve@example.com"})
        assert handler.flush().held == 1
    assert platform.anna.billed("ai_tokens") == {"cus_annas_eve": 30}
    assert platform.bert.billed("ai_tokens") == {}
    assert platform.sandbox.billed("ai_tokens") == {}


def test_leads_of_one_session_on_two_accounts_are_two_leads(platform: Platform) -> None:
    platform.anna.create_customer(id="cus_eve", email="eve@example.com")
    platform.bert.create_customer(id="cus_max", email="max@example.com")
    with platform.handler(customer=from_lead(by="email"), tenant=of_metadata) as handler:
        handler.leads.capture("s-1", email="eve@example.com", account=ANNA)
        handler.leads.capture("s-1", email="max@example.com", account=BERT)
        for name in ("anna", "bert"):
            answer(handler, tenant=name, session_id="s-1")
        assert handler.flush().held == 0
    assert platform.anna.billed("ai_tokens") == {"cus_eve": 15}
    assert platform.bert.billed("ai_tokens") == {"cus_max": 15}


def test_with_tenants_a_lead_is_of_a_session_on_an_account_that_must_be_said(platform: Platform) -> None:
    with platform.handler(customer=from_lead(by="email"), tenant=of_metadata) as handler:
        leads = handler.leads
        asks = (partial(leads.capture, email="eve@example.com"), leads.find, leads.forget)
        for ask in asks:
            with pytest.raises(ConfigurationError, match=r"tenant=.*session.*account="):
                ask("s-1")
            with pytest.raises(InvalidValueError, match="no connected account"):
                ask("s-1", account="anna")
        asks[0]("s-1", account="")  # a run of the platform itself
        assert leads.find("s-1", "") == {"email": "eve@example.com"}
        assert leads.forget("s-1", "")


def test_of_a_lead_only_what_the_tenants_own_source_reads_pays(platform: Platform) -> None:
    platform.anna.create_customer(id="cus_eve", email="eve@example.com", phone="+4930901820")

    def tenant(facts: Facts) -> Tenant:
        return Tenant(ANNA, customer=from_lead(by="phone"))

    with platform.handler(customer=from_lead(by="email"), tenant=tenant) as handler:
        handler.leads.capture("s-1", email="eve@example.com", account=ANNA)
        answer(handler, session_id="s-1")
        assert handler.flush().skipped == 1
        handler.leads.capture("s-1", phone="+4930901820", account=ANNA)
        answer(handler, session_id="s-1")
        assert handler.flush().held == 0
    assert platform.anna.billed("ai_tokens") == {"cus_eve": 15}


def test_with_tenants_a_lead_pays_from_the_first_message_as_its_tenants_own_source_says(platform: Platform) -> None:
    """Anna goes by the address and Bert by the number, whatever the handler's own source reads."""
    for one, mail in ((platform.anna, "eve@example.com"), (platform.bert, "bob@example.com")):
        one.create_customer(id=f"cus_{mail[:3]}", email=mail, phone="+4930901820")
    sources = {"anna": Tenant(ANNA, customer=from_lead("email")), "bert": Tenant(BERT, customer=from_lead("phone"))}

    def tenant(facts: Facts) -> Tenant:
        return sources[str(facts.metadata["tenant"])]

    with platform.handler(customer="cus_1", tenant=tenant) as handler:
        for name, account in (("anna", ANNA), ("bert", BERT)):
            answer(handler, tenant=name, session_id="s-1")
            lead: Any = {"email": "eve@example.com", "account": account, "bill_from": "first_message"}
            assert handler.leads.capture("s-1", **lead) == (1 if name == "anna" else 0)
        lead |= {"phone": "+4930901820"}
        assert handler.leads.capture("s-1", **lead) == 1
        assert handler.flush().pending == 0
    assert platform.anna.billed("ai_tokens") == {"cus_eve": 15}
    assert platform.bert.billed("ai_tokens") == {"cus_bob": 15}


def test_a_meter_that_is_missing_on_one_account_holds_only_that_accounts_usage(platform: Platform) -> None:
    platform.sandbox.connect("acct_new").create_customer(id="cus_1")
    with platform.handler(customer="cus_1", tenant=of_metadata) as handler:
        answer(handler, tenant="new")
        answer(handler, tenant="anna")
        report = handler.flush()
        assert (report.delivered, report.held) == (1, 1)
    assert platform.billed() == (0, 15, 0)


def test_a_tenant_is_chosen_from_trusted_facts_only() -> None:
    """On an agent server, metadata and context are the client's word: a client must not choose the account."""
    said = {"tenant": "anna"}
    facts = Facts(said, {"tenant": "bert"}, said, True, lambda _: said, said, now=7)
    assert facts.trusted() == Facts(auth_user={"tenant": "bert"}, on_server=True)
    assert facts.trusted().now == 7
    ours = Facts({"tenant": "anna"}, context={"tenant": "anna"})
    assert ours.trusted() is ours


def test_a_tenants_customer_may_be_a_plain_id() -> None:
    assert Tenant(ANNA, customer="cus_1").customer == static(id="cus_1")  # type: ignore[arg-type]
    assert Tenant(ANNA).customer is None


def test_a_tenant_function_that_fails_holds_the_run_until_a_person_says_whose_it_is(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []
    is_down = True

    def tenant(facts: Facts) -> Tenant | None:
        if is_down:
            raise KeyError(facts.metadata["tenant"])
        return of_metadata(facts)

    meters = Tokens("ai_tokens"), Messages("messages")
    platform.bert.create_meter("messages")
    with platform.handler(*meters, customer="cus_1", tenant=tenant, on_error=told.append) as handler:
        for _ in range(2):
            answer(handler, tenant="secret@example.com")
        report = handler.flush()
        assert (report.held, report.skipped, report.pending) == (4, 0, 0)
        assert handler.status().unrecorded == 0
        assert platform.billed() == (0, 0, 0)
        (error,) = told  # once, however often it fails
        (line,) = [record.getMessage() for record in caplog.records if "tenant=" in record.getMessage()]
        for said in (str(error), line):
            assert "KeyError" in said
            assert "assign" in said
            assert "secret" not in said

        is_down = False
        answer(handler, tenant="bert")
        is_down = True
        answer(handler, tenant="anna")
        assert len(told) == 2  # it went on in between

        tokens = next(held for held in handler.held() if held.event_name == "ai_tokens")
        assert (tokens.value, tokens.reason) == (45, "tenant= failed: KeyError")
        with pytest.raises(ConfigurationError, match="account="):
            handler.assign(tokens, "cus_1")
        assert handler.assign(tokens, "cus_1", account=ANNA) == 3
        assert handler.flush().held == 3
    assert platform.billed() == (0, 45, 15)


def test_only_what_has_no_account_is_given_one(platform: Platform) -> None:
    with platform.handler(customer=static(email="eve@example.com"), stripe_account=ANNA) as handler:
        answer(handler)
        assert handler.flush().held == 1
        (held,) = handler.held()
        with pytest.raises(ConfigurationError, match=ANNA):
            handler.assign(held, "cus_1", account=BERT)
        assert handler.assign(held, "cus_1", account=ANNA) == 1


def test_people_of_one_address_on_two_accounts_are_held_apart_and_assigned_apart(platform: Platform) -> None:
    for account, used in ((BERT, 70), (ANNA, 5)):
        with platform.handler(customer=static(email="eve@example.com"), stripe_account=account) as handler:
            handler.record_usage({"input_tokens": used}, id="job")
            handler.flush()
            groups = handler.held()
    assert [(one.account, one.value) for one in groups] == [(BERT, 70), (ANNA, 5)]
    assert "<th>account</th>" in groups._repr_html_()
    for both in (groups, [number for one in groups for number in one.ids]):
        with pytest.raises(ConfigurationError, match=f"cus_1.*{ANNA} and {BERT}"):
            handler.assign(both, "cus_1")
    assert handler.held() == groups
    with platform.handler(customer="cus_1") as handler:
        assert handler.assign(groups[1], "cus_1") == 1
        assert handler.flush().held == 1
    assert platform.billed() == (0, 5, 0)


def test_without_its_tenant_usage_without_a_run_is_refused_so_that_the_job_can_tell_it_again(
    platform: Platform,
) -> None:
    """Held, it would be billed twice: by whoever assigns it, and by the same job told again."""
    is_down = True

    def tenant(facts: Facts) -> Tenant | None:
        if is_down:
            raise KeyError
        return of_metadata(facts)

    with platform.handler(customer="cus_1", tenant=tenant) as handler:
        job: dict[str, Any] = {"usage": {"input_tokens": 8}, "id": "job-1", "metadata": {"tenant": "anna"}}
        with pytest.raises(ConfigurationError, match="KeyError"):
            handler.record_usage(**job)
        is_down = False
        handler.record_usage(**job)
        assert handler.flush().delivered == 1
        assert not handler.held()
    assert platform.billed() == (0, 8, 0)


def test_a_run_without_its_tenant_is_not_refused_for_it_will_be_paid(platform: Platform) -> None:
    def broken(facts: Facts) -> Tenant:
        raise KeyError

    with platform.handler(customer="cus_1", tenant=broken, on_unidentified="raise") as handler:
        answer(handler)
        assert handler.flush().held == 1


def test_what_could_not_be_stored_of_it_comes_back_as_held() -> None:
    entry = Entry("a", "ai_tokens", Decimal(15), 1, ReadingState.HELD, reason="tenant= failed: KeyError")
    assert [entry_of(lost) for lost in lost_of([entry])] == [entry]


@pytest.mark.parametrize("tenant", [7, "acct_anna", Tenant(ANNA)])
def test_what_is_no_tenant_function_is_refused_at_once(platform: Platform, tenant: Any) -> None:
    with pytest.raises(ConfigurationError, match="tenant= takes a function"):
        platform.handler(customer="cus_1", tenant=tenant)


def test_an_async_tenant_function_is_refused_at_once(platform: Platform) -> None:
    async def tenant(facts: Facts) -> Tenant:
        return Tenant(ANNA)

    with pytest.raises(ConfigurationError, match="tenant= takes a plain function"):
        platform.handler(customer="cus_1", tenant=tenant)


def test_what_is_no_connected_account_is_refused_by_name(platform: Platform) -> None:
    with pytest.raises(InvalidValueError, match="acct_1032D82eZvKYlo2C"):
        platform.handler(stripe_account="cus_1")
    with pytest.raises(InvalidValueError, match="no connected account"):
        Tenant("acct_with space")
    with pytest.raises(ConfigurationError, match="stripe_account= or tenant="):
        platform.handler(stripe_account=ANNA, tenant=of_metadata)


def test_usage_without_a_run_is_billed_on_the_account_too(platform: Platform) -> None:
    with platform.handler(customer="cus_1", stripe_account=BERT) as handler:
        handler.record_usage(USAGE, id="job-1")
        handler.record_usage(USAGE, id="job-1")
        assert handler.flush().pending == 0
    assert platform.billed() == (0, 0, 15)


def test_the_workflow_component_bills_on_a_connected_account(platform: Platform) -> None:
    event = StripeMeterEvent(stripe_account=ANNA)
    assert event.invoke({"event_name": "ai_tokens", "customer_id": "cus_1", "value": 7})["success"]
    assert platform.billed() == (0, 7, 0)
    with pytest.raises(InvalidValueError, match="no connected account"):
        StripeMeterEvent(stripe_account="anna")


def test_a_limit_is_that_of_a_customer_on_one_account(platform: Platform) -> None:
    def budget_of(handler: StripeMeterCallbackHandler) -> Budget:
        return Budget(handler, SpendLimit("ai_tokens", 20))

    with platform.handler(customer="cus_1", tenant=of_metadata) as handler:
        budget = budget_of(handler)
        for name in ("anna", "anna", "bert"):
            answer(handler, tenant=name)
        with pytest.raises(SpendLimitError):
            budget.check(Facts({"tenant": "anna"}))
        assert budget.remaining(Facts({"tenant": "bert"})) == 5
        with platform.handler(customer="cus_1", stripe_account=ANNA) as hers:
            assert budget_of(hers).remaining("cus_1") == 0


def test_with_tenants_a_limit_is_asked_for_with_the_account(platform: Platform) -> None:
    with platform.handler(customer="cus_1", tenant=of_metadata) as handler:
        budget = Budget(handler, SpendLimit("ai_tokens", 20))
        for name in ("anna", "anna", "bert"):
            answer(handler, tenant=name)
        for customer in ("cus_1", Reference("id", "cus_1")):
            assert budget.remaining(customer, account=ANNA) == 0
            assert budget.remaining(customer, account=BERT) == 5
            assert budget.remaining(customer, account="") == 20
            (allowance,) = budget.allowances(customer, account=BERT)
            assert allowance.used == 15
            budget.check(customer, account=BERT)
            with pytest.raises(SpendLimitError):
                budget.check(customer, account=ANNA)
            with pytest.raises(SpendLimitError):
                asyncio.run(budget.acheck(customer, account=ANNA))
            for ask in (budget.remaining, budget.allowances, budget.check):
                with pytest.raises(ConfigurationError, match=r"tenant=.*account="):
                    ask(customer)  # type: ignore[operator]
        with pytest.raises(InvalidValueError, match="no connected account"):
            budget.remaining("cus_1", account="anna")
        with pytest.raises(ConfigurationError, match="account="):
            budget.remaining(Facts({"tenant": "anna"}), account=ANNA)


def test_without_tenants_a_limit_is_asked_for_on_the_handlers_account_by_default(platform: Platform) -> None:
    with platform.handler(customer="cus_1", stripe_account=ANNA) as handler:
        budget = Budget(handler, SpendLimit("ai_tokens", 20))
        answer(handler)
        assert budget.remaining("cus_1") == budget.remaining("cus_1", account=ANNA) == 5
        assert budget.remaining("cus_1", account=BERT) == 20


@pytest.mark.parametrize(
    ("given", "reason"),
    [(ANNA, "tenant= gave no Tenant"), (Tenant(ANNA, meters=()), "tenant= failed: ConfigurationError")],
)
def test_a_tenant_that_cannot_be_used_holds_the_run_visibly_instead_of_losing_it(
    platform: Platform, given: Any, reason: str
) -> None:
    told: list[Exception] = []
    with platform.handler(customer="cus_1", tenant=lambda _: given, on_error=told.append) as handler:
        answer(handler)
        assert handler.flush().held == 1
        assert handler.status().unrecorded == 0
        (row,) = views.tail(handler._ledger)
    assert (row.state, row.value, row.reason) == ("held", 15, reason)
    assert told
