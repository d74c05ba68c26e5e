"""The soak of ``benchmarks/soak.py``, short: faults all the while, rolled up, pruned, and every run billed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.soak import soak
from faults import tally


@pytest.mark.parametrize("seed", [1, 2])
def test_a_hundred_days_with_faults_bill_every_run_once_and_prune_most_of_them(tmp_path: Path, seed: int) -> None:
    figures = soak(tmp_path, 6_000, memory=2_000, seed=seed, burst=200)
    assert figures.wrong == []
    assert figures.pruned > 2_500
    assert figures.faults > 10
    assert figures.disk_peak < 2 * figures.disk_first
    tally("Stripe fails again and again over a hundred days, while what is old is pruned", tried=figures.faults)
