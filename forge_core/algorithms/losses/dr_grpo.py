"""Dr.GRPO: GRPO without its biases towards length and towards easy or hard prompts."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import clipped_surrogate, constant_mean, token_ratio
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def dr_grpo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-sum over tokens of min(rho_t A, clip(rho_t) A) by sequences x most tokens, with A = r - mean of the group.

    Liu et al. 2025, arXiv 2503.20783, section 3.2.
    """
    ratio_BT, _ = token_ratio(tokens)
    surrogate_BT, clipped = clipped_surrogate(
        ratio_BT, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=constant_mean, metrics=clipped)
