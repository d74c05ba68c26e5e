"""Erasing a person: nothing that names them is left in any file, and no amount is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, insert, select
from typer.testing import CliRunner

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_lead
from langchain_stripe_meter.cli import app
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import acts as decisions
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.forget import FORGOTTEN, forget
from langchain_stripe_meter.ledger.keeping import prune
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.resolving import Unknown, remember, resolve
from langchain_stripe_meter.ledger.schema import acts, leads, payers, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger

MAIL, NAME, PHONE, SESSION = "canary-mail@example.com", "Canary Name", "+4930901820", "canary-session"
WHO = Reference("email", MAIL)
CANARIES = [MAIL, "canary-mail", NAME, PHONE, SESSION]


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    is_sqlite = request.param == "sqlite"
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db" if is_sqlite else str(request.getfixturevalue("postgres_url")))
    yield ledger
    ledger.close()


def named(key: str, who: Reference | None = WHO, state: ReadingState = ReadingState.RECORDED, **more: Any) -> Entry:
    return Entry(key, "tokens", more.pop("value", Decimal(7)), 1_800_000_000, state, reference=who, **more)


def found_in_files(ledger: Ledger, *texts: str) -> list[str]:
    """Which of ``texts`` the raw bytes of the database, its log and its index hold."""
    path = str(ledger.database.url.database)
    data = b"".join(file.read_bytes() for end in ("", "-wal", "-shm") if (file := Path(path + end)).exists())
    assert data
    return [text for text in texts if text.encode() in data]


def dump(ledger: Ledger) -> str:
    """Every value of every row of what may name somebody."""
    with ledger.read() as connection:
        tables = (leads, readings, payers, acts)
        return "\n".join(str(tuple(row)) for table in tables for row in connection.execute(select(table)))


def fill(ledger: Ledger) -> None:
    ledger.record([named("waits"), named("held", state=ReadingState.HELD, reason="unknown", value=Decimal(5))])
    ledger.record([named("other", Reference("email", "bob@example.com"), value=Decimal(3))])
    ledger.record([named("phone", Reference("phone", PHONE), value=Decimal(2))])
    captured = Leads(ledger)
    captured.record([named("skipped", None, ReadingState.SKIPPED, session=SESSION)])
    captured.capture(SESSION, email=MAIL, name=NAME, phone=PHONE)
    captured.capture("another-session", email=MAIL)
    captured.capture("bobs-session", email="bob@example.com")
    with ledger.deliver_lane().transaction() as connection:
        remember(connection, "", f"email:{MAIL}", "cus_1", 1)
        connection.execute(insert(payers), [{"digest": "0" * 64, "customer": "cus_2", "at": 1}])
        detail = json.dumps({"was": f"email:{MAIL}"})
        connection.execute(insert(acts), [{"at": 1, "act": "assign", "subject": "held", "detail": detail}])


def amounts(ledger: Ledger) -> Decimal:
    return sum((row.value for row in views.every(ledger) if row.value), Decimal(0))


@pytest.mark.parametrize("by", [{"email": MAIL}, {"phone": PHONE}, {"session": SESSION}, {"name": NAME}])
def test_a_person_is_gone_wherever_they_were_named_and_the_amounts_stay(ledger: Ledger, by: Any) -> None:
    fill(ledger)
    before = amounts(ledger)
    if ledger.database.is_sqlite:
        assert found_in_files(ledger, *CANARIES) == CANARIES
    done = forget(ledger, **by)
    assert (done.leads, done.readings, done.traces, done.complete, done.advice) == (2, 4, 2, True, "")
    assert not any(canary in dump(ledger) for canary in CANARIES)
    assert "bob@example.com" in dump(ledger)
    if ledger.database.is_sqlite:
        assert found_in_files(ledger, *CANARIES) == []
    assert amounts(ledger) == before
    (group,) = views.held(ledger)
    assert (group.reference, group.value, group.reason) == (None, 14, FORGOTTEN)
    assert decisions.assign(ledger, group.ids, "cus_1") == 3
    again = forget(ledger, **by)
    assert (again.leads, again.readings, again.complete) == (0, 0, True)


def test_acts_that_mention_somebody_with_a_longer_name_or_number_stay(ledger: Ledger) -> None:
    said = [
        f"of {one}." for one in (MAIL, f"jo.{MAIL}", f"{MAIL}.au", f"{MAIL}-x", PHONE, f"{PHONE}1", "name:Canary Name")
    ]
    with ledger.deliver_lane().transaction() as connection:
        connection.execute(insert(acts), [{"at": 1, "act": "x", "subject": "y", "detail": one} for one in said])
    done = forget(ledger, email=MAIL.upper(), phone=PHONE, name="Canary Nam")
    with ledger.read() as connection:
        left = connection.execute(select(acts.c.detail).where(acts.c.act == "x").order_by(acts.c.id)).scalars().all()
    assert (done.traces, left) == (2, [None, *said[1:4], None, *said[5:]])


def test_a_lookup_that_was_under_way_remembers_nobody_who_was_forgotten_meanwhile(ledger: Ledger) -> None:
    """Stripe's answer comes in after the person was erased, and no reading waits for it any more."""
    fill(ledger)
    forget(ledger, email=MAIL)
    for who, left in ((WHO, 1), (Reference("email", "bob@example.com"), 2)):
        with ledger.deliver_lane().transaction() as connection:
            resolve(connection, Unknown("", who), "cus_1", ledger.now())
            assert connection.execute(select(func.count()).select_from(payers)).scalar_one() == left


