"""Real servers in processes of their own, for the tests that ask them over HTTP and end them by a signal."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import wait_until

LANGGRAPH = Path(sys.executable).with_name("langgraph")
PATIENCE = 60.0
EVIL = "cus_evil"
"""Whom a forging client would like to see pay."""
KEYS = ("session_id", "thread_id", "conversation_id")


@dataclass
class Server:
    """A server that answers at ``url`` and writes its log to a file."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text()

    def post(self, path: str, body: object, user: str | None = None) -> str:
        """Its answer to ``body`` from ``user``; ``urllib.error.HTTPError`` unless all is well."""
        headers = {"Content-Type": "application/json"}
        if user is not None:
            headers["Authorization"] = f"Bearer token-of-{user}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return str(reply.read().decode())

    def get(self, path: str) -> Any:
        """What it answers there, as JSON."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as reply:
            return json.load(reply)

    def terminate(self) -> int:
        """SIGTERM, and the process's exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], url: str | None = None
) -> Iterator[Server]:
    """Start a server in ``folder`` and wait until it answers; without ``url``, its log says where (uvicorn's does)."""
    path = folder / "server.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
    server = Server(url or "", process, path)

    def is_ready() -> bool:
        assert process.poll() is None, server.said()[-4000:]
        if url is not None:
            return _answers(f"{url}/ok")
        found = re.search(r"running on (http://\S+)", server.said())
        server.url = found.group(1) if found else ""
        return found is not None

    try:
        wait_until(is_ready, PATIENCE)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@contextmanager
def uvicorn(folder: Path, app: str, environment: Mapping[str, str]) -> Iterator[Server]:
    """``app`` ("module:name") of ``folder``, in a real uvicorn on a free port."""
    command = [sys.executable, "-m", "uvicorn", app, "--port", "0", "--no-access-log"]
    with running(command, folder, environment) as server:
        yield server


def _free_port() -> int:
    """A port on which nobody listens, below those that the system gives to whoever asks for any: none of those can
    take it before the server does."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def agent_server(folder: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """``langgraph dev`` in ``folder``, which holds a langgraph.json, on a free port."""
    port = _free_port()
    command = [str(LANGGRAPH), "dev", "--host", "127.0.0.1", "--port", str(port), "--no-browser", "--no-reload"]
    quiet = {"LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGGRAPH_NO_VERSION_CHECK": "true", "LANGSMITH_TRACING": "false"}
    with running(command, folder, {**environment, **quiet}, f"http://127.0.0.1:{port}") as server:
        yield server
