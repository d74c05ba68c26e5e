"""A real agent server: the user whom it authenticated pays, whatever the client says and wherever it says it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from agent_serving import (
    BY_CONFIG,
    BY_CONTEXT,
    CLAIMS,
    FORGERIES,
    HELLO,
    METADATA,
    SECRET,
    WAIT,
    Bills,
    chat,
    client,
    install,
    owed,
)  # fmt: skip
from conftest import wait_until
from serving import KEYS, Server, agent_server

from langchain_stripe_meter.agents import sign_customer
from langchain_stripe_meter.ledger.leads import Leads
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

pytest.importorskip("langgraph_cli", reason="langgraph-cli[inmem] is not installed")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name in ("ai_tokens_used", "everything", "answers"):
            sandbox.create_meter(name)
        for name in ("ann", "bob", "evil"):
            sandbox.create_customer(id=f"cus_{name}")
        sandbox.create_customer(id="cus_victim", email="victim@example.com")
        yield sandbox


@pytest.fixture(scope="module")
def server(sandbox: StripeSandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with agent_server(folder, install(folder, sandbox)) as server:
        yield server
        server.terminate()
        for bad in ("BlockingError", "could not be recorded", "Error in StripeMeter", SECRET, "smt1."):
            assert bad not in server.said()


@pytest.fixture(scope="module")
def ledger(server: Server) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{server.log.parent}/ledger.db")
    yield ledger
    ledger.close()


@pytest.fixture
def bills(ledger: Ledger, sandbox: StripeSandbox) -> Bills:
    return Bills(ledger, sandbox)


def test_each_user_pays_for_their_own_runs_and_a_forging_client_changes_nothing(server: Server, bills: Bills) -> None:
    async def talk() -> None:
        async with client(server, "ann") as ann, client(server, "bob") as bob:
            thread = await ann.threads.create()
            await ann.runs.wait(thread["thread_id"], "agent", input=HELLO)
            await asyncio.gather(
                ann.runs.wait(None, "agent", input=HELLO, **BY_CONFIG),
                bob.runs.wait(None, "agent", input=HELLO, **BY_CONFIG),
            )
            async for _ in bob.runs.stream(None, "agent", input=HELLO, stream_mode="messages", **BY_CONTEXT):
                pass
            thread = await bob.threads.create()
            background = await bob.runs.create(thread["thread_id"], "agent", input=HELLO)
            await bob.runs.join(thread["thread_id"], background["run_id"])

    asyncio.run(talk())
    assert bills.since() == {("ai_tokens_used", "cus_ann"): 2 * 120, ("ai_tokens_used", "cus_bob"): 3 * 120}


@pytest.mark.parametrize("forged", FORGERIES, ids=["config", "context"])
@pytest.mark.parametrize("on_thread", [False, True])
@pytest.mark.parametrize("user", ["ann", "eve"])
def test_what_a_run_is_created_with_decides_nothing(
    server: Server, bills: Bills, forged: dict[str, Any], on_thread: bool, user: str
) -> None:
    """Whoever has no Stripe customer, as eve, rides free, but not unseen."""

    async def talk(known: Any) -> None:
        metadata = {"metadata": METADATA, "thread_id": str(uuid4())}
        thread = (await known.threads.create(**metadata))["thread_id"] if on_thread else None
        await known.runs.wait(thread, "open", input=HELLO, **forged)
        async for _ in known.runs.stream(thread, "open", input=HELLO, stream_mode=["events", "messages"], **forged):
            pass
        if thread is not None:
            run = await known.runs.create(thread, "open", input=HELLO, multitask_strategy="enqueue", **forged)
            await known.runs.join(thread, run["run_id"])

    chat(server, user, talk)
    runs = 3 if on_thread else 2
    assert bills.since() == (owed("ann", runs) if user == "ann" else {("", "skipped"): 2 * runs})


@pytest.mark.parametrize("forged", FORGERIES, ids=["config", "context"])
def test_usage_that_a_node_records_is_the_authenticated_users_too(
    server: Server, bills: Bills, forged: dict[str, Any]
) -> None:
    async def talk(known: Any) -> None:
        await known.runs.wait(None, "without_a_run", input=HELLO, **forged)

    chat(server, "ann", talk)
    chat(server, "eve", talk)
    assert bills.since() == {("everything", "cus_ann"): 12, ("", "skipped"): 2}


@pytest.mark.parametrize("forged", FORGERIES, ids=["config", "context"])
def test_an_assistant_that_a_client_made_decides_nothing(server: Server, bills: Bills, forged: dict[str, Any]) -> None:
    async def talk(known: Any) -> None:
        made = await known.assistants.create("open", **forged)
        await known.runs.wait(None, made["assistant_id"], input=HELLO)
        await known.assistants.update(made["assistant_id"], **forged)
        await known.runs.wait(None, made["assistant_id"], input=HELLO, **forged)

    chat(server, "bob", talk)
    chat(server, "eve", talk)
    assert bills.since() == {**owed("bob", 2), ("", "skipped"): 4}


def test_the_assistant_of_a_graph_cannot_be_changed_by_a_client(server: Server, bills: Bills) -> None:
    async def of_graph(known: Any) -> str:
        thread = (await known.threads.create())["thread_id"]
        run = await known.runs.create(thread, "open", input=HELLO)
        await known.runs.join(thread, run["run_id"])
        return str(run["assistant_id"])

    shared = chat(server, "bob", of_graph)
    with pytest.raises(Exception, match=f"{shared} not found"):
        chat(server, "eve", lambda eve: eve.assistants.update(shared, **BY_CONFIG))
    chat(server, "bob", lambda bob: bob.runs.wait(None, "open", input=HELLO))
    assert bills.since() == owed("bob", 2)


def test_a_run_that_waited_for_a_person_is_paid_by_who_resumes_it_whatever_they_forge(
    server: Server, bills: Bills
) -> None:
    async def talk(known: Any) -> None:
        thread = (await known.threads.create(metadata=METADATA))["thread_id"]
        await known.runs.wait(thread, "open", input=WAIT, **BY_CONFIG)
        await known.runs.wait(thread, "open", command={"resume": "yes"}, **BY_CONFIG)

    chat(server, "ann", talk)
    chat(server, "eve", talk)
    assert bills.since() == {**owed("ann"), ("", "skipped"): 2}


def test_only_its_owner_can_make_the_lead_of_a_thread_pay(server: Server, ledger: Ledger, bills: Bills) -> None:
    """Where leads pay, whoever may use a thread may spend its lead's money: the example's auth forbids it."""
    thread = str(uuid4())
    Leads(ledger).capture(thread, email="victim@example.com")

    async def own(known: Any) -> None:
        await known.threads.create(thread_id=thread)
        await known.runs.wait(thread, "open", input=HELLO)

    async def steal(known: Any) -> None:
        claimed = {**CLAIMS, **dict.fromkeys(KEYS, thread)}
        config = {"metadata": claimed, "configurable": claimed}
        await known.runs.wait(None, "open", input=HELLO, metadata=claimed, config=config)
        mine = (await known.threads.create(metadata=claimed))["thread_id"]
        await known.runs.wait(mine, "open", input=HELLO, metadata=claimed, config=config)
        await known.runs.wait(thread, "open", input=HELLO)

    chat(server, "eve", own)  # she has no customer of her own, so the lead of her thread pays
    assert bills.since() == owed("victim")
    with pytest.raises(Exception, match="404"):
        chat(server, "bob", steal)
    assert bills.since() == {**owed("victim"), **owed("bob", 2)}


@pytest.mark.parametrize("place", ["metadata", "config metadata", "configurable", "context"])
def test_a_token_that_the_application_signed_is_believed_where_the_user_has_no_customer(
    server: Server, bills: Bills, place: str
) -> None:
    token = {"stripe_customer_token": sign_customer("cus_bob", SECRET, expires_at=10**11)}
    sent: dict[str, Any] = {
        "metadata": {"metadata": token},
        "config metadata": {"config": {"metadata": token}},
        "configurable": {"config": {"configurable": token}},
        "context": {"context": token},
    }[place]
    chat(server, "eve", lambda eve: eve.runs.wait(None, "open", input=HELLO, **sent))
    assert bills.since() == owed("bob")


@pytest.mark.parametrize("headers", [{}, {"x-auth-scheme": "langsmith"}], ids=["no token", "as the Studio"])
def test_a_client_without_a_known_token_is_turned_away(
    server: Server, sandbox: StripeSandbox, bills: Bills, headers: dict[str, str]
) -> None:
    for user in ("evil", None):
        with pytest.raises(Exception, match="401"):
            chat(server, user, lambda evil: evil.runs.wait(None, "agent", input=HELLO, **BY_CONFIG), **headers)
    assert bills.since() == {}


def test_a_cron_is_refused_for_its_runs_would_not_know_who_pays(server: Server, bills: Bills) -> None:
    async def talk(ann: Any) -> None:
        thread = (await ann.threads.create())["thread_id"]
        cron: dict[str, Any] = {"schedule": "* * * * *", "input": HELLO}
        for forged in ({}, *FORGERIES):
            with pytest.raises(Exception, match="crons are not allowed"):
                await ann.crons.create("agent", **cron, **forged)
            with pytest.raises(Exception, match="crons are not allowed"):
                await ann.crons.create_for_thread(thread, "agent", **cron, **forged)

    chat(server, "ann", talk)
    assert bills.since() == {}


def test_a_graph_inside_a_graph_with_a_thread_of_its_own_is_paid_by_the_same_user(server: Server, bills: Bills) -> None:
    chat(server, "ann", lambda ann: ann.runs.wait(None, "outer", input=HELLO, **BY_CONFIG))
    assert bills.since() == owed("ann")


def test_a_handler_in_a_module_is_one_and_those_of_a_graph_file_bill_each_run_once(
    server: Server, bills: Bills
) -> None:
    async def talk(known: Any) -> None:
        for graph in ("one", "other", "agent"):
            await known.runs.wait(None, graph, input=HELLO)

    chat(server, "ann", talk)
    assert server.said().count("metering.py is imported") == 1
    assert server.said().count("own.py is imported") == 2  # once for each of its graphs: two handlers, one ledger
    assert bills.since() == {("ai_tokens_used", "cus_ann"): 3 * 120}


def test_a_run_that_its_client_cancels_is_billed_as_an_estimate_of_what_had_come(server: Server, bills: Bills) -> None:
    async def leave(ann: Any) -> None:
        pieces = ann.runs.stream(None, "slow", input=HELLO, stream_mode="messages-tuple", on_disconnect="cancel")
        async for piece in pieces:
            if "three" in json.dumps(piece.data):
                break
        await pieces.aclose()

    chat(server, "ann", leave)
    wait_until(bills.since)
    billed = bills.since()
    assert set(billed) == {("ai_tokens_used", "cus_ann")}
    assert 3 <= billed["ai_tokens_used", "cus_ann"] <= 20
