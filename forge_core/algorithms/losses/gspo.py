"""GSPO: group sequence policy optimization, which clips whole sequences."""

from __future__ import annotations

from forge_core.algorithms.losses.composition import composed
from forge_core.algorithms.primitives import clipped_surrogate, mean_ratio, sequence_mean
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig


def gspo_loss(tokens: Tokens, config: AlgorithmConfig) -> LossShare:
    """-mean over sequences of min(s A, clip(s) A), with s the geometric mean of the sequence's ratios.

    Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7.
    """
    ratio_B1, _ = mean_ratio(tokens)
    surrogate_BT, clipped = clipped_surrogate(
        ratio_B1, tokens, clip_low=config.clip_low, clip_high=config.clip_high
    )
    return composed(surrogate_BT, tokens, config, average=sequence_mean, metrics=clipped)