def test_a_name_that_two_people_have_leads_to_both_only_where_it_is_what_was_asked_for(ledger: Ledger) -> None:
    captured = Leads(ledger)
    captured.capture("s1", email="one@example.com", name="Jo Bloggs")
    captured.capture("s2", email="two@example.com", name="Jo Bloggs")
    assert forget(ledger, email="one@example.com").leads == 1
    assert captured.find("s2") == {"email": "two@example.com", "name": "Jo Bloggs"}
    assert forget(ledger, name="Jo  Bloggs").leads == 1


def test_what_points_to_a_customer_goes_and_what_was_billed_to_it_stays(ledger: Ledger) -> None:
    fill(ledger)
    ledger.record([Entry("billed", "tokens", Decimal(9), 1, ReadingState.RESOLVED, "cus_2")])
    done = forget(ledger, customer="cus_2")
    assert (done.leads, done.readings, done.traces) == (0, 0, 1)
    assert "cus_2" in dump(ledger)
    kept = "1 reading still carries cus_2. It is Stripe's own id, and stays beside the amounts until they are pruned, "
    assert (done.complete, done.advice) == (True, f"{kept}then in the sums of days.")
    ledger.record([Entry("more", "tokens", Decimal(9), 1, ReadingState.WRITTEN_OFF, "cus_2")])
    prune(ledger)
    again = forget(ledger, customer="cus_2")
    assert (again.traces, again.complete) == (0, True)
    assert again.advice.startswith("2 readings still carry cus_2.")
    assert forget(ledger, customer="cus_3").advice == "Nothing in this ledger named whom you asked for."


def test_the_session_of_skipped_runs_is_forgotten_with_it(ledger: Ledger) -> None:
    fill(ledger)
    Leads(ledger).record([named("theirs", None, ReadingState.SKIPPED, session=SESSION, account="acct_1")])
    assert forget(ledger, session=SESSION).readings == 5
    for account in ("", "acct_1"):
        captured = {"email": "new@example.com", "account": account, "bill_from": "first_message"}
        assert Leads(ledger).capture(SESSION, **captured) == 0


def test_a_session_is_one_persons_on_its_own_account_alone_unless_it_is_what_was_asked_for(ledger: Ledger) -> None:
    captured, bob = Leads(ledger), "bob@example.com"
    captured.capture("s1", email=MAIL, account="acct_1")
    for session in ("s1", "s2"):
        captured.capture(session, email=bob, account="acct_2")
    ledger.record([named("bobs", Reference("email", bob), account="acct_2")])
    captured.record([named("skipped", None, ReadingState.SKIPPED, session="s1", account="acct_3")])
    done = forget(ledger, email=MAIL)
    assert (done.leads, done.readings) == (1, 0)
    assert captured.find("s1", "acct_2") == captured.find("s2", "acct_2") == {"email": bob}
    asked = forget(ledger, session="s1")
    assert (asked.leads, asked.readings) == (2, 2)


def test_what_a_person_led_to_on_a_connected_account_goes_also_when_its_readings_were_pruned(ledger: Ledger) -> None:
    Leads(ledger).capture(SESSION, email=MAIL, name=NAME, account="acct_shop")
    with ledger.deliver_lane().transaction() as connection:
        remember(connection, "acct_1", f"email:{MAIL}", "cus_1", 1)
        remember(connection, "acct_shop", f"name:{NAME}", "cus_2", 1)
    assert forget(ledger, email=MAIL).traces == 2
    with ledger.read() as connection:
        assert connection.execute(select(payers)).all() == []


