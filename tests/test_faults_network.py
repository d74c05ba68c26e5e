"""What networks do between us and Stripe: whatever is unknown is sent again under its identifier, and billed once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import stripe
import tcp_proxy
from faults import deliver, settled
from sqlalchemy import select
from tcp_proxy import FaultProxy, Misdeed

from langchain_stripe_meter.core.events import MeterEvent
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import Move, ReadingState
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.gateway import client
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger.schema import events
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

HARMLESS: dict[str, Misdeed] = {
    "an answer that is late": tcp_proxy.late,
    "an answer that comes byte by byte": tcp_proxy.dribbled,
    "a connection that is closed after its answer": tcp_proxy.reset_once_answered,
}
UNKNOWN: dict[str, Misdeed] = {
    "a reset before Stripe has the request": tcp_proxy.reset_before,
    "a reset after Stripe has the request": tcp_proxy.reset_after,
    "an answer cut in its head": tcp_proxy.cut_in_the_head,
    "an answer cut in its body": tcp_proxy.cut_in_the_body,
    "garbage for an answer": tcp_proxy.garbage,
    "a web page for an answer, after Stripe accepted": tcp_proxy.page_after,
    "a web page for an answer, and Stripe has nothing": tcp_proxy.page_instead,
    "502 from a box on the way, after Stripe accepted": tcp_proxy.bad_gateway_after,
    "400 from a box on the way, after Stripe accepted": tcp_proxy.bad_request_after,
    "a redirect from a box on the way, after Stripe accepted": tcp_proxy.redirect_after,
    "404 from a box on the way, and Stripe has nothing": tcp_proxy.not_found_instead,
    "the answer to somebody else's request": tcp_proxy.answer_of_another_event,
    "no answer until the time is up, after Stripe accepted": tcp_proxy.black_hole_after,
    "no answer until the time is up, and Stripe has nothing": tcp_proxy.black_hole_before,
}
ACCEPTED = {"reset_after", "cut_in_the_head", "cut_in_the_body", "garbage", "page_after", "bad_gateway_after",
            "bad_request_after", "redirect_after", "black_hole_after"}  # fmt: skip


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("ai_tokens")
        for number in range(4):
            sandbox.create_customer(id=f"cus_{number}", email=f"person{number}@example.com")
        yield sandbox


@pytest.fixture
def ledger(quick_folder: Path, sandbox: StripeSandbox) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{quick_folder}/ledger.db", clock=sandbox.now)
    yield ledger
    ledger.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits half a minute for a black hole here."""
    monkeypatch.setattr(client, "READ_SECONDS", 0.5)


def port_of(sandbox: StripeSandbox) -> int:
    return int(sandbox.url.rpartition(":")[2])


def record(ledger: Ledger, count: int, *, by_mail: bool = False) -> None:
    for number in range(count):
        who = number % 4
        mailed = by_mail and number % 3 == 0
        entry = Entry(
            f"run-{number}", "ai_tokens", Decimal(1), ledger.now(),
            ReadingState.RECORDED if mailed else ReadingState.RESOLVED,
            None if mailed else f"cus_{who}",
            Reference("email", f"person{who}@example.com") if mailed else None,
        )  # fmt: skip
        ledger.record([entry])


def doubted(ledger: Ledger) -> set[str]:
    """Identifiers of the events of which, for a while, nobody knew whether Stripe has them."""
    query = select(events.c.identifier).where(events.c.first_unknown_at.is_not(None))
    with ledger.read() as connection:
        return set(connection.execute(query).scalars())


def posts(sandbox: StripeSandbox) -> list[tuple[str, int]]:
    sent = [request for request in sandbox.requests if request.path == "/v1/billing/meter_events"]
    return [(request.params["identifier"], request.status) for request in sent]


