"""Customers that Stripe does not have: held, or made once; and customers and meters that go away later."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_invariant, is_pending

from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.delivery.lookups import Lookups
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import acts, sealing, views
from langchain_stripe_meter.ledger.resolving import Unknown, digest, secret_of
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, drop_answer, drop_request, refuse, server_error
from langchain_stripe_meter.sandbox.wire import RecordedRequest

CUSTOMERS = "/v1/customers"
PEOPLE = [("email", "ann@example.com"), ("name", "Ann Smith"), ("phone", "+4930901820")]
COMMAND = str(Path(sys.executable).with_name("stripe-meter"))


def creates(request: RecordedRequest) -> bool:
    return request.method == "POST" and request.path == CUSTOMERS


class Desk:
    """A sandbox whose search lags by a minute, a ledger that goes by its clock, and couriers that make customers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sandbox = StripeSandbox(search_lag=60).start()
        self.sandbox.create_meter("tokens")
        self.sandbox.advance(days=1)
        self.ledger = Ledger(url, clock=self.sandbox.now)
        self.errors: list[MeteringError] = []
        self._couriers: list[Courier] = []

    def courier(self, *, create_missing: bool = True, ledger: Ledger | None = None) -> Courier:
        gateway = Gateway(self.sandbox.api_key, api_base=self.sandbox.url)
        made = Courier(
            ledger or self.ledger, gateway, on_error=self.errors.append, create_missing=create_missing, concurrency=4
        )
        self._couriers.append(made)
        return made

    def record(self, by: Any, value: str, key: str = "run") -> None:
        who = Reference(by, value)
        facts: dict[str, Any] = {"at": self.ledger.now(), "state": ReadingState.RECORDED, "reference": who}
        self.ledger.record([Entry(key, "tokens", Decimal(1), **facts)])

    def drive(self, courier: Courier, seconds: int = 7200) -> None:
        """Let it work, moving the clock on while it waits, until nothing is pending."""
        until = self.sandbox.now() + seconds
        while is_pending(self.ledger) and self.sandbox.now() < until:
            if not courier.turn() and not courier.in_flight:
                self.sandbox.advance(seconds=12)

    def customers(self) -> list[Any]:
        return list(self.sandbox._account.customers.all())

    def created(self) -> list[RecordedRequest]:
        return [request for request in self.sandbox.requests if creates(request)]

    @property
    def status(self) -> views.Status:
        return views.status(self.ledger)

    def close(self) -> None:
        for courier in self._couriers:
            courier.close(5)
            courier.gateway.close()
        assert_invariant(self.ledger, self.sandbox)
        self.ledger.close()
        self.sandbox.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def desk(url: str) -> Iterator[Desk]:
    desk = Desk(url)
    yield desk
    desk.close()


@pytest.mark.parametrize(("by", "value"), PEOPLE)
def test_somebody_whom_stripe_does_not_know_becomes_a_marked_customer_and_pays(desk: Desk, by: str, value: str) -> None:
    desk.record(by, value)
    desk.drive(desk.courier())
    (made,) = desk.customers()
    assert getattr(made, by) == value
    assert made.metadata == {"created_by": "langchain_stripe_meter"}
    assert desk.sandbox.billed("tokens") == {made.id: 1}
    (request,) = desk.created()
    assert value not in request.idempotency_key
    assert request.idempotency_key == digest(secret_of(desk.ledger), "", f"{by}:{value}")


