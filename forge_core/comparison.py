"""Two checkpoints on the same prompts: the gain of one over the other, and how sure it is.

The percentile bootstrap of a mean of paired differences (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): prompts are drawn with replacement, each with both of its scores, so that what makes a prompt hard for both
does not count. Its seed is fixed: the same scores have the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forge_core.config.promotion import PromotionConfig
from storage.promotions import Comparison

_SEED = 0
_DRAWN_AT_ONCE = 2**20
"""Prompts that are drawn at the same time, which bounds memory to a few MiB."""


def compare(
    candidate: Sequence[float], baseline: Sequence[float], criteria: PromotionConfig
) -> Comparison:
    """The mean gain of the candidate's scores over the baseline's, with its interval.

    Both have one score for each prompt, in the same order. Raises ValueError if they are not of the same number, if
    there are none, or if one is not finite.
    """
    ours, theirs = np.asarray(candidate, np.float64), np.asarray(baseline, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not ours.size:
        raise ValueError(
            f"{ours.size} scores of the candidate and {theirs.size} of the baseline cannot be paired: both need one "
            "for each prompt"
        )
    differences = ours - theirs
    if not np.isfinite(differences).all():
        raise ValueError("a score is not finite: mend the reward, and evaluate again")
    means = _resampled_means(differences, criteria.resamples)
    tail = (1.0 - criteria.confidence) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Comparison(
        score=criteria.score,
        num_prompts=ours.size,
        candidate=float(ours.mean()),
        baseline=float(theirs.mean()),
        gain=float(differences.mean()),
        low=float(low),
        high=float(high),
        confidence=criteria.confidence,
        resamples=criteria.resamples,
    )


def _resampled_means(differences: np.ndarray, resamples: int) -> np.ndarray:
    """Means of so many draws of all prompts with replacement."""
    random = np.random.default_rng(_SEED)
    at_once = max(1, _DRAWN_AT_ONCE // differences.size)
    means = []
    for begin in range(0, resamples, at_once):
        shape = (min(at_once, resamples - begin), differences.size)
        means.append(differences[random.integers(differences.size, size=shape)].mean(axis=1))
    return np.concatenate(means)


def judge(
    score: float, compared: Comparison | None, criteria: PromotionConfig, *, against: str | None
) -> tuple[bool, str]:
    """Whether a checkpoint is promoted, and why, in a sentence.

    Args:
        score: its mean score.
        compared: how it did against the one that was promoted last; None if there is none.
        criteria: what is asked of it.
        against: what the one that was promoted last is called; None if there is none.
    """
    if criteria.min_score is not None and score < criteria.min_score:
        return False, f"its score {score:.4g} is below min_score {criteria.min_score:g}"
    if compared is None:
        return True, f"no checkpoint of line {criteria.line} was promoted before"
    interval = (
        f"{compared.candidate:.4g} against {compared.baseline:.4g} of {against} on {compared.num_prompts} prompts: "
        f"gain {compared.gain:+.4g}, {compared.confidence:.0%} interval {compared.low:+.4g} to {compared.high:+.4g}"
    )
    if compared.low > criteria.min_gain:
        return True, f"{interval}, all of it above {criteria.min_gain:g}"
    return False, f"{interval}, which does not lie above {criteria.min_gain:g}"
