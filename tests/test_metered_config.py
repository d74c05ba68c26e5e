"""Whom the application passes to ``metered_config`` pays, or the call is refused: nobody rides free over a setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel, SimpleChatModel
from langchain_core.messages import AIMessage

from langchain_stripe_meter import (
    Credits,
    StripeMeterCallbackHandler,
    Tokens,
    first_of,
    from_auth_user,
    from_context,
    from_lead,
    from_metadata,
)
from langchain_stripe_meter.agents import from_signed_token, metered_config, sign_customer
from langchain_stripe_meter.core.tenants import Tenant, lead_fields
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError
from langchain_stripe_meter.ledger.views import tail

KEY = "stripe_customer_id"
SECRET = "a-secret-of-more-than-32-bytes-indeed"
Recording = Callable[..., StripeMeterCallbackHandler]


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., StripeMeterCallbackHandler]:
    """Makes handlers that only record."""

    def make(customer: Any = None, **options: Any) -> StripeMeterCallbackHandler:
        ledger = f"sqlite:///{tmp_path}/ledger.db"
        return StripeMeterCallbackHandler(Tokens("tokens"), customer=customer, ledger=ledger, deliver=False, **options)

    return make


class User:
    """As an application's own user may be."""

    def __init__(self, stripe_customer_id: Any = "cus_1") -> None:
        self.stripe_customer_id = stripe_customer_id


def pays(meter: StripeMeterCallbackHandler, config: Any) -> list[tuple[str, str | None]]:
    """The state and the payer of what a run with ``config`` records."""
    answer = AIMessage("Hello!", usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2})
    GenericFakeChatModel(messages=iter([answer]), disable_streaming=True).invoke("Hello?", config)
    return [(row.state, row.customer) for row in tail(meter._ledger, 10)]


@pytest.mark.parametrize(
    ("source", "customer"),
    [
        (None, "cus_1"),
        (None, User()),
        (from_auth_user(KEY), {KEY: "cus_1"}),
        (from_auth_user("plan_customer"), {"plan_customer": "cus_1"}),
        (first_of(from_lead(), from_auth_user("other"), from_auth_user(KEY), "cus_2"), "cus_1"),
        (first_of(from_metadata(KEY), from_signed_token(secret=SECRET), from_auth_user(KEY)), "cus_1"),
    ],
)
def test_whom_the_application_names_pays(source: Any, customer: object, recording: Recording) -> None:
    with recording(source) as meter:
        config = metered_config(meter, customer=customer, config={"tags": ["a"], "metadata": {KEY: "cus_evil"}})
        assert config["tags"] == ["a"]
        assert pays(meter, config) == [("resolved", "cus_1")]


@pytest.mark.parametrize(
    "source",
    [
        first_of(from_signed_token(secret=SECRET), from_auth_user(KEY)),
        first_of(from_metadata("theirs", trust_client=True), first_of(from_lead(), from_auth_user(KEY))),
        first_of(from_lead(trust_client=True), from_auth_user("other"), from_auth_user(KEY)),
        first_of(from_lead(), from_auth_user(KEY)),
    ],
)
def test_whom_the_application_names_pays_whatever_stands_before_in_first_of(source: Any, recording: Recording) -> None:
    """A token, metadata that is trusted and a captured lead say who pays only where the application names nobody."""
    with recording(source) as meter:
        if lead_fields(source):
            meter.leads.capture("s1", email="ann@example.com")
        token = sign_customer("cus_2", SECRET, expires_at=10**11)
        config = {"metadata": {"theirs": "cus_2", "stripe_customer_token": token}}
        assert pays(meter, metered_config(meter, customer="cus_1", config=config, session="s1")) == [
            ("resolved", "cus_1")
        ]


class Session:
    """Somebody as a database's session knows them, until it is closed."""

    is_open = True

    @property
    def stripe_customer_id(self) -> str:
        if not self.is_open:
            raise RuntimeError
        return "cus_1"


class Sized(User):
    """A user that is a container, of its permissions say, and has none."""

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("tenant", [None, lambda facts: Tenant("acct_1")])
def test_who_pays_is_read_at_the_call_whatever_becomes_of_the_user(tenant: Any, recording: Recording) -> None:
    with recording(from_auth_user(KEY), tenant=tenant) as meter:
        closed, changed, emptied = Session(), User(), {KEY: "cus_1"}
        configs = [metered_config(meter, customer=one) for one in (closed, changed, emptied, Sized())]
        closed.is_open = False
        changed.stripe_customer_id = "cus_2"
        emptied.clear()
        for config in configs:
            assert pays(meter, config)[-1] == ("resolved", "cus_1")
        with pytest.raises(RuntimeError):
            metered_config(meter, customer=closed)


def test_what_a_handler_added_later_reads_of_the_user_is_read_at_the_end(recording: Recording, tmp_path: Path) -> None:
    with recording(from_auth_user(KEY)) as meter:
        user = {KEY: "cus_1", "other": "cus_2"}
        config = metered_config(meter, customer=user)
        ledger = f"sqlite:///{tmp_path}/other.db"
        with StripeMeterCallbackHandler(
            Tokens("t"), customer=from_auth_user("other"), ledger=ledger, deliver=False
        ) as later:
            config["callbacks"] = [meter, later]
            assert pays(later, config) == [("resolved", "cus_2")]


@pytest.mark.parametrize("customer", [None, {KEY: None}])
def test_where_the_application_names_nobody_the_sources_go_in_order(customer: object, recording: Recording) -> None:
    with recording(first_of(from_signed_token(secret=SECRET), from_auth_user(KEY))) as meter:
        token = sign_customer("cus_2", SECRET, expires_at=10**11)
        config = metered_config(meter, customer=customer, config={"metadata": {"stripe_customer_token": token}})
        assert pays(meter, config) == [("resolved", "cus_2")]