def test_nobody_is_made_unless_it_was_asked_for(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ann", "bob"):
        desk.record("email", f"{name}@example.com", name)
    desk.drive(desk.courier(create_missing=False))
    assert (desk.status.held, desk.created()) == (2, [])
    said = [record.getMessage() for record in caplog.records if "held" in record.getMessage()]
    why = "Stripe has no customer with this email. The like is not logged again. See: stripe-meter held"
    assert said == [f"stripe-meter: usage is held: {why}"]


@pytest.mark.parametrize(("by", "value"), PEOPLE)
def test_where_there_are_two_a_third_is_never_made(desk: Desk, by: Any, value: str) -> None:
    pair = [desk.sandbox.create_customer(**{by: value}) for _ in range(2)]
    desk.record(by, value)
    desk.drive(desk.courier())
    (held,) = views.held(desk.ledger)
    assert all(one in held.reason for one in pair)
    assert desk.created() == []


@pytest.mark.parametrize("create_missing", [True, False])
def test_an_address_that_stripe_has_in_lower_case_is_held_for_a_person_and_nobody_is_made(
    desk: Desk, create_missing: bool
) -> None:
    eve = desk.sandbox.create_customer(email="eve@example.com")
    desk.record("email", "Eve@example.com")
    courier = desk.courier(create_missing=create_missing)
    desk.drive(courier)
    (held,) = views.held(desk.ledger)
    assert f"customer {eve} differ in upper and lower case only" in held.reason
    assert sealing.retry(desk.ledger) == 1
    desk.drive(courier)
    assert (views.held(desk.ledger), desk.created()) == ([held], [])
    assert acts.assign(desk.ledger, held, eve) == 1
    desk.drive(courier)
    assert desk.sandbox.billed("tokens") == {eve: 1}


def test_a_customer_whose_address_has_the_same_capitals_pays_whoever_has_it_in_lower_case(desk: Desk) -> None:
    desk.sandbox.create_customer(email="eve@example.com")
    eve = desk.sandbox.create_customer(email="Eve@example.com")
    desk.record("email", "Eve@example.com", "found")
    desk.record("email", "Ann@example.com", "made")
    desk.drive(desk.courier())
    (request,) = desk.created()
    assert request.params["email"] == "Ann@example.com"
    assert desk.sandbox.billed("tokens")[eve] == 1
    assert desk.status.delivered == 2


def test_an_address_in_lower_case_is_looked_for_on_the_account_whose_usage_it_is(desk: Desk) -> None:
    theirs = desk.sandbox.connect("acct_1Other").create_customer(email="eve@example.com")
    lookups, gateway = Lookups(desk.ledger, create_missing=False), desk.courier().gateway
    eve = Reference("email", "Eve@example.com")
    assert lookups.ask(gateway, Unknown("", eve)) == ([], None)
    assert theirs in str(lookups.ask(gateway, Unknown("acct_1Other", eve)).why)


def test_what_stripe_says_of_the_address_in_lower_case_names_nobody(desk: Desk) -> None:
    desk.sandbox.fail(
        refuse(400, message="Invalid email address: eve@example.com"), path=CUSTOMERS,
        where=lambda request: request.params.get("email") == "eve@example.com",
    )  # fmt: skip
    desk.record("email", "Eve@example.com")
    desk.drive(desk.courier())
    (held,) = views.held(desk.ledger)
    assert "400" in held.reason
    assert "eve@" not in held.reason.lower()


@pytest.mark.parametrize(("by", "value"), PEOPLE)
def test_a_customer_whom_the_search_cannot_see_yet_is_found_and_not_made_twice(desk: Desk, by: Any, value: str) -> None:
    made_by_a_person = desk.sandbox.create_customer(**{by: value})
    desk.record(by, value)
    desk.drive(desk.courier())
    assert desk.sandbox.billed("tokens") == {made_by_a_person: 1}
    assert (desk.created(), desk.errors) == ([], [])


def test_a_customer_whom_the_search_cannot_see_yet_is_found_on_the_account_whose_usage_it_is(desk: Desk) -> None:
    connected = desk.sandbox.connect("acct_1Other")
    names = Reference("name", "Ann Smith")
    ours, theirs = desk.sandbox.create_customer(name=names.value), connected.create_customer(name=names.value)
    lookups, gateway = Lookups(desk.ledger, create_missing=True), desk.courier().gateway
    assert lookups.ask(gateway, Unknown("", names)) == ([ours], None)
    assert lookups.ask(gateway, Unknown("acct_1Other", names)) == ([theirs], None)
    assert desk.created() == []


@pytest.mark.parametrize("fault", [drop_answer(), drop_request(), refuse(429), refuse(503)])
@pytest.mark.parametrize(("by", "value"), PEOPLE)
def test_an_answer_that_is_lost_makes_nobody_twice(desk: Desk, by: str, value: str, fault: Any) -> None:
    desk.sandbox.fail(fault, path=CUSTOMERS, where=creates)
    desk.record(by, value)
    courier = desk.courier()
    desk.drive(courier)
    (held,) = views.held(desk.ledger)
    assert "create a customer" in held.reason
    assert value not in held.reason
    desk.sandbox.advance(seconds=60)
    while not desk.status.delivered:
        courier.turn()
    assert len(desk.customers()) == 1


def test_a_stored_failure_holds_one_person_and_nobody_else_and_ends_within_a_day(desk: Desk) -> None:
    desk.sandbox.fail(server_error(), path=CUSTOMERS, where=lambda asked: creates(asked) and "email" in asked.params)
    desk.record("email", "ann@example.com", "ann")
    desk.record("name", "Bob", "bob")
    courier = desk.courier()
    desk.drive(courier)
    assert (desk.status.held, desk.status.delivered) == (1, 1)
    for _ in range(30):  # Stripe keeps answering 500 under this key for a day
        desk.sandbox.advance(hours=1)
        while courier.turn() or courier.in_flight:
            pass
    assert desk.status.delivered == 2
    assert len(desk.customers()) == 2


def test_a_customer_whom_a_person_deleted_is_not_brought_back(desk: Desk) -> None:
    desk.record("name", "Ann Smith", "one")
    courier = desk.courier()
    desk.drive(courier)
    (made,) = desk.customers()
    desk.sandbox.delete_customer(made.id)
    desk.sandbox.advance(hours=2)
    desk.record("name", "Ann Smith", "two")
    desk.drive(desk.courier())
    (held,) = views.held(desk.ledger)
    assert "deleted" in held.reason
    assert desk.sandbox.billed("tokens", made.id) == 1


def test_what_stripe_refuses_is_held_without_naming_the_person(desk: Desk) -> None:
    name = "N" * 300
    desk.record("name", name)
    desk.drive(desk.courier())
    (held,) = views.held(desk.ledger)
    assert "400" in held.reason
    assert name not in held.reason
    assert all(name not in str(error) for error in desk.errors)


def test_a_customer_is_made_on_the_account_whose_usage_it_is(desk: Desk) -> None:
    connected = desk.sandbox.connect("acct_1Other")
    connected.create_meter("tokens")
    gateway = desk.courier().gateway
    lookups = Lookups(desk.ledger, create_missing=True)
    made = lookups.ask(gateway, Unknown("acct_1Other", Reference("email", "ann@example.com")))
    assert desk.customers() == []
    (theirs,) = connected._account.customers.all()
    assert ([theirs.id], theirs.email) == (made.customers, "ann@example.com")
    secret, ann = secret_of(desk.ledger), Reference("email", "ann@example.com")
    (created,) = desk.created()
    assert created.idempotency_key == digest(secret, "acct_1Other", ann.text) != digest(secret, "", ann.text)


def test_eight_couriers_make_each_customer_once_though_answers_are_lost(desk: Desk) -> None:
    for by, value in PEOPLE:
        for number in range(4):
            desk.record(by, value, f"{by}-{number}")
    desk.sandbox.fail(drop_answer(), path=CUSTOMERS, where=creates, times=3)
    couriers = [desk.courier(ledger=Ledger(desk.url, clock=desk.sandbox.now)) for _ in range(8)]
    together = threading.Barrier(8)

    def work(courier: Courier) -> None:
        together.wait()
        while courier.turn() or courier.in_flight:
            pass

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, couriers))
        desk.sandbox.advance(seconds=400)
    assert sorted(desk.sandbox.billed("tokens").values()) == [4, 4, 4]
    assert len(desk.customers()) == 3
    assert len({request.idempotency_key for request in desk.created()}) == 3
    for courier in couriers:
        courier.close(5)
        courier.ledger.close()


