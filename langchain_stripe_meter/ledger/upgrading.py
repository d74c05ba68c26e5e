"""Bringing a ledger's schema up to date, and refusing what is no ledger or a newer one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Column, Connection, MetaData, String, Table, insert, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from langchain_stripe_meter.errors import ForeignLedgerError, LedgerError, NewerLedgerError
from langchain_stripe_meter.ledger.address import BUSY_SECONDS
from langchain_stripe_meter.ledger.schema import HEAD, metadata

if TYPE_CHECKING:
    from langchain_stripe_meter.ledger.database import Lane

VERSION_TABLE = "stripe_meter_version"


def bring_up_to_date(lane: Lane, *, automatic: bool) -> None:
    """Make an empty ledger, migrate an older one; refuse a newer or foreign one and leave it as it is.

    With ``automatic`` False (PostgreSQL), an older ledger is refused too: an operator runs the migration.
    """
    version = _version(lane.connection)
    _refuse_unknown(lane.connection, version)
    if lane.connection.dialect.name == "sqlite":
        _write_ahead(lane.connection)
    if version == HEAD:
        return
    if not automatic:
        raise LedgerError(
            "The ledger's tables are missing or older than this package. Run: stripe-meter ledger upgrade"
        )
    with lane.transaction() as connection:
        version = _version(connection)  # another process may have been faster
        _refuse_unknown(connection, version)
        if version is None:
            make(connection)
        elif version != HEAD:
            migrate(connection)


def _write_ahead(connection: Connection) -> None:
    """Switch the file to WAL, which it then stays in. SQLite does not wait by itself for others who do the same."""
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except DBAPIError as error:
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant


def _refuse_unknown(connection: Connection, version: str | None) -> None:
    if version is not None and version > HEAD:
        raise NewerLedgerError(
            f"The ledger has schema {version}; this version of langchain_stripe_meter knows {HEAD}. "
            "Upgrade the package."
        )
    tables = inspect(connection).get_table_names()
    if version is None and connection.dialect.name == "sqlite" and tables:
        raise ForeignLedgerError(
            f"The database holds tables of something else ({', '.join(sorted(tables)[:3])}). "
            "Give the ledger its own file."
        )


def make(connection: Connection) -> None:
    """Make an empty ledger inside the caller's transaction: what the migrations come to, without Alembic, which takes
    longer to import and run than all else that a new ledger needs."""
    metadata.create_all(connection, checkfirst=False)
    versions = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))
    connection.execute(CreateTable(versions))
    connection.execute(insert(versions).values(version_num=HEAD))


def migrate(connection: Connection, to: str = "head") -> None:
    """Run the migrations inside the caller's transaction."""
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except CommandError as error:
        raise LedgerError(f"The ledger cannot be brought up to date: {error}. Restore a backup.") from error
