"""Figures of samples: pass@k, how much of what is said is said once, and how far verifiers agree.

Legend: n samples, k verifiers, T tokens of all responses together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from forge_core.ensembles.scales import Floats

Ints = NDArray[np.int64]

_MOST = 2**63 - 1

RIGHT_ABOVE = 0.5
"""A reward above it says that the sample is right."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that of k samples at least one is right, without bias, from n samples of which c are.

    1 - C(n - c, k) / C(n, k), of M. Chen et al. (2021, "Evaluating large language models trained on code", equation 1).
    Raises ValueError if there are fewer samples than k.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} takes {k} samples of a prompt, and there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 and so on up to `most`: the k that pass@k is told for."""
    return [2**power for power in range(most.bit_length())]


def distinct(tokens_T: Ints, lengths: Sequence[int], n: int) -> float | None:
    """Distinct n-grams over all n-grams of several responses; None if none is long enough.

    Distinct-n of J. Li et al. (2016, "A diversity-promoting objective function for neural conversation models").

    Args:
        tokens_T: tokens of all responses, one after the other, (T,).
        lengths: of the responses; their sum is T.
        n: tokens that are taken together.
    """
    grams, _ = _grams(tokens_T, lengths, n)
    return len(np.unique(grams)) / len(grams) if len(grams) else None


def repetition(tokens_T: Ints, lengths: Sequence[int], n: int) -> float | None:
    """Share of n-grams that the same response has had before, mean over responses; None if none is long enough.

    Seq-rep-n of S. Welleck et al. (2020, "Neural text generation with unlikelihood training", section 6.1). Arguments
    as of `distinct`.
    """
    shares = repetitions(tokens_T, lengths, n)
    told = shares[~np.isnan(shares)]
    return float(told.mean()) if len(told) else None


def repetitions(tokens_T: Ints, lengths: Sequence[int], n: int) -> Floats:
    """The same of each response; NaN for one that is shorter than n."""
    grams, of = _grams(tokens_T, lengths, n)
    num_grams = np.bincount(of, minlength=len(lengths)).astype(np.float64)
    of_distinct = np.unique(_joined(of, grams), return_index=True)[1]
    num_distinct = np.bincount(of[of_distinct], minlength=len(lengths))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: Floats = 1.0 - num_distinct / num_grams
    return shares


def _grams(tokens_T: Ints, lengths: Sequence[int], n: int) -> tuple[Ints, Ints]:
    """A number for each n-gram that lies within a response, equal for equal ones, and whose response it is."""
    of = np.repeat(np.arange(len(lengths)), lengths)
    if len(tokens_T) < n:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    number = tokens_T
    for length in range(2, n + 1):
        number = _joined(number[:-1], tokens_T[length - 1 :])
    of_first, of_last = of[: len(of) - n + 1], of[n - 1 :]
    is_within = of_first == of_last
    return number[is_within], of_first[is_within]


def _joined(left: Ints, right: Ints) -> Ints:
    """A number for each pair of numbers that are not negative, equal for equal pairs."""
    base = int(right.max(initial=0)) + 1
    if (int(left.max(initial=0)) + 1) * base > _MOST:
        # Numbered anew, by their order, they are below the number of pairs.
        left = np.unique(left, return_inverse=True)[1].astype(np.int64)
    if (int(left.max(initial=0)) + 1) * base > _MOST:
        right = np.unique(right, return_inverse=True)[1].astype(np.int64)
        base = int(right.max(initial=0)) + 1
    return left * base + right


def disagreement(votes_nk: Floats) -> float | None:
    """Share of samples that two verifiers judge differently, mean over pairs of verifiers; None for less than two.

    Args:
        votes_nk: 1 for, 0 against, NaN where a verifier has not seen a sample, (n, k).
    """
    shares = []
    for first, second in combinations(votes_nk.T, 2):
        both = ~np.isnan(first) & ~np.isnan(second)
        if both.any():
            shares.append(float(np.mean(first[both] != second[both])))
    return sum(shares) / len(shares) if shares else None
