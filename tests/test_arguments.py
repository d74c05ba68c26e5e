"""Arguments that cannot be used are refused at the door, by name, and never taken without a word."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from metering import Shop
from sqlalchemy import update

from langchain_stripe_meter import Credits, Messages, StripeMeterCallbackHandler, Tokens, stripe_meter
from langchain_stripe_meter.agents import sign_customer
from langchain_stripe_meter.agents.limits import (
    Budget,
    SpendLimit,
    SpendLimitCallback,
    SpendLimitMiddleware,
    StripeCredit,
)
from langchain_stripe_meter.core.customers import from_metadata, static
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.tenants import Tenant
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError
from langchain_stripe_meter.ledger import resolving
from langchain_stripe_meter.ledger.resolving import Unknown
from langchain_stripe_meter.ledger.schema import readings
from langchain_stripe_meter.ledger.store import ASSIGNED, write_act
from langchain_stripe_meter.ledger.views import tail

USAGE = {"input_tokens": 5}
Recording = Callable[..., StripeMeterCallbackHandler]


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """Makes handlers that only record."""
    made: list[StripeMeterCallbackHandler] = []

    def make(*meters: Any, **options: Any) -> StripeMeterCallbackHandler:
        usual = {"customer": "cus_1", "ledger": f"sqlite:///{tmp_path}/ledger.db", "deliver": False}
        made.append(StripeMeterCallbackHandler(*(meters or (Tokens("tokens"),)), **{**usual, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


# -- how long somebody waits, and what is recorded again


@pytest.mark.parametrize("timeout", [None, "10", True, float("nan")])
def test_a_timeout_that_is_none_is_refused(recording: Recording, timeout: Any) -> None:
    meter = recording()
    for wait in (meter.flush, meter.close):
        with pytest.raises(ConfigurationError, match=f"timeout={timeout!r}"):
            wait(timeout)


def test_whoever_is_ready_to_wait_for_ever_waits_until_all_is_delivered(tmp_path: Path) -> None:
    with Shop(tmp_path) as shop:
        shop.handler.record_usage({"input_tokens": 5}, id="job", customer="cus_1")
        assert shop.handler.flush(float("inf")).delivered == 1


def test_only_what_was_told_as_unrecorded_is_recorded_again(recording: Recording) -> None:
    with pytest.raises(ConfigurationError, match=r"record_again\(\) takes the UnrecordedError .* not ValueError"):
        recording().record_again(cast("Any", ValueError()))


def test_a_block_is_for_a_handler() -> None:
    with pytest.raises(ConfigurationError, match=r"stripe_meter\(\) takes a StripeMeterCallbackHandler, not int"):
        stripe_meter(cast("Any", 5)).__enter__()


# -- usage without a run


def test_usage_that_no_meter_counts_is_refused_and_not_lost_in_silence(recording: Recording) -> None:
    meter = recording(Messages("messages"), Credits("credits", {"gpt-4o": 10}))
    with pytest.raises(ConfigurationError, match=r"messages, credits.*answered messages.*per='call'"):
        meter.record_usage(USAGE, id="job")
    with pytest.raises(ConfigurationError, match="answered messages"):
        asyncio.run(meter.arecord_usage(USAGE, id="job"))
    assert tail(meter._ledger, 10) == []


def test_of_both_kinds_of_meters_those_that_count_calls_apply(recording: Recording) -> None:
    meter = recording(Messages("messages"), Tokens("tokens"), Credits("credits", {}, default=2, per="call"))
    meter.record_usage(USAGE, id="job")
    assert {row.event_name: row.value for row in tail(meter._ledger, 10)} == {"tokens": 5, "credits": 2}


def test_the_meters_of_the_tenant_are_the_ones_that_must_count_it(recording: Recording) -> None:
    tenants = {"calls": Tenant("acct_1", (Tokens("tokens"),)), "messages": Tenant("acct_1", (Messages("messages"),))}
    meter = recording(Tokens("tokens"), tenant=lambda facts: tenants.get(facts.metadata["of"]))
    meter.record_usage(USAGE, id="job", metadata={"of": "calls"})
    with pytest.raises(ConfigurationError, match="messages count"):
        meter.record_usage(USAGE, id="job", metadata={"of": "messages"})
    meter.record_usage(USAGE, id="other", metadata={"of": "nobody"})
    assert sorted(row.state for row in tail(meter._ledger, 10)) == ["resolved", "skipped"]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"customer": "cus_2"}, "'job' stands for 5 of cus_1 on tokens"),
        ({}, {"usage": {"input_tokens": 6}}, "'job' stands for 5 of cus_1 on tokens"),
        ({"customer": static(email="a@x.io")}, {"customer": static(email="b@x.io")}, "'job' stands for 5 of somebody"),
        ({}, {}, None),
        ({"customer": static(email="a@x.io")}, {"customer": static(email="a@x.io")}, None),
        ({"customer": static(email="a@x.io")}, {}, None),  # perhaps the same, by another name
    ],
)
@pytest.mark.parametrize("asynchronously", [False, True])
def test_an_id_that_stands_for_something_else_is_refused(
    recording: Recording, first: dict[str, Any], second: dict[str, Any], said: str | None, asynchronously: bool
) -> None:
    meter = recording(Tokens("tokens"), Credits("credits", {}, default=2, per="call"))

    def record(**options: Any) -> None:
        usage = options.pop("usage", USAGE)
        if asynchronously:
            asyncio.run(meter.arecord_usage(usage, id="job", **options))
        else:
            meter.record_usage(usage, id="job", **options)

    record(**first)
    if said is None:
        record(**second)
    else:
        with pytest.raises(ConfigurationError, match=f"{said}.*another id"):
            record(**second)
    assert {row.event_name: row.value for row in tail(meter._ledger, 10)} == {"tokens": 5, "credits": 2}


def test_a_job_that_was_skipped_is_not_taken_for_billed_once_its_customer_is_said(recording: Recording) -> None:
    meter = recording(customer=from_metadata("stripe_customer_id"))
    meter.record_usage(USAGE, id="job")
    meter.record_usage(USAGE, id="job")
    with pytest.raises(ConfigurationError, match=r"'job' stands for 5 of nobody on tokens.*skipped.*another id"):
        meter.record_usage(USAGE, id="job", customer="cus_1")
    meter.record_usage(USAGE, id="job-again", customer="cus_1")
    meter.record_usage(USAGE, id="of nobody", customer=from_metadata("payer"))
    assert sorted(row.state for row in tail(meter._ledger, 10)) == ["resolved", "skipped", "skipped"]


def test_a_job_whose_amount_was_unknown_is_not_taken_for_billed_once_it_is_told(recording: Recording) -> None:
    meter = recording()
    meter.record_usage({"input_tokens": None}, id="job")
    meter.record_usage({"input_tokens": None}, id="job")
    with pytest.raises(ConfigurationError, match=r"'job' stands for an unknown amount on tokens.*assign\(held, value="):
        meter.record_usage(USAGE, id="job")
    assert [row.state for row in tail(meter._ledger, 10)] == ["held"]


KINDS = Tokens("tokens", split=True)


@pytest.mark.parametrize(
    ("usage", "options", "said"),
    [
        ({"input_tokens": 5}, {}, "'job' stands for 2 of cus_1 on tokens"),
        ({"input_tokens": 5, "output_tokens": 2}, {"model": "b"}, "'job' stands for [25] of cus_1 on tokens"),
        ({"input_tokens": 0, "output_tokens": 2}, {}, "'job' stands for 5 of cus_1 on tokens"),
        ({"input_tokens": 0, "output_tokens": 0}, {}, "'job' stands for [25] of cus_1 on tokens"),
        ({"input_tokens": 5, "output_tokens": 2}, {}, None),
    ],
)
def test_an_id_that_stands_for_other_kinds_of_tokens_is_refused(
    recording: Recording, usage: dict[str, int], options: dict[str, Any], said: str | None
) -> None:
    meter = recording(KINDS)
    meter.record_usage({"input_tokens": 5, "output_tokens": 2}, id="job", model="a", provider="openai")
    again: Any = {"id": "job", "model": "a", "provider": "openai", **options}
    if said is None:
        meter.record_usage(usage, **again)
    else:
        with pytest.raises(ConfigurationError, match=f"{said}.*another id"):
            meter.record_usage(usage, **again)
    assert sorted(row.value or 0 for row in tail(meter._ledger, 10)) == [2, 5]


def test_what_other_meters_count_of_a_job_is_of_the_same_customer(recording: Recording) -> None:
    tokens, credit = recording(), recording(Credits("credits", {}, default=2, per="call"))
    tokens.record_usage(USAGE, id="job")
    with pytest.raises(ConfigurationError, match=r"'job' stands for 5 of cus_1 on tokens.*another id"):
        credit.record_usage(USAGE, id="job", customer="cus_2")
    credit.record_usage(USAGE, id="job")
    credit.record_usage(USAGE, id="job 2", customer="cus_2")
    assert sorted(row.value or 0 for row in tail(tokens._ledger, 10)) == [2, 2, 5]


def test_of_two_who_record_different_usage_under_one_id_at_once_one_is_refused(recording: Recording) -> None:
    meter = recording()
    refused: list[str] = []

    def record(customer: str) -> None:
        start.wait()
        try:
            meter.record_usage(USAGE, id="job", customer=customer)
        except ConfigurationError:
            refused.append(customer)

    start = threading.Barrier(8)
    threads = [threading.Thread(target=record, args=(f"cus_{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = tail(meter._ledger, 10)
    assert sorted([*refused, str(row.customer)]) == [f"cus_{number}" for number in range(8)]


def test_who_says_at_the_same_moment_as_others_who_pays_for_a_job_is_billed_or_refused(recording: Recording) -> None:
    meter = recording(customer=from_metadata("stripe_customer_id"))
    refused: list[str] = []

    def record(job: str, customer: str | None) -> None:
        start.wait()
        try:
            meter.record_usage(USAGE, id=job, customer=customer)
        except ConfigurationError:
            refused.append(job)

    for number in range(40):
        job, start = f"job {number}", threading.Barrier(8)
        who = 4 * ("cus_1", None)  # whoever comes last to a barrier goes first
        threads = [threading.Thread(target=record, args=(job, customer)) for customer in who]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (state,) = {row.state for row in tail(meter._ledger, 1)}
        assert refused.count(job) == (4 if state == "skipped" else 0)


def test_an_id_whose_usage_a_person_gave_to_somebody_else_may_be_repeated(recording: Recording) -> None:
    meter = recording(customer=static(email="a@x.io"))
    meter.record_usage(USAGE, id="job")
    with meter._ledger.deliver_lane().transaction() as connection:
        resolving.hold(connection, Unknown("", Reference("email", "a@x.io")), "nobody", meter._ledger.now())
    meter.assign(meter.held()[0], "cus_2")
    meter.record_usage(USAGE, id="job")
    meter.record_usage(USAGE, id="job", customer="cus_1")
    (row,) = tail(meter._ledger, 10)
    assert (row.customer, row.value) == ("cus_2", 5)


def test_an_id_whose_usage_was_held_and_given_to_nobody_still_stands_for_it(recording: Recording) -> None:
    meter = recording()
    meter.record_usage(USAGE, id="job", customer="cus_1")
    with meter._ledger.deliver_lane().transaction() as connection:
        connection.execute(update(readings).values(tries=1, state="held"))
        write_act(connection, ASSIGNED, "1 held readings", "cus_12, 5", meter._ledger.now())  # somebody else's
    with pytest.raises(ConfigurationError, match="another id"):
        meter.record_usage(USAGE, id="job", customer="cus_2")


def test_no_part_of_what_is_refused_for_its_id_is_recorded(recording: Recording) -> None:
    recording(Tokens("tokens")).record_usage(USAGE, id="job")
    meter = recording(Tokens("tokens"), Credits("credits", {}, default=2, per="call"))
    with pytest.raises(ConfigurationError, match="another id"):
        meter.record_usage(USAGE, id="job", customer="cus_2")
    assert [row.event_name for row in tail(meter._ledger, 10)] == ["tokens"]


# -- the handler


async def asynchronous(error: object) -> None:
    """It would never be awaited."""


class Asynchronous:
    async def __call__(self, error: object) -> None:
        """Nor would this."""


@pytest.mark.parametrize("on_error", ["log", 5, asynchronous, functools.partial(asynchronous), Asynchronous()])
def test_an_on_error_that_cannot_be_called_is_refused(recording: Recording, on_error: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"on_error= .*(str|int|async)"):
        recording(on_error=on_error)


@pytest.mark.parametrize("secret", ["abc", "sk_test_canary", 5, b"whsec_canary", "whsec_", " whsec_ \n", " "])
def test_a_webhook_secret_that_is_none_is_refused_and_not_repeated(recording: Recording, secret: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"webhook_secret= .*whsec_") as caught:
        recording(webhook_secret=secret)
    assert "canary" not in str(caught.value)
    recording(webhook_secret="whsec_1", on_error=print)


@pytest.mark.parametrize("since", ["yesterday", 1.5, True, None, 1_790_000_000_000, datetime(2026, 1, 1)])  # noqa: DTZ001
def test_a_time_that_is_none_is_refused(tmp_path: Path, since: Any) -> None:
    with Shop(tmp_path, Tokens("tokens")) as shop:
        for ask in (shop.handler.skips, shop.handler.verify):
            with pytest.raises(ConfigurationError, match="since="):
                ask(since)
            ask(datetime(2026, 1, 1, tzinfo=UTC))
            ask(int(time.time()))
        with pytest.raises(ConfigurationError, match="until="):
            shop.handler.verify(0, since)
        shop.handler.verify(0, datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("expires_at", [5, 0, datetime(2020, 1, 1, tzinfo=UTC)])
def test_a_token_that_has_expired_is_not_made(expires_at: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"expires_at=.* in the past"):
        sign_customer("cus_1", "a-secret-of-more-than-32-bytes-indeed", expires_at=expires_at)


# -- limits


def test_a_budget_takes_a_handler_and_limits(recording: Recording) -> None:
    meter, limit, make = recording(), SpendLimit("tokens", 5), cast("Any", Budget)
    for arguments, said in [
        ((limit, meter), "Budget.*StripeMeterCallbackHandler first.*not SpendLimit"),
        ((meter, limit, 5), "SpendLimit.*not int"),
        ((meter, [limit]), "SpendLimit.*not list"),
    ]:
        with pytest.raises(ConfigurationError, match=said):
            make(*arguments)


@pytest.mark.parametrize("guard", [SpendLimitCallback, SpendLimitMiddleware])
def test_what_guards_takes_a_budget(guard: Any, recording: Recording) -> None:
    for wrong, said in ((SpendLimit("tokens", 5), "SpendLimit"), (recording(), "StripeMeterCallbackHandler")):
        with pytest.raises(ConfigurationError, match=f"Budget, not {said}"):
            guard(wrong)


@pytest.mark.parametrize("customer", [5, ["cus_1"], {"id": "cus_1"}])
def test_a_budget_is_asked_for_a_customer(recording: Recording, customer: Any) -> None:
    budget = Budget(recording(), SpendLimit("tokens", 5))
    for ask in (budget.check, budget.remaining, budget.allowances):
        with pytest.raises(ConfigurationError, match=f"customer.* not {type(customer).__name__}"):
            ask(customer)


def test_an_amount_that_must_be_awaited_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'tokens'.*async"):
        SpendLimit("tokens", asynchronous)  # type: ignore[arg-type]


@pytest.mark.parametrize("price", [0.002, "cheap", "0", "NaN", True, None])
def test_a_price_is_exact(tmp_path: Path, price: Any) -> None:
    with Shop(tmp_path, Tokens("tokens")) as shop:
        with pytest.raises(ConfigurationError, match="unit_price="):
            StripeCredit(shop.handler, unit_price=price)
        StripeCredit(shop.handler, unit_price="0.002")


def test_credit_is_asked_with_a_handler() -> None:
    wrong: Any = SpendLimit("tokens", 5)
    with pytest.raises(ConfigurationError, match="StripeMeterCallbackHandler first, not SpendLimit"):
        StripeCredit(wrong, unit_price=1)
