"""What the commands share: how they open what they need, and how they answer: tables for people, ``--json`` for
programs, one sentence for what went wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_stripe_meter.errors import ConfigurationError, MeteringError, logger
from langchain_stripe_meter.ledger import DEFAULT_LEDGER

if TYPE_CHECKING:
    from langchain_stripe_meter.gateway.client import Gateway
    from langchain_stripe_meter.ledger.store import Ledger


LedgerOption = Annotated[
    str | None, typer.Option("--ledger", envvar="STRIPE_METER_LEDGER", help="The ledger's database address.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
BillingDayOption = Annotated[
    int, typer.Option("--billing-day", min=1, max=31, help="The day of the month on which billing periods begin.")
]

# Names and paths are shown as they are: "[agents]" is no colour, and ":key:" no picture.
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
_piped = Console(markup=False, emoji=False, highlight=False, width=100_000)
"""For a pipe or a file: nothing is cut or wrapped, so that it can be copied and searched."""
IDS_AT_ONCE = 100_000
"""The longest range of ids that is taken for meant."""
MOST_ROWS = 1_000_000
"""The longest list that a command shows."""
ID_DIGITS = 18
"""A database's ids have no more."""
_COLOURS = {"ok": "green", "delivered": "green", "warn": "yellow", "held": "yellow", "doubtful": "yellow",
            "fail": "red", "rejected": "red", "skipped": "dim"}  # fmt: skip


_COMMANDS = {
    **{name: name for name in ("assign", "cancel", "correct", "forget", "prune", "retime", "retry", "verify")},
    "write_off": "write-off", "settle_doubt": "doubtful settle", "leads.capture": "leads capture",
}  # fmt: skip
_CALL = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, _COMMANDS))})\((?:\.\.\.)?\)")
_ARGUMENT = re.compile(r"(?<![\w&?/.-])(account|customer|email|id|name|phone|reason|session|since|until)=(?=(\S?))")


def in_commands(said: str) -> str:
    """What is said to who writes Python (``correct()``, ``reason=``), as commands and their options."""
    said = _CALL.sub(lambda found: f"stripe-meter {_COMMANDS[found[1]]}", said)
    return _ARGUMENT.sub(lambda found: f"--{found[1]}" + (" " if found[2] and found[2] not in ",.;:)" else ""), said)


def _log_in_commands(record: logging.LogRecord) -> bool:
    record.msg, record.args = in_commands(record.getMessage()), None
    return True


@contextmanager
def clear_errors(*, as_json: bool) -> Iterator[None]:
    """A ``MeteringError`` becomes one sentence and exit code 2; what is told of the work meanwhile names commands."""
    logger.addFilter(_log_in_commands)
    try:
        yield
    except MeteringError as error:
        fail(in_commands(str(error)), as_json=as_json)
    finally:
        logger.removeFilter(_log_in_commands)


def fail(message: str, code: int = 2, *, as_json: bool = False) -> NoReturn:
    """Say what is wrong on standard error, and leave; with ``as_json`` on standard output, too, where nothing is yet.

    It is one line there, so that it can end an export's lines.
    """
    if as_json:
        sys.stdout.write(json.dumps({"error": message}) + "\n")
    errors.print(Text.assemble(("stripe-meter: ", "red"), message), soft_wrap=True)
    raise typer.Exit(code)


def say(message: str, data: Mapping[str, Any], *, as_json: bool) -> None:
    """What a command did: a sentence, or its facts as a JSON object."""
    if as_json:
        print_json(data)
    else:
        console.print(message, soft_wrap=True)


def rows(items: Sequence[Any], *, as_json: bool, empty: str, hide: Sequence[str] = ()) -> None:
    """Records of one dataclass, as a table or as a JSON array."""
    if as_json:
        print_json([dataclasses.asdict(item) for item in items])
        return
    if not items:
        console.print(empty)
        return
    names = [field.name for field in dataclasses.fields(items[0]) if field.name not in hide]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        number = any(isinstance(getattr(item, name), Decimal) for item in items)
        table.add_column(
            name.replace("_", " "), justify="right" if number else "left", no_wrap=number or name in ("at", "state"),
            overflow="ellipsis" if number else "fold",
        )  # fmt: skip
    for item in items:
        table.add_row(*(cell(name, getattr(item, name)) for name in names))
    _print(table)


