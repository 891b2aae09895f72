"""A model with one hidden variable, whether a sample is right, fitted by EM.

The model of A. P. Dawid and A. M. Skene (1979, "Maximum likelihood estimation of observer error-rates using the EM
algorithm") for two classes: with z the hidden truth, x_u what unit u says,

    P(z = 1) = b,    P(x | z) = product over u of P_u(x_u | z).

A unit is one verifier with two levels, or several that share their errors with as many levels as they can give votes,
plus one: among themselves they are then free to depend on each other as they like.

Legend: n samples, U units, L levels of all units together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge_core.ensembles.scales import Floats

Ints = NDArray[np.int64]

UNKNOWN = -1
"""Label of a sample of which nobody said whether it is right."""
_ROUNDS = 1000
_TOLERANCE = 1e-6
_PRIOR_COUNT = 1.0
"""Samples that each level of a unit is taken to have been seen in besides, so that nothing is impossible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelModel:
    """The fitted model."""

    balance: float
    """b, the share of right samples."""
    levels: tuple[Floats, ...]
    """For each unit P_u(x | z), (levels of u, 2): row x, column z."""

    def log_odds(self, said: Ints) -> Floats:
        """Log odds of being right, (n,), of samples by their units' levels, (n, U)."""
        odds = np.full(len(said), np.log(self.balance / (1.0 - self.balance)))
        for unit, table in enumerate(self.levels):
            odds += np.log(table[:, 1] / table[:, 0])[said[:, unit]]
        return odds


def fit_label_model(
    said: Ints,
    num_levels: Sequence[int],
    *,
    first: Floats,
    labels: Ints | None = None,
    balance: float | None = None,
) -> LabelModel:
    """Fit by EM, from a first guess of the posteriors.

    Args:
        said: levels of the units, (n, U).
        num_levels: how many levels each unit has, U of them.
        first: first guess of the probability that each sample is right, (n,); EM climbs to the maximum next to it, and
            this alone decides which of the two classes is called right.
        labels: 1 right, 0 wrong, UNKNOWN, (n,); those that are known are not estimated (semi-supervised EM).
        balance: share of right samples, where it is known.
    """
    starts = np.concatenate([[0], np.cumsum(num_levels)])
    seen = np.zeros((len(said), starts[-1]))
    for unit, start in enumerate(starts[:-1]):
        seen[np.arange(len(said)), start + said[:, unit]] = 1.0
    unit_of = np.repeat(np.arange(len(num_levels)), num_levels)
    totals = seen.sum(axis=0)
    known = np.zeros(len(said), bool) if labels is None else labels != UNKNOWN
    truth = np.zeros(0) if labels is None else labels[known].astype(np.float64)
    posterior = first.copy()
    previous = np.zeros(2 * len(totals) + 1)
    for _ in range(_ROUNDS):
        posterior[known] = truth
        # M step: shares among samples, each weighted by how probably it is of the class.
        right = seen.T @ posterior
        counts = np.stack([totals - right, right], axis=1) + _PRIOR_COUNT
        tables = counts / np.add.reduceat(counts, starts[:-1], axis=0)[unit_of]
        b = balance if balance is not None else _share(posterior)
        # E step.
        logs = np.log(tables)
        odds = np.log(b / (1.0 - b)) + seen @ (logs[:, 1] - logs[:, 0])
        posterior = _sigmoid(odds)
        parameters = np.append(tables.ravel(), b)
        if np.abs(parameters - previous).max() < _TOLERANCE:
            break
        previous = parameters
    return LabelModel(balance=float(b), levels=tuple(np.split(tables, starts[1:-1])))


def _share(posterior: Floats) -> float:
    return float((posterior.sum() + _PRIOR_COUNT) / (len(posterior) + 2 * _PRIOR_COUNT))


def _sigmoid(odds: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -odds))
