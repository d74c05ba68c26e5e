"""Customers: who pays, exactly or not at all, and nothing personal in any message."""

from __future__ import annotations

import subprocess
import sys
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_stripe_meter.core.customers import (
    CustomerSource,
    Disbelieved,
    Facts,
    FirstOf,
    FromSignedToken,
    Skip,
    Static,
    as_source,
    first_of,
    from_auth_user,
    from_context,
    from_lead,
    from_metadata,
    static,
)
from langchain_stripe_meter.core.references import MAX_TEXT, By, Reference, normalise
from langchain_stripe_meter.core.tenants import needs_lookup
from langchain_stripe_meter.core.tokens import Secrets
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

KEY = "stripe_customer_id"
BYS: list[By] = ["id", "email", "name", "phone"]


def who(source: CustomerSource, **facts: Any) -> Reference | Skip:
    return source.identify(Facts(**facts))


# -- the exact form


@given(st.sampled_from(BYS), st.text(max_size=60))
def test_a_normal_form_is_its_own_normal_form(by: By, text: str) -> None:
    try:
        normal = normalise(by, text)
    except InvalidValueError:
        return
    assert normalise(by, normal) == normal
    assert Reference(by, normal).value == normal


@given(st.text())
def test_any_text_is_a_short_printable_name_or_refused(text: str) -> None:
    try:
        name = normalise("name", text)
    except InvalidValueError:
        return
    assert name.isprintable()
    assert 0 < len(name) <= MAX_TEXT
    assert name == " ".join(name.split())


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("value", ["", "  ", "\0", "a\0b", "\ud800", "x" * 1_000_000, None, 7, True, b"a@b.de", ["a"]])
def test_what_cannot_be_somebody_is_refused(by: By, value: Any) -> None:
    with pytest.raises(InvalidValueError):
        normalise(by, value)


@pytest.mark.parametrize(
    ("by", "text", "normal"),
    [
        ("name", "  Ann \t Smith\n", "Ann Smith"),
        ("name", "Ａnn", "Ann"),
        ("name", "Zoe\u0308", "Zoë"),
        ("email", " Ann.Smith@Example.COM ", "Ann.Smith@example.com"),
        ("email", "POSTMASTER@example.com", "POSTMASTER@example.com"),
        ("email", "ann+tag@example.com", "ann+tag@example.com"),
        ("email", "jürgen@MÜNCHEN.de", "jürgen@münchen.de"),
        ("email", "jürgen@MU\u0308NCHEN.de", "jürgen@münchen.de"),
        ("email", "ann@XN--MNCHEN-3YA.de", "ann@xn--mnchen-3ya.de"),
        ("phone", "+49 30 901820", "+4930901820"),
        ("phone", "+49 (0)30 / 901820".replace(" / ", "-"), "+4930901820"),
        ("phone", "+1 (415) 555-2671", "+14155552671"),
        ("phone", "+39 02 3661 8300", "+390236618300"),
        ("phone", "＋49 30 901820", "+4930901820"),
        ("phone", "(+49) 30.901820", "+4930901820"),
        ("phone", "+49 30\u20119018\u201320", "+4930901820"),
        ("phone", "+٤٩ ٣٠ ٩٠١٨٢٠", "+4930901820"),
    ],
)
def test_what_means_the_same_has_one_form(by: By, text: str, normal: str) -> None:
    assert normalise(by, text) == normal


def test_a_name_may_be_as_long_as_stripe_takes() -> None:
    assert normalise("name", "x" * MAX_TEXT) == "x" * MAX_TEXT


def test_mailboxes_that_differ_only_in_case_stay_two_since_stripes_filter_tells_them_apart() -> None:
    assert normalise("email", "Ann@example.com") != normalise("email", "ann@example.com")


@pytest.mark.parametrize(
    "text",
    ["ann", "ann@", "@example.com", "ann@localhost", "a b@example.com", "Ann <ann@example.com>", "ann@ex ample.com",
     "ann@example.com, bob@example.com", "ann@example..com", "ann\uff20example.com",
     "x" * 70 + "@" + "y" * 250 + ".com",
     "ann@example.com\r\nBcc: bob@example.com", '"ann"@example.com', "ann@[127.0.0.1]"],
)  # fmt: skip
def test_what_is_not_one_plain_address_is_no_email(text: str) -> None:
    with pytest.raises(InvalidValueError, match="email"):
        normalise("email", text)


