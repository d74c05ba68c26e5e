"""A ledger belongs to one Stripe account and one mode; a key of another is refused, and nothing is mixed."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from faults import settled, tally
from sqlalchemy import select
from typer.testing import CliRunner

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.delivery.guard import PAUSE_SECONDS
from langchain_stripe_meter.errors import ConfigurationError, ForeignLedgerError, LedgerError, MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import opening, views
from langchain_stripe_meter.ledger.schema import events
from langchain_stripe_meter.ledger.store import ACCOUNT, Entry, Ledger, pin, refuse_early
from langchain_stripe_meter.sandbox import StripeSandbox

TEST, LIVE = "sk_test_sandbox", "sk_live_sandbox"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        sandbox.create_meter("m")
        sandbox.create_customer(id="cus_1")
        yield sandbox


def meter(url: str, key: str | None, **options: Any) -> StripeMeterCallbackHandler:
    usual: dict[str, Any] = {"customer": "cus_1", "ledger": url, "stripe": key, "deliver": False}
    return StripeMeterCallbackHandler(Tokens("m"), **{**usual, **options})


def use(handler: StripeMeterCallbackHandler, name: str = "job") -> None:
    handler.record_usage({"input_tokens": 1}, id=name)


def recorded(url: str) -> list[str]:
    ledger = Ledger(url)
    try:
        return [row.identifier for row in views.tail(ledger, 100)]
    finally:
        ledger.close()


# -- test mode and live mode


@pytest.mark.parametrize(("first", "second"), [(TEST, LIVE), (LIVE, TEST)])
@pytest.mark.parametrize("deliver", [True, False])
def test_a_key_of_the_other_mode_is_refused_and_records_nothing(
    url: str, first: str, second: str, deliver: bool
) -> None:
    with StripeSandbox() as sandbox, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRIPE_METER_API_BASE", sandbox.url)
        sandbox.allow(LIVE)
        handler = meter(url, first, deliver=deliver)
        use(handler, "first")
        handler.close(5)
        with pytest.raises(ForeignLedgerError, match=r"holds usage of (test|live) mode"):
            use(meter(url, second, deliver=deliver), "second")
        handler = meter(url, first, deliver=deliver)
        use(handler, "third")
        handler.close(5)
    assert [key.split("-")[0] for key in recorded(url)] == ["first", "third"]


def test_a_ledger_in_a_file_refuses_the_other_mode_at_the_door(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    handler = meter(url, TEST)
    use(handler)
    handler.close(5)
    with pytest.raises(ForeignLedgerError, match="live mode a ledger of its own"):
        meter(url, LIVE)


def test_a_run_that_would_go_into_the_ledger_of_the_other_mode_is_told_and_breaks_no_chain(postgres_url: str) -> None:
    from langchain_core.language_models.fake_chat_models import FakeListChatModel

    first = meter(postgres_url, TEST)
    use(first)
    first.close()
    told: list[MeteringError] = []
    handler = meter(postgres_url, LIVE, on_error=told.append)  # PostgreSQL is not asked before it is needed
    assert FakeListChatModel(responses=["Hello"]).invoke("Hi", {"callbacks": [handler]}).content == "Hello"
    assert isinstance(told[0].__cause__, ForeignLedgerError)
    with pytest.raises(ForeignLedgerError):
        handler.flush()
    assert handler.close() is None
    assert len(recorded(postgres_url)) == 1


def test_without_a_key_nothing_is_pinned_and_nothing_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPE_API_KEY", LIVE)  # not asked for: this process may be the wrong one to judge by
    handler = meter(url, None, deliver=False)
    use(handler, "first")
    assert handler._ledger.note("livemode") is None
    handler.close(5)
    tested = meter(url, TEST)
    use(tested, "second")
    assert tested._ledger.note("livemode") == "test"
    tested.close()
    use(handler, "third")
    handler.close(5)
    assert len(recorded(url)) == 3


def test_a_handler_is_made_although_its_database_cannot_be_reached(tmp_path: Path) -> None:
    meter("postgresql+psycopg://nobody@127.0.0.1:1/none", TEST)
    (tmp_path / "rubbish.db").write_bytes(b"not a database" * 100)
    handler = meter(f"sqlite:///{tmp_path}/rubbish.db", TEST)
    with pytest.raises(LedgerError, match="not a database"):
        use(handler)


def test_a_handler_whose_ledger_can_be_nowhere_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for where, why in (("no", "No such file"), ("file", "It is no folder"), ("n" * 300, "File name too long")):
        with pytest.raises(ConfigurationError, match=f"folder {tmp_path}/{where} cannot be used: {why}"):
            meter(f"sqlite:///{tmp_path}/{where}/x.db", TEST)
    assert not (tmp_path / "no").exists()
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'langchain-stripe-meter[postgres]'")):
        meter("postgresql+psycopg://nobody@127.0.0.1:1/none", TEST)


def test_of_many_who_open_a_new_ledger_at_once_one_decides(url: str) -> None:
    ledgers = [Ledger(url) for _ in range(8)]
    for ledger in ledgers:
        ledger.note("opened")
    start, refused = threading.Barrier(8), []

    def open_it(number: int) -> None:
        lane = ledgers[number].deliver_lane()
        start.wait()
        try:
            pin(lane, 1, is_test=number % 2 == 0)
        except ForeignLedgerError:
            refused.append(number % 2 == 0)

    threads = [threading.Thread(target=open_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mode = ledgers[0].note("livemode")
    assert refused == [mode == "live"] * 4
    for ledger in ledgers:
        ledger.close()


def test_the_look_at_the_door_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    refuse_early(path, is_test=True)
    assert not path.exists()
    path.write_bytes(b"")
    refuse_early(path, is_test=True)
    assert path.read_bytes() == b""


def test_a_courier_of_the_other_mode_pauses_and_sends_nothing(sandbox: StripeSandbox, url: str) -> None:
    live = sandbox.connect(sandbox.account_id, livemode=True)
    live.create_meter("m")
    live.create_customer(id="cus_1")
    sandbox.allow(LIVE)
    handler = meter(url, TEST)
    use(handler)
    handler.close(5)
    ledger, told = Ledger(url, clock=sandbox.now), []
    gateway = Gateway(LIVE, api_base=sandbox.url)
    courier = Courier(ledger, gateway, on_error=told.append)
    for _ in range(5):
        courier.turn()
        sandbox.advance(seconds=PAUSE_SECONDS)
    courier.close(1)
    gateway.close()
    assert len(told) == 1
    assert "test mode" in str(told[0])
    assert "test mode" in str(views.status(ledger).paused)
    assert live.events == sandbox.events == []
    tally("a key of another account or mode")
    ledger.close()


# -- another account


class Shop:
    """Usage of the sandbox's account, and a key of another."""

    def __init__(self, sandbox: StripeSandbox, url: str) -> None:
        self.sandbox = sandbox
        self.ledger = Ledger(url, clock=sandbox.now)
        self.told: list[MeteringError] = []
        other = sandbox.connect("acct_other")
        other.create_meter("m")
        other.create_customer(id="cus_1")
        sandbox.allow("sk_test_other", account="acct_other")
        sandbox.allow("rk_test_narrow", {"meter_events:write", "meters:read"})
        self.other = other

    def record(self, *keys: str) -> None:
        now, known = self.ledger.now(), {"state": ReadingState.RESOLVED, "customer": "cus_1"}
        self.ledger.record([Entry(key, "m", 1, now, **known) for key in keys])  # type: ignore[arg-type]

    def turns(self, key: str, until: Any) -> None:
        gateway = Gateway(key, api_base=self.sandbox.url)
        courier = Courier(self.ledger, gateway, on_error=self.told.append)
        wait_until(lambda: (courier.turn(), until())[1])
        courier.close(5)
        gateway.close()

    def deliver(self, key: str) -> None:
        self.turns(key, lambda: not views.status(self.ledger).pending)

    def attempts(self) -> list[int]:
        with self.ledger.read() as connection:
            return list(connection.execute(select(events.c.attempts)).scalars())


