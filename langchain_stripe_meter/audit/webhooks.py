"""Stripe's asynchronous rejections: what it took and refused later, as its webhooks tell.

A forged, changed, old or future-dated request is refused before anything is read from it; a repeated one changes
nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_stripe_meter.audit.windows import tell_late, tell_rejected
from langchain_stripe_meter.core.events import check_webhook_secret
from langchain_stripe_meter.core.totals import GONE_CODES, Report
from langchain_stripe_meter.errors import (
    ConfigurationError,
    InvalidValueError,
    LedgerError,
    OnError,
    StripeError,
    logger,
)
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.gateway.meters import meters_named
from langchain_stripe_meter.gateway.notices import TOLERANCE, Notice, read_notice
from langchain_stripe_meter.ledger import reports
from langchain_stripe_meter.ledger.store import ACCOUNT, Ledger
from langchain_stripe_meter.telling import tell

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

TYPES = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")
MAX_BODY = 256 * 1024
"""Bytes. A thin event has a few hundred."""
MAX_HEADER = 4096
_SIGNATURE = re.compile(r"v1=[0-9a-f]{64}", re.ASCII)
_DATE = re.compile(r"t=([1-9]\d{0,11})", re.ASCII)


@dataclass(frozen=True, slots=True)
class WebhookResult:
    """What came of a webhook. ``status`` is the HTTP status to answer with: Stripe sends again what is not 2xx.

    ``rejected`` are the identifiers under which events were sent that are rejected now; ``unknown`` counts samples that
    are not this ledger's, or have moved on before. What Stripe did not name is found later, by a courier.
    """

    status: int
    message: str
    event_id: str | None = None
    rejected: tuple[str, ...] = ()
    unknown: int = 0

    @property
    def ok(self) -> bool:
        """Whether it was Stripe's, and is dealt with."""
        return self.status == 200