def record(fields: Mapping[str, Any], *, as_json: bool) -> None:
    """One record, a line for each of its fields."""
    if as_json:
        print_json(fields)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), cell(name, value))
    _print(table)


def _print(table: Table) -> None:
    (console if console.is_terminal else _piped).print(table)


def cell(name: str, value: object) -> Text:
    """A value as a person reads it."""
    return Text(_words(name, value), style=_COLOURS.get(str(value), "") if name == "state" else "")


def _words(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name == "at" and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | Decimal):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return "\n".join(f"{count:,}  {key}" for key, count in value.items()) or "-"
    if isinstance(value, tuple) and not all(isinstance(item, int) for item in value):
        return "\n".join(map(str, value))
    return in_ranges(value) or "-" if isinstance(value, tuple) else str(value)


def in_ranges(ids: Sequence[int]) -> str:
    """``(1, 2, 3, 7)`` as "1-3 7", which ``from_ranges`` reads."""
    found: list[list[int]] = []
    for one in sorted(ids):
        if found and one == found[-1][-1] + 1:
            found[-1][1:] = [one]
        else:
            found.append([one])
    return " ".join("-".join(map(str, ends)) for ends in found)


def from_ranges(texts: Sequence[str]) -> list[int]:
    """Ids that a person gave, one by one or as ranges, each once and in order; ``ConfigurationError`` names a slip."""
    ids: set[int] = set()
    for text in texts:
        first, _, last = text.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()) or max(len(first), len(last)) > ID_DIGITS:
            raise ConfigurationError(f"{text!r} is no id of a held reading. Give such as 3 or 3-7.")
        if int(first) > int(last):
            raise ConfigurationError(f"{text!r} ends before it begins. Give {last}-{first}.")
        if int(last) - int(first) >= IDS_AT_ONCE:
            raise ConfigurationError(f"{text!r} is more than {IDS_AT_ONCE:,} readings. Give fewer at a time.")
        ids.update(range(int(first), int(last) + 1))
    return sorted(ids)


def print_json(value: Any) -> None:
    """JSON on standard output; amounts as text, so that no reader rounds them."""
    sys.stdout.write(json.dumps(value, default=str, indent=2) + "\n")


@contextmanager
def open_ledger(url: str | None) -> Iterator[Ledger]:
    """The ledger. It must exist already: a mistyped path must not create an empty one."""
    ledger = new_ledger(url)
    ledger.check_place()
    missing = missing_file(ledger)
    if missing is not None:
        raise ConfigurationError(
            f"There is no ledger at {missing} yet. The first run makes it, or stripe-meter deliver, or stripe-meter "
            "ledger upgrade. If there should be one, give its address with --ledger or $STRIPE_METER_LEDGER."
        )
    with closing(ledger):
        yield ledger


def new_ledger(url: str | None) -> Ledger:
    """The ledger, whether it exists or not; it is opened, and made, when it is first used."""
    from langchain_stripe_meter.ledger.store import Ledger

    return Ledger(url or DEFAULT_LEDGER)


def file_of(ledger: Ledger) -> Path | None:
    """The absolute path of the ledger's file; None where it is on a server."""
    return Path(str(ledger.database.url.database)).absolute() if ledger.database.is_sqlite else None


def missing_file(ledger: Ledger) -> Path | None:
    """The absolute path of the ledger's file where there is none yet."""
    file = file_of(ledger)
    return None if file is None or file.exists() else file


def open_gateway() -> closing[Gateway]:
    """Stripe, by ``$STRIPE_API_KEY``."""
    return closing(new_gateway())


def new_gateway() -> Gateway:
    """Stripe, for the caller to close. The gateway's own advice about a missing key is for Python."""
    from langchain_stripe_meter.gateway.client import Gateway

    if not os.environ.get("STRIPE_API_KEY"):
        raise ConfigurationError("There is no Stripe API key. Set $STRIPE_API_KEY to yours.")
    return Gateway()


@contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, inside the block."""
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
