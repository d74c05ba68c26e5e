"""Doubtful events: what Stripe's sums say of them is believed only when nothing else could explain it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import assert_invariant
from courier_shop import Shop
from sqlalchemy import insert, select, update
from typer.testing import CliRunner

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.audit.chores import Doubts
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.doubts import (
    ASK_AGAIN,
    LOOK_AGAIN,
    PERSON,
    SUMS_LAG,
)
from langchain_stripe_meter.core.states import Move
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.errors import ConfigurationError, IllegalMoveError, StripeError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import sealing, views
from langchain_stripe_meter.ledger.acts import assign, retime, write_off
from langchain_stripe_meter.ledger.doubts import doubtful, settle_doubt
from langchain_stripe_meter.ledger.outbox import MeterEvent
from langchain_stripe_meter.ledger.reversals import ask_to_cancel
from langchain_stripe_meter.ledger.schema import acts, events, pruned
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.operations import cancel
from langchain_stripe_meter.sandbox import RecordedRequest, drop_answer, refuse, server_error_after_accept

ADJUSTMENTS = "/v1/billing/meter_event_adjustments"
SUMMARIES = "*/event_summaries"
NOW = 1_780_000_020
DAY = 86_400


class DoubtShop(Shop):
    """A shop whose courier minds its doubts, and whose usage all lies in one minute."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.minute = self.ledger.now() // 60 * 60
        self.minded = Doubts(self.ledger, self.courier.gateway)

    def doubt(self, *keys: str, taken: tuple[str, ...] = (), **facts: object) -> None:
        """Record usage that becomes doubtful; Stripe has those of ``taken``, and said so to nobody."""
        for key in taken:
            self.sandbox.fail(server_error_after_accept(), where=lambda request, key=key: _identifier(request) == key)
        self.sandbox.fail(refuse(503), times=None)
        self.record(*keys, **{"at": self.minute, **facts})
        self.drive(seconds=4)
        self.sandbox.advance(hours=23)
        self.drive(seconds=4)
        assert {row.identifier for row in doubtful(self.ledger)} >= set(keys)
        self.sandbox.clear_faults()

    def look(self, times: int = 1, apart: int = LOOK_AGAIN) -> None:
        for _ in range(times):
            self.minded(self.ledger.now())
            self.sandbox.advance(seconds=apart)

    def rest(self) -> None:
        """Let Stripe's sums settle."""
        self.sandbox.advance(seconds=SUMS_LAG)

    def send_foreign(self, value: str, identifier: str = "foreign") -> None:
        outcome, _ = self.courier.gateway.send_once(
            MeterEvent("ai_tokens", "cus_1", Decimal(value), identifier, self.minute)
        )
        assert outcome.move is Move.ACCEPTED

    def reason(self) -> str:
        (reason,) = {row.reason for row in doubtful(self.ledger)}
        return reason

    def looks(self) -> int:
        return sum("event_summaries" in request.path for request in self.sandbox.requests)


def _identifier(request: RecordedRequest) -> str:
    return str(request.params["identifier"])


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[DoubtShop]:
    shop = DoubtShop(tmp_path)
    yield shop
    shop.close()


# -- what two looks decide


def test_what_stripe_does_not_have_is_sent_again_under_its_identifier_and_billed_once(shop: DoubtShop) -> None:
    shop.doubt("run", value=5)
    shop.rest()
    shop.look(2)
    assert shop.states() == {"run": "pending"}
    with shop.ledger.read() as connection:
        row = connection.execute(select(events)).one()
    assert (row.first_unknown_at, row.seen_value, row.error, row.settled_at) == (None,) * 4
    assert row.attempts > 1
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 5)
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_what_stripe_has_is_delivered_and_never_sent_again(shop: DoubtShop) -> None:
    shop.doubt("run", taken=("run",), value=5)
    sent = len(shop.sent())
    shop.rest()
    shop.look(2)
    shop.drive()
    assert (shop.states(), shop.billed(), len(shop.sent())) == ({"run": "delivered"}, 5, sent)
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


