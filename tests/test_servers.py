"""LangServe and an application of one's own, over HTTP: whom the application authenticated pays, and no other."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from serving import EVIL, KEYS, Server, uvicorn

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.agents import metered_config, sign_customer
from langchain_stripe_meter.core.tokens import Secrets, sign
from langchain_stripe_meter.observed import CLIENT_RUN, ClientRun
from langchain_stripe_meter.sandbox import StripeSandbox

SECRET = "a-secret-of-more-than-32-bytes-indeed"
METERING = """
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_stripe_meter import (
    Messages, StripeMeterCallbackHandler, Tokens, first_of, from_auth_user, from_context, from_lead, from_metadata)
from langchain_stripe_meter.agents import from_signed_token

KEY = "stripe_customer_id"
USAGE = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
said = from_auth_user(KEY), from_metadata(KEY), from_metadata("customer"), from_context(KEY), from_lead()
everywhere = first_of(from_signed_token(), *said)
meter = StripeMeterCallbackHandler(Tokens("tokens"), Messages("messages"), customer=everywhere)

def model():
    def answers():
        while True:
            yield AIMessage("Hello!", usage_metadata=USAGE)
    return GenericFakeChatModel(messages=answers(), disable_streaming=True)
"""
APP = """
import dataclasses
import langgraph_api  # as an application may that is no agent server
from fastapi import FastAPI, Request
from langchain_core.prompts import ChatPromptTemplate
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langserve import add_routes
from metering import meter, model
from langchain_stripe_meter.agents import metered_config

CUSTOMERS = {"Bearer token-of-ann": "cus_ann", "Bearer token-of-bob": "cus_bob"}
SESSIONS = {"Bearer token-of-ann": "session-of-ann"}
meter.leads.capture("session-of-victim", email="victim@example.com")
meter.leads.capture("session-of-lead", email="lead@example.com")

def paid(config, request: Request):
    user = CUSTOMERS.get(request.headers.get("authorization"))
    return metered_config(meter, customer=user, config=config)

async def apaid(config, request: Request):
    return paid(config, request)

chain = ChatPromptTemplate.from_template("{question}") | model()
builder = StateGraph(MessagesState)
builder.add_node("answer", lambda state: {"messages": [model().invoke(state["messages"])]})
builder.add_edge(START, "answer")
graph = builder.compile(checkpointer=InMemorySaver())

app = FastAPI(lifespan=meter.lifespan)
keys = ("configurable", "metadata")
attached = chain.with_config(callbacks=[meter])
add_routes(app, attached, path="/chain", config_keys=keys, per_req_config_modifier=paid)
add_routes(app, model().with_config(callbacks=[meter]), path="/model", config_keys=keys, per_req_config_modifier=paid)
add_routes(app, attached, path="/usual", per_req_config_modifier=apaid)

@app.post("/own")
async def own(request: Request):
    body = await request.json()
    answer = await chain.ainvoke(body["input"], paid(body.get("config"), request))
    return answer.content

@app.post("/graph")
async def ask(request: Request):
    body = await request.json()
    said = {"messages": [("user", "Hello")]}
    await graph.ainvoke(said, paid(body["config"], request), context=body.get("context"))

@app.post("/lead")
async def lead(request: Request):
    body = await request.json()
    config = metered_config(meter, customer=None, config=body["config"], session="session-of-lead")
    return (await chain.ainvoke(body["input"], config)).content

@app.post("/careless")
async def careless(request: Request):
    body = await request.json()
    return (await chain.ainvoke(body["input"], {**body["config"], "callbacks": [meter]})).content

@app.get("/report")
async def report():
    return dataclasses.asdict(await meter.aflush(60))
