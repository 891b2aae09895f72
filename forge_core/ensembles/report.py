"""How well an ensemble does where the truth is known: whom it picks, and whether its probabilities hold.

Legend: n samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forge_core.ensembles.scales import Bools, Floats, Scale
from storage.ensembles import CalibrationBin, LabelledReport, PickRates

_BINS = 10
_EQUAL = 1e-12


def pick_rate(scores: Floats, right: Floats, groups: Sequence[str]) -> float:
    """Share of groups of which a right sample is picked by the largest score; of equal ones each is as likely.

    Args:
        scores: one per sample, (n,).
        right: whether each is right, or how probably, (n,).
        groups: what group each is of, n of them.
    """
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    best = np.full(of.max() + 1, -np.inf)
    np.maximum.at(best, of, scores)
    top = scores >= best[of] - _EQUAL
    return float(np.mean(np.bincount(of, top * right) / np.bincount(of, top)))


def labelled_report(
    posterior: Floats,
    scores: Floats,
    scales: Sequence[Scale],
    names: Sequence[str],
    right: Bools,
    groups: Sequence[str],
) -> LabelledReport:
    """What came of the ensemble, the best single verifier, majority vote and mean, on samples whose labels are known.

    Args:
        posterior: the ensemble's probabilities, (n,).
        scores: of k verifiers, (n, k).
        scales: how those are read, k of them.
        names: what those are called, k of them.
        right: the labels, (n,).
        groups: what group each sample is of, n of them.
    """
    truth = right.astype(np.float64)
    columns = list(zip(scales, scores.T, strict=True))
    votes = np.stack([scale.votes(column) for scale, column in columns], axis=1)
    normalised = np.stack([scale.normalised(column) for scale, column in columns], axis=1)
    singles = [pick_rate(column, truth, groups) for column in scores.T]
    best = int(np.argmax(singles))
    calibration = _calibration(posterior, truth)
    error = sum(
        each.samples * abs(each.predicted - each.right)
        for each in calibration
        if each.predicted is not None and each.right is not None
    )
    return LabelledReport(
        pick_rates=PickRates(
            ensemble=pick_rate(posterior, truth, groups),
            best_single=singles[best],
            best_single_name=names[best],
            majority=pick_rate(votes.sum(axis=1).astype(np.float64), truth, groups),
            mean=pick_rate(normalised.mean(axis=1), truth, groups),
            chance=pick_rate(np.zeros(len(truth)), truth, groups),
            possible=pick_rate(truth, truth, groups),
        ),
        calibration=calibration,
        calibration_error=error / len(truth),
        share_right=float(truth.mean()),
    )


def _calibration(posterior: Floats, truth: Floats) -> tuple[CalibrationBin, ...]:
    edges = np.arange(1, _BINS) / _BINS
    of = np.searchsorted(edges, posterior, side="left")
    bins = []
    for number in range(_BINS):
        inside = of == number
        count = int(inside.sum())
        bins.append(
            CalibrationBin(
                low=number / _BINS,
                high=(number + 1) / _BINS,
                samples=count,
                predicted=float(posterior[inside].mean()) if count else None,
                right=float(truth[inside].mean()) if count else None,
            )
        )
    return tuple(bins)
