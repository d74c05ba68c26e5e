"""What a customer source wants of leads: pure."""

from __future__ import annotations

from langchain_stripe_meter.core.customers import first_of, from_lead, from_metadata
from langchain_stripe_meter.core.tenants import lead_fields, lead_region, needs_lookup, session_digest

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
