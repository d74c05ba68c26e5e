DEFAULT_LEDGER = "sqlite:///stripe_meter.db"
"""Where a ledger is, unless told."""