def test_eight_processes_make_a_customer_once(tmp_path: Path) -> None:
    desk = Desk(f"sqlite:///{tmp_path}/ledger.db")
    desk.sandbox.set_time(int(time.time()))  # the processes go by the real clock
    desk.record("name", "Ann Smith")
    arguments = [COMMAND, "deliver", "--once", "--create-missing", "--ledger", desk.url]
    environment = {**os.environ, **desk.sandbox.environment()}
    workers = [subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE) for _ in range(8)]
    for worker in workers:
        worker.communicate(timeout=90)
        assert worker.returncode == 0
    (made,) = desk.customers()
    assert desk.sandbox.billed("tokens") == {made.id: 1}
    desk.close()


# -- what goes away after it was sealed


def seal(desk: Desk) -> None:
    with desk.ledger.deliver_lane().transaction() as connection:
        assert sealing.seal(connection, desk.ledger.now()) == 1


def test_a_customer_who_is_deleted_after_sealing_is_held_and_another_may_pay(desk: Desk) -> None:
    gone, other = (desk.sandbox.create_customer() for _ in range(2))
    desk.ledger.record([Entry("run", "tokens", Decimal(5), desk.ledger.now(), ReadingState.RESOLVED, gone)])
    seal(desk)
    desk.sandbox.delete_customer(gone)
    courier = desk.courier()
    desk.drive(courier)
    (held,) = views.held(desk.ledger)
    assert (held.customer, held.value) == (gone, 5)
    assert "No such customer" in held.reason
    assert_invariant(desk.ledger, desk.sandbox)
    acts.assign(desk.ledger, held.ids, other)
    desk.drive(courier)
    assert desk.sandbox.billed("tokens") == {other: 5}
    assert [event.identifier for event in desk.sandbox.events] == ["run"]


