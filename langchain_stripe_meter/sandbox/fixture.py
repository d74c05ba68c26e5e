"""The pytest fixture ``stripe_sandbox``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from langchain_stripe_meter.sandbox import StripeSandbox

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stripe_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[StripeSandbox]:
    """A running sandbox of its own for each test, to which the environment points this package."""
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        yield sandbox