def test_an_address_is_erased_however_its_letters_were_written(ledger: Ledger) -> None:
    written = "Canary-Mail@example.com"
    ledger.record([named("waits", Reference("email", written))])
    Leads(ledger).capture("s1", email="CANARY-mail@example.com")
    with ledger.deliver_lane().transaction() as connection:
        remember(connection, "", f"email:{written}", "cus_1", 1)
        connection.execute(insert(acts), [{"at": 1, "act": "assign", "subject": "held", "detail": f"email:{written}"}])
    done = forget(ledger, email=MAIL)
    assert (done.leads, done.readings, done.traces, done.complete) == (1, 1, 2, True)
    assert "canary" not in dump(ledger).lower()


def test_where_an_address_led_is_forgotten_in_any_spelling_when_nothing_else_names_it(ledger: Ledger) -> None:
    with ledger.deliver_lane().transaction() as connection:
        remember(connection, "acct_1", "email:Canary-Mail@example.com", "cus_1", 1)
        remember(connection, "acct_1", "email:canary-mail@example.com", "cus_2", 1)
        remember(connection, "acct_1", "email:another-mail@example.com", "cus_3", 1)
    assert forget(ledger, email="canary-MAIL@example.com").traces == 2


def test_a_number_is_read_as_dialled_where_the_caller_or_the_handlers_leads_say(tmp_path: Path) -> None:
    ledger = f"sqlite:///{tmp_path}/l.db"
    for customer, more in ((from_lead("phone", region="DE"), {}), (from_lead("phone"), {"region": "DE"})):
        with StripeMeterCallbackHandler(Tokens("tokens"), customer=customer, ledger=ledger, deliver=False) as meter:
            meter.leads.capture("s", phone=PHONE)
            assert meter.forget(phone="030 901820", **more).leads == 1


def test_it_says_so_when_nothing_named_the_person(ledger: Ledger) -> None:
    done = forget(ledger, email=MAIL)
    assert (done.complete, done.advice) == (True, "Nothing in this ledger named whom you asked for.")


def test_nobody_is_erased_by_mistake(ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        forget(ledger)
    with pytest.raises(ConfigurationError, match="e-mail") as refused:
        forget(ledger, email="canary")
    assert "canary" not in str(refused.value)


def test_among_thousands_of_rows_that_moved_about_no_byte_is_left(tmp_path: Path) -> None:
    """Pages split, merge and are reused; erased text must not survive in one of their gaps."""
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    chance = random.Random(7)
    people = [f"person{number:04}-{'x' * chance.randrange(80)}@example.com" for number in range(400)]
    for turn in range(5):
        batch = [named(f"{chance.random()}", Reference("email", one)) for one in chance.sample(people, 300)]
        ledger.record(batch)
        Leads(ledger).capture(f"{chance.random()}-{turn}", email=people[turn])
    for one in people[:20]:
        done = forget(ledger, email=one)
        assert done.complete, done.advice
        assert found_in_files(ledger, one, one.partition("@")[0][:11]) == []
    assert found_in_files(ledger, people[50]) == [people[50]]
    ledger.close()


def test_while_somebody_else_reads_it_says_to_run_it_again(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db?timeout=0")
    fill(ledger)
    other = create_engine(f"sqlite:///{tmp_path}/l.db")
    with other.connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT count(*) FROM readings").all()
        done = forget(ledger, email=MAIL)
        assert (done.leads, done.complete) == (2, False)
        assert "again" in done.advice
    other.dispose()
    assert found_in_files(ledger, MAIL) == [MAIL]
    assert forget(ledger, email=MAIL, name=NAME, phone=PHONE).complete
    assert found_in_files(ledger, *CANARIES) == []
    ledger.close()


def test_the_command_erases_and_answers_honestly(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.db?timeout=0"
    ledger = Ledger(url)
    fill(ledger)

    def call(code: int, *arguments: str) -> Any:
        result = CliRunner().invoke(app, ["forget", "--ledger", url, *arguments])
        assert result.exit_code == code, result.output
        assert "canary" not in result.output
        return result

    with ledger.read() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT count(*) FROM readings").all()
        assert "Run this again" in call(1, "--email", MAIL).stderr
    assert json.loads(call(0, "--email", MAIL, "--json").stdout)["complete"] is True
    assert found_in_files(ledger, MAIL) == []
    assert "at least one" in call(2).stderr
    ledger.close()
