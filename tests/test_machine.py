"""Any order of events, chosen by Hypothesis: the invariant holds after every single one."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import assert_invariant
from faults import tally
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from simulation import EVENTS, HOUR, InProcess, Killed, Sandbox, SteadyCourier, as_process, empty_ledger, gateway_to

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_lead, from_metadata
from langchain_stripe_meter.audit.chores import Doubts
from langchain_stripe_meter.core.doubts import SUMS_LAG
from langchain_stripe_meter.sandbox import (
    Fault,
    broken_body,
    drop_answer,
    drop_request,
    rate_limited,
    refuse,
    server_error,
    server_error_after_accept,
)

EXAMPLES = 25
METERS = ("tokens_in", "tokens_out")
LEADS = ("ann@example.com", "bob@example.com")
KNOWN = ("cus_0", "cus_1")
FAULTS: dict[str, Fault] = {
    "lost answer": drop_answer(),
    "lost request": drop_request(),
    "broken answer": broken_body(),
    "500": server_error(),
    "500 after it was taken": server_error_after_accept(),
    "429": rate_limited(20),
    "503": refuse(503),
    "401": refuse(401),
}
customers = st.sampled_from(KNOWN)
amounts = st.integers(0, 3)


class Metering(RuleBasedStateMachine):
    """A handler that records, a courier that delivers, Stripe, and the time."""

    @initialize()
    def open(self) -> None:
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.db"
        shutil.copy(empty_ledger(), self.path)
        self.sandbox = Sandbox()
        for meter in METERS:
            self.sandbox.create_meter(meter)
        for customer in KNOWN:
            self.sandbox.create_customer(id=customer)
        self.skew = self.jobs = self.boots = 0
        self.start()

    def start(self) -> None:
        """A process of our own, with a handler and a courier."""
        self.boots += 1
        self.handler = StripeMeterCallbackHandler(
            Tokens("tokens_in", count="input"),
            Tokens("tokens_out", count="output"),
            customer=from_metadata("stripe_customer_id"),
            ledger=f"sqlite:///{self.path}",
            deliver=False,
            synchronous="NORMAL",
            clock=lambda: self.sandbox.time + self.skew,
        )
        self.ledger = self.handler._ledger
        self.http = InProcess(self.sandbox)
        gateway = gateway_to(self.http)
        self.courier = SteadyCourier(self.ledger, gateway, concurrency=4, chores=[Doubts(self.ledger, gateway)])

    # -- usage

    @rule(customer=customers, used=amounts)
    def run(self, customer: str, used: int) -> None:
        """A chat model answers a customer."""
        usage = {"input_tokens": used, "output_tokens": 1, "total_tokens": used + 1}
        model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=usage)]))
        model.invoke("Hi", {"callbacks": [self.handler], "metadata": {"stripe_customer_id": customer}})

    @rule()
    def run_for_nobody(self) -> None:
        model = GenericFakeChatModel(messages=iter([AIMessage("Hi")]))
        model.invoke("Hi", {"callbacks": [self.handler]})

    @rule(customer=customers, used=amounts, again=st.booleans())
    def record(self, customer: str, used: int, again: bool) -> None:
        """A job's usage, which may be recorded twice."""
        self.jobs += 1
        for _ in range(1 + again):
            self.handler.record_usage(
                {"input_tokens": used, "output_tokens": 2}, id=f"job-{self.jobs}", customer=customer
            )

    @rule(email=st.sampled_from(LEADS))
    def record_lead(self, email: str) -> None:
        """Usage of somebody whom Stripe may not know."""
        self.jobs += 1
        lead = {"lead": {"email": email}}
        self.handler.record_usage({"input_tokens": 1}, id=f"lead-{self.jobs}", customer=from_lead(), metadata=lead)

    # -- Stripe

    @rule(email=st.sampled_from(LEADS))
    def create_customer(self, email: str) -> None:
        self.sandbox.create_customer(email=email)

    @rule()
    def delete_customer(self) -> None:
        if self.sandbox._account.customers.exists(KNOWN[1]):
            self.sandbox.delete_customer(KNOWN[1])

    @rule()
    def switch_meter(self) -> None:
        meter = self.sandbox._account.meters.find(METERS[1])
        assert meter is not None
        (self.sandbox.deactivate_meter if meter.active else self.sandbox.reactivate_meter)(METERS[1])

    @rule(names=st.lists(st.sampled_from(sorted(FAULTS)), min_size=1, max_size=3), path=st.sampled_from([EVENTS, None]))
    def go_wrong(self, names: list[str], path: str | None) -> None:
        """The next requests meet these faults, each one."""
        self.sandbox.fail(*(FAULTS[name] for name in names), path=path)

    @rule(name=st.sampled_from(sorted(FAULTS)), path=st.sampled_from([EVENTS, None]))
    def begin_outage(self, name: str, path: str | None) -> None:
        self.sandbox.fail(FAULTS[name], path=path, times=None)

    @rule(down=st.booleans())
    def connect(self, down: bool) -> None:
        self.http.is_down = down

    @rule()
    def end_outage(self) -> None:
        self.sandbox.clear_faults()
        self.http.is_down = False

    @rule(lag=st.sampled_from([0, HOUR, SUMS_LAG - HOUR - 1]))
    def lag(self, lag: int) -> None:
        self.sandbox.summary_lag = lag

    # -- time and processes

    @rule(seconds=st.sampled_from([1, 61, 601, HOUR, SUMS_LAG, 12 * HOUR, 23 * HOUR, 30 * HOUR]))
    def advance(self, seconds: int) -> None:
        self.sandbox.time += seconds

    @rule(skew=st.integers(-1800, 1800))
    def set_clock(self, skew: int) -> None:
        self.skew = skew

    @rule(turns=st.integers(1, 6))
    def deliver(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    def turn(self) -> bool:
        with as_process("host", f"{self.boots:x}"):
            try:
                return bool(self.courier.turn()) or self.courier.in_flight > 0
            except Killed:
                self.restart()
                return True

    @rule(requests=st.integers(0, 2), after=st.booleans())
    def kill_soon(self, requests: int, after: bool) -> None:
        """The process dies before or after one of its next requests reached Stripe."""
        self.http.fuse = (requests, after)

    @rule(customer=customers, name=st.sampled_from(["lost answer", "500 after it was taken", "broken answer", "kill"]))
    def lose_an_answer(self, customer: str, name: str) -> None:
        """Stripe takes an event, and we do not hear of it."""
        self.record(customer, 1, again=False)
        if name == "kill":
            self.http.fuse = (self.boots % 4, True)
        else:
            self.sandbox.fail(FAULTS[name], path=EVENTS)
        self.deliver(2)

    @rule(hours=st.sampled_from([22, 23, 24, 30]))
    def sleep(self, hours: int) -> None:
        """Nobody delivers for about as long as Stripe remembers."""
        self.sandbox.clear_faults()
        self.sandbox.time += hours * HOUR
        self.deliver(4)

    @rule()
    def restart(self) -> None:
        self.handler.close()
        self.courier.gateway.close()
        self.start()

    # -- a person

    @rule()
    def retry(self) -> None:
        self.handler.retry()

    @precondition(lambda self: self.handler.held())
    @rule()
    def assign(self) -> None:
        self.handler.assign(self.handler.held()[0], KNOWN[0])

    @precondition(lambda self: self.handler.doubtful())
    @rule()
    def settle_doubt(self) -> None:
        """Somebody looks at Stripe for one doubtful event."""
        name = self.handler.doubtful()[0].identifier
        there = any(event.identifier == name and event.billed for event in self.sandbox.events)
        assert self.handler.settle_doubt([name], delivered=there) == 1

    # -- what must always be true

    @invariant()
    def nothing_is_lost_nor_billed_twice(self) -> None:
        assert_invariant(self.ledger, self.sandbox)

    def teardown(self) -> None:
        """Everything calms down, and everything that can be is delivered."""
        self.end_outage()
        self.http.fuse, self.skew = None, 0
        for _ in range(60):
            while self.turn():
                pass
            if not self.handler.status().pending:
                break
            self.sandbox.time += SUMS_LAG
        assert_invariant(self.ledger, self.sandbox, settled=True)
        self.handler.close()
        self.courier.gateway.close()
        self.folder.cleanup()


def test_whatever_happens_in_whatever_order_nothing_is_lost_or_billed_twice() -> None:
    usual = settings(max_examples=EXAMPLES, stateful_step_count=40, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Metering, settings=usual)
    tally("anything, in any order: 40 events of 22 kinds", tried=EXAMPLES)
