"""Proof that a step costs the controller the same, and no more memory, however many came before it."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# What the tests have is taken from there; their folder is no package.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

STEPS, CHUNK = 10_000, 250
MOST_GROWTH = 1.3
"""Of processor time per step, and of memory, from the first quarter of the steps to the last."""


def prove_controller() -> tuple[bool, dict[str, Any]]:
    """Pipeline, admission, ledger, log and commits of an async run of ten thousand steps; processes are simulated."""
    from simulated_run import SimulatedRun, cost_of_steps

    with tempfile.TemporaryDirectory() as folder:
        run = SimulatedRun(Path(folder), steps=STEPS)
        costs = cost_of_steps(run, steps=STEPS, chunk=CHUNK)
        problems = [problem.sentence for problem in run.run.ledger.problems]
    quarter = len(costs) // 4
    early, late = costs[1:quarter], costs[-quarter:]
    cpu, memory = (
        statistics.median(getattr(each, name) for each in late)
        / statistics.median(getattr(each, name) for each in early)
        for name in ("cpu_seconds", "rss_bytes")
    )
    steps = costs[-1].last_step - costs[1].last_step
    result = {
        "cpu_growth": cpu,
        "memory_growth": memory,
        "bytes_per_step": (costs[-1].rss_bytes - costs[1].rss_bytes) / steps,
        "problems": problems[:5],
        "costs": [asdict(each) for each in costs],
    }
    return cpu <= MOST_GROWTH and memory <= MOST_GROWTH and not problems, result


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {"controller": prove_controller}
