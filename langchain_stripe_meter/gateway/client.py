"""The way to Stripe: the official client, its own retries off because the ledger owns retries."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from cachetools import TTLCache

from langchain_stripe_meter.core.events import MeterEvent
from langchain_stripe_meter.core.references import Reference, normalise
from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError, StripeError
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.gateway.connection import Session, quietly
from langchain_stripe_meter.reentry import inside

if TYPE_CHECKING:
    from stripe import StripeClient

CONNECT_SECONDS = 5
READ_SECONDS = 30
METERS_CACHED_SECONDS = 300
ACCOUNTS_CACHED = 1000
"""Connected accounts whose meters are kept in memory."""
_UNSENT = {Move.UNKNOWN: Move.REFUSED_FOR_NOW, Move.REFUSED: Move.NO_ACCESS, Move.UNSEAL: Move.NO_ACCESS}
"""What it means for an event that the meters of its account could not be listed."""
_KEY = re.compile(r"[sr]k_(test|live)_\w+\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Price:
    """What one unit of a meter costs: ``unit_amount`` in the minor unit (cents) of ``currency``, per ``interval``.

    ``id`` (``price_…``) is what a customer's subscription needs, ``product`` (``prod_…``) what its invoice shows.
    """

    id: str
    product: str
    unit_amount: Decimal
    currency: str
    interval: str


@dataclass(frozen=True, slots=True)
class MeterInfo:
    """A meter as Stripe has it. ``problem`` says why deltas sent to it would bill wrongly, or None."""

    id: str
    event_name: str
    display_name: str
    status: str
    formula: str
    window: str | None
    customer_key: str
    value_key: str
    price: Price | None = None
    """The metered price on it that was asked for, where one was."""

    @property
    def problem(self) -> str | None:
        """With a window, or a formula other than sum, only the newest event of each window would count."""
        if self.status != "active":
            return f"the meter {self.event_name!r} is {self.status}; reactivate it in Stripe"
        if self.formula != "sum":
            return f"the meter {self.event_name!r} aggregates by {self.formula!r}; make one that aggregates by 'sum'"
        if self.window:
            return f"the meter {self.event_name!r} has an event_time_window ({self.window}); make one without"
        if self.customer_key == self.value_key:
            return f"the meter {self.event_name!r} takes customer and value from one key; make one with two"
        return None


class Gateway:
    """Stripe, as the ledger needs it. Any thread may call it; each thread gets its own connection.

    ``stripe`` is an API key, a ``stripe.StripeClient``, or None for ``$STRIPE_API_KEY``. ``api_base`` (default
    ``$STRIPE_METER_API_BASE``) points v1 and the v2 stream at another address, such as the sandbox.
    """

    def __init__(self, stripe: str | StripeClient | None = None, *, api_base: str | None = None) -> None:
        self._given = check_key(stripe)
        self._api_base = api_base or os.environ.get("STRIPE_METER_API_BASE") or None
        self._meters: TTLCache[str, dict[str, MeterInfo] | None] = TTLCache(ACCOUNTS_CACHED, METERS_CACHED_SECONDS)
        self.date: int | None = None
        """The latest that Stripe has dated an answer, by its own clock, in Unix seconds: it is later than that now."""
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A child opens connections of its own."""
        self._client: StripeClient | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Gateway(api_base={self._api_base!r})"

    @property
    def is_test(self) -> bool:
        """Whether the key is one for test mode."""
        key = self._given if isinstance(self._given, str) else self._given._requestor.api_key
        return "_test_" in str(key)

    @property
    def client(self) -> StripeClient:
        """The official client, made when first needed (importing it costs a third of a second)."""
        with inside(), self._lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def _make_client(self) -> StripeClient:
        if not isinstance(self._given, str):
            return self._given
        import stripe

        stripe.enable_telemetry = False  # it would write a file under the user's ~/.config
        session: Any = Session()
        http = stripe.RequestsClient(timeout=(CONNECT_SECONDS, READ_SECONDS), session=session)
        base = self._api_base
        addresses: Any = {"api": base, "meter_events": base} if base else None
        return stripe.StripeClient(self._given, max_network_retries=0, base_addresses=addresses, http_client=http)

    def send(self, event: MeterEvent, attempt: str, is_late: Callable[[], bool] = lambda: False) -> Outcome:
        """Send one meter event (v1) and say what came of it; never raises.

        ``attempt`` names this attempt in the idempotency key, which must be new each time: Stripe would replay a stored
        500 under the old one for a day. The identifier stays, and is what protects from billing twice. ``is_late`` is
        asked last, when nothing else can take time any more: whether it must not be sent now.
        """

        def objection(info: MeterInfo | None) -> Outcome | None:
            if info is not None and info.problem:
                return Outcome(Move.UNSEAL, info.problem)
            return Outcome(Move.REFUSED_FOR_NOW, "its claim had run out before it was sent") if is_late() else None

        options = {"idempotency_key": f"{event.identifier}.{attempt}", "max_network_retries": 0}
        return self._try(event, options, objection)[0]

    def send_once(self, event: MeterEvent) -> tuple[Outcome, dict[str, Any]]:
        """Send one meter event outside any ledger: what came of it, and Stripe's own object where it was accepted."""
        return self._try(event, {"max_network_retries": 0}, lambda info: None)

    def _try(
        self, event: MeterEvent, options: Any, objection: Callable[[MeterInfo | None], Outcome | None]
    ) -> tuple[Outcome, dict[str, Any]]:
        try:
            info = self.meter(event.event_name, event.account)
            if (unsent := objection(info)) is not None:
                return unsent, {}
            made = self._create(event, info, options)
            answer = made.to_dict()
            if answer.get("identifier") != event.identifier:
                return Outcome(Move.UNKNOWN, "Stripe answered 2xx with a body that is not this event"), {}
            return Outcome(Move.ACCEPTED, date=self._dated(made)), answer
        except StripeError as error:  # the meter could not be read, so nothing was sent
            outcome = self.outcome_of(error, event.account)
            return replace(outcome, move=_UNSENT.get(outcome.move, outcome.move)), {}
        except Exception as error:  # noqa: BLE001 - every failure has a meaning, and it is stored
            outcome = self.outcome_of(error, event.account)
            if outcome.move is Move.UNSEAL:  # perhaps for its meter
                self.forget_meters(event.account)
            return outcome, {}

    @staticmethod
    def outcome_of(error: Exception, account: str = "") -> Outcome:
        """What an error means: one of the ``stripe`` client's, or a ``StripeError`` that has one as its cause.

        ``account`` is the connected account that was asked about.
        """
        from langchain_stripe_meter.gateway.replies import classify

        cause = error.__cause__
        return classify(cause if isinstance(error, StripeError) and isinstance(cause, Exception) else error, account)

    def _dated(self, answer: Any) -> int | None:
        from langchain_stripe_meter.gateway.replies import date_of

        date = date_of(getattr(answer.last_response, "headers", None))
        if date is not None:
            self.date = max(date, self.date or date)
        return date

    def _create(self, event: MeterEvent, info: MeterInfo | None, options: Any) -> Any:
        keys = (info.customer_key, info.value_key) if info else ("stripe_customer_id", "value")
        params: Any = {
            "event_name": event.event_name,
            "identifier": event.identifier,
            "timestamp": event.timestamp,
            "payload": event.payload(*keys),
        }
        on = on_account(event.account)
        with quietly():
            return self.client.v1.billing.meter_events.create(params, options | on)

    def meter(self, event_name: str, account: str = "") -> MeterInfo | None:
        """The meter with this event name; None where there is none, or where the key may not read meters.

        Raises ``StripeError`` where Stripe does not answer: unknown is not absent.
        """
        known = self.known_meters(account)
        if known is ... or (known is not None and event_name not in known):
            known = self.load_meters(account)
        return known.get(event_name) if known else None

    def known_meters(self, account: str = "") -> dict[str, MeterInfo] | EllipsisType | None:
        """The account's meters by event name, as they were listed lately; None where the key may not read them, ``...``
        where they were not listed. Asks nobody."""
        with inside(), self._lock:
            return self._meters.get(account, ...)

    def can_read_meters(self, account: str = "") -> bool:
        """Whether the key may read meters (a restricted key may only write events)."""
        return isinstance(self.known_meters(account), dict)

    def load_meters(self, account: str = "") -> dict[str, MeterInfo] | None:
        """List the account's meters, and keep them for a while; None where the key may not read meters.

        Raises ``StripeError`` where Stripe does not answer, or has closed the account to us.
        """
        from langchain_stripe_meter.gateway.replies import code_of

        try:
            found: dict[str, MeterInfo] | None = {meter.event_name: meter for meter in self.meters(account)}
        except StripeError as error:
            if _said(error) != 403 or code_of(error.__cause__) == "account_invalid":
                raise
            found = None
        with inside(), self._lock:
            self._meters[account] = found
        return found

    def forget_meters(self, account: str = "") -> None:
        """Look at the account's meters again before the next use: Stripe has said that something changed."""
        with inside(), self._lock:
            self._meters.pop(account, None)

    def meters(self, account: str = "") -> list[MeterInfo]:
        """All meters of an account, active ones last so that they win over older ones of the same event name."""
        with as_stripe_error("list the meters"):
            listed = self.client.v1.billing.meters.list({"limit": 100}, on_account(account)).auto_paging_iter()
            infos = [meter_info(meter) for meter in listed]
        return sorted(infos, key=lambda info: (info.status == "active", info.event_name))

    def account_id(self) -> str | None:
        """The account that the key belongs to; None where Stripe does not show it to this key."""
        try:
            with as_stripe_error("read the account"):
                account = self.client.v1.accounts.retrieve_current()
            self._dated(account)
            return str(account.id)
        except StripeError as error:
            if _said(error) in (400, 403, 404):
                return None
            raise

    def billed(self, meter_id: str, customer: str, start: int, end: int, account: str = "") -> Decimal | None:
        """What Stripe has summed up for a customer from ``start`` to ``end`` (Unix seconds, whole minutes).

        None where Stripe does not know the customer. Stripe answers with floats, which are read to 15 digits, the
        most that it takes in. Sums lag behind what was accepted.
        """
        window: Any = {"customer": customer, "start_time": start, "end_time": end, "limit": 100}
        try:
            with as_stripe_error("read the meter's summaries"):
                summaries = self.client.v1.billing.meters.event_summaries
                listed = summaries.list(meter_id, window, on_account(account)).auto_paging_iter()
                return sum((Decimal(f"{summary.aggregated_value:.15g}") for summary in listed), Decimal(0))
        except StripeError as error:
            if _said(error) in (400, 404):
                return None
            raise

    def find_customers(self, reference: Reference, account: str = "") -> list[str]:
        """Ids of the account's customers that are exactly ``reference``; more than one means ambiguous.

        Stripe's search is loose (case, word prefixes), so what it finds is compared again.
        """
        if reference.by == "id":
            return [reference.value]
        customers = self.client.v1.customers
        with as_stripe_error(f"look up a customer by {reference.by}"):
            if reference.by == "email":
                found = list(
                    customers.list({"email": reference.value, "limit": 100}, on_account(account)).auto_paging_iter()
                )
            else:
                query = f'{reference.by}:"{_escape(reference.value)}"'
                found = list(customers.search({"query": query, "limit": 100}, on_account(account)).auto_paging_iter())
            return [customer.id for customer in found if is_exactly(customer, reference)]

    def close(self) -> None:
        """Let go of the connections."""
        with inside(), self._lock:
            client, self._client = self._client, None
        http = getattr(getattr(client, "_requestor", None), "_client", None)
        if http is not None and isinstance(self._given, str):  # the SDK has no public way to close its connections
            http.close()


