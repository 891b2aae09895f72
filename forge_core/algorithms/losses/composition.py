"""What every loss ends with: importance weights, its mean, and what is added to it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from forge_core.algorithms.divergence import kl_penalty
from forge_core.algorithms.metrics import Metrics
from forge_core.algorithms.primitives import Measured, entropy_bonus, sampling_weights
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig

Average = Callable[[torch.Tensor, Tokens], Measured]


def composed(
    surrogate_BT: torch.Tensor,
    tokens: Tokens,
    config: AlgorithmConfig,
    *,
    average: Average,
    metrics: Metrics,
) -> LossShare:
    """average(KL penalty - w * surrogate) - entropy bonus, with the weights w of `config.correction`."""
    weights, weighed = sampling_weights(tokens, config.correction)
    penalty_BT, diverged = kl_penalty(tokens, config.kl)
    loss, _ = average(penalty_BT - weights * surrogate_BT, tokens)
    bonus, explored = entropy_bonus(tokens, config.entropy_coefficient)
    return LossShare(loss=loss - bonus, metrics={**metrics, **weighed, **diverged, **explored})
