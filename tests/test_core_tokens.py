"""Signed tokens: believed whoever carries them, because only the holder of the secret can have made them."""

from __future__ import annotations

import copy
import logging
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_stripe_meter import MeteringSettings
from langchain_stripe_meter.agents import from_signed_token, sign_customer
from langchain_stripe_meter.core.customers import Disbelieved, Facts, FromSignedToken, Skip, first_of
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.tokens import MAX_TOKEN, Secrets, sign
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError

NOW = 1_800_000_000
KEY = "stripe_customer_token"
SECRET = "canary-secret-of-more-than-32-bytes"
OTHER = "another-secret-of-more-than-32-bytes"
ACCOUNT = "acct_1032D82eZvKYlo2C"
NOTHING: Any = None
SEVEN: Any = 7


def token(customer: str = "cus_1", secret: Any = SECRET, *, expires_at: Any = NOW + 60, **more: Any) -> str:
    return sign(customer, Secrets(secret), expires_at=expires_at, **more)


def who(source: FromSignedToken, sent: object, *, now: int | None = NOW, place: str = "metadata") -> Reference | Skip:
    facts: dict[str, Any] = {place: {KEY: sent}}
    return source.identify(Facts(**facts, now=now, on_server=True))


@pytest.fixture
def source() -> FromSignedToken:
    return from_signed_token(secret=SECRET)


@pytest.mark.parametrize("place", ["metadata", "configurable"])
def test_a_token_is_believed_on_a_server_wherever_its_client_put_it(source: FromSignedToken, place: str) -> None:
    assert who(source, token(), place=place) == Reference("id", "cus_1")


def test_a_token_is_short_and_needs_no_escaping_in_an_address() -> None:
    made = token("cus_NffrFeUfNV2Hib", account=ACCOUNT)
    assert len(made) < 110
    assert set(made) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~")
    account = "acct_" + "x" * 100
    longest = token("cus_" + "x" * 100, account=account, expires_at=10**12 - 1)
    assert len(longest) == 272 < MAX_TOKEN
    assert isinstance(who(from_signed_token(secret=SECRET, account=account), longest), Reference)
    for bad in (account + "x", "acct_1\n"):
        with pytest.raises(InvalidValueError):
            token(account=bad)


def test_a_token_is_good_until_the_second_at_which_it_expires(source: FromSignedToken) -> None:
    assert isinstance(who(source, token(), now=NOW + 59), Reference)
    for late in (NOW + 60, NOW + 10**9):
        assert who(source, token(), now=late) == Disbelieved("the signed token has expired")
    assert who(source, token(), now=None) == Disbelieved("the signed token has expired")  # nobody said when it is
    when = datetime.fromtimestamp(NOW + 60, UTC)
    assert token(expires_at=when) == token()


@given(st.data())
def test_a_token_that_was_changed_anywhere_is_not_believed(data: st.DataObject) -> None:
    made = token(account=ACCOUNT)
    at = data.draw(st.integers(0, len(made) - 1))
    char = data.draw(st.characters(codec="utf-8").filter(lambda one: one != made[at]))
    skip = who(from_signed_token(secret=SECRET, account=ACCOUNT), made[:at] + char + made[at + 1 :])
    assert isinstance(skip, Skip)


