"""Runs of the tiny preset that are compared by what they learn: their scores, curves, intervals and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.objects import open_store
from storage.resume import read_ledger

STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}
"""By degrees of freedom, the quantile of Student's distribution for a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a run came to."""

    seed: int
    """Its seed."""
    initial: float
    """Mean score of sampled answers to the held-out prompts before the first step."""
    final: float
    """The same after the last."""
    age_max: int
    """Largest age of a group."""
    age_mean: float
    """Mean age over groups."""
    wall_seconds: float
    """What the command took."""
    curve: tuple[float, ...]
    """Mean reward of each step's groups, those without a signal among them."""

    @classmethod
    def of(cls, store: str, summary: Mapping[str, Any]) -> Learned:
        """From a run's run.json and log."""
        steps = read_ledger(open_store(store), summary["run_id"]).steps
        return cls(
            seed=summary["config"]["seed"],
            initial=summary["eval"]["initial"],
            final=summary["eval"]["final"],
            age_max=summary["age"]["max"],
            age_mean=summary["age"]["mean"],
            wall_seconds=summary["wall_seconds"],
            curve=tuple(steps[step].metrics.get("reward", math.nan) for step in sorted(steps)),
        )

    def figures(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval over seeds; None for a single one."""
    mean, number = statistics.fmean(values), len(values)
    if number == 1:
        return mean, None
    return mean, STUDENT_T[number - 1] * statistics.stdev(values) / number**0.5


def told(values: Sequence[float]) -> str:
    """`0.812 ± 0.020`."""
    mean, half = mean_and_interval(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def draw_curves(runs: Mapping[str, Sequence[Learned]], path: Path, title: str) -> None:
    """A figure of the mean reward over steps, one colour a kind of run, with the range over its seeds."""
    # Deferred: the proofs that draw nothing do not need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, of_name in runs.items():
        length = min(len(run.curve) for run in of_name)
        columns = [[run.curve[step] for run in of_name] for step in range(length)]
        steps = range(1, length + 1)
        (line,) = axes.plot(steps, [statistics.fmean(each) for each in columns], label=name)
        axes.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns],
            color=line.get_color(), alpha=0.12, linewidth=0,
        )  # fmt: skip
    axes.set(title=title, xlabel="step", ylabel="mean reward", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
