"""DAPO: GRPO with a higher upper clip, every token weighing the same, and a soft limit of length."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import clipped_surrogate, token_mean, token_ratio
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def dapo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-mean over all tokens of min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A).

    Yu et al. 2025, arXiv 2503.14476, equations 8 and 12; what it does to the rewards of overlong responses is
    `forge_core.algorithms.advantages.overlong_penalty`.
    """
    ratio_BT, _ = token_ratio(tokens)
    surrogate_BT, clipped = clipped_surrogate(
        ratio_BT, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=token_mean, metrics=clipped)