@given(
    st.one_of(st.text(), st.from_regex(r"smt1\.cus_[a-z]+\.[0-9]+\.\.[A-Za-z0-9_-]{43}\Z"), st.none(), st.integers())
)
def test_anything_else_is_a_skip_that_does_not_repeat_it(sent: Any) -> None:
    skip = who(from_signed_token(secret=SECRET), sent)
    assert isinstance(skip, Skip)
    assert not sent or len(str(sent)) < 5 or str(sent) not in skip.reason


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (None, "there is no signed token under 'stripe_customer_token'"),
        ("", "there is no signed token under 'stripe_customer_token'"),
        ("cus_1", "the signed token is malformed"),
        (["smt1"], "the signed token is malformed"),
        ("smt1.cus_1.1..é", "the signed token is malformed"),
        ("\ud800", "the signed token is malformed"),
        (token().replace("smt1", "smt2"), "the signed token is malformed"),
        (token() + "=", "the signed token was not signed with our secret"),
        (token(secret=OTHER), "the signed token was not signed with our secret"),
        (token() + "x" * MAX_TOKEN, "the signed token is too long"),
        (token(account=ACCOUNT), "the signed token is for another Stripe account"),
    ],
)
def test_each_fault_has_its_reason_and_nothing_personal(source: FromSignedToken, sent: Any, reason: str) -> None:
    kind = Disbelieved if sent else Skip
    assert who(source, sent) == kind(reason)
    passed = Reference("id", "cus_house") if kind is Skip else Disbelieved(reason)
    assert first_of(source, "cus_house").identify(Facts({KEY: sent}, now=NOW, on_server=True)) == passed


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({}, "smt1.cus_1.1800000000..BelaX6uSQ1Vwu2HXIHz31KEfYYNmEqFl1aNMJBhR9GQ"),
        ({"account": "acct_1"}, "smt1.cus_1.1800000000.acct_1.Aw_K5xv0JFHQ6As6KXwBTM4bWpEXBjVfm3zJaeHEWD8"),
    ],
)
def test_an_upgrade_does_not_make_tokens_worthless_that_front_ends_hold(more: dict[str, Any], made: str) -> None:
    secret = "a secret of at least thirty-two bytes"
    assert token(secret=secret, expires_at=1_800_000_000, **more) == made
    assert who(from_signed_token(secret=secret, **more), made, now=NOW - 1) == Reference("id", "cus_1")


@pytest.mark.parametrize("expiry", ["", "soon", "-5", "1.5", "١٢", "9" * 13])
def test_our_own_signature_under_an_expiry_that_is_none_is_not_believed(source: FromSignedToken, expiry: str) -> None:
    text = f"smt1.cus_1.{expiry}."
    assert who(source, f"{text}.{source.secrets.sign(text)}") == Disbelieved("the signed token is malformed")


def test_a_token_expires_between_the_epoch_and_the_last_second_of_twelve_digits() -> None:
    assert [token(expires_at=at).split(".")[2] for at in (0, 10**12 - 1)] == ["0", "999999999999"]


def test_what_is_just_as_long_as_a_token_may_be_is_read(source: FromSignedToken) -> None:
    assert who(source, "x" * MAX_TOKEN) == Disbelieved("the signed token is malformed")
    assert who(source, "x" * (MAX_TOKEN + 1)) == Disbelieved("the signed token is too long")


def test_a_token_counts_for_its_own_stripe_account_only() -> None:
    of_ours = from_signed_token(secret=SECRET, account=ACCOUNT)
    assert who(of_ours, token(account=ACCOUNT)) == Reference("id", "cus_1")
    for made in (token(), token(account="acct_other")):
        assert who(of_ours, made) == Disbelieved("the signed token is for another Stripe account")


def test_during_a_change_of_secrets_both_are_accepted_and_the_first_signs() -> None:
    both = from_signed_token(secret=[OTHER, SECRET])
    assert who(both, token(secret=SECRET)) == who(both, token(secret=OTHER)) == Reference("id", "cus_1")
    assert token(secret=[OTHER, SECRET]) == token(secret=OTHER)
    assert isinstance(who(from_signed_token(secret=OTHER), token(secret=SECRET)), Skip)


def test_a_valid_token_in_one_place_is_not_spoilt_by_an_invalid_one_in_the_other(source: FromSignedToken) -> None:
    facts = Facts({KEY: "nonsense"}, configurable={KEY: token()}, now=NOW)
    assert source.identify(facts) == Reference("id", "cus_1")


@pytest.mark.parametrize("secret", ["", "x" * 31, b"x" * 31, [], [SECRET, "short"], [SEVEN], "ä" * 15])
def test_a_secret_that_is_too_short_is_refused_without_being_repeated(secret: Any) -> None:
    for use in (lambda: from_signed_token(secret=secret), lambda: token(secret=secret)):
        with pytest.raises(ConfigurationError) as caught:
            use()
        assert "xxx" not in str(caught.value)
    assert from_signed_token(secret="ä" * 16) == from_signed_token(secret=("ä" * 16).encode())