@pytest.mark.parametrize("fault", UNKNOWN)
@pytest.mark.parametrize("times", [1, 3])
def test_an_outcome_that_the_network_hides_is_unknown_and_sent_again_under_its_identifier(
    ledger: Ledger, sandbox: StripeSandbox, fault: str, times: int
) -> None:
    misdeed = UNKNOWN[fault]
    record(ledger, 1)
    with FaultProxy(port_of(sandbox)) as proxy:
        proxy.plan = [misdeed] * times
        deliver(ledger, sandbox, url=proxy.url)
        assert proxy.met == times
    assert doubted(ledger) == {"run-0"}
    repeats = [("run-0", 400)] * times if misdeed.__name__ in ACCEPTED else []
    assert posts(sandbox) == [("run-0", 200), *repeats]
    settled(ledger, sandbox, fault=fault, tried=times)
    assert sandbox.billed("ai_tokens", "cus_0") == 1


@pytest.mark.parametrize("fault", HARMLESS)
def test_what_is_only_slow_or_only_ends_is_delivered_by_the_first_try(
    ledger: Ledger, sandbox: StripeSandbox, fault: str
) -> None:
    record(ledger, 3)
    with FaultProxy(port_of(sandbox)) as proxy:
        proxy.plan = [HARMLESS[fault]] * 3
        deliver(ledger, sandbox, url=proxy.url, concurrency=1)
        assert proxy.met == 3
    assert doubted(ledger) == set()
    assert posts(sandbox) == [(f"run-{number}", 200) for number in range(3)]
    settled(ledger, sandbox, fault=fault, tried=3)


@pytest.mark.parametrize("seed", range(5))
def test_a_storm_over_every_request_loses_nothing_and_bills_nothing_twice(
    ledger: Ledger, sandbox: StripeSandbox, seed: int
) -> None:
    """Lookups of customers and meters meet it too; what is unknown or unread is asked again."""
    chance = random.Random(seed)
    misdeeds = [*UNKNOWN.values(), *HARMLESS.values()]
    record(ledger, 24, by_mail=True)
    with FaultProxy(port_of(sandbox), hits=lambda _: chance.random() < 0.4) as proxy:
        proxy.plan = chance.choices(misdeeds, k=30)
        deliver(ledger, sandbox, url=proxy.url)
        assert proxy.met > 5
    settled(ledger, sandbox, fault="a storm of all these over every request")
    assert sum(sandbox.billed("ai_tokens").values()) == 24


def test_a_page_of_a_box_on_the_way_does_not_mean_that_stripe_knows_no_such_customer(sandbox: StripeSandbox) -> None:
    with FaultProxy(port_of(sandbox), hits=lambda request: b"event_summaries" in request) as proxy:
        gateway = Gateway(sandbox.api_key, api_base=proxy.url)
        meter = gateway.meter("ai_tokens")
        assert meter is not None
        proxy.plan = [tcp_proxy.not_found_instead]
        with pytest.raises(StripeError, match="404"):
            gateway.billed(meter.id, "cus_0", 0, 60)
        assert gateway.billed(meter.id, "cus_nobody", 0, 60) is None
        gateway.close()


@pytest.mark.parametrize("given", ["key", "client"])
def test_what_stripe_says_to_a_redirect_is_no_answer_about_the_event(sandbox: StripeSandbox, given: str) -> None:
    """A client that is given follows it, with a GET for an address that Stripe does not have."""
    usage = MeterEvent("ai_tokens", "cus_0", Decimal(1), "run-0", sandbox.now())
    with FaultProxy(port_of(sandbox)) as proxy:
        client = stripe.StripeClient(sandbox.api_key, base_addresses={"api": proxy.url})
        gateway = Gateway(sandbox.api_key if given == "key" else client, api_base=proxy.url)
        proxy.plan = [tcp_proxy.redirect_after]
        assert gateway.send(usage, "0").move is Move.UNKNOWN
        assert gateway.send(usage, "1").move is Move.DUPLICATE
        gateway.close()
    assert [request.method for request in sandbox.requests if request.path == "/v1/billing/meter_events"] == (
        ["POST", "POST"] if given == "key" else ["POST", "GET", "POST"]
    )