@pytest.fixture
def shop(sandbox: StripeSandbox, url: str) -> Iterator[Shop]:
    shop = Shop(sandbox, url)
    yield shop
    shop.ledger.close()


def test_another_accounts_key_pauses_everything_and_burns_no_attempt(shop: Shop) -> None:
    shop.record("first")
    shop.deliver(TEST)
    shop.record("second", "third")
    turns = iter(range(6))

    def six_minutes() -> bool:
        shop.sandbox.advance(seconds=60)
        return next(turns) == 5

    shop.turns("sk_test_other", six_minutes)
    assert shop.other.events == []
    assert len(shop.sandbox.events) == 1
    assert shop.ledger.note("account") == shop.sandbox.account_id
    (told,) = shop.told
    assert "acct_other" in str(told)
    assert shop.sandbox.account_id in str(told)
    assert "acct_other" in str(views.status(shop.ledger).paused)
    assert shop.attempts() == [1]

    shop.deliver(TEST)
    assert sorted(event.identifier for event in shop.sandbox.events) == ["first", "second", "third"]
    assert views.status(shop.ledger).paused is None
    assert shop.attempts() == [1, 1, 1]
    assert len(shop.told) == 1
    settled(shop.ledger, shop.sandbox, fault="a key of another account or mode")


class _Raced(Ledger):
    """Something happens once a look at whose ledger it is has found nobody."""

    meanwhile: Callable[[], None]

    def note(self, name: str) -> str | None:
        found = super().note(name)
        if name == ACCOUNT and found is None:
            self.meanwhile()
        return found


