"""A step costs the controller the same however many came before it; `make prove BAR=controller` does ten thousand."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from simulated_run import SimulatedRun, cost_of_steps


def test_a_step_costs_the_controller_the_same_however_many_came_before(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path, steps=120)
    costs = cost_of_steps(run, steps=120, chunk=10)
    assert run.run.ledger.current_step == 120 and not run.run.ledger.problems
    early, late = costs[2:7], costs[-5:]
    # A cost in proportion to the steps before would be at least twice as high.
    assert statistics.median(each.cpu_seconds for each in late) < 1.6 * statistics.median(
        each.cpu_seconds for each in early
    )
    # What a step leaves behind is what the log tells of it: no more than that of those before.
    growth = [b.blocks - a.blocks for a, b in itertools.pairwise(costs[2:])]
    assert statistics.median(growth[-4:]) < 1.5 * statistics.median(growth[:4])
    line = run.line
    assert not line.parts and max(map(len, (line.requests, line.intervals))) <= 2
