"""Who is behind a session, as the application learned it, and what of that session waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, func, select, update
from sqlalchemy import delete as sql_delete

from langchain_stripe_meter.core.references import By, Reference, check_region, normalise
from langchain_stripe_meter.core.states import Move, ReadingState, next_reading_state
from langchain_stripe_meter.core.tenants import account_of, session_digest
from langchain_stripe_meter.errors import ConfigurationError, LedgerError, logger
from langchain_stripe_meter.ledger.inserting import others
from langchain_stripe_meter.ledger.jobs import Job, check_job
from langchain_stripe_meter.ledger.schema import leads, readings
from langchain_stripe_meter.ledger.store import Entry, Ledger, dialect_insert, write_act
from langchain_stripe_meter.workers import in_worker

BillFrom = Literal["now", "first_message"]
LEAD_FIELDS: tuple[By, ...] = ("email", "name", "phone")
UNKNOWN_AMOUNT = "the amount is unknown"
NOTED_EVERY = 86_400
"""How often, in seconds, it is noted at most that somebody asked for a lead."""

_CLAIMED = next_reading_state(ReadingState.SKIPPED, Move.CLAIM)
_CLAIMED_WITHOUT_AMOUNT = next_reading_state(_CLAIMED, Move.HOLD)


def sessions_known(ledger: Ledger) -> int:
    """For how many sessions a lead is known."""
    with ledger.read() as connection:
        return int(connection.execute(select(func.count()).select_from(leads)).scalar_one())


class Leads:
    """What the application learned about the person behind a session: durable, shared by all processes.

    ``account`` is the connected account where none is given; with ``has_tenants``, every call must say its own. Who
    never pays by a lead (``reads_leads`` is False) claims nothing by one; ``region`` is where phone numbers without a
    leading ``+`` are dialled; ``claimed`` is called when skipped readings shall be billed after all.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        account: str = "",
        has_tenants: bool = False,
        reads_leads: bool = True,
        region: str | None = None,
        claimed: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._account = account
        self._has_tenants = has_tenants
        self._reads_leads = reads_leads
        self._region = region
        self._claimed = claimed

    def capture(
        self,
        session: str,
        *,
        email: str | None = None,
        name: str | None = None,
        phone: str | None = None,
        region: str | None = None,
        account: str | None = None,
        bill_from: BillFrom = "now",
    ) -> int:
        """Remember a lead's fields for ``session`` (the run's ``session_id``, ``thread_id`` or ``conversation_id``;
        on an agent server only its ``thread_id``, since the others are the client's word).

        Fields that are not given keep what was captured before. Only call it with what your application knows: an
        address that somebody typed into a chat proves nothing.

        Args:
            session: Text of 1 to 255 printable characters.
            email: An e-mail address.
            name: A person's or a company's name.
            phone: A phone number; without a leading ``+`` it needs ``region``.
            region: Where ``phone`` is dialled, such as ``"DE"``.
            account: The connected account (``acct_…``) that the session belongs to; by default the handler's
                ``stripe_account``; with ``tenant=`` it must be said (``""`` for the key's own).
            bill_from: ``"now"`` leaves the runs before this skipped. ``"first_message"`` bills those of this session
                that were skipped for want of a lead, once, where this lead has what the ``customer=`` of the handler
                (or tenant) that skipped them reads of it.

        Returns:
            How many readings that had been skipped will be billed after all.

        Raises:
            ConfigurationError: A field cannot be used (the message does not repeat it), or ``account`` is missing.
            LedgerError: The lead could not be stored.
        """
        account = self._on(account)
        session, fields = _session(session), _fields(region or self._region, email=email, name=name, phone=phone)
        self.check_bill_from(bill_from)
        return self._capture(account, session, fields, bill_from, replaces=True) or 0

    def note(self, session: str, *, account: str, region: str | None, bill_from: BillFrom, **typed: str) -> bool:
        """As ``capture``, for what a user typed: False, and nothing is changed, where any of it would be replaced."""
        session, fields = _session(session), _fields(region or self._region, **typed)
        self.check_bill_from(bill_from)
        return self._capture(account, session, fields, bill_from, replaces=False) is not None

    def _capture(
        self, account: str, session: str, fields: Mapping[str, str], bill_from: BillFrom, *, replaces: bool
    ) -> int | None:
        """How many readings are claimed; None where nothing was captured."""
        with self._ledger.write("record") as connection:
            _lock(connection, [session_digest(account, session)])
            if not replaces and not fields.keys().isdisjoint(_find(connection, account, session) or {}):
                return None
            _store(connection, account, session, {**fields, "captured_at": self._ledger.now()})
            count = self._claim(connection, account, session) if bill_from == "first_message" else 0
        if count:
            self._claimed()
        return count

    def check_bill_from(self, bill_from: object) -> None:
        """Refuse a ``bill_from`` that ``capture`` cannot follow."""
        if bill_from not in ("now", "first_message"):
            raise ConfigurationError(f"bill_from={bill_from!r}: use 'now' or 'first_message'.")
        if bill_from == "first_message" and not self._reads_leads:
            raise ConfigurationError("bill_from='first_message' needs a handler whose customer= is from_lead(...).")

    async def acapture(self, session: str, **fields: Any) -> int:
        """As ``capture``, without blocking the event loop."""
        return await in_worker(self.capture, session, **fields)

    def find(self, session: str, account: str | None = None) -> dict[str, str] | None:
        """The lead of ``session``, or None. Who asks keeps it from being pruned for its age, which counts from then."""
        if not _is_session(session):
            return None
        mine, now = _of(self._on(account), session), self._ledger.now()
        with self._ledger.look() as connection:
            row = connection.execute(select(leads).where(mine)).mappings().first()
        if row is None:
            return None
        if row["captured_at"] < now - NOTED_EVERY:
            self._note_use(mine, now)
        return _fields_of(row)

    def _on(self, account: str | None) -> str:
        return account_of(account, self._account, has_tenants=self._has_tenants, what="session")

    def _note_use(self, mine: ColumnElement[bool], now: int) -> None:
        try:
            with self._ledger.write("record") as connection:
                connection.execute(update(leads).where(mine).values(captured_at=now))
        except LedgerError as error:  # it is noted the next time
            logger.info("stripe-meter: that a lead was asked for could not be noted: %s", error)

    def forget(self, session: str, account: str | None = None) -> bool:
        """Erase what was captured for ``session``; True if there was anything.

        The handler's ``forget`` erases a person wherever the ledger names them.
        """
        if not _is_session(session):
            return False
        mine = _of(self._on(account), session)
        with self._ledger.write("record") as connection:
            return connection.execute(sql_delete(leads).where(mine)).rowcount > 0

    def record(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Store entries as the ledger does; of those that wait for a lead, look once more whether it is there.

        That look and the insert are one transaction, and capturing is another: a run is either recorded before the
        lead is captured, and then claimed with it, or after, and then the lead pays. None slips in between.
        Returns what was stored.
        """
        if not any(entry.session for entry in entries):
            self._ledger.record(entries)
            return entries
        with self._ledger.write("record") as connection:
            _lock(connection, [session_digest(one.account, one.session) for one in entries if one.session])
            final = [self._look_again(connection, entry) for entry in entries]
            insert = dialect_insert(connection, readings).on_conflict_do_nothing()
            connection.execute(insert, [entry.columns() for entry in final])
            self._ledger.others.extend(others(connection.connection.driver_connection, [one.row() for one in final]))
        return final

    def record_job(self, entries: Sequence[Entry], job: Job) -> Sequence[Entry]:
        """As ``record``, for a job. Refused where its id stands for something else."""
        with self._ledger.look() as connection:  # before any of it is stored
            check_job(connection, entries, job)
        stored = self.record(entries) if entries else entries
        with self._ledger.look() as connection:  # somebody else may have been as fast
            check_job(connection, stored, job)
        return stored

    def _look_again(self, connection: Connection, entry: Entry) -> Entry:
        if not entry.session or not _is_session(entry.session):
            return replace(entry, session=None)
        if entry.follows:
            query = select(readings).where(readings.c.key == entry.follows)
            other = connection.execute(query).mappings().first()
            return entry if other is None or other["state"] == ReadingState.SKIPPED else like(entry, other)
        who = _payer(entry.reads, _find(connection, entry.account, entry.session))
        if who is None:
            return entry
        state, reason = _claim_of(entry.value)
        return replace(entry, state=state, reference=who, reason=reason, session=None)

    def _claim(self, connection: Connection, account: str, session: str) -> int:
        """Each is claimed by what its own handler reads of the lead, as if it had been known before."""
        lead = _find(connection, account, session)
        mine = (readings.c.session == session_digest(account, session)) & (readings.c.account == account)
        skipped = mine & (readings.c.state == ReadingState.SKIPPED.value) & readings.c.reads.is_not(None)
        count = 0
        for reads in connection.execute(select(readings.c.reads).where(skipped).distinct()).scalars().all():
            who = _payer(reads.split(","), lead)
            for amount, has_amount in ((0, readings.c.value.is_not(None)), (None, readings.c.value.is_(None))):
                if who is None:
                    continue
                state, reason = _claim_of(amount)
                claim = update(readings).where(skipped, readings.c.reads == reads, has_amount)
                changes = {"state": state.value, "reference": who.text, "reason": reason}
                count += connection.execute(claim.values(**changes, session=None, reads=None)).rowcount
        if count:
            write_act(connection, "claimed", f"{count} skipped readings", "their lead was captured", self._ledger.now())
        return count


def like(entry: Entry, other: Mapping[Any, Any]) -> Entry:
    """The same usage, for whom the ``other`` reading is by now."""
    customer, named = other["customer"], other["reference"]
    reference = Reference.of(named) if named and not customer else None
    state = ReadingState.RESOLVED if customer else ReadingState.RECORDED if reference else ReadingState.HELD
    who: Any = {"customer": customer, "reference": reference, "reason": other["reason"]}
    return replace(entry, state=state, **who, session=None, reads=(), follows=None)


def _payer(reads: Sequence[By], lead: Mapping[str, str] | None) -> Reference | None:
    return next((Reference(by, lead[by]) for by in reads if lead and by in lead), None)


def _claim_of(value: object) -> tuple[ReadingState, str | None]:
    """Where a claim takes a skipped reading; without an amount it waits for a person."""
    return (_CLAIMED, None) if value is not None else (_CLAIMED_WITHOUT_AMOUNT, UNKNOWN_AMOUNT)


def _fields(region: str | None, **given: str | None) -> dict[str, str]:
    check_region(region)
    told = {by: given.get(by) for by in LEAD_FIELDS}
    fields: dict[str, str] = {by: normalise(by, value, region) for by, value in told.items() if value is not None}
    if not fields:
        raise ConfigurationError("leads.capture() takes at least one of email=, name= and phone=.")
    return fields


def _store(connection: Connection, account: str, session: str, values: Mapping[str, Any]) -> None:
    insert = dialect_insert(connection, leads).values(account=account, session=session, **values)
    connection.execute(insert.on_conflict_do_update(index_elements=["account", "session"], set_=values))


def _lock(connection: Connection, digests: Sequence[str]) -> None:
    """One transaction at a time per session. SQLite has one writer anyhow; PostgreSQL has these locks."""
    if connection.dialect.name == "postgresql":
        for digest in sorted(set(digests)):
            key = int(digest[:15], 16)
            connection.execute(select(func.pg_advisory_xact_lock(key)))


def _of(account: str, session: str) -> Any:
    return (leads.c.account == account) & (leads.c.session == session)


def _find(connection: Connection, account: str, session: str) -> dict[str, str] | None:
    row = connection.execute(select(leads).where(_of(account, session))).mappings().first()
    return None if row is None else _fields_of(row)


def _fields_of(row: Mapping[Any, Any]) -> dict[str, str]:
    return {by: row[by] for by in LEAD_FIELDS if row[by]}


def _is_session(session: object) -> bool:
    return isinstance(session, str) and 0 < len(session) <= 255 and session.isprintable()


def _session(session: str) -> str:
    if not _is_session(session):
        raise ConfigurationError("A lead belongs to a session: text of 1 to 255 printable characters.")
    return session