"""
FORGED: dict[str, Any] = {
    "metadata": {
        "stripe_customer_id": EVIL,
        "lead": {"email": "victim@example.com"},
        **dict.fromkeys(KEYS, "session-of-victim"),
        "stripe_customer_token": sign_customer(EVIL, "another" + SECRET, expires_at=10**11),
        "customer": EVIL,
        CLIENT_RUN: {"user": {"stripe_customer_id": EVIL}, "session": "session-of-victim"},
    },
    "configurable": {
        "stripe_customer_id": EVIL,
        **dict.fromkeys(KEYS, "session-of-victim"),
        "stripe_customer_token": sign(EVIL, Secrets(SECRET), expires_at=1),
        "langgraph_auth_user": {"identity": "evil", "stripe_customer_id": EVIL},
        "langgraph_auth_user_id": "evil",
        "__pregel_runtime": {"context": {"stripe_customer_id": EVIL}},
        CLIENT_RUN: "client",
    },
}
QUESTION = {"question": "Hello?"}
IDLE = {"metadata": {}, "configurable": {}}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name in ("tokens", "messages"):
            sandbox.create_meter(name)
        for name in ("ann", "bob", "evil"):
            sandbox.create_customer(id=f"cus_{name}")
        for name in ("victim", "lead"):
            sandbox.create_customer(id=f"cus_{name}", email=f"{name}@example.com")
        yield sandbox


@pytest.fixture(scope="module")
def server(sandbox: StripeSandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("application")
    (folder / "metering.py").write_text(METERING)
    (folder / "app.py").write_text(APP)
    environment = {
        **sandbox.environment(),
        "STRIPE_METER_LEDGER": f"sqlite:///{folder}/ledger.db",
        "STRIPE_METER_TOKEN_SECRET": SECRET,
    }
    with uvicorn(folder, "app:app", environment) as server:
        yield server
        assert server.terminate() in (0, -15)
        for bad in ("Traceback", "could not be recorded", "Error in ", SECRET, *FORGED["metadata"].values()):
            assert not isinstance(bad, str) or bad not in server.said(), server.said()[-4000:]


class Bills:
    """What each customer came to owe, and how many readings had nobody to bill, since this was made."""

    def __init__(self, server: Server, sandbox: StripeSandbox) -> None:
        self._server, self._sandbox = server, sandbox
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        report = self._server.get("/report")
        assert report["pending"] == report["held"] == 0
        billed = {who: int(value) for who, value in self._sandbox.billed("tokens").items()}
        messages = {f"{who} messages": int(value) for who, value in self._sandbox.billed("messages").items()}
        return {**billed, **messages, "skipped": report["skipped"]}

    def since(self) -> dict[str, int]:
        now = self._now()
        return {who: value - self._before.get(who, 0) for who, value in now.items() if value != self._before.get(who)}


@pytest.fixture
def bills(server: Server, sandbox: StripeSandbox) -> Bills:
    return Bills(server, sandbox)


def langserve_bodies(question: object, config: dict[str, Any]) -> dict[str, Any]:
    one = {"input": question, "config": config}
    return {
        "invoke": one,
        "stream": one,
        "stream_log": one,
        "stream_events": one,
        "batch": {"inputs": [question], "config": [config]},
    }


WAYS = ("invoke", "batch", "stream", "stream_log", "stream_events")
ONE = {"cus_ann": 120, "cus_ann messages": 1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", ["/chain", "/model"])
def test_behind_langserve_the_authenticated_user_pays_whatever_a_client_forges(
    server: Server, bills: Bills, path: str, way: str
) -> None:
    question: object = "Hello?" if path == "/model" else QUESTION
    answer = server.post(f"{path}/{way}", langserve_bodies(question, FORGED)[way], "ann")
    assert "Hello!" in answer
    assert "cus_ann" not in answer
    assert bills.since() == ONE
    server.post(f"{path}/{way}", langserve_bodies(question, FORGED)[way])  # a stranger, with the same forgeries
    assert bills.since() == {**ONE, "skipped": 2}


@pytest.mark.parametrize("way", WAYS)
def test_langserves_batch_needs_metadata_among_its_config_keys_else_it_is_skipped_and_counted(
    server: Server, bills: Bills, way: str
) -> None:
    forged = {"configurable": FORGED["configurable"]}
    server.post(f"/usual/{way}", langserve_bodies(QUESTION, forged)[way], "ann")
    assert bills.since() == ({"skipped": 2} if way == "batch" else ONE)


def test_in_an_application_of_ones_own_each_user_pays_for_their_own_runs(server: Server, bills: Bills) -> None:
    for user in ("ann", "bob", "bob"):
        server.post("/own", {"input": QUESTION, "config": FORGED}, user)
    server.post("/own", {"input": QUESTION}, "bob")
    assert bills.since() == {**ONE, "cus_bob": 360, "cus_bob messages": 3}


@pytest.mark.parametrize("config", [FORGED, IDLE], ids=["forges", "omits everything"])
def test_a_stranger_rides_free_but_not_unseen(server: Server, bills: Bills, config: dict[str, Any]) -> None:
    server.post("/own", {"input": QUESTION, "config": config})
    assert bills.since() == {"skipped": 2}


def test_a_graphs_context_and_thread_are_the_clients_word_too(server: Server, bills: Bills) -> None:
    body = {"config": FORGED, "context": {"stripe_customer_id": EVIL}}
    server.post("/graph", body, "ann")
    assert bills.since() == ONE
    server.post("/graph", body)
    assert bills.since() == {**ONE, "skipped": 2}


def test_the_lead_of_the_session_that_the_application_names_pays(server: Server, bills: Bills) -> None:
    server.post("/lead", {"input": QUESTION, "config": FORGED})
    assert bills.since() == {"cus_lead": 120, "cus_lead messages": 1}


@pytest.mark.parametrize("place", ["metadata", "configurable"])
def test_a_stranger_with_a_signed_token_pays_as_it_says(server: Server, bills: Bills, place: str) -> None:
    config = copy.deepcopy(FORGED)
    config[place]["stripe_customer_token"] = sign_customer("cus_bob", SECRET, expires_at=10**11)
    server.post("/own", {"input": QUESTION, "config": config})
    assert bills.since() == {"cus_bob": 120, "cus_bob messages": 1}


@pytest.mark.parametrize("place", ["metadata", "configurable"])
def test_whom_the_application_names_pays_before_any_token(server: Server, bills: Bills, place: str) -> None:
    config = copy.deepcopy(FORGED)
    config[place]["stripe_customer_token"] = sign_customer("cus_bob", SECRET, expires_at=10**11)
    server.post("/own", {"input": QUESTION, "config": config}, "ann")
    server.post("/chain/invoke", {"input": QUESTION, "config": config}, "ann")
    assert bills.since() == {"cus_ann": 240, "cus_ann messages": 2}


def test_a_client_that_names_its_run_again_and_again_pays_for_each(server: Server, bills: Bills) -> None:
    config = {"run_id": "01890a5d-ac96-774b-bcce-b302099a8057"}
    for _ in range(3):
        server.post("/own", {"input": QUESTION, "config": config}, "ann")
    assert bills.since() == {"cus_ann": 360, "cus_ann messages": 3}


def test_a_user_who_came_as_json_was_authenticated_by_nobody(server: Server, bills: Bills) -> None:
    """Even where an application hands on what its client says is authenticated, without ``metered_config``."""
    config = {**FORGED, "metadata": {"langgraph_api_version": "1.0"}}
    server.post("/careless", {"input": QUESTION, "config": config}, "ann")
    assert bills.since() == {"skipped": 2}


@pytest.mark.parametrize(
    "junk",
    [{}, {"metadata": None}, {"metadata": ["x"]}, {"configurable": "x"}, {"callbacks": ["x"]}, {"callbacks": {"a": 1}}],
)
def test_a_clients_config_may_be_anything_json_can_say(server: Server, bills: Bills, junk: dict[str, Any]) -> None:
    server.post("/own", {"input": QUESTION, "config": junk}, "ann")
    assert bills.since() == ONE


# -- the config itself


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[StripeMeterCallbackHandler]:
    with StripeMeterCallbackHandler(Tokens("t"), ledger=f"sqlite:///{tmp_path}/ledger.db", deliver=False) as meter:
        yield meter


def test_what_a_client_says_of_itself_is_taken_out_and_the_rest_of_its_config_stays(
    meter: StripeMeterCallbackHandler,
) -> None:
    given = copy.deepcopy({**FORGED, "context": {"x": 1}, "run_id": "1"})
    given["metadata"]["colour"] = given["configurable"]["colour"] = "red"
    before = copy.deepcopy(given)
    config: dict[str, Any] = {**metered_config(meter, customer="cus_1", config=given, session="s1")}
    assert given == before
    assert set(config) == {"callbacks", "metadata", "configurable"}
    kept = {"customer", "colour", "stripe_customer_token", "session_id", CLIENT_RUN}  # a token speaks for itself
    assert set(config["metadata"]) == kept
    assert config["metadata"]["session_id"] == "s1"
    assert set(config["configurable"]) == {"stripe_customer_id", "colour", "stripe_customer_token", *KEYS, CLIENT_RUN}


def test_the_applications_own_handlers_stay_and_the_meter_is_attached_once(
    meter: StripeMeterCallbackHandler,
) -> None:
    other = BaseCallbackHandler()
    for given in ([other, meter], CallbackManager([other, meter])):
        assert metered_config(meter, customer=None, config={"callbacks": given})["callbacks"] == [other, meter]


def test_the_mark_survives_copies_but_not_json_and_shows_nobody() -> None:
    mark = ClientRun({"stripe_customer_id": "cus_1"}, "s1")
    for same in (copy.copy(mark), copy.deepcopy(mark), pickle.loads(pickle.dumps(mark))):
        assert isinstance(same, ClientRun)
        assert (same.user, same.session) == (mark.user, mark.session)
    assert json.loads(json.dumps(mark)) == "client"
    assert not isinstance(json.loads(json.dumps(mark)), ClientRun)
    assert "cus_1" not in repr(mark)