class Webhooks:
    """Takes Stripe's notifications in. ``secret`` is the endpoint's signing secret (``whsec_…``), by default
    ``$STRIPE_WEBHOOK_SECRET``. ``wake`` is called when something is left to be found out."""

    def __init__(
        self,
        ledger: Ledger,
        gateway: Gateway,
        secret: str | None = None,
        *,
        on_error: OnError | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._ledger = ledger
        self._gateway = gateway
        self._on_error = on_error
        self._wake = wake
        variable = "STRIPE_WEBHOOK_SECRET"
        known = check_webhook_secret(secret) or check_webhook_secret(os.environ.get(variable), f"${variable}")
        if known is None:
            raise ConfigurationError(
                "Webhooks need their signing secret. Set $STRIPE_WEBHOOK_SECRET or pass webhook_secret='whsec_…'."
            )
        self._secret = known

    def __repr__(self) -> str:
        return f"Webhooks({self._ledger!r})"

    def handle(self, raw_body: bytes, signature: str | None) -> WebhookResult:
        """Take one webhook in: its body as it came, and its ``Stripe-Signature`` header. Any thread may call it.

        Never raises for what was sent. Where Stripe or the ledger does not answer, the status is 503, nothing is
        changed, and Stripe sends it again.
        """
        try:
            check_request(raw_body, signature, self._ledger.now())
            notice = read_notice(self._gateway, raw_body, signature or "", self._secret)
            _check_mode(notice, is_test=self._gateway.is_test)
        except InvalidValueError as error:
            logger.warning("stripe-meter: a webhook was refused: %s", error)
            return WebhookResult(400, str(error))
        try:
            return self._take(notice)
        except (StripeError, LedgerError) as error:
            tell(self._on_error, error)
            return WebhookResult(503, "It could not be dealt with now; send it again.", notice.id)

    def _take(self, notice: Notice) -> WebhookResult:
        if notice.type not in TYPES:
            return WebhookResult(200, "Not a type that concerns meter events; ignored.", notice.id)
        with self._ledger.read() as connection:
            if reports.was_seen(connection, notice.id):
                return _repeated(notice)
        report = notice.fetch(self._ledger.now())
        own = self._ledger.note(ACCOUNT)
        account = "" if notice.account == own else notice.account
        stored = self._store(notice.id, account, report, self._meters(notice, account, report))
        return _repeated(notice) if stored is None else self._follow_up(notice, account, report, *stored)

    def _meters(self, notice: Notice, account: str, report: Report) -> set[str]:
        """The event names that may be concerned by what the report does not name."""
        if notice.meter is None or report.errors <= len(report.samples):
            return set()
        return {name for name, ids in meters_named(self._gateway, account).items() if notice.meter in ids}

    def _store(
        self, event_id: str, account: str, report: Report, meters: set[str]
    ) -> tuple[reports.Taken, reports.Window] | None:
        """The effect and the notification's id, in one transaction; None where it was taken in meanwhile."""
        with self._ledger.write() as connection:
            now = self._ledger.now()
            if not reports.is_new(connection, event_id, now):
                return None
            names = meters | reports.event_names(connection, report.samples, account)
            taken = reports.take(connection, report.samples, account, report.end, now)
            window = reports.open_window(event_id, account, names, report, taken)
            reports.keep(connection, window, now)
        return taken, window

    def _follow_up(
        self, notice: Notice, account: str, report: Report, taken: reports.Taken, window: reports.Window
    ) -> WebhookResult:
        if report.codes & GONE_CODES:
            self._gateway.forget_meters(account)
        tell_rejected(self._on_error, taken.rejected, report.codes)
        tell_late(self._on_error, taken.late)
        if not window.is_done and self._wake is not None:
            self._wake()
        return WebhookResult(200, "Taken in.", notice.id, tuple(taken.rejected), taken.unknown)

    def route(self, path: str = "/stripe/webhooks") -> Route:
        """A Starlette (or FastAPI) route that takes them in. Needs the extra ``[ui]``."""
        try:
            from starlette.routing import Route
        except ImportError as error:
            raise ConfigurationError("The route needs starlette: pip install 'langchain-stripe-meter[ui]'") from error

        return Route(path, self._endpoint, methods=["POST"])

    async def _endpoint(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        headers = request.headers.getlist("stripe-signature")
        body = await _read_body(request)
        signature = headers[0] if len(headers) == 1 else None
        result = await run_in_threadpool(self.handle, body, signature)
        return JSONResponse({"message": result.message}, status_code=result.status)


async def _read_body(request: Any) -> bytes:
    """The body, or as much of it as shows that it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            break
    return body


def _check_mode(notice: Notice, *, is_test: bool) -> None:
    if notice.livemode == is_test:
        raise InvalidValueError("The event is of the other mode (test or live) than the API key.")


def _repeated(notice: Notice) -> WebhookResult:
    return WebhookResult(200, "It was taken in before; nothing changed.", notice.id)


def check_request(raw_body: bytes, signature: str | None, now: int) -> None:
    """Refuse, before anything is parsed, what cannot be one of Stripe's. ``InvalidValueError`` says why.

    The date in the header is signed too; it must be within ``TOLERANCE`` seconds of now, either way.
    """
    if not isinstance(raw_body, bytes):
        raise InvalidValueError("The body must be the request's bytes as they came: any other text has no signature.")
    if len(raw_body) > MAX_BODY:
        raise InvalidValueError(f"The body has more than {MAX_BODY // 1024} KiB; a thin event is far smaller.")
    if not isinstance(signature, str) or not 0 < len(signature) <= MAX_HEADER:
        raise InvalidValueError("There must be one Stripe-Signature header, of at most 4096 characters.")
    parts = signature.split(",")
    dates = [match for part in parts if (match := _DATE.fullmatch(part))]
    if len(dates) != 1 or sum(part.startswith("t=") for part in parts) != 1:
        raise InvalidValueError("The Stripe-Signature header has no single date (t=).")
    if not any(_SIGNATURE.fullmatch(part) for part in parts):
        raise InvalidValueError("The Stripe-Signature header has no signature (v1=).")
    if abs(int(dates[0][1]) - now) > TOLERANCE:
        raise InvalidValueError(
            f"The webhook's date is more than {TOLERANCE} seconds from now. If Stripe sent it just now, set this "
            "server's clock."
        )
