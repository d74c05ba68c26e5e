"""Webhooks that are not Stripe's, not as Stripe sent them, or not from now: refused, and nothing changes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from auditing import Books
from conftest import wait_until
from faults import tally
from starlette.applications import Starlette

from langchain_stripe_meter.audit.webhooks import MAX_BODY, MAX_HEADER
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.ledger import sealing

BOTH = pytest.mark.parametrize("books", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    """On SQLite, unless a test asks for another engine."""
    url: Any = request.getfixturevalue("postgres_url") if getattr(request, "param", "") == "postgresql" else tmp_path
    with Books(url) as books:
        books.deliver("run-1", "run-2")
        yield books
        assert books.states() == {"run-1": "delivered", "run-2": "delivered"}
        books.take(*books.sandbox.rejections)


@pytest.fixture
def genuine(books: Books) -> tuple[bytes, str]:
    """A webhook that would reject run-1."""
    return books.sandbox.thin_event(books.sandbox.reject("run-1", "run-2")[0])


def mutants(body: bytes, header: str) -> Iterator[tuple[bytes, str]]:
    """Every byte of the header and every third of the body flipped in one bit, and everything cut short."""
    for position in range(len(header)):
        for bit in (1, 4, 32):
            changed = chr(ord(header[position]) ^ bit)
            yield body, header[:position] + changed + header[position + 1 :]
        yield body, header[:position]
    for position in range(0, len(body), 3):
        for bit in (1, 32, 128):
            yield body[:position] + bytes([body[position] ^ bit]) + body[position + 1 :], header
        yield body[:position], header
    yield body + b" ", header
    yield b" " + body, header
    yield b"", header


@BOTH
def test_whatever_bit_is_flipped_or_cut_off_it_is_refused_and_nothing_changes(
    books: Books, genuine: tuple[bytes, str]
) -> None:
    before, asked, tried = books.snapshot(), len(books.sandbox.requests), 0
    for body, header in mutants(*genuine):
        assert books.webhooks.handle(body, header).status == 400, (body, header)
        tried += 1
    assert tried > 500
    assert (books.snapshot(), len(books.sandbox.requests)) == (before, asked)
    tally("a webhook is forged or altered", tried=tried)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: None,
        lambda header: "",
        lambda header: "v1=" + "0" * 64,
        lambda header: header.partition(",")[0],
        lambda header: header.replace("v1=", "v0="),
        lambda header: f"{header},t={header[2:12]}",
        lambda header: header.replace("t=", "t=0"),
        lambda header: header.replace("t=", "t=+"),
        lambda header: header.replace("t=", "t= "),
        lambda header: header.replace("t=1", "t=\u0661"),
        lambda header: header.replace("t=", "t=-"),
        lambda header: header.replace(",", ", "),
        lambda header: header.replace(",", ";"),
        lambda header: header.upper(),
        lambda header: header + "," + "v1=" + "0" * MAX_HEADER,
        lambda header: "t=9" * 3000,
        lambda header: header.replace("v1=", "v1=\u00e9"),
        lambda header: 17,
    ],
)
def test_a_malformed_header_is_refused(books: Books, genuine: tuple[bytes, str], change: Callable[[str], Any]) -> None:
    before = books.snapshot()
    assert books.webhooks.handle(genuine[0], change(genuine[1])).status == 400
    assert books.snapshot() == before


@pytest.mark.parametrize(("seconds", "status"), [(-301, 400), (-299, 200), (299, 200), (301, 400), (10**9, 400)])
def test_a_date_too_far_from_now_is_refused_either_way(books: Books, seconds: int, status: int) -> None:
    body = json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "x.y", "livemode": False,
                       "created": "2027-01-15T08:00:00.000Z"}).encode()  # fmt: skip
    before = books.snapshot()
    result = books.webhooks.handle(body, books.sign(body, at=books.ledger.now() + seconds))
    assert (result.status, books.snapshot()) == (status, before)
    assert status == 200 or "set this server's clock" in result.message
    tally("a webhook is dated too far from now", tried=int(status == 400))


def test_another_secret_is_refused_and_the_right_one_among_several_signatures_is_enough(books: Books) -> None:
    body = json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "x.y", "livemode": False,
                       "created": "2027-01-15T08:00:00.000Z"}).encode()  # fmt: skip
    good, other = books.sign(body), books.sign(body, secret="whsec_other")
    assert books.webhooks.handle(body, other).status == 400
    assert books.webhooks.handle(body, f"{other},{good.partition(',')[2]},v0=abc").status == 200


def test_a_huge_body_is_refused_before_it_is_read(books: Books) -> None:
    body = b'{"x": "' + b"a" * MAX_BODY + b'"}'
    assert "KiB" in books.webhooks.handle(body, books.sign(body)).message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b"{}",
        b"[" * 100_000,
        b'{"object": "event", "id": "evt_1", "type": "charge.failed"}',
        b'{"object": "v2.core.event", "type": "x", "created": "", "livemode": false}',
        b'{"object": "v2.core.event", "id": 1, "type": "x", "created": "", "livemode": false}',
        b'{"object": "v2.core.event", "id": "' + b"e" * 256 + b'", "type": "x", "created": "", "livemode": false}',
    ],
)
def test_a_signed_body_that_is_no_thin_event_is_refused_with_what_to_do(books: Books, body: bytes) -> None:
    before = books.snapshot()
    result = books.webhooks.handle(body, books.sign(body))
    assert (result.status, books.snapshot()) == (400, before)
    assert "thin" in result.message


def test_an_event_of_live_mode_is_refused_with_a_test_key(books: Books) -> None:
    body = json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "x.y", "livemode": True,
                       "created": "2027-01-15T08:00:00.000Z"}).encode()  # fmt: skip
    assert "mode" in books.webhooks.handle(body, books.sign(body)).message


def test_an_event_that_stripe_does_not_have_changes_nothing(books: Books, genuine: tuple[bytes, str]) -> None:
    """Somebody who has the secret still cannot make up what happened: it is fetched from Stripe."""
    body = genuine[0].replace(books.sandbox.rejections[0].id.encode(), b"evt_made_up")
    before = books.snapshot()
    assert books.webhooks.handle(body, books.sign(body)).status == 503
    assert books.snapshot() == before


def test_refusals_are_logged_without_the_body_or_the_secret(
    books: Books, genuine: tuple[bytes, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    books.webhooks.handle(b'{"canary": "ann@example.com"}', genuine[1])
    assert [record.levelname for record in caplog.records if record.name == "langchain_stripe_meter"] == ["WARNING"]
    assert not re.search("canary|ann@|whsec", caplog.text)


def test_without_a_secret_there_are_no_webhooks(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRIPE_WEBHOOK_SECRET", raising=False)
    for secret in (None, ""):
        with pytest.raises(ConfigurationError, match=r"Set .STRIPE_WEBHOOK_SECRET"):
            type(books.webhooks)(books.ledger, books.gateway, secret)
    for secret in ("whsec_", " whsec_ \n", "  ", "canary"):
        with pytest.raises(ConfigurationError, match=r"^webhook_secret= ") as caught:
            type(books.webhooks)(books.ledger, books.gateway, secret)
        assert "canary" not in str(caught.value)
        monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", secret)
        with pytest.raises(ConfigurationError, match=r"^.STRIPE_WEBHOOK_SECRET ") as caught:
            type(books.webhooks)(books.ledger, books.gateway)
        assert "canary" not in str(caught.value)


def test_space_around_a_secret_is_no_part_of_it(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "x.y", "livemode": False,
                       "created": "2027-01-15T08:00:00.000Z"}).encode()  # fmt: skip
    pasted = type(books.webhooks)(books.ledger, books.gateway, " whsec_sandbox\n")
    assert pasted.handle(body, books.sign(body)).status == 200
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", "whsec_sandbox\n")
    assert type(books.webhooks)(books.ledger, books.gateway).handle(body, books.sign(body)).status == 200


@BOTH
def test_over_http_the_route_answers_as_stripe_expects(books: Books, genuine: tuple[bytes, str]) -> None:
    body, header = genuine
    before = books.snapshot()
    with serve(Starlette(routes=[books.webhooks.route("/stripe/webhooks")])) as url:

        def post(data: Any, headers: dict[str, str]) -> int:
            return requests.post(f"{url}/stripe/webhooks", data=data, headers=headers, timeout=60).status_code

        signed = {"Stripe-Signature": header}
        assert post(body, {}) == 400
        assert post(body + b" ", signed) == 400
        assert post(b"a" * (4 * MAX_BODY), signed) == 400
        assert post(iter([b"a" * 1024] * 1024), signed) == 400
        assert post(body, {"Stripe-Signature": f"{header},{header}"}) == 400
        assert requests.get(f"{url}/stripe/webhooks", timeout=60).status_code == 405
        assert books.snapshot() == before
        assert post(body, signed) == 200
        assert set(books.states().values()) == {"rejected"}
        after = books.snapshot()
        assert post(body, signed) == 200
        assert books.snapshot() == after

    sealing.retry(books.ledger)
    books.deliver()


class serve:  # noqa: N801 - reads as a function where it is used
    """A real uvicorn on a free port, while the block lasts."""

    def __init__(self, app: Starlette) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self) -> str:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(60)