@pytest.mark.parametrize("customer", [None, "", {KEY: None}, User(None), User("")])
def test_who_has_no_customer_yet_is_skipped_like_a_stranger(customer: object, recording: Recording) -> None:
    with recording(from_auth_user(KEY)) as meter:
        assert pays(meter, metered_config(meter, customer=customer)) == [("skipped", None)]


@pytest.mark.parametrize(
    "source",
    [
        from_metadata(KEY),
        from_metadata(KEY, trust_client=True),
        from_context(KEY),
        from_lead(),
        from_signed_token(secret=SECRET),
        "cus_2",
        first_of("cus_2", from_auth_user(KEY)),
        first_of(first_of(from_metadata(KEY), "cus_2"), from_auth_user(KEY)),
    ],
)
def test_a_handler_that_does_not_read_whom_the_application_names_is_refused_at_the_door(
    source: Any, recording: Recording
) -> None:
    with recording(source) as meter:
        with pytest.raises(ConfigurationError, match=r"customer=from_auth_user\('stripe_customer_id'\)"):
            metered_config(meter, customer="cus_1", config={})
        assert metered_config(meter, customer=None)["callbacks"] == [meter]


@pytest.mark.parametrize("customer", ["cus_1", {KEY: "cus_1"}, {}, User(), 5, object()])
def test_a_user_without_the_key_that_the_handler_reads_is_refused_at_the_door(
    customer: object, recording: Recording
) -> None:
    with recording(from_auth_user("x_id")) as meter, pytest.raises(ConfigurationError, match="'x_id'"):
        metered_config(meter, customer=customer)


def test_the_customer_source_of_the_tenant_is_the_one_that_must_read_it(recording: Recording) -> None:
    def tenant(facts: Any) -> Tenant | None:
        name = getattr(facts.auth_user, "name", None)
        return None if name is None else Tenant("acct_1", customer=from_auth_user(name))

    with recording("cus_2", tenant=tenant) as meter:
        user = User()
        assert metered_config(meter, customer=user)["callbacks"] == [meter]  # nobody's, by the application's own word
        user.name = KEY  # type: ignore[attr-defined]
        assert pays(meter, metered_config(meter, customer=user)) == [("resolved", "cus_1")]
        user.name = "x_id"  # type: ignore[attr-defined]
        with pytest.raises(ConfigurationError, match="'x_id'"):
            metered_config(meter, customer=user)


@pytest.mark.parametrize("customer", ["bob@example.com", {KEY: "bob@example.com"}, User("cus_"), User(5)])
def test_what_is_no_customers_id_is_refused_without_repeating_it(customer: object, recording: Recording) -> None:
    with recording() as meter, pytest.raises(InvalidValueError, match=r"from_lead\(\)") as caught:
        metered_config(meter, customer=customer)
    assert "bob" not in str(caught.value)


@pytest.mark.parametrize("source", [from_lead(), from_metadata(KEY), "cus_2"])
def test_an_address_is_no_customers_id_whatever_the_handler_reads(source: Any, recording: Recording) -> None:
    with recording(source) as meter, pytest.raises(InvalidValueError, match=r"leads\.capture"):
        metered_config(meter, customer="bob@example.com")


class Deployed(SimpleChatModel):
    """A model whose answers, and whose name for tracing, do not say which it is; only its parameters may."""

    says_its_name: bool

    @property
    def _llm_type(self) -> str:
        return "deployed"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": "dear"} if self.says_its_name else {}

    def _call(self, *args: Any, **kwargs: Any) -> str:
        return "Hello!"


CHEAP = {"ls_model_name": "cheap", "ls_provider": "cheap"}


@pytest.mark.parametrize("place", ["metadata", "configurable"])
def test_a_client_does_not_say_by_which_model_it_is_priced(place: str, tmp_path: Path) -> None:
    meters = (Credits("calls", {"cheap": 1}, default=10, per="call"), Credits("messages", {"cheap": 1}, default=10))
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    with StripeMeterCallbackHandler(*meters, ledger=ledger, deliver=False) as meter:
        config = metered_config(meter, customer="cus_1", config={place: {**CHEAP, "colour": "red"}})
        assert config[place]["colour"] == "red"  # type: ignore[literal-required]
        Deployed(says_its_name=False).invoke("Hi", config)
        assert {(row.event_name, row.value) for row in tail(meter._ledger)} == {("calls", 10), ("messages", 10)}


@pytest.mark.parametrize(("metadata", "credits"), [({"langgraph_api_version": "1"}, 10), ({}, 1)])
def test_on_a_server_the_models_own_parameters_name_it_before_the_metadata(
    metadata: dict[str, str], credits: int, tmp_path: Path
) -> None:
    calls, ledger = Credits("calls", {"cheap": 1}, default=10, per="call"), f"sqlite:///{tmp_path}/ledger.db"
    with StripeMeterCallbackHandler(calls, customer="cus_1", ledger=ledger, deliver=False) as meter:
        Deployed(says_its_name=True).invoke("Hi", {"callbacks": [meter], "metadata": {**CHEAP, **metadata}})
        assert [row.value for row in tail(meter._ledger)] == [credits]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"session": 5}, "session=.* int"),
        ({"config": "x"}, "config=.* str"),
        ({"config": []}, "config=.* list"),
        ({"meter": BaseCallbackHandler()}, "BaseCallbackHandler"),
        ({"meter": None}, "NoneType"),
    ],
)
def test_what_is_no_argument_is_refused_by_name(arguments: dict[str, Any], said: str, recording: Recording) -> None:
    with recording() as meter, pytest.raises(ConfigurationError, match=said):
        metered_config(**{"meter": meter, "customer": "cus_1", **arguments})
