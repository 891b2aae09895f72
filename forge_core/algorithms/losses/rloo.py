"""RLOO: REINFORCE with the mean of the other samples as baseline, a response being one action."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import clipped_surrogate, sequence_mean, sequence_ratio
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def rloo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-mean over sequences of min(rho A, clip(rho) A), with rho the ratio of whole sequences.

    At rho = 1 its gradient is that of Ahmadian et al. 2024, arXiv 2402.14740, equation 9; the clipped ratio is for the
    updates after a step's first, as TRL's RLOOTrainer has it.
    """
    ratio_B1, _ = sequence_ratio(tokens)
    surrogate_BT, clipped = clipped_surrogate(
        ratio_B1, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=sequence_mean, metrics=clipped)
