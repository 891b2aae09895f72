"""Which verifiers share their errors.

Given whether a sample is right, verifiers that err each for itself are independent. Their covariance then comes of that
one hidden fact alone, and their correlations are products, R_jk = a_j a_k for j != k: a matrix of rank one off its
diagonal. Verifiers that share their errors stand out of it by what is left, R_jk - a_j a_k.

The loadings a are fitted by least absolute deviations, which pairs of that kind cannot pull towards themselves as long
as they are few: least squares, and EM with them, would take what a few verifiers share for the truth.

Legend: n samples, k verifiers.
"""

from __future__ import annotations

import math

import numpy as np

from forge_core.ensembles.scales import Bools, Floats

LEAST_RESIDUAL = 0.1
"""Correlation beyond what the hidden truth explains from which on two verifiers count as dependent."""
_DEVIATIONS = 4.0
"""Standard errors that it is above chance besides: about one pair in 15,000 is by chance."""
_ROUNDS = 200
_TOLERANCE = 1e-9


def correlations(votes: Bools) -> Floats:
    """Correlations between the votes of k verifiers on n samples, (n, k) to (k, k)."""
    found: Floats = np.corrcoef(votes.astype(np.float64), rowvar=False).astype(np.float64)
    return found


def fit_loadings(correlation: Floats) -> Floats:
    """The loadings a, (k,), that make the sum of |R_jk - a_j a_k| over all pairs small.

    Each in turn is set to its best value given the others, which is a median of R_jk / a_k weighted by |a_k|. The signs
    are such that most verifiers load positively. The first guess, the median correlation with the others, is itself
    deaf to a minority that agrees.
    """
    k = len(correlation)
    others = ~np.eye(k, dtype=bool)
    first = np.median(correlation[others].reshape(k, k - 1), axis=1)
    first = np.where(np.abs(first) < 1e-3, 1e-3, first)
    products = np.outer(first, first)[others]
    scale = np.median(np.abs(correlation[others] / products))
    loadings = np.clip(first * math.sqrt(scale), -1.0, 1.0)
    for _ in range(_ROUNDS):
        before = loadings.copy()
        for j in range(k):
            there = others[j] & (np.abs(loadings) > 1e-6)
            if there.any():
                ratios = correlation[j, there] / loadings[there]
                loadings[j] = np.clip(_weighted_median(ratios, np.abs(loadings[there])), -1.0, 1.0)
        if np.abs(loadings - before).max() < _TOLERANCE:
            break
    return loadings if (np.sign(loadings).sum() or loadings.sum()) >= 0 else -loadings


def _weighted_median(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    heights = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(heights, heights[-1] / 2)]])


def dependent_pairs(residual: Floats, num_samples: int) -> Bools:
    """Which pairs have a correlation left that is neither small nor chance, (k, k), never a verifier with itself."""
    least = max(LEAST_RESIDUAL, _DEVIATIONS / math.sqrt(num_samples))
    pairs = np.abs(residual) > least
    np.fill_diagonal(pairs, False)
    return pairs


def connected(pairs: Bools) -> list[list[int]]:
    """The verifiers in groups that pairs connect, each sorted, in the order of their first members."""
    groups: list[list[int]] = []
    seen: set[int] = set()
    for start in range(len(pairs)):
        if start in seen:
            continue
        group, todo = {start}, [start]
        while todo:
            new = set(np.flatnonzero(pairs[todo.pop()]).tolist()) - group
            group |= new
            todo += new
        seen |= group
        groups.append(sorted(group))
    return groups
