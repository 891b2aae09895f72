"""Simulated weak verifiers: samples whose truth is known, and votes on them that err as told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_CANDIDATES = 8


@dataclass(frozen=True)
class Simulated:
    """One draw."""

    right: Any
    """Truth of each sample, (n,)."""
    votes: Any
    """Votes of each verifier, (n, k)."""
    accuracy: Any
    """Share of the samples that each judges rightly, (k,)."""
    groups: list[str]
    """Prompt of each sample."""


def simulate(seed: int, *, num_prompts: int = 2000, shared: float = 1.0) -> Simulated:
    """Twenty verifiers of eight candidates to each prompt, of which a fifth is right.

    Verifiers 0 to 13 have accuracies between 0.5 and 0.8 and err each for itself. 14 to 17 are as accurate as each
    other and take the share `shared` of their errors from one draw; 18 and 19 are worse than chance.
    """
    random = np.random.default_rng(seed)
    n = num_prompts * NUM_CANDIDATES
    right = random.random(n) < 0.2
    accuracy = random.uniform(0.5, 0.8, 20)
    accuracy[14:18] = accuracy[14]
    accuracy[18:] = random.uniform(0.3, 0.45, 2)
    errs = random.random((n, 20)) > accuracy
    common = random.random(n) > accuracy[14]
    takes_common = random.random((n, 4)) < shared
    errs[:, 14:18] = np.where(takes_common, common[:, None], errs[:, 14:18])
    votes = right[:, None] ^ errs
    return Simulated(
        right=right,
        votes=votes,
        accuracy=(votes == right[:, None]).mean(axis=0),
        groups=[f"{number // NUM_CANDIDATES:05d}" for number in range(n)],
    )


def logistic_regression(features: Any, right: Any) -> Any:
    """Log odds of being right, (n,), of a logistic regression with labels, by Newton's method."""
    columns = np.column_stack([np.ones(len(features)), features])
    weights = np.zeros(columns.shape[1])
    for _ in range(8):
        probability = 1.0 / (1.0 + np.exp(-columns @ weights))
        spread = probability * (1.0 - probability)
        hessian = (columns * spread[:, None]).T @ columns + 1e-6 * np.eye(len(weights))
        weights += np.linalg.solve(hessian, columns.T @ (right - probability))
    return columns @ weights
