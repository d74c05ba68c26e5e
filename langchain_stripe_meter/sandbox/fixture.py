"""The pytest fixture ``stripe_sandbox``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from langchain_stripe_meter.sandbox import StripeSandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def stripe_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StripeSandbox]:
    """A running sandbox of its own for each test, to which the environment points this package.

    The default ledger is a new file in the test's ``tmp_path``: real usage that waits in ``stripe_meter.db`` is not
    sent to the sandbox. A handler that was made before the test began, or with ``ledger=``, keeps the ledger it has.
    """
    monkeypatch.setenv("STRIPE_METER_LEDGER", f"sqlite:///{tmp_path / 'stripe_meter.db'}")
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        yield sandbox
