"""What each payer has used so far, kept in memory and brought up to date from the ledger before each answer.

What any process has recorded counts at once: each answer first reads the readings that are newer than the newest one
seen, which costs one look at the end of an index. What happens to readings later is seen otherwise:

- a reading named by e-mail, name or phone finds its customer: the table ``payers`` says so (ledger/resolving.py);
- a person, a webhook or a captured lead changes readings or events, or such a name finds another customer than before:
  whoever does that leaves a row in ``acts``, and everything is counted anew;
- old readings are pruned: their sums were counted already, and are in ``pruned`` for those who count anew.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from langchain_stripe_meter.core.periods import Period, Spent, What
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.forks import renew_after_fork
from langchain_stripe_meter.ledger.lanes import clear_errors
from langchain_stripe_meter.ledger.resolving import known_by, secret_of
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.reentry import inside

PAGE = 10_000
"""Rows that are counted at a time, so that a long ledger is never in memory as a whole."""
TAIL = 1000
"""How far from its end a ledger on PostgreSQL is searched for readings that are not committed yet."""
GAP_SECONDS = 600
"""How long such a reading is waited for; the number of one that was never stored stays free for good."""
LATER_SECONDS = 1
"""How often it is asked what became of readings that were counted already."""
RECOUNT_SECONDS = 10
"""Everything is counted anew at most this often."""
ACTS_BACK = 200
"""Acts that are counted, not only numbered, since on PostgreSQL one may be committed after later ones."""

_NOT_USED = (ReadingState.SKIPPED.value, ReadingState.WRITTEN_OFF.value)
_READINGS = (  # a reading that became an event is in that event's state: it may have been cancelled since
    "SELECT r.id, r.key, r.account, r.event_name, r.customer, r.reference, r.value, r.at, "
    "coalesce((SELECT e.state FROM events e WHERE e.id = r.event_id), r.state) FROM readings r WHERE "
)  # (no join: PostgreSQL, before it has statistics, would prepare for a large one)


class _Row(NamedTuple):
    id: int
    key: str
    account: str
    event_name: str
    customer: str | None
    reference: str | None
    value: str | None
    at: int
    state: str


class Counters:
    """What was used within ``periods``; any thread may ask, and a forked child goes on by itself.

    Everything that was recorded counts, sent or not, except what was skipped or written off. Raises ``LedgerError``
    where the ledger cannot be read. The first question reads all readings of the longest period, once.
    """

    def __init__(self, ledger: Ledger, periods: Iterable[Period]) -> None:
        self._ledger = ledger
        self._periods = tuple(dict.fromkeys(periods))
        self._sqlite = ledger.database.is_sqlite
        self._lock = threading.Lock()
        self._begun = self._done = 0
        self._secret: bytes | None = None
        self._clear()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """What another thread was counting in the parent just then is counted anew."""
        if self._lock.locked():
            self._clear()
        self._lock = threading.Lock()

    def _clear(self) -> None:
        self._loaded = False
        self._last: tuple[int, str | None] = (0, None)
        self._gaps = _Gaps()
        self._spent = Spent(self._periods)
        self._customers: dict[str, str] = {}
        self._unresolved: set[str] = set()
        self._later_at = self._counted_at = 0
        self._acts = (0, 0, 0)
        self._stale = False

    def used(self, who: Reference, wanted: Iterable[tuple[str, Period]], account: str = "") -> list[Decimal]:
        """How much of each (event name, period) ``who`` has used, in the period that is now."""
        seen = self._begun  # whatever begins to read from here on sees all that was recorded before this call
        with inside(), self._lock:
            now = self._ledger.now()
            if self._done <= seen:
                self._begun += 1
                self._refresh(now)
                self._done = self._begun
            names = self._names(who, account, now)
            return [self._spent.of(names, (account, event_name), period, now) for event_name, period in wanted]

    def _names(self, who: Reference, account: str, now: int) -> Sequence[str]:
        """Under which names ``who`` is counted: as a customer, and as a lead whose customer was not known then."""
        if who.by == "id":
            return (who.value,)
        known = self._digest(account, who.text)
        if self._learn([known]):
            self._load(now)  # at once: until then, the lead would have used nothing
            self._learn([known])
        customer = self._customers.get(known)
        return (known,) if customer is None else (known, customer)

    # -- what is new

    def _refresh(self, now: int) -> None:
        if not self._loaded or not self._read_new(now):
            self._load(now)
        elif not 0 <= now - self._later_at < LATER_SECONDS:
            self._later_at = now
            self._learn(list(self._unresolved))
            self._stale = self._stale or self._read_acts(self._acts[0]) != self._acts
            if self._stale and not 0 <= now - self._counted_at < RECOUNT_SECONDS:
                self._load(now)

    def _read_new(self, now: int) -> bool:
        """Count what was recorded since the last time.

        False where the newest reading seen is gone (all were pruned, or the ledger is another one): its number, and
        those after it, may come again.
        """
        last, key = self._last
        rows = self._rows("r.id >= ? ORDER BY r.id LIMIT ?", last, PAGE)
        if key is not None and (not rows or (rows[0].id, rows[0].key) != (last, key)):
            return False
        self._read_gaps(now)
        while True:
            new = [row for row in rows if row.id != last]
            self._count(new, now)
            if not self._sqlite:  # there, one writer at a time numbers what it commits
                self._gaps.note([row.id for row in new], last, now)
            if rows:
                last = rows[-1].id
                self._last = (last, rows[-1].key)
            if len(rows) < PAGE:
                return True
            rows = self._rows("r.id > ? ORDER BY r.id LIMIT ?", last, PAGE)

    def _read_gaps(self, now: int) -> None:
        missing = self._gaps.open(now)
        if missing:
            rows = self._rows("r.id = ANY(?)", missing)
            self._count(rows, now)
            self._gaps.close([row.id for row in rows])

    def _count(self, rows: Iterable[_Row], now: int) -> None:
        self._spent.add(self._amounts(rows), now)

    def _amounts(self, rows: Iterable[_Row]) -> Iterator[tuple[str, What, int, Decimal]]:
        for row in rows:
            if row.value is None or row.state in _NOT_USED:
                continue
            name = row.customer or (row.reference and self._lead(row.account, row.reference))
            if name:
                yield name, (row.account, row.event_name), row.at, Decimal(row.value)

    def _lead(self, account: str, reference: str) -> str:
        known = self._digest(account, reference)
        if known not in self._customers:
            self._unresolved.add(known)
        return self._customers.get(known, known)

    # -- everything

    def _load(self, now: int) -> None:
        self._clear()
        self._later_at = self._counted_at = now
        newest = int(self._query("SELECT coalesce(max(id), 0) FROM acts")[0][0])
        self._acts = self._read_acts(max(newest - ACTS_BACK, 0))
        since = min((period.begins(now) for period in self._periods), default=now)
        while True:
            pruned = self._query("SELECT count(*), sum(readings) FROM pruned")
            self._count(self._pruned(since), now)
            self._read_old(since, now)
            self._read_new(now)
            if self._query("SELECT count(*), sum(readings) FROM pruned") == pruned:
                break  # else readings became sums meanwhile, and could have been missed or taken twice
            self._spent, self._last = Spent(self._periods), (0, None)
        self._learn(list(self._unresolved))
        self._loaded = True

    def _read_old(self, since: int, now: int) -> None:
        """What stands in the ledger but for its end, where something older may still be committed."""
        end = int(self._query("SELECT coalesce(max(id), 0) FROM readings")[0][0]) - TAIL
        last = 0
        while last < end:
            page = self._rows("r.id > ? AND r.id <= ? AND r.at >= ? ORDER BY r.id LIMIT ?", last, end, since, PAGE)
            self._count(page, now)
            last = page[-1].id if len(page) == PAGE else end
        self._last = (last, None)

    def _pruned(self, since: int) -> Iterator[_Row]:
        rows = self._query("SELECT account, event_name, customer, day, state, amount FROM pruned WHERE day >= ?", since)
        for account, event_name, customer, day, state, amount in rows:
            yield _Row(0, "", account, event_name, customer, None, amount, day, state)

    # -- what became of it

    def _read_acts(self, base: int) -> tuple[int, int, int]:
        ((last, count),) = self._query("SELECT coalesce(max(id), 0), count(*) FROM acts WHERE id > ?", base)
        return base, int(last), int(count)

    def _learn(self, digests: Sequence[str]) -> bool:
        """Find out whose customer the unknown are by now, and count what they have used as that customer's.

        True where one is another's than before: then what was counted by name alone stands with the wrong customer.
        """
        if not digests:
            return False
        moved = False
        some = "IN (SELECT value FROM json_each(?))" if self._sqlite else "= ANY(?)"
        asked = json.dumps(digests) if self._sqlite else digests
        for known, customer in self._query(f"SELECT digest, customer FROM payers WHERE digest {some}", asked):  # noqa: S608
            moved = moved or self._customers.get(known, customer) != customer
            self._customers[known] = customer
            if known in self._unresolved:
                self._unresolved.discard(known)
                self._spent.move(known, customer)
        return moved

    def _digest(self, account: str, reference: str) -> str:
        if self._secret is None:
            self._secret = secret_of(self._ledger)
        return known_by(self._secret, account, reference)

    # -- the database

    def _rows(self, condition: str, *values: Any) -> list[_Row]:
        return [_Row._make(row) for row in self._query(_READINGS + condition, *values)]

    def _query(self, statement: str, *values: Any) -> list[Any]:
        """The driver's own rows: SQLAlchemy's cost several times the query itself, and this runs before every call."""
        text = statement if self._sqlite else statement.replace("?", "%s")
        with clear_errors():
            found: list[Any] = self._ledger.database.lane("count").run(
                lambda driver: driver.execute(text, values).fetchall()
            )
        return found


class _Gaps:
    """Numbers below the newest reading's that nobody has seen: not committed yet, or never to be."""

    def __init__(self) -> None:
        self._since: dict[int, int] = {}

    def open(self, now: int) -> list[int]:
        """Those that may still be committed."""
        if self._since:
            self._since = {number: at for number, at in self._since.items() if 0 <= now - at < GAP_SECONDS}
        return list(self._since)

    def close(self, numbers: Iterable[int]) -> None:
        """``numbers`` were committed and seen."""
        for number in numbers:
            del self._since[number]

    def note(self, numbers: Iterable[int], last: int, now: int) -> None:
        """``numbers`` were seen, in their order, after ``last``: what lies between them is missing."""
        for number in numbers:
            self._since.update(dict.fromkeys(range(max(last + 1, number - TAIL), number), now))
            last = number
        for number in list(self._since)[:-TAIL]:
            del self._since[number]