@pytest.mark.parametrize(
    "wrong",
    [
        {"customer": "ann"}, {"customer": "cus_1.9"}, {"customer": NOTHING}, {"expires_at": 1.5}, {"expires_at": True},
        {"expires_at": -1}, {"expires_at": 10**12}, {"expires_at": "soon"}, {"account": "1"}, {"account": "acct_1.2"},
        {"expires_at": datetime(2027, 1, 1)},  # noqa: DTZ001 - it has no time zone
    ],
)  # fmt: skip
def test_what_makes_no_token_is_refused_where_it_is_signed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        token(**wrong)


def test_the_secret_is_in_no_repr_and_in_no_pickle_and_a_copy_is_the_same(source: FromSignedToken) -> None:
    several = first_of(source, from_signed_token(secret=[SECRET, OTHER]))
    assert "canary" not in repr(several) + repr(source.secrets) + str(source.secrets)
    assert copy.deepcopy(source) == copy.copy(source) == source
    assert source != from_signed_token(secret=OTHER)
    assert hash(source) == hash(from_signed_token(secret=SECRET))
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(source)


def test_the_secret_comes_from_the_environment_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRIPE_METER_TOKEN_SECRET", raising=False)
    for use in (from_signed_token, lambda: sign_customer("cus_1", expires_at=NOW)):
        with pytest.raises(ConfigurationError, match=r"\$STRIPE_METER_TOKEN_SECRET"):
            use()
    monkeypatch.setenv("STRIPE_METER_TOKEN_SECRET", f"{OTHER} {SECRET}")
    assert from_signed_token() == from_signed_token(secret=[OTHER, SECRET])
    assert sign_customer("cus_1", expires_at=10**11) == token(secret=OTHER, expires_at=10**11)


def test_settings_name_the_variable_that_holds_the_secret_and_never_hold_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delenv("BOT_SECRET", raising=False)
    customer = {"source": "signed_token", "secret_env": "BOT_SECRET", "account": ACCOUNT}
    nested = {"source": "first_of", "sources": [customer, {"source": "auth_user"}]}
    given: dict[str, Any] = {"meters": [{"kind": "tokens", "event_name": "t"}], "deliver": False, "customer": nested}
    settings = MeteringSettings.model_validate({**given, "ledger": f"sqlite:///{tmp_path}/l.db"})
    with pytest.raises(ConfigurationError, match=r"\$BOT_SECRET"):
        settings.handler()
    monkeypatch.setenv("BOT_SECRET", SECRET)
    with MeteringSettings.model_validate_json(settings.model_dump_json()).handler() as handler:
        made = handler.customer.identify(Facts({KEY: token(account=ACCOUNT)}, now=NOW))
        assert made == Reference("id", "cus_1")
    assert "canary" not in settings.model_dump_json() + repr(settings)


def test_a_secret_put_where_the_name_of_its_variable_belongs_is_not_repeated() -> None:
    customer = {"source": "signed_token", "secret_env": SECRET}
    settings = MeteringSettings.model_validate(
        {"meters": [{"kind": "tokens", "event_name": "t"}], "deliver": False, "customer": customer}
    )
    assert "canary" not in repr(settings)
    with pytest.raises(ConfigurationError) as caught:
        settings.handler()
    assert "canary" not in str(caught.value)


def test_neither_token_nor_secret_reaches_the_ledger_or_a_log(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    from langchain_core.language_models import GenericFakeChatModel
    from langchain_core.messages import AIMessage

    from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens

    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=usage)] * 3))
    caplog.set_level(logging.DEBUG)
    good, bad = token(expires_at=10**11), token(secret=OTHER, expires_at=10**11)
    source, ledger = from_signed_token(secret=SECRET), tmp_path / "l.db"
    with StripeMeterCallbackHandler(Tokens("t"), customer=source, ledger=f"sqlite:///{ledger}", deliver=False) as meter:
        for sent in (good, bad, good + "x"):
            model.invoke("Hello", {"callbacks": [meter], "metadata": {KEY: sent}})
        assert meter.flush().skipped == 2
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"cus_1" in stored
    for secret in (SECRET, OTHER, good, bad, good.split(".")[-1], bad.split(".")[-1]):
        assert secret.encode() not in stored
        assert secret not in caplog.text
