"""What losses are made of. Each function gives a tensor and the metrics that it measured on the way.

Shapes: B sequences, T predicted positions; what has one value for a sequence has shape (B, 1) and broadcasts.
Computed in float32 at least; off the mask stand zeros, whatever the input has there, also in the gradient.
"""

from __future__ import annotations

import torch

from forge_core.algorithms.metrics import Metrics, largest_of, mean_of, shares_of, smallest_of
from forge_core.algorithms.tokens import Tokens
from forge_core.config import CorrectionConfig

Measured = tuple[torch.Tensor, Metrics]


def log_ratio(
    logprobs_BT: torch.Tensor, against_BT: torch.Tensor, mask_BT: torch.Tensor
) -> torch.Tensor:
    """log p - log q of each token, 0 off the mask, shape (B, T)."""
    precise = torch.promote_types(logprobs_BT.dtype, torch.float32)
    # `where`, not a product: off the mask anything may stand, and nan * 0 is nan.
    return torch.where(mask_BT, logprobs_BT.to(precise) - against_BT.to(precise), 0.0)


def token_ratio(tokens: Tokens) -> Measured:
    """Importance ratio of each token against the anchor, shape (B, T).

    rho_t = p(y_t) / q(y_t): Schulman et al. 2017, arXiv 1707.06347, section 3.
    """
    ratio_BT = log_ratio(tokens.logprobs_BT, tokens.anchor_logprobs_BT, tokens.mask_BT).exp()
    return ratio_BT, {}


def mean_ratio(tokens: Tokens) -> Measured:
    """Importance ratio of each sequence as the geometric mean of its tokens', shape (B, 1).

    s = exp(1/|y| sum_t log rho_t): GSPO, Zheng et al. 2025, arXiv 2507.18071, equation 7.
    """
    log_ratio_BT = log_ratio(tokens.logprobs_BT, tokens.anchor_logprobs_BT, tokens.mask_BT)
    lengths_B1 = tokens.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return (log_ratio_BT.sum(dim=1, keepdim=True) / lengths_B1).exp(), {}


def sequence_ratio(tokens: Tokens) -> Measured:
    """Importance ratio of each sequence, the product of its tokens', shape (B, 1)."""
    log_ratio_BT = log_ratio(tokens.logprobs_BT, tokens.anchor_logprobs_BT, tokens.mask_BT)
    return log_ratio_BT.sum(dim=1, keepdim=True).exp(), {}


