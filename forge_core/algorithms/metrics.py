"""Figures of a step, gathered micro-batch by micro-batch and then over ranks: means, and extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Mean:
    """A sum, and over how many."""

    total: float
    """Sum of the values."""
    count: float
    """Number of the values."""

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest value so far; one that is no number counts as infinite, so that it is not lost."""

    value: float
    """The value."""

    def __add__(self, other: Largest) -> Largest:
        return Largest(max(_or_infinite(self.value), _or_infinite(other.value)))


@dataclass(frozen=True, slots=True)
class Smallest:
    """The smallest value so far."""

    value: float
    """The value."""

    def __add__(self, other: Smallest) -> Smallest:
        return Smallest(min(self.value, other.value))


def _or_infinite(value: float) -> float:
    return value if value == value else math.inf


Metric = Mean | Largest | Smallest
Metrics = Mapping[str, Metric]
"""By name, TRL's where it has one."""

SumOverRanks = Callable[[list[float], dist.ReduceOp.RedOpType], list[float]]


def mean_of(value: torch.Tensor, mask_BT: torch.Tensor) -> Mean:
    """The mean over the tokens of the mask; over the sequences that have any, where the shape is (B, 1)."""
    if value.shape != mask_BT.shape:
        mask_BT = mask_BT.any(dim=1, keepdim=True)
    total = torch.where(mask_BT, value.detach(), 0).sum()
    return Mean(float(total), float(mask_BT.sum()))


def shares_of(holds: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """For how large a share of its tokens it holds, of each sequence that has any token of the mask."""
    holds_BT = holds.expand_as(mask_BT) & mask_BT
    lengths_B = mask_BT.sum(dim=1)
    return (holds_BT.sum(dim=1) / lengths_B)[lengths_B > 0]


def smallest_of(values: torch.Tensor) -> Smallest:
    """The smallest of some values; of none, what any other is smaller than."""
    return Smallest(float(values.min()) if values.numel() else math.inf)


def largest_of(values: torch.Tensor) -> Largest:
    """The largest of some values; of none, what any other is larger than."""
    return Largest(float(values.max()) if values.numel() else -math.inf)


class StepMetrics:
    """What the micro-batches of one rank told."""

    def __init__(self) -> None:
        self._gathered: dict[str, Metric] = {}

    def add(self, metrics: Metrics) -> None:
        """Take in those of a micro-batch. Each has the same names, also one of padding."""
        for name, metric in metrics.items():
            known = self._gathered.get(name)
            self._gathered[name] = metric if known is None else known + metric  # type: ignore[operator]

    def reduced(self, over_ranks: SumOverRanks) -> dict[str, float]:
        """Collective: the figures by name; those of nothing are left out."""
        gathered = sorted(self._gathered.items())
        means = {name: m for name, m in gathered if isinstance(m, Mean)}
        tops = {name: m.value for name, m in gathered if isinstance(m, Largest)}
        bottoms = {name: m.value for name, m in gathered if isinstance(m, Smallest)}
        totals = over_ranks([m.total for m in means.values()], dist.ReduceOp.SUM)
        counts = over_ranks([m.count for m in means.values()], dist.ReduceOp.SUM)
        largest = over_ranks([_or_infinite(value) for value in tops.values()], dist.ReduceOp.MAX)
        smallest = over_ranks(list(bottoms.values()), dist.ReduceOp.MIN)
        figures = {
            **{n: t / c for n, t, c in zip(means, totals, counts, strict=True) if c},
            **dict(zip([*tops, *bottoms], [*largest, *smallest], strict=True)),
        }
        nothing = {name: -math.inf for name in tops} | {name: math.inf for name in bottoms}
        return {n: figure for n, figure in figures.items() if figure != nothing.get(n)}