def test_of_two_accounts_keys_that_meet_on_a_new_ledger_one_sends(shop: Shop, url: str) -> None:
    plain, shop.ledger = shop.ledger, _Raced(url, clock=shop.sandbox.now)

    def other() -> None:
        shop.ledger = plain
        shop.record("second")
        shop.turns("sk_test_other", lambda: shop.told or not views.status(plain).pending)
        shop.record("third")

    with closing(shop.ledger) as raced:
        raced.meanwhile = other
        shop.record("first")
        shop.turns(TEST, lambda: shop.told or not views.status(plain).pending)
    if shop.ledger is raced:
        other()
    assert shop.ledger.note(ACCOUNT) == shop.sandbox.account_id
    assert shop.other.events == []
    assert len(shop.told) == 1


def test_a_key_that_may_not_read_its_account_delivers_and_pins_none(shop: Shop) -> None:
    shop.record("first")
    shop.deliver("rk_test_narrow")
    assert shop.ledger.note("account") is None
    assert [event.identifier for event in shop.sandbox.events] == ["first"]
    shop.record("second")
    shop.deliver(TEST)
    assert shop.ledger.note("account") == shop.sandbox.account_id
    shop.record("third")
    shop.deliver("rk_test_narrow")
    assert len(shop.sandbox.events) == 3
    assert shop.told == []


# -- the commands


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def test_deliver_verify_and_doctor_tell_of_the_other_mode(
    sandbox: StripeSandbox, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.allow(LIVE)
    monkeypatch.setenv("STRIPE_METER_API_BASE", sandbox.url)
    monkeypatch.setenv("STRIPE_METER_LEDGER", url)
    handler = meter(url, TEST)
    use(handler)
    handler.close(5)
    monkeypatch.setenv("STRIPE_API_KEY", LIVE)
    for command in (["deliver", "--once"], ["verify"]):
        assert "test mode" in call(*command, code=2).stderr
    found = json.loads(call("doctor", "--json", code=1).stdout)
    assert any(one["state"] == "fail" and "holds usage of test mode" in one["said"] for one in found)
    monkeypatch.setenv("STRIPE_API_KEY", TEST)
    call("deliver", "--once")
    assert sandbox.billed("m", "cus_1") == 1
    assert "holds usage" not in call("doctor").stdout


def test_doctor_tells_of_another_account(sandbox: StripeSandbox, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(sandbox, url)
    shop.record("first")
    shop.deliver(TEST)
    shop.ledger.close()
    monkeypatch.setenv("STRIPE_METER_API_BASE", sandbox.url)
    monkeypatch.setenv("STRIPE_METER_LEDGER", url)
    monkeypatch.setenv("STRIPE_API_KEY", "sk_test_other")
    assert "the key belongs to acct_other" in " ".join(call("doctor", code=1).stdout.split())
    monkeypatch.setenv("STRIPE_API_KEY", TEST)
    call("doctor")
