"""Plays the simulation's seeds beside the other tests, in processes of their own that give way to them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulation import Tally

TEST = "test_weeks_of_trouble_lose_nothing_and_bill_nothing_twice"
"""Who waits for them."""
USUAL_SEEDS = 200
SEEDS = int(os.environ.get("STRIPE_METER_SIMULATED_SEEDS", USUAL_SEEDS))
NICENESS = 10

_players: list[subprocess.Popen[str]] = []


def begin() -> None:
    """Start as many as there are processors for us; each plays its share of the seeds."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for first in range(count):
        command = [sys.executable, __file__, str(first), str(SEEDS), str(count)]
        _players.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))


def total() -> Tally:
    """What happened in all of them, once the last has ended; AssertionError names the seed that failed."""
    from simulation import Tally

    sums = Tally()
    for player in _players:
        said, complaint = player.communicate()
        assert player.returncode == 0, complaint
        sums += Tally.of(json.loads(said))
    return sums


def stop() -> None:
    """Nobody waits for them any more."""
    for player in _players:
        if player.returncode is None:
            player.kill()
            player.communicate()
    _players.clear()


if __name__ == "__main__":
    os.nice(NICENESS)
    from simulation import play

    logging.disable(logging.CRITICAL)
    print(json.dumps(asdict(play(range(*map(int, sys.argv[1:])))), default=str))
