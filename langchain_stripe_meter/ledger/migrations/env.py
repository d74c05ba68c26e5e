"""Alembic's entry: runs the migrations on the connection that the ledger hands over, in its transaction."""

from alembic import context

from langchain_stripe_meter.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="stripe_meter_version",
)
with context.begin_transaction():
    context.run_migrations()
