"""From the scores of an ensemble's verifiers to one probability, by its stored form.

Legend: n samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forge_core.ensembles.fit import FittedUnit, log_odds
from forge_core.ensembles.scales import Floats, Scale
from storage.ensembles import Ensemble, FittedVerifier


def used_verifiers(ensemble: Ensemble) -> list[FittedVerifier]:
    """Those whose scores the probability is made of."""
    return [each for each in ensemble.verifiers if each.use != "dropped"]


def posterior(ensemble: Ensemble, scores: Mapping[str, Sequence[float]]) -> Floats:
    """Probability that each of n samples is right, (n,), by the scores of the verifiers that are used.

    P(right | votes) = 1 / (1 + exp(-o)), o = log(b / (1 - b)) + sum over units of log(P(count | right) / P(count |
    wrong)), with b the class balance.
    """
    used = used_verifiers(ensemble)
    columns = {each.name: number for number, each in enumerate(used)}
    votes = np.stack(
        [
            Scale(low=each.low, high=each.high, threshold=each.threshold).votes(
                np.asarray(scores[each.name], np.float64)
            )
            for each in used
        ],
        axis=1,
    )
    units = tuple(
        FittedUnit(
            members=tuple(columns[name] for name in unit.verifiers),
            inverted=unit.inverted,
            levels=np.stack([unit.given_wrong, unit.given_right], axis=1),
        )
        for unit in ensemble.units
    )
    return 1.0 / (1.0 + np.exp(-log_odds(votes, ensemble.class_balance, units)))
