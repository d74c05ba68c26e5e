"""``stripe-meter``: the demo, and everything a person does with a ledger."""

from langchain_stripe_meter.cli.commands import app


def main() -> None:
    """The console script."""
    app()


__all__ = ["app", "main"]
