"""Power loss at every write and fsync: what was acknowledged is there, whatever the disk made of the rest."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from faults import tally
from power_loss import Disk, moments, trace, ways

from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Entry, Ledger

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which records the writes, is absent")

RECORDER = """
import os, sys
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.ledger.store import Entry, Ledger

folder, synchronous = sys.argv[1:]
for part in range(2):  # closing it in between folds the write-ahead log into the file
    ledger = Ledger(f"sqlite:///{folder}/ledger.db", synchronous=synchronous)
    for batch in range(6):
        names = [f"{part}-{batch}-{number}" for number in range(1 + batch % 3)]
        ledger.record([Entry(name, "ai_tokens", 1, 1, ReadingState.RESOLVED, "cus_1") for name in names])
        os.write(1, " ".join([*names, ""]).encode())
    ledger.close()
"""
WHOLE = {f"{part}-{batch}-{number}" for part in range(2) for batch in range(6) for number in range(1 + batch % 3)}


class Lab:
    """Puts an image on a disk and looks at it, with SQLite or with the package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "ledger.db"
        folder.mkdir()

    def put(self, image: Mapping[str, bytes], shm: bytes) -> None:
        for old in self.folder.iterdir():
            old.unlink()
        for name, content in image.items():
            (self.folder / name).write_bytes(content)
        (self.folder / "ledger.db-shm").write_bytes(shm)

    def keys(self) -> set[str]:
        if not self.path.exists():
            return set()
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA synchronous=OFF")
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'readings'").fetchone():
                return set()
            return {key for (key,) in connection.execute("SELECT key FROM readings WHERE value = '1'")}

    def keys_by_the_package(self) -> set[str]:
        """Opened as after a restart, with one more reading to show that it goes on."""
        ledger = Ledger(f"sqlite:///{self.path}")
        ledger.record([Entry("after", "ai_tokens", 1, 1, ReadingState.RESOLVED, "cus_1")])
        keys = {row.identifier for row in views.every(ledger)}
        ledger.close()
        return keys - {"after"}


def images(quick_folder: Path, synchronous: str) -> Iterator[tuple[int, Disk, Mapping[str, bytes]]]:
    """Every image of every moment, numbered."""
    folder, chance, number = quick_folder / "traced", random.Random(1), 0
    folder.mkdir()
    lines = trace(RECORDER, folder, synchronous, output=quick_folder / "trace")
    for disk in moments(lines, folder):
        for choose in ways(chance):
            number += 1
            yield number, disk, disk.image(choose)
    assert set(disk.said) == WHOLE
    assert disk.image(lambda: True)["ledger.db"] == (folder / "ledger.db").read_bytes()


def test_every_image_of_a_power_loss_has_all_that_was_acknowledged(quick_folder: Path) -> None:
    lab, chance = Lab(quick_folder / "lab"), random.Random(2)
    tried = 0
    for number, disk, image in images(quick_folder, "FULL"):
        lab.put(image, chance.randbytes(chance.choice([0, 3, 32768])))
        found = lab.keys_by_the_package() if number % 7 == 0 else lab.keys()
        assert set(disk.said) <= found <= WHOLE
        tried = number
    assert tried > 500
    tally("power loss at each write and fsync, with torn and reordered sectors", tried=tried, varies=True)


def test_with_normal_an_image_lacks_what_was_acknowledged_last_and_none_is_corrupt(quick_folder: Path) -> None:
    """Those who ask for NORMAL trade this; and it shows that the images do lose what was not waited for."""
    lab = Lab(quick_folder / "lab")
    losing = 0
    for _, disk, image in images(quick_folder, "NORMAL"):
        lab.put(image, b"")
        found = lab.keys()
        losing += not set(disk.said) <= found
        assert found <= WHOLE
    assert losing > 10