@pytest.mark.parametrize(
    "text",
    ["1", "+", "+49", "abc", "030 901820", "0049 30 901820", "+49 30 901820 ext 5", "+49 30 901820;ext=5",
     "call +49 30 901820 now", "+1-800-FLOWERS", "+49 30 901820, +49 30 901821", "+49 30 901820 / 21", "+999 1234567",
     "+12345678901234567890", "+49 30 901820 #5", "tel:+4930901820", "911", "++49 30 901820", "+49 30 +901820",
     "+49 30 901820 ~55", "+49 30 901820～55", "+49 30 901820＃5", "+49 30 901820／5", "+49 30 901820 *55",
     "+49 30 901820；ext=5", "12 +49 30 901820", "+4930901820＋1"],
)  # fmt: skip
def test_what_is_not_one_complete_number_is_no_phone(text: str) -> None:
    with pytest.raises(InvalidValueError, match=r"phone.*region="):
        normalise("phone", text)


@pytest.mark.parametrize(("text", "region"), [("030 901820", "DE"), ("0049 30 901820", "DE"), ("+49 30 901820", "US")])
def test_a_region_says_where_a_national_number_is_dialled(text: str, region: str) -> None:
    assert normalise("phone", text, region) == "+4930901820"
    assert static(phone=text, region=region) == static(phone="+4930901820")
    lead = {"lead": {"phone": text}}
    assert who(from_lead(by="phone", region=region), metadata=lead) == Reference("phone", "+4930901820")


@given(st.from_regex(r"\A\+?[0-9][0-9 ()-]{5,16}\Z"), st.sampled_from([None, "DE", "US", "IT", "AR", "MX", "BR"]))
def test_a_phone_number_becomes_e164_that_reads_the_same_anywhere(text: str, region: str | None) -> None:
    try:
        number = normalise("phone", text, region)
    except InvalidValueError:
        return
    assert number.startswith("+")
    assert number[1:].isascii()
    assert number[1:].isdigit()
    assert len(number) <= 20  # what Stripe takes
    assert normalise("phone", number) == number == normalise("phone", number, "FR")


@pytest.mark.parametrize("region", ["de", "XX", "Germany", "", "49", 49, "001"])
def test_a_region_that_does_not_exist_is_refused_at_the_door(region: Any) -> None:
    with pytest.raises(ConfigurationError, match="region"):
        static(phone="030 901820", region=region)
    with pytest.raises(ConfigurationError, match="region"):
        from_lead(by="phone", region=region)


def test_only_phone_numbers_have_a_region() -> None:
    with pytest.raises(ConfigurationError, match="region"):
        static(email="ann@example.com", region="DE")
    with pytest.raises(ConfigurationError, match="region"):
        from_lead(by="email", region="DE")