@pytest.mark.parametrize(("taken", "states"), [((), "pending"), (("a", "b", "c"), "delivered")])
def test_all_doubts_of_a_minute_share_their_fate(shop: DoubtShop, taken: tuple[str, ...], states: str) -> None:
    shop.record("before", at=shop.minute + 59, value=100)
    shop.drive()
    shop.doubt("a", "b", "c", taken=taken, value=5)
    shop.rest()
    shop.look(2)
    assert shop.states() == {"before": "delivered", "a": states, "b": states, "c": states}
    shop.drive()
    assert shop.billed() == 115


def test_when_stripe_has_a_part_of_them_a_person_is_asked_once_and_settles_it(shop: DoubtShop) -> None:
    shop.doubt("a", "b", taken=("a",), value=5)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="stripe-meter doubtful"):
        shop.look(1)
    shop.look(3, apart=ASK_AGAIN)
    assert shop.states() == {"a": "doubtful", "b": "doubtful"}
    assert shop.reason() == PERSON + "Stripe has 5 in that minute; 0 is delivered, 10 in doubt."
    assert settle_doubt(shop.ledger, ["a"], delivered=True) == 1
    with pytest.raises(IllegalMoveError, match="meter event a is delivered, not in doubt"):
        settle_doubt(shop.ledger, ["b", "a"], delivered=False)
    with pytest.raises(ConfigurationError, match="no meter event with the identifier 'unknown'"):
        settle_doubt(shop.ledger, ["b", "unknown"], delivered=False)
    assert shop.states() == {"a": "delivered", "b": "doubtful"}
    assert settle_doubt(shop.ledger, ["b", "b"], delivered=False) == 1
    shop.drive()
    assert shop.billed() == 10
    with shop.ledger.read() as connection:
        said = [(row.act, row.subject, row.detail) for row in connection.execute(select(acts))]
    assert said == [
        ("doubt settled", "a", "Stripe has it"), ("absent at Stripe", "b", ""),
        ("doubt settled", "b", "Stripe does not have it"),
    ]  # fmt: skip
    assert_invariant(shop.ledger, shop.sandbox, settled=True)


def test_a_person_is_no_longer_needed_once_the_sum_is_plain(shop: DoubtShop) -> None:
    shop.doubt("a", taken=("a",), value=5)
    shop.doubt("b", value=7)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError):
        shop.look(1)
    settle_doubt(shop.ledger, ["a"], delivered=True)
    shop.rest()
    shop.look(2, apart=ASK_AGAIN)
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"a": "delivered", "b": "delivered"}, 12)


# -- what Stripe refused after it took it, unheard of


def test_a_doubt_that_stripe_has_instead_of_as_much_that_it_refused_later_is_not_sent_again(shop: DoubtShop) -> None:
    shop.record("before", at=shop.minute, value=5)
    shop.drive()
    shop.sandbox.reject("before")  # and no webhook tells
    shop.doubt("run", taken=("run",), value=5)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="either what is delivered, or as much of what is in doubt"):
        shop.look(1)
    sent = len(shop.sent())
    shop.drive()
    assert (shop.states()["run"], len(shop.sent()), shop.billed()) == ("doubtful", sent, 5)


def test_a_doubt_that_stripe_lacks_beside_a_correction_that_it_refused_later_is_not_called_delivered(
    shop: DoubtShop,
) -> None:
    shop.record("before", at=shop.minute, value=100)
    shop.record("correction", at=shop.minute, value=-5)
    shop.drive()
    shop.sandbox.reject("correction")
    shop.doubt("run", value=5)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="either"):
        shop.look(1)
    assert (shop.states()["run"], shop.billed()) == ("doubtful", 100)


# -- when a look says nothing


def test_nothing_follows_from_one_look_nor_from_two_that_differ(shop: DoubtShop) -> None:
    shop.doubt("run", taken=("run",), value=5)
    shop.rest()
    shop.sandbox.summary_lag = 2 * DAY
    shop.look(1)
    assert shop.states() == {"run": "doubtful"}
    shop.sandbox.summary_lag = 0
    shop.look(1)
    assert shop.states() == {"run": "doubtful"}
    shop.look(1)
    assert shop.states() == {"run": "delivered"}


def test_looks_are_ten_minutes_apart(shop: DoubtShop) -> None:
    shop.doubt("run")
    shop.rest()
    shop.look(1, apart=LOOK_AGAIN - 10)
    shop.look(1, apart=10)
    assert (shop.states(), shop.looks()) == ({"run": "doubtful"}, 1)
    shop.look(1)
    assert (shop.states(), shop.looks()) == ({"run": "pending"}, 2)


