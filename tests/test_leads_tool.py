"""The tool with which an agent notes a typed address: for its own session only, and without repeating it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from metering import Shop

from langchain_stripe_meter import Tokens, first_of, from_lead, from_metadata
from langchain_stripe_meter.agents import capture_lead_tool
from langchain_stripe_meter.cli.demo import ScriptedModel, says
from langchain_stripe_meter.errors import ConfigurationError


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path, Tokens("tokens"), customer=from_lead()) as shop:
        shop.sandbox.create_customer(id="cus_ann", email="ann@example.com")
        yield shop


def agent_that_notes(shop: Shop, arguments: dict[str, Any], **options: Any) -> Any:
    """An agent whose model calls the tool with ``arguments``, and then thanks."""
    script = [says("", 10, 0, call={"name": "capture_lead", "args": arguments}), says("Thank you!", 5, 5)]
    return create_agent(ScriptedModel(script=script), [capture_lead_tool(shop.handler, **options)])


def talk(agent: Any, shop: Shop, thread: str | None = "t1") -> str:
    """The tool's answer."""
    config: dict[str, Any] = {"callbacks": [shop.handler]}
    if thread:
        config["configurable"] = {"thread_id": thread}
    messages = agent.invoke({"messages": [HumanMessage("It's me")]}, config)["messages"]
    return next(str(message.content) for message in messages if isinstance(message, ToolMessage))


def test_an_agent_notes_an_address_for_its_own_thread(shop: Shop) -> None:
    assert "is noted" in talk(agent_that_notes(shop, {"email": "ann@example.com"}), shop)
    assert shop.handler.leads.find("t1") == {"email": "ann@example.com"}
    assert shop.billed("cus_ann") == {"tokens": 10}, "the call before the capture stays skipped"


def test_what_the_application_captured_is_not_replaced_and_the_model_is_told(shop: Shop) -> None:
    shop.handler.leads.capture("t1", email="ann@example.com")
    for _ in range(2):
        answer = talk(agent_that_notes(shop, {"email": "victim@example.com"}), shop)
        assert answer == "An e-mail address was noted before and stays as it is. Do not ask for it again."
    assert shop.handler.leads.find("t1") == {"email": "ann@example.com"}
    assert shop.billed("cus_ann") == {"tokens": 40}


def test_what_was_typed_first_stays_too_also_from_the_first_message(shop: Shop) -> None:
    talk(agent_that_notes(shop, {"email": "ann@example.com"}, bill_from="first_message"), shop)
    answer = talk(agent_that_notes(shop, {"email": "victim@example.com"}, bill_from="first_message"), shop)
    assert "stays as it is" in answer
    assert shop.handler.leads.find("t1") == {"email": "ann@example.com"}


def test_a_field_is_noted_beside_those_that_the_application_captured(shop: Shop) -> None:
    shop.handler.leads.capture("t1", name="Ann")
    assert "is noted" in talk(agent_that_notes(shop, {"email": "ann@example.com"}), shop)
    assert shop.handler.leads.find("t1") == {"email": "ann@example.com", "name": "Ann"}


def test_of_two_who_note_at_once_the_first_is_kept(shop: Shop) -> None:
    barrier, leads = threading.Barrier(8), shop.handler.leads

    def note(number: int) -> bool:
        barrier.wait()
        return leads.note("t1", email=f"{number}@example.com", account="", region=None, bill_from="now")

    with ThreadPoolExecutor(8) as pool:
        noted = list(pool.map(note, range(8)))
    assert noted.count(True) == 1
    assert leads.find("t1") == {"email": f"{noted.index(True)}@example.com"}


def test_from_the_first_message_when_it_is_made_so(shop: Shop) -> None:
    agent = agent_that_notes(shop, {"email": "ann@example.com"}, bill_from="first_message")

    async def main() -> None:
        config: Any = {"callbacks": [shop.handler], "configurable": {"thread_id": "t1"}}
        await agent.ainvoke({"messages": [HumanMessage("It's me")]}, config)

    asyncio.run(main())
    assert shop.billed("cus_ann") == {"tokens": 20}


def test_the_model_cannot_choose_the_session(shop: Shop) -> None:
    tool = capture_lead_tool(shop.handler)
    assert set(tool.args) == {"email"}
    forged = {"email": "ann@example.com", "session": "victim", "config": {"metadata": {"thread_id": "victim"}}}
    talk(agent_that_notes(shop, forged), shop)
    assert shop.handler.leads.find("victim") is None
    assert shop.handler.leads.find("t1") == {"email": "ann@example.com"}


@pytest.mark.parametrize("typed", ["canary no address", "", "x" * 1_000_000, "a@b\r\nBcc: c@d.example", 7, None])
def test_bad_input_is_answered_politely_and_not_repeated(
    shop: Shop, typed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="langchain_stripe_meter")
    answer = talk(agent_that_notes(shop, {"email": typed}), shop)
    assert answer == "That is not a complete e-mail address. Ask the user to write it once more."
    assert shop.handler.leads.find("t1") is None
    assert "canary" not in caplog.text


def test_without_a_session_nothing_is_noted(shop: Shop) -> None:
    assert "no session" in talk(agent_that_notes(shop, {"email": "ann@example.com"}), shop, thread=None)


def test_a_ledger_that_fails_does_not_break_the_chat(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with shop.handler._ledger.database.lane("record").transaction() as connection:
        connection.exec_driver_sql("DROP TABLE leads")
    assert "just now" in talk(agent_that_notes(shop, {"email": "ann@example.com"}), shop)
    assert "no such table" in caplog.text
    assert "ann@" not in caplog.text


def test_a_phone_number_is_read_in_its_region(shop: Shop) -> None:
    handler = shop.another_handler(customer=first_of(from_metadata("cid"), from_lead("phone")))
    tool = capture_lead_tool(handler, by="phone", region="DE")
    assert "noted" in tool.invoke({"phone": "030 901820"}, {"metadata": {"session_id": "s"}})
    assert handler.leads.find("s") == {"phone": "+4930901820"}


def test_a_tool_that_notes_what_the_handler_does_not_read_is_refused(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match="by='phone'"):
        capture_lead_tool(shop.handler, by="phone")


def test_a_lead_is_noted_on_the_account_that_is_billed(shop: Shop) -> None:
    from langchain_stripe_meter.core.tenants import Tenant

    one = shop.another_handler(stripe_account="acct_1")
    several = shop.another_handler(tenant=lambda facts: Tenant("acct_2"))
    for handler, account in ((one, "acct_1"), (several, "acct_2")):
        tool = capture_lead_tool(handler)
        assert "noted" in tool.invoke({"email": "ann@example.com"}, {"metadata": {"session_id": "s"}})
        assert handler.leads.find("s", account) == {"email": "ann@example.com"}
    one.leads.capture("s2", email="bob@example.com")
    assert one.leads.find("s2") == several.leads.find("s2", "acct_1") == {"email": "bob@example.com"}
