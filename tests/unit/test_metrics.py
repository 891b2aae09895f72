"""Figures of a step: means of what was counted and extremes, over micro-batches and ranks; nothing of nothing."""

import math

import pytest
import torch
import torch.distributed as dist

from forge_core.algorithms.metrics import (
    Largest,
    Mean,
    Smallest,
    StepMetrics,
    largest_of,
    mean_of,
    shares_of,
    smallest_of,
)

MASK = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])


def reduced(*ranks: StepMetrics) -> list[dict[str, float]]:
    """What each rank is told, with the collectives done by hand."""
    asked: list[list[list[float]]] = [[] for _ in ranks]
    wanted: list[dist.ReduceOp.RedOpType] = []
    for rank, told in zip(asked, ranks, strict=True):

        def record(
            values: list[float], op: dist.ReduceOp.RedOpType, rank: list[list[float]] = rank
        ) -> list[float]:
            rank.append(values)
            wanted.append(op)
            return values

        told.reduced(record)
    operations = {dist.ReduceOp.SUM: sum, dist.ReduceOp.MAX: max, dist.ReduceOp.MIN: min}
    together = [
        [operations[op](each) for each in zip(*of_ranks, strict=True)]
        for op, of_ranks in zip(wanted, zip(*asked, strict=True), strict=False)
    ]
    results = []
    for told in ranks:
        answers = iter(together)
        results.append(told.reduced(lambda _values, _op, answers=answers: next(answers)))  # type: ignore[misc]
    return results


def gathered(*micro_batches: dict[str, Mean | Largest | Smallest]) -> StepMetrics:
    told = StepMetrics()
    for each in micro_batches:
        told.add(each)
    return told


def test_figures_are_over_all_micro_batches_of_all_ranks() -> None:
    first = gathered(
        {"mean": Mean(3.0, 2.0), "top": Largest(1.0), "bottom": Smallest(-2.0)},
        {"mean": Mean(1.0, 2.0), "top": Largest(5.0), "bottom": Smallest(4.0)},
    )
    second = gathered({"mean": Mean(6.0, 1.0), "top": Largest(2.0), "bottom": Smallest(-3.0)})
    assert reduced(first, second) == [{"mean": 2.0, "top": 5.0, "bottom": -3.0}] * 2


def test_a_rank_without_anything_is_told_the_same() -> None:
    nothing = {"mean": Mean(0.0, 0.0), "top": Largest(-math.inf), "bottom": Smallest(math.inf)}
    some = {"mean": Mean(1.0, 4.0), "top": Largest(-2.0), "bottom": Smallest(7.0)}
    wanted = {"mean": 0.25, "top": -2.0, "bottom": 7.0}
    assert reduced(gathered(nothing), gathered(some)) == [wanted, wanted]
    assert reduced(gathered(nothing), gathered(nothing)) == [{}, {}]


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_what_is_no_number_is_not_lost_among_larger_ones(order: tuple[float, float]) -> None:
    [told] = reduced(gathered(*({"top": Largest(value)} for value in order)))
    assert told == {"top": math.inf}
    assert reduced(gathered({"top": Largest(math.nan)})) == [{"top": math.inf}]


def test_means_are_over_tokens_or_over_sequences_that_have_any() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [9.0, 9.0, 9.0], [4.0, 9.0, 9.0]], requires_grad=True)
    assert mean_of(values, MASK) == Mean(7.0, 3.0)
    assert mean_of(values[:, :1], MASK) == Mean(5.0, 2.0)


def test_shares_are_of_the_sequences_that_have_any_token() -> None:
    holds = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])
    assert shares_of(holds, MASK).tolist() == [0.5, 1.0]
    assert shares_of(holds[:, :1], MASK).tolist() == [1.0, 1.0]
    assert shares_of(holds, MASK & False).tolist() == []


def test_extremes_of_nothing_give_way_to_any_other() -> None:
    some, none = torch.tensor([0.5, -1.0]), torch.tensor([])
    assert (largest_of(some), smallest_of(some)) == (Largest(0.5), Smallest(-1.0))
    assert (largest_of(none), smallest_of(none)) == (Largest(-math.inf), Smallest(math.inf))