def test_sums_are_not_looked_at_before_they_have_settled(shop: DoubtShop) -> None:
    shop.doubt("run")
    shop.sandbox.advance(seconds=SUMS_LAG - 400)
    shop.look(3, apart=10)
    assert shop.looks() == 0


def test_what_is_delivered_in_the_same_minute_makes_the_sum_settle_anew(shop: DoubtShop) -> None:
    shop.doubt("run", taken=("run",), value=5)
    shop.rest()
    shop.look(1)
    shop.sandbox.summary_lag = SUMS_LAG - LOOK_AGAIN
    shop.record("late", at=shop.minute + 1, value=5)  # as large as the doubt, and not in the sum yet
    shop.drive()
    shop.look(3)
    assert shop.states() == {"run": "doubtful", "late": "delivered"}
    shop.rest()
    shop.look(2)
    assert shop.states() == {"run": "delivered", "late": "delivered"}
    assert shop.billed() == 10


@pytest.mark.parametrize(("taken", "other"), [(("run",), -5), ((), 5)], ids=["Stripe has it", "Stripe lacks it"])
def test_what_is_cancelled_in_the_same_minute_makes_the_sum_settle_anew(
    shop: DoubtShop, taken: tuple[str, ...], other: int
) -> None:
    """While the sum still shows what was cancelled, it looks as if Stripe lacked the doubt, or had it."""
    shop.doubt("run", taken=taken, value=5)
    shop.record("other", value=other, at=shop.minute)
    shop.drive()
    shop.sandbox.summary_lag = 3600
    shop.sandbox.advance(seconds=SUMS_LAG - 120)
    cancel(shop.ledger, shop.courier.gateway, "other")
    shop.sandbox.advance(seconds=120)
    shop.look(2)
    assert (shop.states(), shop.looks()) == ({"run": "doubtful", "other": "written_off"}, 0)
    shop.rest()
    shop.look(2)
    shop.drive()
    assert (shop.states()["run"], shop.billed()) == ("delivered", 5)


@pytest.mark.parametrize("fault", [refuse(503), server_error_after_accept()], ids=["unknown", "unknown, but taken"])
def test_nothing_is_decided_while_another_outcome_of_the_minute_is_open(shop: DoubtShop, fault: object) -> None:
    shop.doubt("run", value=5)
    shop.sandbox.fail(fault, times=1)  # type: ignore[arg-type]
    shop.sandbox.fail(refuse(503), times=None)
    shop.record("other", at=shop.minute + 30, value=5)
    shop.drive(seconds=60)
    shop.sandbox.clear_faults()
    shop.rest()
    shop.look(3)
    assert (shop.states(), shop.looks()) == ({"run": "doubtful", "other": "pending"}, 0)


def test_while_stripe_does_not_answer_nothing_changes(shop: DoubtShop) -> None:
    shop.doubt("run")
    shop.rest()
    shop.sandbox.fail(refuse(503), path=SUMMARIES, times=3)
    shop.look(3)
    assert shop.looks() == 3
    assert not shop.reason().startswith(PERSON)
    shop.look(2)
    assert shop.states() == {"run": "pending"}


@pytest.mark.parametrize("becomes", ["settled by a person", "being sent for"])
def test_what_changes_while_stripe_is_asked_makes_the_look_void(shop: DoubtShop, becomes: str) -> None:
    shop.doubt("run", taken=("run",), value=5)
    shop.record("other", at=shop.minute, value=5)
    shop.sandbox.advance(seconds=1)
    shop.rest()
    shop.sandbox.summary_lag = 3 * DAY  # so that a look that counts would say: absent
    shop.look(1)

    def meanwhile(_: RecordedRequest) -> bool:
        if becomes == "being sent for":
            shop.sandbox.fail(refuse(503), times=None)
            shop.courier.turn()
            shop.courier.turn()
        else:
            settle_doubt(shop.ledger, ["run"], delivered=True)
        return False

    Doubts(shop.ledger, _Asking(shop.courier.gateway, meanwhile))(shop.ledger.now())
    assert shop.states()["run"] == ("delivered" if becomes == "settled by a person" else "doubtful")


