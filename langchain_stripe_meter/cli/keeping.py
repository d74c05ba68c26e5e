"""The commands that keep a ledger: ``export``, ``prune``, ``ledger backup``, ``ledger restored``."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_stripe_meter.cli.groups import ledger_app
from langchain_stripe_meter.cli.show import JsonOption, LedgerOption, clear_errors, console, errors, fail, say
from langchain_stripe_meter.cli.world import open_ledger

if TYPE_CHECKING:
    from rich.status import Status

    from langchain_stripe_meter.ledger.store import Ledger

TELL_EVERY = 1_000
"""Rows between two words of progress."""


def export(
    file: Annotated[Path | None, typer.Argument(help="Where to; standard output by default.")] = None,
    ledger: LedgerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of CSV.")] = False,
) -> None:
    """Every reading and what became of it, as CSV or JSON lines."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened, errors.status("exporting") as shown:
        if file is None:
            _export(opened, sys.stdout, shown, as_json=as_json)
            return
        try:
            with file.open("w", newline="", encoding="utf-8") as stream:
                count = _export(opened, stream, shown, as_json=as_json)
        except OSError as error:
            fail(f"{file} cannot be written: {error.strerror}. Give another path.", as_json=as_json)
    console.print(f"{count:,} readings written to {file}.", soft_wrap=True)


def _export(ledger: Ledger, stream: Any, shown: Status, *, as_json: bool) -> int:
    from langchain_stripe_meter.ledger import views

    names = [field.name for field in dataclasses.fields(views.Row)]
    writer = csv.DictWriter(stream, names)
    if not as_json:
        writer.writeheader()
    count = 0
    for row in views.every(ledger):
        plain = {name: getattr(row, name) for name in names}
        if as_json:
            stream.write(json.dumps(plain, default=str) + "\n")
        else:
            writer.writerow(plain)
        count += 1
        if count % TELL_EVERY == 0:
            shown.update(f"{count:,} readings")
    return count


def prune(
    older_than: Annotated[int, typer.Option(help="Days; at least 36, since Stripe takes usage of 35.")] = 40,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Make the file smaller too; nobody can record meanwhile.")
    ] = False,
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what is final and old; its sums are kept."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger import keeping

        with errors.status("pruning") as shown:
            done = keeping.prune(opened, older_than, progress=_telling(shown, "rows looked at"))
            if shrink:
                shown.update("shrinking the file")
                keeping.shrink(opened)
    said = f"{done.readings:,} readings of more than {older_than} days were pruned; their sums are kept."
    said += f" So were {done.leads:,} leads that nothing has asked for in a year." if done.leads else ""
    say(said, dataclasses.asdict(done), as_json=as_json)


def _telling(shown: Status, what: str) -> Callable[[int, int], None]:
    return lambda done, all_: shown.update(f"{done:,} of {all_:,} {what}")


@ledger_app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where to; must not exist.")],
    ledger: LedgerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the ledger (SQLite) as it stands now, while others go on recording."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.epoch import backup as copy

        with errors.status("copying") as shown:
            size = copy(opened, file, progress=_telling(shown, "pages"))
    say(f"The ledger is copied to {file} ({size:,} bytes).", {"file": str(file), "bytes": size}, as_json=as_json)


@ledger_app.command()
def restored(ledger: LedgerOption = None, as_json: JsonOption = False) -> None:
    """Say that the ledger was restored from a backup, before anything is sent (SQLite's is noticed by itself)."""
    with clear_errors(as_json=as_json), open_ledger(ledger) as opened:
        from langchain_stripe_meter.ledger.epoch import restored as mark

        mark(opened)
    said = "Noted. What is unsent and older than 23 hours is compared with Stripe's sums before it is sent."
    say(said, {"restored": True}, as_json=as_json)