def check_key(given: str | StripeClient | None, *, otherwise: str = "") -> str | StripeClient:
    """A usable key or client; ``ConfigurationError`` says what is wrong without repeating the key.

    ``otherwise`` is what else the caller could do without a key.
    """
    key: Any = os.environ.get("STRIPE_API_KEY") if given is None else given
    if not key:
        raise ConfigurationError(f"There is no Stripe API key: set $STRIPE_API_KEY, or pass it as stripe{otherwise}.")
    if not isinstance(key, str) and not (hasattr(key, "v1") and hasattr(key, "_requestor")):
        raise ConfigurationError(f"stripe= takes an API key or a stripe.StripeClient, not {type(key).__name__}.")
    if isinstance(key, str) and not _KEY.match(key):
        kind = "a publishable key (pk_…)" if key.startswith("pk_") else "no secret or restricted key"
        kind = "between spaces or line breaks" if _KEY.match(key.strip()) else kind
        raise ConfigurationError(f"The Stripe API key is {kind}. It must look like 'sk_test_…' or 'rk_live_…'.")
    checked: str | StripeClient = key
    return checked


def _said(error: StripeError) -> int | None:
    """The status that Stripe gave with words of its own; None for what some box on the way said."""
    from langchain_stripe_meter.gateway.replies import has_words

    said = error.__cause__
    return getattr(said, "http_status", None) if has_words(said) else None