class _Asking(Gateway):
    """The real gateway; something happens while it waits for a sum."""

    def __init__(self, real: Gateway, meanwhile: object) -> None:
        super().__init__(real.client)
        self._meanwhile = meanwhile

    def billed(self, *arguments: object) -> Decimal | None:  # type: ignore[override]
        found = super().billed(*arguments)  # type: ignore[arg-type]
        self._meanwhile(None)  # type: ignore[operator]
        return found


# -- what only a person can tell


def test_usage_that_the_ledger_does_not_know_needs_a_person(shop: DoubtShop) -> None:
    shop.doubt("run", value=5)
    shop.send_foreign("3")
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError):
        shop.look(1)
    assert "Stripe has 3 in that minute" in shop.reason()


def test_what_is_absent_but_too_old_is_not_sent_to_be_refused(shop: DoubtShop) -> None:
    shop.doubt("run", value=5)
    shop.sandbox.advance(days=34)
    shop.look(1)
    with pytest.raises(StripeError, match="34 days"):
        shop.look(1)
    assert shop.states() == {"run": "doubtful"}
    assert settle_doubt(shop.ledger, ["run"], delivered=False) == 1
    before = len(shop.sent())
    shop.drive()
    (held,) = views.held(shop.ledger)
    assert (held.reason.partition(":")[0], len(shop.sent())) == ("older than 34 days", before)
    assert retime(shop.ledger, held) == 1
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 5)


def test_the_sum_is_that_of_the_connected_account(shop: DoubtShop) -> None:
    connected = shop.sandbox.connect("acct_shop")
    connected.create_meter("ai_tokens")
    connected.create_customer(id="cus_1")
    shop.doubt("run", taken=("run",), value=5, account="acct_shop")
    shop.rest()
    shop.look(2)
    assert shop.states() == {"run": "delivered"}
    assert (connected.billed("ai_tokens", "cus_1"), shop.billed()) == (5, 0)


def test_a_meter_that_was_replaced_still_counts(shop: DoubtShop) -> None:
    shop.doubt("run", taken=("run",), value=5)
    shop.sandbox.deactivate_meter("ai_tokens")
    shop.sandbox.create_meter("ai_tokens")
    shop.rest()
    shop.look(2)
    assert shop.states() == {"run": "delivered"}


def test_a_meter_that_does_not_add_up_tells_nothing(shop: DoubtShop) -> None:
    shop.doubt("run", value=5)
    shop.sandbox.deactivate_meter("ai_tokens")
    shop.sandbox.create_meter("ai_tokens", formula="last")
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="adds up"):
        shop.look(1)
    assert shop.states() == {"run": "doubtful"}


@pytest.mark.parametrize(
    ("path", "status", "said"), [(SUMMARIES, 404, "no sums of the customer"), ("/v1/billing/meters", 403, "permission")]
)
def test_what_stripe_will_not_say_needs_a_person(shop: DoubtShop, path: str, status: int, said: str) -> None:
    shop.doubt("run")
    shop.rest()
    shop.sandbox.fail(refuse(status), path=path, times=2)
    shop.look(1)
    with pytest.raises(StripeError, match=said):
        shop.look(1)
    shop.look(3, apart=ASK_AGAIN)
    assert shop.states() == {"run": "pending"}


def test_a_meter_that_stripe_does_not_have_needs_a_person(shop: DoubtShop) -> None:
    shop.doubt("run")
    with shop.ledger.deliver_lane().transaction() as connection:
        connection.execute(update(events).values(event_name="gone"))
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="no meter with the event name 'gone'"):
        shop.look(1)


def test_a_wish_to_cancel_whose_outcome_nobody_knows_makes_the_sum_tell_nothing(shop: DoubtShop) -> None:
    """Stripe has cancelled one event and taken the other: its sum looks as if it had taken only the first."""
    shop.record("delivered", value=5, at=shop.minute)
    shop.drive()
    assert ask_to_cancel(shop.ledger, "delivered") is not None
    shop.courier.gateway.client.v1.billing.meter_event_adjustments.create(
        {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": "delivered"}}
    )
    shop.doubt("doubtful", value=5, taken=("doubtful",))
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="asked to be cancelled"):
        shop.look(1)
    assert shop.states() == {"delivered": "delivered", "doubtful": "doubtful"}
    assert shop.billed() == 5