def clipped_surrogate(
    ratio: torch.Tensor, tokens: Tokens, *, clip_low: float, clip_high: float
) -> Measured:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of each token, to be made large, shape (B, T).

    Schulman et al. 2017, arXiv 1707.06347, equation 7; with two bounds as in DAPO, Yu et al. 2025, arXiv 2503.14476,
    equation 10. The metrics are the shares of tokens (of sequences, for a ratio of sequences) that are clipped, and the
    smallest and largest share of a sequence.
    """
    advantages_BT = _on_mask(tokens.advantages_BT, tokens)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate_BT = torch.minimum(ratio * advantages_BT, clipped * advantages_BT)
    sign = advantages_BT if ratio.shape[1] > 1 else advantages_BT.sum(dim=1, keepdim=True)
    is_low = (ratio < 1.0 - clip_low) & (sign < 0)
    is_high = (ratio > 1.0 + clip_high) & (sign > 0)
    return surrogate_BT, {
        "clip_ratio/low_mean": mean_of(is_low, tokens.mask_BT),
        "clip_ratio/low_min": smallest_of(shares_of(is_low, tokens.mask_BT)),
        "clip_ratio/high_mean": mean_of(is_high, tokens.mask_BT),
        "clip_ratio/high_max": largest_of(shares_of(is_high, tokens.mask_BT)),
        "clip_ratio/region_mean": mean_of(is_low | is_high, tokens.mask_BT),
    }


def capped_surrogate(
    ratio_BT: torch.Tensor, tokens: Tokens, *, clip_low: float, clip_high: float
) -> Measured:
    """sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log p of each token, to be made large, shape (B, T).

    CISPO: MiniMax-M1, Chen et al. 2025, arXiv 2506.13585, equations 4 and 5. Every token keeps its gradient; only its
    weight is bounded.
    """
    weight_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high).detach()
    advantages_BT = _on_mask(tokens.advantages_BT, tokens)
    surrogate_BT = weight_BT * advantages_BT * _on_mask(tokens.logprobs_BT, tokens)
    is_capped = (ratio_BT > 1.0 + clip_high) & (advantages_BT > 0)
    return surrogate_BT, {"cispo_clip_ratio": mean_of(is_capped, tokens.mask_BT)}


def sampling_weights(tokens: Tokens, correction: CorrectionConfig) -> Measured:
    """What each token's loss is multiplied by to make up for who sampled it; shape (B, T), or (B, 1) for sequences.

    With proximal logprobs, w = proximal / sampled: the decoupled objective of Hilton et al. 2021, arXiv 2110.00641,
    equation 2; w or min(w, high) (truncated importance sampling: Ionides 2008; Espeholt et al. 2018,
    arXiv 1802.01561, section 4.1) or w where low <= w <= high and 0 elsewhere (IcePop: Ling Team 2025,
    arXiv 2510.18855). Without them the loss's own ratio is the weight, and what is left to do is the mask, by the
    ratio of the weights in training to those that sampled.
    """
    nothing = torch.ones_like(tokens.mask_BT, dtype=torch.float32)
    if correction.weights == "none":
        return nothing, {}
    is_decoupled = tokens.proximal_logprobs_BT is not None
    newer_BT = tokens.anchor_logprobs_BT if is_decoupled else tokens.logprobs_BT
    log_weight_BT = log_ratio(newer_BT.detach(), tokens.sampled_logprobs_BT, tokens.mask_BT)
    if correction.level == "sequence":
        log_weight_BT = log_weight_BT.sum(dim=1, keepdim=True)
    plain = log_weight_BT.exp()
    limited = _limited(plain, correction)
    weights = limited if is_decoupled else (limited > 0).to(plain.dtype)
    return weights, {
        "correction/weight_mean": mean_of(weights, tokens.mask_BT),
        "correction/limited_ratio": mean_of(limited != plain, tokens.mask_BT),
    }


def _limited(weights: torch.Tensor, correction: CorrectionConfig) -> torch.Tensor:
    low, high = correction.low, correction.high
    if correction.weights == "truncated":
        return weights.clamp(max=high)
    if correction.weights == "masked":
        assert low is not None and high is not None
        is_within = (weights >= low) & (weights <= high)
        return torch.where(is_within, weights, 0.0)
    return weights


def token_mean(value_BT: torch.Tensor, tokens: Tokens) -> Measured:
    """Share of the mean over all tokens of the minibatch, scalar: DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 12."""
    return _on_mask(value_BT, tokens).sum() / tokens.num_tokens, {}


def sequence_mean(value_BT: torch.Tensor, tokens: Tokens) -> Measured:
    """Share of the mean over sequences of the mean over their tokens, scalar.

    GRPO, Shao et al. 2024, arXiv 2402.03300, equation 3: groups are of one size, so that the mean over groups of the
    mean over their samples is that over all samples.
    """
    lengths_B1 = tokens.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return (_on_mask(value_BT, tokens) / lengths_B1).sum() / tokens.num_sequences, {}


def constant_mean(value_BT: torch.Tensor, tokens: Tokens) -> Measured:
    """Share of the sum over tokens by sequences x `max_tokens`, scalar.

    A divisor that no length has a say in: Dr.GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.2.
    """
    return _on_mask(value_BT, tokens).sum() / (tokens.num_sequences * tokens.max_tokens), {}


def entropy_bonus(tokens: Tokens, coefficient: float) -> Measured:
    """Share of coefficient x the mean entropy of a token, scalar: Mnih et al. 2016, arXiv 1602.01783, section 4."""
    if not coefficient:
        return tokens.logprobs_BT.new_zeros(()), {}
    bonus_BT = coefficient * _on_mask(tokens.entropy_BT, tokens)
    bonus, _ = token_mean(bonus_BT, tokens)
    return bonus, {"entropy_bonus": mean_of(bonus_BT, tokens.mask_BT)}


def drift(
    logprobs_BT: torch.Tensor, sampled_logprobs_BT: torch.Tensor, mask_BT: torch.Tensor
) -> Metrics:
    """How far the policy in training is from the one that sampled, whatever the loss."""
    log_ratio_BT = log_ratio(logprobs_BT.detach(), sampled_logprobs_BT, mask_BT)
    # Schulman's k3 estimator of KL(sampled || trained): exp(x) - 1 - x, with x the log ratio.
    divergence_BT = log_ratio_BT.exp() - 1.0 - log_ratio_BT
    return {
        "sampling/kl": mean_of(divergence_BT, mask_BT),
        "sampling/sampling_logp_difference/mean": mean_of(log_ratio_BT.abs(), mask_BT),
    }


def _on_mask(value_BT: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    precise = torch.promote_types(value_BT.dtype, torch.float32)
    return torch.where(tokens.mask_BT, value_BT.to(precise), 0.0)
