"""CISPO: importance weights that are clipped instead of tokens."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import capped_surrogate, token_mean, token_ratio
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def cispo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-mean over all tokens of sg(clip(rho_t)) A log p_t, where sg stops the gradient.

    MiniMax-M1, Chen et al. 2025, arXiv 2506.13585, equations 4 and 5.
    """
    ratio_BT, _ = token_ratio(tokens)
    surrogate_BT, capped = capped_surrogate(
        ratio_BT, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=token_mean, metrics=capped)