def test_a_wish_to_cancel_that_stripe_refused_leaves_its_minute_as_it_was(shop: DoubtShop) -> None:
    shop.record("delivered", value=7, at=shop.minute)
    shop.drive()
    shop.sandbox.fail(refuse(400, message="It is on an invoice that is final."), path=ADJUSTMENTS)
    with pytest.raises(StripeError, match="invoice"):
        cancel(shop.ledger, shop.courier.gateway, "delivered")
    shop.doubt("doubtful", value=5)
    shop.rest()
    shop.look(2)
    shop.drive()
    assert shop.states() == {"delivered": "delivered", "doubtful": "delivered"}
    assert shop.billed() == 12


def test_what_was_cancelled_is_known_though_its_first_answer_was_lost(shop: DoubtShop) -> None:
    shop.sandbox.fail(drop_answer())
    shop.record("cancelled", value=7, at=shop.minute)
    shop.drive()
    cancel(shop.ledger, shop.courier.gateway, "cancelled")
    shop.doubt("doubtful", value=5)
    shop.rest()
    shop.look(2)
    shop.drive()
    assert shop.states() == {"cancelled": "written_off", "doubtful": "delivered"}
    assert shop.billed() == 5


@pytest.mark.parametrize("account", ["", "acct_1Sandbox"])  # the key's own, which may be named
@pytest.mark.parametrize("state", ["delivered", "written_off"])
def test_what_was_pruned_or_written_off_in_doubt_makes_the_sum_tell_nothing(
    shop: DoubtShop, state: str, account: str
) -> None:
    shop.doubt("a", "b", value=5)
    with shop.ledger.deliver_lane().transaction() as connection:
        connection.execute(update(events).where(events.c.identifier == "a").values(state="written_off"))
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="written off while"):
        shop.look(1)
    facts = {"event_name": "ai_tokens", "customer": "cus_1", "day": shop.minute // DAY * DAY, "state": state}
    with shop.ledger.deliver_lane().transaction() as connection:
        connection.execute(insert(pruned).values(account=account, amount="1", readings=1, **facts))
    shop.sandbox.advance(seconds=ASK_AGAIN)
    with pytest.raises(StripeError, match="pruned"):
        shop.look(1)


# -- what Stripe knows by its identifier, and its sums lack


def contradict(shop: DoubtShop) -> None:
    """Stripe took it and refused it later; a person has it sent again, and Stripe still knows its identifier."""
    shop.doubt("run", taken=("run",), value=5)
    shop.sandbox.reject("run")
    settle_doubt(shop.ledger, ["run"], delivered=False)
    shop.drive(seconds=60)
    assert (shop.states(), shop.billed()) == ({"run": "doubtful"}, 0)


def test_what_stripe_knows_and_lacks_waits_for_a_person_and_then_goes_out_under_a_new_identifier(
    shop: DoubtShop,
) -> None:
    contradict(shop)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match=r"refused it later, or somebody cancelled it there"):
        shop.look(1)
    assert settle_doubt(shop.ledger, ["run"], delivered=False) == 1
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 5)
    assert shop.sandbox.events[-1].identifier == "run-r1"


def test_what_somebody_cancelled_at_stripe_is_billed_by_no_retry(shop: DoubtShop) -> None:
    contradict(shop)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="cancelled"):
        shop.look(1)
    assert sealing.retry(shop.ledger) == 0
    write_off(shop.ledger, "run", reason="it was cancelled in the Dashboard")
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"run": "written_off"}, 0)


def test_that_stripe_knows_it_is_not_forgotten_over_another_reason_to_ask_a_person(shop: DoubtShop) -> None:
    contradict(shop)
    shop.send_foreign("3")
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="Stripe has 3 in that minute"):
        shop.look(1)
    foreign = {"event_name": "ai_tokens", "type": "cancel", "cancel": {"identifier": "foreign"}}
    shop.courier.gateway.client.v1.billing.meter_event_adjustments.create(foreign)  # type: ignore[arg-type]
    shop.sandbox.advance(seconds=ASK_AGAIN)
    shop.look(1, apart=ASK_AGAIN)
    with pytest.raises(StripeError, match="somebody cancelled it there"):
        shop.look(1)
    assert shop.states() == {"run": "doubtful"}