def test_a_meter_that_comes_back_after_sealing_gets_the_same_event_once(desk: Desk) -> None:
    ann = desk.sandbox.create_customer()
    desk.ledger.record([Entry("run", "tokens", Decimal(5), desk.ledger.now(), ReadingState.RESOLVED, ann)])
    seal(desk)
    courier = desk.courier()
    desk.sandbox.deactivate_meter("tokens")
    desk.drive(courier)
    assert (desk.status.held, desk.status.rejected, desk.sandbox.events) == (1, 0, [])
    assert_invariant(desk.ledger, desk.sandbox)
    desk.sandbox.reactivate_meter("tokens")
    desk.sandbox.advance(seconds=400)
    courier.gateway.forget_meters()
    while not desk.status.delivered:
        if not courier.turn() and not courier.in_flight:
            desk.sandbox.advance(seconds=60)
    assert [(event.identifier, event.value) for event in desk.sandbox.events] == [("run", 5)]
    courier.turn()
    assert desk.sandbox.billed("tokens") == {ann: 5}


def test_what_stripe_says_of_an_account_that_it_closed_names_nobody(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """Its words may quote what was asked for."""
    desk.sandbox.connect("acct_1x").create_meter("tokens")
    quoting = refuse(403, message='This key may not run the search name:"Ann Canary" on acct_1x.')
    desk.sandbox.fail(quoting, path="/v1/customers/search", times=None)
    facts: dict[str, Any] = {"at": desk.ledger.now(), "state": ReadingState.RECORDED, "account": "acct_1x"}
    desk.ledger.record([Entry("run", "tokens", Decimal(1), reference=Reference("name", "Ann Canary"), **facts)])
    desk.drive(desk.courier())
    (held,) = views.held(desk.ledger)
    assert '<name>" on acct_1x' in held.reason
    assert not [said for said in (held.reason, caplog.text, *map(str, desk.errors)) if "Canary" in said]


def test_what_is_told_of_a_failed_lookup_names_nobody_behind_it_either(desk: Desk) -> None:
    quoting = refuse(500, message='Something went wrong with name:"Ann Canary".')
    desk.sandbox.fail(quoting, path="/v1/customers/search", times=None)
    desk.record("name", "Ann Canary")
    desk.drive(desk.courier(), seconds=5)
    (told,) = desk.errors
    assert "<name>" in str(told)
    assert "Canary" not in "".join(traceback.format_exception(told))