def on_account(account: str) -> Any:
    """Options of a request that concerns a connected account."""
    return {"stripe_account": account} if account else {}


def meter_info(meter: Any) -> MeterInfo:
    return MeterInfo(
        id=meter.id,
        event_name=meter.event_name,
        display_name=meter.display_name,
        status=meter.status,
        formula=meter.default_aggregation.formula,
        window=meter.event_time_window,
        customer_key=meter.customer_mapping.event_payload_key,
        value_key=meter.value_settings.event_payload_key,
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def is_exactly(customer: Any, reference: Reference) -> bool:
    """Whether a customer of Stripe's is the one that ``reference`` names, to the letter once both are normalised."""
    theirs = getattr(customer, reference.by, None)
    if getattr(customer, "deleted", False) or not theirs:
        return False
    try:
        return normalise(reference.by, theirs) == reference.value
    except InvalidValueError:
        return False


@contextmanager
def as_stripe_error(doing: str) -> Iterator[None]:
    """Errors of the ``stripe`` client as ``StripeError``, and what it would log of the request kept out of the log."""
    import stripe

    from langchain_stripe_meter.gateway.replies import advise

    try:
        with quietly():
            yield
    except stripe.StripeError as error:
        raise StripeError(f"Stripe did not let us {doing}: {advise(error)}") from error