def test_its_neighbours_in_the_minute_wait_for_it_and_then_go_by_themselves(shop: DoubtShop) -> None:
    """Stripe took a and refused it later; it never had b."""
    shop.sandbox.fail(server_error_after_accept(), where=lambda request: _identifier(request) == "a")
    shop.sandbox.fail(refuse(503), times=None)
    shop.record("a", at=shop.minute, value=5)
    shop.record("b", at=shop.minute, value=7)
    shop.drive(seconds=4)
    shop.sandbox.advance(hours=23)
    shop.drive(seconds=4)
    shop.sandbox.clear_faults()
    shop.sandbox.reject("a")
    settle_doubt(shop.ledger, ["a"], delivered=False)
    shop.drive(seconds=60)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="Usage of 1 minutes"):
        shop.look(1)
    assert [("knows its identifier" in row.reason) for row in doubtful(shop.ledger)] == [True, False]
    settle_doubt(shop.ledger, ["a"], delivered=False)
    shop.drive(seconds=60)
    assert shop.states() == {"a": "delivered", "b": "doubtful"}
    shop.rest()
    shop.look(3, apart=ASK_AGAIN)
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"a": "delivered", "b": "delivered"}, 12)


def test_while_sums_lag_nothing_beside_what_stripe_knows_is_called_absent(shop: DoubtShop) -> None:
    """Stripe has both; who said that it lacks a was wrong, and so are its sums."""
    shop.sandbox.summary_lag = 27 * 3600
    shop.doubt("a", "b", taken=("a", "b"), value=5)
    settle_doubt(shop.ledger, ["a"], delivered=False)
    shop.drive(seconds=60)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError):
        shop.look(1)
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"a": "doubtful", "b": "doubtful"}, 10)


@pytest.mark.parametrize("gone", ["customer", "meter"])
def test_what_was_said_to_be_absent_stays_so_though_it_is_held_and_sealed_anew(shop: DoubtShop, gone: str) -> None:
    shop.doubt("run", taken=("run",), value=5)
    shop.sandbox.reject("run")
    settle_doubt(shop.ledger, ["run"], delivered=False)
    if gone == "customer":
        shop.sandbox.delete_customer("cus_1")
    else:
        shop.sandbox.deactivate_meter("ai_tokens")
    shop.drive(seconds=60)
    assert shop.states() == {"run": "held"}
    if gone == "customer":
        assign(shop.ledger, views.held(shop.ledger), "cus_2")
    else:
        shop.sandbox.reactivate_meter("ai_tokens")
        shop.courier.gateway.forget_meters("")
        sealing.retry(shop.ledger)
    shop.drive(seconds=60)
    assert (shop.states(), shop.billed(), shop.billed("cus_2")) == ({"run": "doubtful"}, 0, 0)


@pytest.mark.parametrize("forbidden", [False, True])
def test_a_person_is_told_of_it_once_whatever_else_there_is_to_tell(shop: DoubtShop, forbidden: bool) -> None:
    """Beside as much that is delivered, or where the key may not read sums."""
    contradict(shop)
    if forbidden:
        shop.sandbox.fail(refuse(403, message="may not"), path=SUMMARIES, times=None)
    else:
        shop.record("other", at=shop.minute + 1, value=5)
        shop.drive(seconds=60)
    courier = shop.another_courier(chores=[Doubts(shop.ledger, shop.courier.gateway)])
    shop.errors.clear()
    for _ in range(30 * 6):
        courier.turn()
        shop.sandbox.advance(seconds=120)
    (told,) = shop.errors
    assert "Stripe knows its identifier" in str(told)
    assert shop.reason() in str(told)


def test_who_says_wrongly_that_stripe_lacks_an_event_does_not_have_it_billed_twice(shop: DoubtShop) -> None:
    shop.doubt("run", taken=("run",), value=5)
    settle_doubt(shop.ledger, ["run"], delivered=False)
    shop.drive(seconds=60)
    assert shop.reason() == "Stripe knows its identifier, though it was said to lack it"
    with pytest.raises(IllegalMoveError, match=r"Stripe knows the identifier of run.*two hours"):
        settle_doubt(shop.ledger, ["run"], delivered=False)
    shop.rest()
    shop.look(2)
    assert (shop.states(), sealing.retry(shop.ledger), shop.billed()) == ({"run": "delivered"}, 0, 5)


