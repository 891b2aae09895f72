"""GRPO: group relative policy optimization."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import clipped_surrogate, sequence_mean, token_ratio
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def grpo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-mean over sequences of the mean over their tokens of min(rho_t A, clip(rho_t) A).

    DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, equation 3, with A of its section 4.1.2.
    """
    ratio_BT, _ = token_ratio(tokens)
    surrogate_BT, clipped = clipped_surrogate(
        ratio_BT, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=sequence_mean, metrics=clipped)
