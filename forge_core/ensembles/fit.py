"""Fitting an ensemble: which verifiers are read as one, what each says about the truth, and which say nothing.

Without labels the truth is a hidden variable, and right and wrong are told apart by one assumption: most verifiers,
those that share their errors counted as one, are better than chance.

Legend: n samples, k verifiers, U units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from forge_core.ensembles.dependence import connected, correlations, dependent_pairs, fit_loadings
from forge_core.ensembles.label_model import UNKNOWN, Ints, LabelModel, fit_label_model
from forge_core.ensembles.scales import Bools, Floats, Scale, fit_scale
from storage.ensembles import Rates

LEAST_VOTE_SHARE = 0.01
"""Verifiers that vote for fewer samples than this, or for more than all but this, are left out of the fit."""
LEAST_INFORMATION = 0.05
"""Units whose counts are as probable for right samples as for wrong ones, up to this, are dropped: half the sum of the
differences; of a single verifier true positive rate plus true negative rate less 1, without its sign."""
LEAST_UNITS = 3
"""Independent units that it takes to tell without labels how good each is."""
_MERGES = 5
"""Times at most that further dependent units are merged and the model is fitted again."""
_HIGHEST_LOADING = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedUnit:
    """Verifiers that are read as one."""

    members: tuple[int, ...]
    """Columns of the scores."""
    inverted: tuple[bool, ...]
    """Whose votes are turned around before they are counted."""
    levels: Floats
    """P(count | truth), (members + 1, 2): row the count, column wrong or right."""

    @property
    def information(self) -> float:
        """Total variation between what it says of right and of wrong samples, between 0 and 1."""
        return float(np.abs(self.levels[:, 1] - self.levels[:, 0]).sum() / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was fitted, by column of the scores."""

    scales: tuple[Scale, ...]
    """How scores are read, k of them."""
    balance: float
    """Share of right samples."""
    units: tuple[FittedUnit, ...]
    """What the probability is made of."""
    rates: dict[int, Rates]
    """Estimated rates of the verifiers that the model was fitted with."""
    dropped: dict[int, str]
    """Verifiers that are in no unit, and why."""
    posterior: Floats
    """Probability that each sample is right, (n,); known labels are not put in its place."""
    warnings: tuple[str, ...]
    """What speaks against trusting it, a sentence each."""


def fit_ensemble(
    scores: Floats, *, labels: Ints | None = None, balance: float | None = None
) -> Fit:
    """Fit an ensemble to the scores of k verifiers on n samples, (n, k).

    Args:
        scores: finite numbers, larger for better.
        labels: 1 right, 0 wrong, UNKNOWN, (n,).
        balance: share of right samples, where it is known.

    Raises ValueError if fewer units are left than it takes.
    """
    scales = tuple(map(fit_scale, scores.T))
    votes = np.stack([s.votes(column) for s, column in zip(scales, scores.T, strict=True)], axis=1)
    shares = votes.mean(axis=0)
    dropped = {
        j: f"it votes for {share:.1%} of the samples, and so tells too little about any"
        for j, share in enumerate(shares.tolist())
        if not LEAST_VOTE_SHARE <= share <= 1 - LEAST_VOTE_SHARE
    }
    used = [j for j in range(len(scales)) if j not in dropped]
    has_labels = labels is not None and bool((labels != UNKNOWN).any())
    _check_enough(len(used), has_labels)
    units, model = _fit_units(votes, used, labels, balance, has_labels)
    posterior = _sigmoid(log_odds(votes, model.balance, units))
    rates = {j: rates_of(votes[:, j], posterior) for j in used}
    warnings = []
    if (largest := max(len(unit.members) for unit in units)) * 2 > len(used):
        warnings.append(
            f"{largest} of {len(used)} verifiers share their errors: the estimates rest on the few others"
        )
    kept = []
    for unit in units:
        if unit.information >= LEAST_INFORMATION:
            kept.append(unit)
        else:
            dropped |= {j: "it votes alike for right and for wrong samples" for j in unit.members}
    if not kept:
        raise ValueError(
            "no verifier tells right samples from wrong ones by more than chance: add better ones, or give labels"
        )
    return Fit(
        scales=scales,
        balance=model.balance,
        units=tuple(kept),
        rates=rates,
        dropped=dropped,
        posterior=_sigmoid(log_odds(votes, model.balance, tuple(kept))),
        warnings=tuple(warnings),
    )


def log_odds(votes: Bools, balance: float, units: tuple[FittedUnit, ...]) -> Floats:
    """Log odds of being right, (n,), by the votes of all verifiers, (n, k)."""
    model = LabelModel(balance=balance, levels=tuple(u.levels for u in units))
    return model.log_odds(np.stack([_counts(votes, u.members, u.inverted) for u in units], axis=1))


