"""PPO: clipped ratios of tokens, each with an advantage of its own by a learned critic."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import clipped_surrogate, token_mean, token_ratio
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def ppo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-mean over all tokens of min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).

    Schulman et al. 2017, arXiv 1707.06347, equation 7, with A_t of `forge_core.algorithms.gae`; its value loss is the
    critic's own, which shares no weights with the policy.
    """
    ratio_BT, _ = token_ratio(tokens)
    surrogate_BT, clipped = clipped_surrogate(
        ratio_BT, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=token_mean, metrics=clipped)
