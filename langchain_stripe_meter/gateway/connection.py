"""What lies under the official client: its log, without the names of our customers, and its connections."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Quiet(logging.Filter):
    """Keeps what the client libraries say of our requests out of the log: their addresses and bodies name people."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = threading.local()
        for name in ("stripe", "urllib3.connectionpool"):
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or not getattr(self.ours, "now", False)


_QUIET = _Quiet()


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing that happens here in this thread reaches the log, unless it is a warning."""
    before = getattr(_QUIET.ours, "now", False)
    _QUIET.ours.now = True
    try:
        yield
    finally:
        _QUIET.ours.now = before


class Session(threading.local):
    """Each thread's connection, which follows no redirect: a POST would be followed by a GET, and what Stripe says to
    that is no answer about the event."""

    def __init__(self) -> None:
        import requests

        self._own = requests.Session()

    def request(self, *arguments: Any, **options: Any) -> Any:
        return self._own.request(*arguments, **options | {"allow_redirects": False})

    def close(self) -> None:
        self._own.close()
