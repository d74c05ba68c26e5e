"""Alembic migrations, shipped in the package: applied by themselves on SQLite, by ``stripe-meter ledger upgrade``
on PostgreSQL."""