def rates_of(votes: Bools, right: Floats) -> Rates:
    """Rates of a verifier by its votes and the probability, or the knowledge, that each sample is right."""
    of_right = float(right @ votes / right.sum()) if right.sum() else 0.0
    wrong = 1.0 - right
    of_wrong = float(wrong @ ~votes / wrong.sum()) if wrong.sum() else 0.0
    accuracy = float(np.where(votes, right, wrong).mean())
    return Rates(accuracy=accuracy, true_positive_rate=of_right, true_negative_rate=of_wrong)


def _check_enough(num_units: int, has_labels: bool) -> None:
    if num_units < (1 if has_labels else LEAST_UNITS):
        raise ValueError(
            f"{num_units} verifiers that vote and do not share their errors are left, and it takes {LEAST_UNITS} to "
            "tell without labels how good each is: name more of them by --scores, or give --labels with "
            "--labelled-prompts"
        )


def _fit_units(
    votes: Bools, used: list[int], labels: Ints | None, balance: float | None, has_labels: bool
) -> tuple[tuple[FittedUnit, ...], LabelModel]:
    """Units and the model of them: merged until no two of them are left dependent."""
    some = votes[:, used]
    correlation = correlations(some) if len(used) > 1 else np.ones((1, 1))
    loadings = fit_loadings(correlation) if len(used) > 2 else np.full(len(used), 0.1)
    residual = correlation - np.outer(loadings, loadings)
    groups = (
        connected(dependent_pairs(residual, len(votes)))
        if len(used) > 2
        else [[j] for j in range(len(used))]
    )
    for _ in range(_MERGES):
        _check_enough(len(groups), has_labels)
        inverted = [_inverted(group, correlation) for group in groups]
        said = np.stack(
            [_counts(some, g, i) for g, i in zip(groups, inverted, strict=True)], axis=1
        )
        first = _first_guess(some, loadings, groups)
        sizes = [len(group) + 1 for group in groups]
        model = fit_label_model(said, sizes, first=first, labels=labels, balance=balance)
        units = tuple(
            FittedUnit(members=tuple(used[j] for j in group), inverted=turned, levels=levels)
            for group, turned, levels in zip(groups, inverted, model.levels, strict=True)
        )
        merged = _merged(groups, dependent_pairs(_left(some, correlation, model, said), len(votes)))
        if merged == groups or len(merged) < LEAST_UNITS:
            break
        groups = merged
    return units, model


def _left(votes: Bools, correlation: Floats, model: LabelModel, said: Ints) -> Floats:
    """The correlation of each pair that the fitted model does not explain, (k, k).

    With b the share of right samples, J = true positive rate + true negative rate - 1 and s the standard deviation of
    the votes, the hidden truth explains b (1 - b) J_j J_k / (s_j s_k).
    """
    posterior = _sigmoid(model.log_odds(said))
    b = posterior.mean()
    difference = (
        posterior @ votes / posterior.sum() - (1 - posterior) @ votes / (1 - posterior).sum()
    )
    explained = math.sqrt(b * (1 - b)) * difference / votes.std(axis=0)
    left: Floats = correlation - np.outer(explained, explained)
    return left


def _merged(groups: list[list[int]], pairs: Bools) -> list[list[int]]:
    """The groups, those joined between whose members there are dependent pairs."""
    joined = pairs.copy()
    for group in groups:
        joined[np.ix_(group, group)] = True
    return connected(joined)


def _inverted(group: list[int], correlation: Floats) -> tuple[bool, ...]:
    """Whose votes run against those of the group's first."""
    return tuple(bool(correlation[group[0], j] < 0) for j in group)


def _counts(votes: Bools, members: list[int] | tuple[int, ...], inverted: tuple[bool, ...]) -> Ints:
    return (votes[:, list(members)] ^ np.array(inverted)).sum(axis=1, dtype=np.int64)


def _first_guess(votes: Bools, loadings: Floats, groups: list[list[int]]) -> Floats:
    """Posteriors to begin with, (n,): votes weighted as in a factor model, those of a group shared out among it."""
    weights = loadings / (1 - np.minimum(loadings**2, _HIGHEST_LOADING))
    for group in groups:
        weights[group] /= len(group)
    total = (votes - votes.mean(axis=0)) / votes.std(axis=0) @ weights
    return _sigmoid(2 * (total - np.median(total)) / max(float(total.std()), 1e-12))


def _sigmoid(odds: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -odds))
