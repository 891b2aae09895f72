"""From the scores of a verifier, whatever their unit, to votes.

Legend: n samples, k verifiers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_OUTER_PERCENT = 5.0
"""Share of the scores at each end, in percent, that does not stretch the scale of those between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How one verifier's scores are read."""

    low: float
    """Score that becomes 0, as do all below it."""
    high: float
    """Score that becomes 1, as do all above it."""
    threshold: float
    """A score above it is a vote for right."""

    def normalised(self, scores: Floats) -> Floats:
        """Scores between 0 and 1; all 0.5 where the verifier gave one score only."""
        if self.low == self.high:
            return np.full(len(scores), 0.5)
        return np.clip((scores - self.low) / (self.high - self.low), 0.0, 1.0)

    def votes(self, scores: Floats) -> Bools:
        """Whether each score is a vote for right."""
        return scores > self.threshold


def fit_scale(scores: Floats) -> Scale:
    """The scale of one verifier from its scores of n samples.

    The ends are the 5th and the 95th percentile, or the least and the largest score where those coincide. The threshold
    is Otsu's: of all cuts between two scores that which leaves the least variance within the two sides (N. Otsu, 1979,
    "A threshold selection method from gray-level histograms"). Of two different scores it is the middle.
    """
    low, high = (
        float(end) for end in np.percentile(scores, (_OUTER_PERCENT, 100 - _OUTER_PERCENT))
    )
    if low == high:
        low, high = float(scores.min()), float(scores.max())
    return Scale(low=low, high=high, threshold=_otsu(np.clip(scores, low, high)))


def _otsu(scores: Floats) -> float:
    values, counts = np.unique(scores, return_counts=True)
    if len(values) == 1:
        return float(values[0])
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(values * counts)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    # The variance between the sides, which is least within them where it is largest.
    best = int(np.argmax(below * above * gap**2))
    return float((values[best] + values[best + 1]) / 2)