@pytest.mark.parametrize(
    ("by", "canary"),
    [("email", "canary-ann@@example"), ("email", "canary@secret"), ("email", "canary <c@example.com>"),
     ("phone", "canary 12345"), ("phone", "0309018204711"), ("name", "canary\0"), ("id", "canary@example.com"),
     ("id", "Canary Smith")],
)  # fmt: skip
def test_an_error_never_repeats_the_personal_value(by: By, canary: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Reference(by, canary)
    told = "".join(traceback.TracebackException.from_exception(caught.value).format_exception_only())
    assert canary not in told
    assert "canary" not in told.lower()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_reprs_hold_nothing_personal() -> None:
    facts = Facts({"lead": {"email": "canary@example.com"}}, {"name": "canary"}, {"name": "canary"})
    for shown in (
        facts,
        Reference("email", "canary@example.com"),
        static(name="canary"),
        first_of(static(name="canary")),
    ):
        assert "canary" not in repr(shown)


def test_importing_the_core_does_not_import_the_email_and_phone_libraries() -> None:
    code = (
        "import sys, langchain_stripe_meter.core.customers as c; c.static(id='cus_1'); c.from_lead(); "
        "c.from_lead('phone'); sys.exit(bool({'email_validator', 'phonenumbers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- sources


@pytest.mark.parametrize(
    ("by", "value"), [("id", "cus_1"), ("email", "a@example.com"), ("name", "Ann"), ("phone", "+4930901820")]
)
def test_a_static_customer_pays_whatever_the_run_says(by: By, value: str) -> None:
    named: dict[str, Any] = {by: value}
    facts = {"metadata": {KEY: "cus_2", "lead": {"email": "lead@example.com"}}, "on_server": True}
    assert who(static(**named), **facts) == Reference(by, value)


@pytest.mark.parametrize("given_", [{}, {"id": "cus_1", "name": "Ann"}, {"id": "nobody"}, {"email": ""}, {"name": " "}])
def test_a_static_customer_is_named_once_and_well(given_: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        static(**given_)


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        (from_metadata(KEY), {"metadata": {KEY: "cus_1"}}),
        (from_auth_user(KEY), {"auth_user": {KEY: "cus_1"}}),
        (from_auth_user(KEY), {"auth_user": SimpleNamespace(stripe_customer_id="cus_1"), "on_server": True}),
        (from_context(KEY), {"context": {KEY: "cus_1"}}),
        (from_context(KEY), {"context": SimpleNamespace(stripe_customer_id="cus_1")}),
    ],
)
def test_a_source_reads_its_own_place_and_no_other(source: CustomerSource, facts: dict[str, Any]) -> None:
    assert who(source, **facts) == Reference("id", "cus_1")
    everywhere = {"metadata": {KEY: "cus_1"}, "auth_user": {KEY: "cus_1"}, "context": {KEY: "cus_1"}}
    assert isinstance(who(source, **{name: value for name, value in everywhere.items() if name not in facts}), Skip)


@pytest.mark.parametrize(
    "value", [None, "", " ", "cus_", "ann@example.com", "cus_1 ", 7, ["cus_1"], {"id": "cus_1"}, True]
)
@pytest.mark.parametrize("source", [from_metadata(KEY), from_auth_user(KEY), from_context(KEY)])
def test_a_missing_or_malformed_id_is_skipped_with_a_reason_and_without_the_value(
    source: CustomerSource, value: Any
) -> None:
    skip = who(source, metadata={KEY: value}, auth_user={KEY: value}, context={KEY: value})
    assert isinstance(skip, Skip)
    assert skip.reason
    assert "ann@example.com" not in skip.reason


def test_a_clients_word_counts_on_a_server_only_if_it_is_trusted() -> None:
    facts: dict[str, Any] = {
        "metadata": {KEY: "cus_victim", "lead": {"email": "v@example.com"}},
        "context": {KEY: "cus_victim"},
        "on_server": True,
    }
    for source in (from_metadata(KEY), from_context(KEY), from_lead()):
        assert isinstance(who(source, **facts), Skip)
    for source in (from_metadata(KEY, trust_client=True), from_context(KEY, trust_client=True)):
        assert who(source, **facts) == Reference("id", "cus_victim")
    assert who(from_lead(trust_client=True), **facts) == Reference("email", "v@example.com")


def test_the_captured_lead_is_believed_on_a_server_and_comes_before_the_metadata() -> None:
    leads = {"s1": {"email": "captured@example.com"}}
    facts: dict[str, Any] = {
        "metadata": {"thread_id": "s1", "lead": {"email": "typed@example.com"}}, "lead": leads.get
    }  # fmt: skip
    for on_server in (True, False):
        assert who(from_lead(), **facts, on_server=on_server) == Reference("email", "captured@example.com")


def test_a_captured_number_is_read_in_the_region_too() -> None:
    facts: dict[str, Any] = {"metadata": {"thread_id": "t"}, "lead": lambda _: {"phone": "030 901820"}}
    assert who(from_lead("phone", region="DE"), **facts) == Reference("phone", "+4930901820")
    assert who(from_lead("phone"), **facts) == Skip("the customer's phone is malformed; it looks like '+49 30 901820'")


def test_without_a_session_or_a_store_of_leads_only_the_metadata_can_name_one() -> None:
    def nobody_asks(session: str) -> None:
        raise AssertionError(session)

    lead = {"lead": {"email": "ann@example.com"}}
    assert who(from_lead(), metadata=lead, lead=nobody_asks) == Reference("email", "ann@example.com")
    assert who(from_lead(), metadata={**lead, "thread_id": "t"}) == Reference("email", "ann@example.com")


@pytest.mark.parametrize("by", ["email", "name", "phone"])
def test_before_its_identifier_is_known_a_lead_is_not_metered(by: By) -> None:
    source = from_lead(by=by)
    for lead in (None, {}, "x", {by: ""}, {by: None}, {"other": "x"}):
        assert isinstance(who(source, metadata={"lead": lead}), Skip)
    assert isinstance(who(source), Skip)
    assert isinstance(who(source, metadata={"session_id": "s"}, lead=lambda session: None), Skip)
    assert isinstance(who(source, metadata={"session_id": "s"}, lead=lambda session: {"other": "x"}), Skip)


@pytest.mark.parametrize(
    ("metadata", "session"),
    [
        ({"session_id": "s", "thread_id": "t", "conversation_id": "c"}, "s"),
        ({"session_id": "", "thread_id": "t"}, "t"), ({"session_id": None, "conversation_id": 7}, "7"), ({}, None),
    ],
)  # fmt: skip
def test_the_session_is_the_first_of_its_three_names(metadata: dict[str, Any], session: str | None) -> None:
    assert Facts(metadata).session(trust_client=False) == session


def test_the_first_source_that_names_somebody_decides_and_all_reasons_are_kept() -> None:
    source = first_of(from_auth_user(KEY), from_metadata(KEY), "cus_house")
    assert who(source, auth_user={KEY: "cus_1"}, metadata={KEY: "cus_2"}) == Reference("id", "cus_1")
    assert who(source, metadata={KEY: "cus_2"}) == Reference("id", "cus_2")
    assert who(source) == Reference("id", "cus_house")
    skip = who(first_of(from_auth_user("a"), from_metadata("b")))
    assert skip == Skip("the authenticated user has no 'a'; metadata has no 'b'")


@pytest.mark.parametrize("value", ["cus-ann", "ann@example.com", 7, ["cus_1"]])
@pytest.mark.parametrize("source", [from_metadata(KEY), from_auth_user(KEY), from_context(KEY)])
def test_who_is_named_wrongly_is_nobodys_to_pay_for_whatever_comes_next(source: CustomerSource, value: Any) -> None:
    skip = who(first_of(source, "cus_house"), metadata={KEY: value}, auth_user={KEY: value}, context={KEY: value})
    assert skip == Disbelieved("the customer's id is malformed; it looks like 'cus_123'")
    before = first_of(from_metadata("absent"), source, from_lead(), "cus_house")
    assert who(before, metadata={KEY: value}, auth_user={KEY: value}, context={KEY: value}) == skip


def test_a_reference_is_read_back_from_what_the_ledger_writes_with_colons_in_it() -> None:
    for reference in (Reference("name", "Ann: of the Hill"), Reference("id", "cus_1"), Reference("email", "a@b.com")):
        assert Reference.of(reference.text) == reference


def test_a_lead_that_cannot_be_one_is_nobody_so_the_next_source_decides() -> None:
    for lead in ({"email": "ann"}, {"email": 7}, {}):
        assert who(first_of(from_lead(), "cus_house"), metadata={"lead": lead}) == Reference("id", "cus_house")


def test_what_a_client_claims_without_being_believed_ends_nothing() -> None:
    source = first_of(from_metadata(KEY), from_context(KEY), from_auth_user(KEY))
    said = {KEY: "nonsense"}
    assert who(source, metadata=said, context=said, auth_user={KEY: "cus_1"}, on_server=True) == Reference(
        "id", "cus_1"
    )


def test_a_client_of_a_server_does_not_ride_free_on_a_claim_that_is_none() -> None:
    """Whom the server itself knows pays; a default customer, or another word of the client's, does not."""
    claims = from_metadata(KEY, trust_client=True)
    own, known = {"email": "ann@example.com"}, {KEY: "cus_1"}
    facts: dict[str, Any] = {"on_server": True, "metadata": {KEY: "nonsense", "thread_id": "t", "lead": own}}
    everything = first_of(claims, from_lead(), from_auth_user(KEY), from_lead(trust_client=True), "cus_house")
    assert who(everything, **facts) == Disbelieved("the customer's id is malformed; it looks like 'cus_123'")
    assert who(everything, **facts, auth_user=known) == Reference("id", "cus_1")
    assert who(everything, **facts, lead={"t": own}.get) == Reference("email", "ann@example.com")
    another_claim = first_of(claims, from_context(KEY, trust_client=True), from_auth_user(KEY))
    assert who(another_claim, **facts, context={KEY: "cus_2"}, auth_user=known) == Reference("id", "cus_1")
    its_own = first_of(from_auth_user(KEY), from_lead(), "cus_house")
    anonymous = {**facts, "auth_user": {KEY: "anonymous"}}
    assert who(its_own, **anonymous, lead={"t": own}.get) == Reference("email", "ann@example.com")
    assert isinstance(who(its_own, **anonymous), Disbelieved)


@pytest.mark.parametrize("blank", [None, "", " ", "\n", False, 0, b"", [], {}])
def test_a_blank_claims_nothing_so_the_next_source_decides(blank: Any) -> None:
    sources = (from_metadata(KEY), from_context(KEY), from_auth_user(KEY), FromSignedToken(KEY, Secrets("x" * 32)))
    for source in sources:
        facts: dict[str, Any] = {"metadata": {KEY: blank}, "context": {KEY: blank}, "auth_user": {KEY: blank}}
        assert who(first_of(source, "cus_house"), **facts) == Reference("id", "cus_house")


def test_whom_the_application_named_pays_though_another_is_named_wrongly() -> None:
    facts: dict[str, Any] = {"metadata": {KEY: "nonsense"}, "auth_user": {}, "named": {"id": "cus_1"}}
    assert who(first_of(from_metadata(KEY), from_auth_user("id")), **facts) == Reference("id", "cus_1")


def test_only_a_lead_needs_a_look_into_the_ledger() -> None:
    assert needs_lookup(first_of(from_metadata(KEY), first_of(from_lead())))
    assert not needs_lookup(first_of(from_metadata(KEY), static(id="cus_1")))


def test_a_plain_string_is_a_static_customer() -> None:
    assert as_source("cus_1") == Static(Reference("id", "cus_1"))
    assert first_of("cus_1") == FirstOf((static(id="cus_1"),))


NOTHING: Any = None
FAX: Any = "fax"
SEVEN: Any = 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: from_metadata(""), lambda: from_auth_user(NOTHING), lambda: from_context(SEVEN), first_of,
        lambda: from_lead(by="id"), lambda: from_lead(by=FAX), lambda: as_source(SEVEN), lambda: first_of(NOTHING),
        lambda: as_source("ann"), lambda: Reference(FAX, "1"),
    ],
)  # fmt: skip
def test_a_source_that_makes_no_sense_is_refused_at_the_door(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


def test_on_a_server_a_client_cannot_name_somebody_elses_session_to_make_their_lead_pay() -> None:
    leads = {"victim": {"email": "victim@example.com"}, "own": {"email": "ann@example.com"}}
    forged = {"session_id": "victim", "conversation_id": "victim", "thread_id": "own"}
    on_server = Facts(forged, on_server=True, lead=leads.get)
    assert from_lead().identify(on_server) == Reference("email", "ann@example.com")
    without_thread = Facts({"session_id": "victim"}, on_server=True, lead=leads.get)
    assert isinstance(from_lead().identify(without_thread), Skip)
    trusting = from_lead(trust_client=True).identify(on_server)
    assert trusting == from_lead().identify(Facts(forged, lead=leads.get)) == Reference("email", "victim@example.com")