def test_what_was_absent_and_is_sent_again_with_an_answer_that_is_lost_is_known_rightly(shop: DoubtShop) -> None:
    shop.doubt("run", value=5)
    settle_doubt(shop.ledger, ["run"], delivered=False)
    shop.sandbox.fail(drop_answer())
    shop.drive(seconds=60)
    shop.rest()
    shop.look(2)
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 5)


def test_a_hiccup_on_the_way_does_not_make_it_delivered(shop: DoubtShop) -> None:
    shop.doubt("run", taken=("run",), value=5)
    shop.sandbox.reject("run")
    settle_doubt(shop.ledger, ["run"], delivered=False)
    shop.sandbox.fail(refuse(503))
    shop.drive(seconds=60)
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError, match="refused it later"):
        shop.look(1)
    settle_doubt(shop.ledger, ["run"], delivered=False)
    shop.drive()
    assert (shop.states(), shop.billed()) == ({"run": "delivered"}, 5)


# -- on both engines, in the handler, and on the command line


def test_it_works_on_postgresql(postgres_url: str, tmp_path: Path) -> None:
    shop = DoubtShop(tmp_path)
    shop.ledger = Ledger(postgres_url, clock=shop.sandbox.now)
    shop.courier = shop.another_courier()
    shop.minded = Doubts(shop.ledger, shop.courier.gateway)
    shop.doubt("a", "b", taken=("a",), value=5)
    shop.doubt("c", value=7, customer="cus_2")
    shop.rest()
    shop.look(1)
    with pytest.raises(StripeError):
        shop.look(1)
    assert settle_doubt(shop.ledger, ["a"], delivered=True) == 1
    assert settle_doubt(shop.ledger, ["b"], delivered=False) == 1
    shop.drive()
    assert (shop.billed(), shop.billed("cus_2")) == (10, 7)
    assert_invariant(shop.ledger, shop.sandbox, settled=True)
    shop.close()


def test_a_courier_minds_the_doubts_by_itself_and_tells_on_error(shop: DoubtShop) -> None:
    shop.doubt("plain", value=5, customer="cus_2")
    shop.doubt("partly", "too", taken=("too",), value=5)
    courier = shop.another_courier(chores=[Doubts(shop.ledger, shop.courier.gateway)])
    shop.errors.clear()
    shop.rest()
    for _ in range(40):
        courier.turn()
        shop.sandbox.advance(seconds=120)
    assert shop.states() == {"plain": "delivered", "partly": "doubtful", "too": "doubtful"}
    assert len(shop.errors) == 1
    assert "stripe-meter doubtful" in str(shop.errors[0])


def test_the_handler_shows_what_is_in_doubt_and_minds_it(
    shop: DoubtShop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shop.doubt("a", "b", taken=("a",), value=5)
    for name, value in shop.sandbox.environment().items():
        monkeypatch.setenv(name, value)
    shop.rest()
    with StripeMeterCallbackHandler(
        Tokens("ai_tokens"), ledger=f"sqlite:///{tmp_path}/ledger.db", clock=shop.sandbox.now
    ) as meter:
        assert [row.identifier for row in meter.doubtful()] == ["a", "b"]
        assert "<td>a</td>" in meter.doubtful()._repr_html_()
        courier: Courier = meter._courier  # type: ignore[assignment]
        courier.turn()
        assert shop.looks() == 1
        assert meter.settle_doubt(["a"], delivered=True) == 1
        assert meter.settle_doubt(["b"], delivered=False) == 1
        assert meter.flush().doubtful == 0
    assert shop.billed() == 10


def test_a_person_settles_a_doubt_on_the_command_line(
    shop: DoubtShop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shop.doubt("a", value=5)
    monkeypatch.setenv("STRIPE_METER_LEDGER", f"sqlite:///{tmp_path}/ledger.db")

    def call(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result.output

    assert json.loads(call("doubtful", "--json"))[0]["identifier"] == "a"
    assert "HTTP 503" in call("doubtful")
    call("doubtful", "settle", "a", code=2)  # which of both must be said
    assert "'b'" in call("doubtful", "settle", "a", "b", "--delivered", code=2)
    assert "1 of 1 events are settled" in call("doubtful", "settle", "a", "--delivered")
    assert "not in doubt" in call("doubtful", "settle", "a", "--absent", code=2)
    assert "Nothing is in doubt" in call("doubtful")
    assert shop.states() == {"a": "delivered"}
