"""Keys, connected accounts, meters, summaries and customers of the sandbox, through the real client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import stripe
from sandbox_client import client_of, refusal, send, words

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox import StripeSandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

NOON = 1_800_014_400  # a full hour
MIDNIGHT = NOON - NOON % 86_400


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        yield sandbox


@pytest.fixture
def client(sandbox: StripeSandbox) -> stripe.StripeClient:
    return client_of(sandbox)


@pytest.fixture
def ann(sandbox: StripeSandbox) -> str:
    return sandbox.create_customer(email="ann@example.com", name="Ann Example", phone="+15550001")


class TestKeys:
    @pytest.mark.parametrize("key", ["sk_test_other", "sk_live_other", "rk_test_other"])
    def test_an_unknown_key_is_401(self, sandbox: StripeSandbox, key: str) -> None:
        error = refusal(client_of(sandbox, key).v1.customers.list)
        assert isinstance(error, stripe.AuthenticationError)
        assert words(error).startswith("Invalid API Key provided: ")
        assert key not in words(error)

    def test_a_revoked_key_is_401_until_it_is_allowed_again(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.revoke(sandbox.api_key)
        assert "Expired API Key" in words(refusal(send, client, ann))
        sandbox.allow(sandbox.api_key)
        send(client, ann)

    def test_a_restricted_key_may_do_what_it_was_given(self, sandbox: StripeSandbox, ann: str) -> None:
        sandbox.allow("rk_test_send", {"meter_events:write"})
        client = client_of(sandbox, "rk_test_send")
        send(client, ann)
        error = refusal(client.v1.billing.meters.list)
        assert isinstance(error, stripe.PermissionError)
        assert "'meters:read' permission" in words(error)

    def test_cancelling_has_a_permission_of_its_own(self, sandbox: StripeSandbox, ann: str) -> None:
        sandbox.allow("rk_test_send", {"meter_events:write"})
        sandbox.allow("rk_test_cancel", {"meter_event_adjustments:write"})
        identifier = send(client_of(sandbox, "rk_test_send"), ann).identifier
        params: Any = {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": identifier}}
        sender, canceller = (
            client_of(sandbox, key).v1.billing.meter_event_adjustments for key in ("rk_test_send", "rk_test_cancel")
        )
        assert "'meter_event_adjustments:write' permission" in words(refusal(sender.create, params))
        canceller.create(params)
        assert sandbox.billed("ai_tokens", ann) == 0

    def test_writing_includes_reading(self, sandbox: StripeSandbox) -> None:
        sandbox.allow("rk_test_w", {"customers:write"})
        assert client_of(sandbox, "rk_test_w").v1.customers.list().data == []

    def test_a_permission_that_does_not_exist_is_an_error(self, sandbox: StripeSandbox) -> None:
        with pytest.raises(ConfigurationError, match="Unknown permission 'meter:write'"):
            sandbox.allow("rk_test_x", {"meter:write"})

    def test_a_live_key_works_on_separate_live_data(self, sandbox: StripeSandbox, ann: str) -> None:
        sandbox.allow("sk_live_real")
        live = sandbox.connect(sandbox.account_id, livemode=True)
        live.create_meter("ai_tokens")
        client = client_of(sandbox, "sk_live_real")
        assert "No such customer" in words(refusal(send, client, ann))
        bob = live.create_customer()
        assert send(client, bob, 3).livemode is True
        assert live.billed("ai_tokens", bob) == 3
        assert sandbox.billed("ai_tokens") == {}

    def test_a_key_may_belong_to_another_account(self, sandbox: StripeSandbox) -> None:
        sandbox.allow("sk_test_foreign", account="acct_foreign")
        foreign = client_of(sandbox, "sk_test_foreign")
        assert foreign.v1.accounts.retrieve_current().id == "acct_foreign"
        assert foreign.v1.billing.meters.list().data == []


class TestConnectedAccounts:
    def test_have_their_own_meters_customers_and_events(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        connected = sandbox.connect("acct_x")
        there = client_of(sandbox, stripe_account="acct_x")
        assert "No active meter" in words(refusal(send, there, ann))
        connected.create_meter("ai_tokens")
        bob = connected.create_customer()
        send(there, bob, 3, identifier="run-1")
        send(client, ann, 5, identifier="run-1")
        assert connected.billed("ai_tokens") == {bob: 3}
        assert sandbox.billed("ai_tokens") == {ann: 5}
        assert sandbox.connect("acct_x").events == connected.events

    def test_that_are_not_connected_are_403(self, sandbox: StripeSandbox) -> None:
        sandbox.allow("sk_test_foreign", account="acct_foreign")
        client_of(sandbox, "sk_test_foreign").v1.billing.meters.list()
        for name in ("acct_unknown", "acct_foreign"):
            error = refusal(client_of(sandbox, stripe_account=name).v1.customers.list)
            assert isinstance(error, stripe.PermissionError)
            assert "does not have access to account" in words(error)


class TestMeters:
    def test_are_created_changed_and_listed(self, client: stripe.StripeClient) -> None:
        params: Any = {
            "display_name": "Minutes",
            "event_name": "minutes",
            "default_aggregation": {"formula": "last"},
            "event_time_window": "hour",
            "value_settings": {"event_payload_key": "amount"},
        }
        meter = client.v1.billing.meters.create(params)
        assert (meter.default_aggregation.formula, meter.event_time_window) == ("last", "hour")
        assert (meter.customer_mapping.event_payload_key, meter.value_settings.event_payload_key) == (
            "stripe_customer_id",
            "amount",
        )
        assert client.v1.billing.meters.update(meter.id, {"display_name": "Min"}).display_name == "Min"
        assert client.v1.billing.meters.retrieve(meter.id).display_name == "Min"
        assert [m.event_name for m in client.v1.billing.meters.list().data] == ["minutes", "ai_tokens"]

    def test_only_the_display_name_can_change(self, sandbox: StripeSandbox, client: stripe.StripeClient) -> None:
        (meter,) = client.v1.billing.meters.list().data
        error = refusal(client.v1.billing.meters.update, meter.id, {"event_name": "other"})
        assert words(error) == "Received unknown parameter: event_name"

    def test_one_active_meter_has_an_event_name(self, sandbox: StripeSandbox, client: stripe.StripeClient) -> None:
        old = client.v1.billing.meters.list().data[0]
        params: Any = {"display_name": "x", "event_name": "ai_tokens", "default_aggregation": {"formula": "sum"}}
        refusal(client.v1.billing.meters.create, params)
        client.v1.billing.meters.deactivate(old.id)
        new = client.v1.billing.meters.create(params)
        refusal(client.v1.billing.meters.reactivate, old.id)
        active = client.v1.billing.meters.list({"status": "active"}).data
        inactive = client.v1.billing.meters.list({"status": "inactive"}).data
        assert ([m.id for m in active], [m.id for m in inactive]) == ([new.id], [old.id])

    def test_a_meter_that_is_not_there_is_404(self, client: stripe.StripeClient) -> None:
        error = refusal(client.v1.billing.meters.retrieve, "mtr_x")
        assert (error.http_status, error.code) == (404, "resource_missing")

    def test_lists_come_in_pages(self, sandbox: StripeSandbox, client: stripe.StripeClient) -> None:
        for number in range(12):
            sandbox.create_meter(f"m{number}")
        first = client.v1.billing.meters.list()
        assert (len(first.data), first.has_more) == (10, True)
        rest = client.v1.billing.meters.list({"starting_after": first.data[-1].id})
        assert ([m.event_name for m in rest.data], rest.has_more) == (["m1", "m0", "ai_tokens"], False)
        back = client.v1.billing.meters.list({"ending_before": rest.data[0].id, "limit": 3})
        assert [m.id for m in back.data] == [m.id for m in first.data[-3:]]
        assert len(list(client.v1.billing.meters.list({"limit": 4}).auto_paging_iter())) == 13
        assert refusal(client.v1.billing.meters.list, {"limit": 101}).http_status == 400
        assert refusal(client.v1.billing.meters.list, {"starting_after": "mtr_x"}).http_status == 400


class TestSummaries:
    @pytest.fixture(autouse=True)
    def _at_noon(self, sandbox: StripeSandbox) -> None:
        sandbox.set_time(NOON)

    def test_add_up_what_happened_from_the_start_until_before_the_end(
        self, client: stripe.StripeClient, ann: str
    ) -> None:
        for at in (NOON - 61, NOON - 60, NOON - 1, NOON):
            send(client, ann, "1.5", timestamp=at)
        (summary,) = _summaries(client, ann, NOON - 60, NOON).data
        assert (summary.aggregated_value, summary.start_time, summary.end_time) == (3.0, NOON - 60, NOON)
        assert isinstance(summary.aggregated_value, float)

    def test_are_missing_where_nothing_happened(self, client: stripe.StripeClient, ann: str) -> None:
        assert _summaries(client, ann, NOON - 60, NOON).data == []

    def test_group_by_hour_or_day_in_utc_newest_first(self, client: stripe.StripeClient, ann: str) -> None:
        for at in (NOON - 7200, NOON - 3600, NOON - 3599, MIDNIGHT - 1):
            send(client, ann, timestamp=at)
        hours = _summaries(client, ann, NOON - 7200, NOON, value_grouping_window="hour").data
        assert [(s.start_time, s.aggregated_value) for s in hours] == [(NOON - 3600, 2), (NOON - 7200, 1)]
        days = _summaries(client, ann, MIDNIGHT - 86_400, MIDNIGHT + 86_400, value_grouping_window="day").data
        assert [(s.start_time, s.aggregated_value) for s in days] == [(MIDNIGHT, 3), (MIDNIGHT - 86_400, 1)]

    @pytest.mark.parametrize(
        ("start", "end", "grouping"),
        [
            (NOON - 61, NOON, None),
            (NOON - 60, NOON + 1, None),
            (NOON, NOON, None),
            (NOON - 60, NOON, "hour"),
            (NOON - 3600, NOON, "day"),
        ],
    )
    def test_refuse_times_that_are_not_aligned(
        self, client: stripe.StripeClient, ann: str, start: int, end: int, grouping: str | None
    ) -> None:
        assert refusal(_summaries, client, ann, start, end, value_grouping_window=grouping).http_status == 400

    def test_come_ten_at_a_time(self, client: stripe.StripeClient, ann: str) -> None:
        for hour in range(12):
            send(client, ann, timestamp=NOON - 3600 * hour)
        page = _summaries(client, ann, NOON - 86_400, NOON + 3600, value_grouping_window="hour")
        assert (len(page.data), page.has_more) == (10, True)
        assert len(list(page.auto_paging_iter())) == 12

    def test_show_events_only_after_the_lag(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.summary_lag = 120
        send(client, ann, timestamp=NOON - 1)
        assert _summaries(client, ann, NOON - 60, NOON).data == []
        sandbox.advance(seconds=120)
        assert _summaries(client, ann, NOON - 60, NOON).data[0].aggregated_value == 1

    def test_show_what_was_cancelled_until_the_lag_is_over(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.summary_lag = 120
        send(client, ann, identifier="a", timestamp=NOON - 1)
        sandbox.advance(seconds=120)
        client.v1.billing.meter_event_adjustments.create(
            {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": "a"}}
        )
        assert _summaries(client, ann, NOON - 60, NOON).data[0].aggregated_value == 1
        assert sandbox.billed("ai_tokens", ann) == 0
        sandbox.advance(seconds=120)
        assert _summaries(client, ann, NOON - 60, NOON).data == []

    def test_leave_out_what_was_cancelled_or_rejected(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        for name in ("a", "b", "c"):
            send(client, ann, identifier=name, timestamp=NOON - 1)
        sandbox.reject("a")
        client.v1.billing.meter_event_adjustments.create(
            {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": "b"}}
        )
        assert _summaries(client, ann, NOON - 60, NOON).data[0].aggregated_value == 1
        assert sandbox.billed("ai_tokens", ann) == 1
        sandbox.reject("c")
        assert _summaries(client, ann, NOON - 60, NOON).data == []

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [(("sum", None), 7), (("count", None), 3), (("last", None), 1), (("sum", "hour"), 5), (("last", "day"), 1)],
    )
    def test_follow_the_meters_formula_and_window(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str, kind: Any, expected: int
    ) -> None:
        sandbox.create_meter("special", formula=kind[0], event_time_window=kind[1])
        for at, value in ((NOON - 7000, 2), (NOON - 6000, 4), (NOON - 10, 1)):
            send(client, ann, value, event_name="special", timestamp=at)
        (summary,) = _summaries(client, ann, NOON - 7200, NOON, event_name="special").data
        assert summary.aggregated_value == sandbox.billed("special", ann) == expected

    def test_of_an_unknown_customer_are_404(self, client: stripe.StripeClient) -> None:
        assert refusal(_summaries, client, "cus_x", NOON - 60, NOON).http_status == 404


def _summaries(
    client: stripe.StripeClient, customer: str, start: int, end: int, event_name: str = "ai_tokens", **params: Any
) -> Any:
    meters = client.v1.billing.meters
    (meter_id,) = [meter.id for meter in meters.list().data if meter.event_name == event_name]
    wanted: Any = {"customer": customer, "start_time": start, "end_time": end, **params}
    return meters.event_summaries.list(meter_id, wanted)


class TestCustomers:
    def test_are_created_read_and_deleted(self, client: stripe.StripeClient) -> None:
        made = client.v1.customers.create({"email": "b@example.com", "name": "Bo", "metadata": {"plan": "pro"}})
        read = client.v1.customers.retrieve(made.id)
        assert (read.email, read.name, read.phone) == ("b@example.com", "Bo", None)
        assert read.to_dict()["metadata"] == {"plan": "pro"}
        client.v1.customers.delete(made.id)
        gone = client.v1.customers.retrieve(made.id)
        assert gone.to_dict() == {"id": made.id, "object": "customer", "deleted": True}
        assert refusal(client.v1.customers.delete, made.id).http_status == 404

    def test_are_created_once_per_idempotency_key(self, client: stripe.StripeClient) -> None:
        made = [client.v1.customers.create({"name": "Bo"}, {"idempotency_key": "k"}).id for _ in range(2)]
        assert made[0] == made[1]
        assert len(client.v1.customers.list().data) == 1

    def test_need_no_unique_email_and_are_listed_by_the_exact_one(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        twin = sandbox.create_customer(email="ann@example.com")
        sandbox.create_customer(email="Ann@example.com")
        found = client.v1.customers.list({"email": "ann@example.com", "limit": 2}).data
        assert [customer.id for customer in found] == [twin, ann]
        sandbox.delete_customer(twin)
        assert [c.id for c in client.v1.customers.list({"email": "ann@example.com"}).data] == [ann]

    def test_are_listed_by_when_they_were_created(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.advance(days=1)
        bob = sandbox.create_customer()
        since = sandbox.now() - 3600
        assert [c.id for c in client.v1.customers.list({"created": {"gte": since}}).data] == [bob]
        assert [c.id for c in client.v1.customers.list({"created": {"lt": since}}).data] == [ann]

    def test_an_address_that_is_none_is_refused(self, client: stripe.StripeClient) -> None:
        assert refusal(client.v1.customers.create, {"email": "nobody"}).code == "email_invalid"

    def test_an_unknown_one_is_404(self, client: stripe.StripeClient) -> None:
        error = refusal(client.v1.customers.retrieve, "cus_x")
        assert (error.http_status, words(error)) == (404, "No such customer: 'cus_x'")


class TestSearch:
    @pytest.fixture(autouse=True)
    def _people(self, sandbox: StripeSandbox) -> None:
        sandbox.create_customer(name="one two three", email="One@example.com", phone="+15550001")
        sandbox.create_customer(name="one two three four", email="two@example.com", metadata={"plan": "pro"})
        sandbox.create_customer(name='say "hi" \\ bye', metadata={"plan": "free"})

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ('name:"one two three"', 2),
            ('name:"ONE Two"', 2),
            ('name:"one three"', 0),
            ('name:"on"', 0),
            ('name~"wo thr"', 2),
            ('email:"one@EXAMPLE.com"', 1),
            ('email~"example"', 2),
            ('phone:"+15550001"', 1),
            ('metadata["plan"]:"PRO"', 1),
            ("metadata['plan']:'free'", 1),
            ('-name:"one two three"', 1),
            ("email:null", 1),
            ("-metadata['plan']:null", 2),
            ('name:"one" AND email~"two"', 1),
            ('name:"one" email~"two"', 1),
            ('phone:"+15550001" OR metadata["plan"]:"free"', 2),
            (r'name:"say \"hi\" \\ bye"', 1),
            ("created>0", 3),
            ("created<1000 or created:5", 0),
        ],
    )
    def test_follows_stripes_grammar(self, client: stripe.StripeClient, query: str, found: int) -> None:
        assert len(client.v1.customers.search({"query": query}).data) == found

    @pytest.mark.parametrize(
        "query",
        [
            "ann",
            'name:"open',
            "name:bare",
            'color:"red"',
            'name:"a" AND name:"b" OR name:"c"',
            'name:"a" name:"b" OR name:"c"',
            '(name:"a")',
            'name:"a" AND',
            'name:"a"email:"b"',
            'metadata:"x"',
            'metadata["plan"]~"pro"',
            'created:"soon"',
            "name>5",
            " AND ".join(['name:"a"'] * 11),
        ],
    )
    def test_refuses_what_it_cannot_read(self, client: stripe.StripeClient, query: str) -> None:
        error = refusal(client.v1.customers.search, {"query": query})
        assert error.http_status == 400
        assert "unable to parse your search query" in words(error)

    def test_knows_customers_and_deletions_only_after_the_lag(
        self, sandbox: StripeSandbox, client: stripe.StripeClient
    ) -> None:
        sandbox.search_lag = 60
        zoe = sandbox.create_customer(name="Zoe")
        assert client.v1.customers.search({"query": 'name:"zoe"'}).data == []
        sandbox.advance(seconds=60)
        assert [c.id for c in client.v1.customers.search({"query": 'name:"zoe"'}).data] == [zoe]
        sandbox.delete_customer(zoe)
        assert len(client.v1.customers.search({"query": 'name:"zoe"'}).data) == 1
        sandbox.advance(seconds=60)
        assert client.v1.customers.search({"query": 'name:"zoe"'}).data == []

    def test_comes_in_pages(self, client: stripe.StripeClient) -> None:
        page = client.v1.customers.search({"query": "created>0", "limit": 2})
        assert (len(page.data), page.has_more) == (2, True)
        assert len(list(page.auto_paging_iter())) == 3
