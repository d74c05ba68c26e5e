"""The sandbox goes wrong on request; what matters is whether the work was done."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import pytest
import requests
import stripe
from sandbox_client import client_of, refusal, send, setting, words

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox import (
    StripeSandbox,
    broken_body,
    delay,
    drop_answer,
    drop_request,
    hang,
    rate_limited,
    refuse,
    server_error,
    server_error_after_accept,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
    return sandbox.create_customer(email="ann@example.com")


class TestAFaultThatDoesNotDoTheWork:
    def test_rate_limited_says_when_to_come_back_and_why(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(rate_limited(retry_after=2, reason="endpoint-rate"))
        error = refusal(send, client, ann)
        assert isinstance(error, stripe.RateLimitError)
        headers = error.headers or {}
        assert (headers["Retry-After"], headers["Stripe-Rate-Limited-Reason"]) == ("2", "endpoint-rate")
        assert sandbox.events == []

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, stripe.InvalidRequestError),
            (401, stripe.AuthenticationError),
            (403, stripe.PermissionError),
            (409, stripe.APIError),
            (429, stripe.RateLimitError),
            (503, stripe.APIError),
        ],
    )
    def test_refuse_answers_with_any_status(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str, status: int, kind: type[Exception]
    ) -> None:
        sandbox.fail(refuse(status, message="Not today.", code="odd"))
        error = refusal(send, client, ann)
        assert isinstance(error, kind)
        assert (error.http_status, words(error)) == (status, "Not today.")
        assert sandbox.events == []

    def test_refuse_stores_nothing_for_the_idempotency_key(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(refuse(503))
        refusal(send, client, ann, key="k")
        send(client, ann, key="k")
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_server_error_is_replayed_for_its_idempotency_key_for_24_hours(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(server_error())
        refusal(send, client, ann, key="k", identifier="run-1")
        error = refusal(send, client, ann, key="k", identifier="run-1")
        assert (error.http_status, (error.headers or {})["Idempotent-Replayed"]) == (500, "true")
        send(client, ann, key="another", identifier="run-1")
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_dropped_request_leaves_the_client_without_an_answer(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(drop_request())
        assert isinstance(refusal(send, client, ann, identifier="run-1"), stripe.APIConnectionError)
        assert sandbox.events == []
        assert sandbox.requests[0].status is None
        send(client, ann, identifier="run-1")

    def test_an_outage_refuses_everything_and_ends(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        with sandbox.outage():
            assert refusal(send, client, ann, key="k").http_status == 503
            assert refusal(client.v1.customers.list).http_status == 503
        send(client, ann, key="k")
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_stopped_sandbox_refuses_connections_and_keeps_its_state(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        send(client, ann)
        sandbox.stop()
        assert isinstance(refusal(send, client, ann), stripe.APIConnectionError)
        sandbox.start()
        send(client, ann)
        assert sandbox.billed("ai_tokens", ann) == 2


class TestAFaultThatDoesTheWork:
    def test_a_server_error_after_accept_has_billed(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(server_error_after_accept())
        assert refusal(send, client, ann, identifier="run-1").http_status == 500
        assert "already exists" in words(refusal(send, client, ann, identifier="run-1"))
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_dropped_answer_has_billed_and_is_stored_under_its_key(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(drop_answer())
        assert isinstance(refusal(send, client, ann, key="k", identifier="run-1"), stripe.APIConnectionError)
        assert sandbox.billed("ai_tokens", ann) == 1
        again = send(client, ann, key="k", identifier="run-1")
        assert again.last_response.headers["Idempotent-Replayed"] == "true"
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_broken_body_has_billed(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        sandbox.fail(broken_body())
        error = refusal(send, client, ann)
        assert (type(error), error.http_status) == (stripe.APIError, 200)
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_delay_only_takes_longer(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        sandbox.fail(delay(0.05))
        begun = time.monotonic()
        send(client, ann)
        assert time.monotonic() - begun >= 0.05
        assert sandbox.billed("ai_tokens", ann) == 1

    def test_a_hanging_request_is_done_once_the_event_is_set(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        go, arrived = threading.Event(), threading.Event()
        sandbox.fail(hang(go), where=setting(arrived))
        sender = threading.Thread(target=send, args=(client, ann))
        sender.start()
        assert arrived.wait(60)
        assert sandbox.events == []
        go.set()
        sender.join()
        assert sandbox.billed("ai_tokens", ann) == 1


class TestAnIdempotencyKey:
    def test_replays_the_stored_answer(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        first = send(client, ann, 5, key="k", identifier="run-1")
        again = send(client, ann, 5, key="k", identifier="run-1")
        assert first.to_dict() == again.to_dict()
        assert again.last_response.headers["Idempotent-Replayed"] == "true"
        assert "Idempotent-Replayed" not in first.last_response.headers
        assert sandbox.billed("ai_tokens", ann) == 5

    def test_refuses_other_parameters(self, client: stripe.StripeClient, ann: str) -> None:
        send(client, ann, 5, key="k")
        error = refusal(send, client, ann, 6, key="k")
        assert isinstance(error, stripe.IdempotencyError)
        assert error.http_status == 400

    def test_is_forgotten_after_24_hours(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        send(client, ann, 5, key="k")
        sandbox.advance(hours=24, seconds=1)
        send(client, ann, 6, key="k")
        assert sandbox.billed("ai_tokens", ann) == 11

    def test_replays_a_refusal_even_when_its_cause_is_gone(
        self, sandbox: StripeSandbox, client: stripe.StripeClient
    ) -> None:
        error = refusal(send, client, "cus_late", key="k")
        sandbox.create_customer(id="cus_late")
        assert words(refusal(send, client, "cus_late", key="k")) == words(error)
        send(client, "cus_late", key="another")

    def test_does_not_store_what_was_refused_for_its_parameters(self, client: stripe.StripeClient, ann: str) -> None:
        refusal(send, client, ann, key="k", mode="x")
        send(client, ann, key="k")


class TestAPlan:
    def test_is_met_one_fault_after_the_other(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(refuse(429), refuse(503), times=2)
        assert [refusal(send, client, ann).http_status for _ in range(4)] == [429, 429, 503, 503]
        send(client, ann)

    def test_lasts_until_it_is_cleared(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        sandbox.fail(refuse(503), times=None)
        for _ in range(3):
            refusal(send, client, ann)
        sandbox.clear_faults()
        send(client, ann)

    def test_concerns_one_path_a_pattern_or_all(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        sandbox.fail(refuse(503))
        client.v1.customers.list()
        refusal(send, client, ann)
        sandbox.fail(refuse(503), path="/v1/customers*", times=2)
        send(client, ann)
        refusal(client.v1.customers.list)
        refusal(client.v1.customers.search, {"query": 'name:"x"'})
        sandbox.fail(refuse(503), path=None)
        refusal(client.v1.billing.meters.list)

    def test_may_choose_its_requests(self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str) -> None:
        bob = sandbox.create_customer()
        sandbox.fail(refuse(503), where=lambda request: request.params["payload"]["stripe_customer_id"] == bob)
        send(client, ann)
        assert refusal(send, client, bob).http_status == 503

    def test_with_a_broken_condition_fails_loudly(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL, "langchain_stripe_meter")
        sandbox.fail(refuse(503), where=lambda request: request.params["nope"])
        assert "The sandbox itself failed: KeyError('nope')" in words(refusal(send, client, ann))

    def test_takes_only_faults_and_error_statuses(self, sandbox: StripeSandbox) -> None:
        with pytest.raises(ConfigurationError, match="is no fault"):
            sandbox.fail(429)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="from 400 to 599"):
            refuse(200)


class TestStopping:
    def test_leaves_no_threads_even_with_connections_kept_alive(self) -> None:
        before = set(threading.enumerate())
        with StripeSandbox() as sandbox, requests.Session() as session:
            assert session.get(sandbox.url).status_code == 401
            sandbox.stop()  # while the client holds on to its connection
            assert set(threading.enumerate()) <= before

    def test_drops_what_hangs_without_doing_it(
        self, sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
    ) -> None:
        arrived, errors = threading.Event(), []
        sandbox.fail(hang(threading.Event()), where=setting(arrived))
        sender = threading.Thread(target=lambda: errors.append(refusal(send, client, ann)))
        sender.start()
        assert arrived.wait(60)
        sandbox.stop()
        sender.join()
        assert isinstance(errors[0], stripe.APIConnectionError)
        assert sandbox.events == []


def test_many_clients_at_once_lose_and_double_nothing(sandbox: StripeSandbox) -> None:
    customers = [sandbox.create_customer() for _ in range(8)]

    def send_many(customer: str) -> None:
        client = client_of(sandbox)
        for number in range(25):
            send(client, customer, 2, identifier=f"{customer}-{number}")

    senders = [threading.Thread(target=send_many, args=(customer,)) for customer in customers]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sandbox.billed("ai_tokens") == dict.fromkeys(customers, 50)


def test_one_key_cannot_be_used_twice_at_the_same_time(
    sandbox: StripeSandbox, client: stripe.StripeClient, ann: str
) -> None:
    go, arrived = threading.Event(), threading.Event()
    sandbox.fail(hang(go), where=setting(arrived))
    sender = threading.Thread(target=send, args=(client, ann), kwargs={"key": "k"})
    sender.start()
    assert arrived.wait(60)
    error = refusal(send, client, ann, key="k")
    go.set()
    sender.join()
    assert error.http_status == 409
    assert sandbox.billed("ai_tokens", ann) == 1


def test_the_fixture_points_the_environment_at_a_running_sandbox(
    stripe_sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    assert os.environ["STRIPE_API_KEY"] == "sk_test_sandbox"
    assert os.environ["STRIPE_METER_API_BASE"] == stripe_sandbox.url
    client = client_of(stripe_sandbox, os.environ["STRIPE_API_KEY"])
    assert client.v1.accounts.retrieve_current().id == stripe_sandbox.account_id


def test_the_fixture_keeps_the_ledger_of_the_folder_out_of_the_test(
    stripe_sandbox: StripeSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    stripe_sandbox.create_meter("tokens")
    stripe_sandbox.create_customer(id="cus_1")
    with StripeMeterCallbackHandler(Tokens("tokens"), ledger="sqlite:///stripe_meter.db", deliver=False) as real:
        real.record_usage({"input_tokens": 5}, id="a real run", customer="cus_1")
    with StripeMeterCallbackHandler(Tokens("tokens")) as tested:
        tested.record_usage({"input_tokens": 2}, id="the test's", customer="cus_1")
    assert stripe_sandbox.billed("tokens", "cus_1") == 2
    assert real.status().pending == 1
    real.close()


def test_a_request_that_is_no_http_api_call_is_closed_or_refused(sandbox: StripeSandbox) -> None:
    headers = {"Authorization": f"Bearer {sandbox.api_key}"}
    assert requests.put(sandbox.url + "/v1/account", headers=headers, timeout=60).status_code == 404
    assert requests.get(sandbox.url + "/v1/account", auth=(sandbox.api_key, ""), timeout=60).status_code == 200
    wrong_kind = requests.post(sandbox.url + "/v1/billing/meters", json={"a": 1}, headers=headers, timeout=60)
    assert "content type" in wrong_kind.json()["error"]["message"]
    with pytest.raises(requests.ConnectionError):
        requests.post(sandbox.url + "/v1/account", data=iter([b"chunked"]), headers=headers, timeout=60)
