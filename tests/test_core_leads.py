"""What a customer source wants of leads: pure."""

from __future__ import annotations

import pytest

from langchain_stripe_meter.core.customers import CustomerSource, Facts, first_of, from_lead, from_metadata
from langchain_stripe_meter.core.tenants import (
    account_of,
    lead_fields,
    lead_region,
    lead_session,
    needs_lookup,
    session_digest,
)
from langchain_stripe_meter.errors import ConfigurationError, MeteringError

PLAIN = from_metadata("stripe_customer_id")
NESTED = first_of(PLAIN, first_of(from_lead("phone", region="DE"), from_lead("email")), from_lead("phone"))


def test_the_fields_of_a_lead_are_those_that_its_source_tries_in_its_order() -> None:
    assert lead_fields(NESTED) == ("phone", "email")
    assert lead_fields(from_lead("name")) == ("name",)
    assert lead_fields(PLAIN) == ()


def test_a_leads_numbers_are_dialled_where_the_first_source_with_a_region_says() -> None:
    assert lead_region(NESTED) == "DE"
    assert lead_region(from_lead("phone")) is None
    assert lead_region(PLAIN) is None


def test_only_a_source_that_reads_leads_asks_the_ledger() -> None:
    assert [needs_lookup(source) for source in (NESTED, from_lead(), PLAIN)] == [True, True, False]


def test_an_upgrade_does_not_change_what_stands_for_a_session_or_its_usage_could_not_be_claimed() -> None:
    assert session_digest("", "session-1") == "e33543085af153625abc9170283a9004845c4aa507a15cf9ffc0e7b74f884cbd"
    assert session_digest("acct_1", "session-1") == "a468957987f80fc661f0dc6c86d2bb8d7188f06f0157a1ab24102ba4d08535a5"


def test_any_text_may_name_a_session() -> None:
    assert len(session_digest("", "\ud800")) == 64


@pytest.mark.parametrize(
    ("source", "session"),
    [
        (PLAIN, None),
        (from_lead(), "thread"),
        (from_lead(trust_client=True), "told"),
        (first_of(from_lead(trust_client=True), from_lead("name")), "thread"),
    ],
)
def test_a_lead_is_of_the_session_that_every_source_which_reads_it_believes(
    source: CustomerSource, session: str | None
) -> None:
    facts = Facts({"session_id": "told", "thread_id": "thread"}, on_server=True)
    assert lead_session(source, facts) == session


@pytest.mark.parametrize(("given", "expected"), [(None, "acct_9"), ("", ""), ("acct_1", "acct_1")])
def test_an_account_is_the_handlers_own_unless_it_is_given(given: str | None, expected: str) -> None:
    assert account_of(given, "acct_9", has_tenants=False, what="customer") == expected


def test_with_tenants_the_account_must_be_given_and_is_checked() -> None:
    assert account_of("acct_1", "acct_9", has_tenants=True, what="session") == "acct_1"
    with pytest.raises(ConfigurationError, match="the same session is somebody else's on each account"):
        account_of(None, "acct_9", has_tenants=True, what="session")
    with pytest.raises(MeteringError, match="no connected account"):
        account_of("cus_1", "", has_tenants=False, what="customer")
