"""Group relative policy optimization.

Shapes: N groups, G samples a group, B episodes, T response positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_core.config import AlgorithmConfig


def group_advantages(rewards_NG: torch.Tensor, *, scale: bool) -> torch.Tensor:
    """Advantage of each sample within its group, shape (N, G).

    A = (r - mean) / std over the group (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, section 4.1.2);
    with 1e-4 added to the sample standard deviation;
    without `scale`, A = r - mean (Dr.GRPO, Liu et al. 2025, arXiv 2503.20783). A group whose rewards are all
    equal gets exact zeros.
    """
    centred_NG = rewards_NG - rewards_NG.mean(dim=1, keepdim=True)
    has_signal_N1 = (rewards_NG != rewards_NG[:, :1]).any(dim=1, keepdim=True)
    if scale:
        centred_NG = centred_NG / (rewards_NG.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(has_signal_N1, centred_NG, torch.zeros_like(centred_NG))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """A micro-batch's share of the loss, and sums from which step metrics are made."""

    loss: torch.Tensor
    """Scalar: the sum over masked tokens, divided by the step's number of tokens."""
    metrics: dict[str, float]
    """Sums over masked tokens, under the names they get as means."""


def grpo_loss(
    logprobs_BT: torch.Tensor,
    sampled_logprobs_BT: torch.Tensor,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    num_tokens: float,
    config: AlgorithmConfig,
) -> LossSums:
    """The clipped surrogate, averaged over the tokens of the whole batch.

    -1/num_tokens * sum_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) with
    rho_t = exp(logprob - sampled logprob): equation 3 of Shao et al. 2024 without the KL term, with the
    token-level mean and the asymmetric clip of DAPO (Yu et al. 2025, arXiv 2503.14476, equations 10 and 12).

    Args:
        logprobs_BT: logprobs under the weights being trained.
        sampled_logprobs_BT: logprobs recorded when the tokens were sampled; the same shape.
        advantages_B: one advantage per episode.
        mask_BT: true where the policy wrote the token.
        num_tokens: masked tokens of the whole batch over all ranks, so that shares add up.
        config: clip bounds.
    """
    mask = mask_BT.to(logprobs_BT.dtype)
    # `where`, not a product: off the mask anything may stand, and nan * 0 is nan.
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - sampled_logprobs_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    advantages_B1 = advantages_B[:, None]
    surrogate_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    loss = -(surrogate_BT * mask).sum() / num_tokens
    with torch.no_grad():
        is_low = (ratio_BT < 1.0 - config.clip_low) & (advantages_B1 < 0)
        is_high = (ratio_BT > 1.0 + config.clip_high) & (advantages_B1 > 0)
        metrics = {
            "clip_ratio/low_mean": float((is_low * mask).sum()),
            "clip_ratio/high_mean": float((is_high * mask).sum()),
            "clip_ratio/region_mean": float(((is_low | is_high) * mask).sum()),
            **ratio_sums(logprobs_BT, sampled_logprobs_BT, mask_BT),
        }
    return LossSums(loss=loss, metrics=metrics)


@torch.no_grad()
def ratio_sums(
    logprobs_BT: torch.Tensor, sampled_logprobs_BT: torch.Tensor, mask_BT: torch.Tensor
) -> dict[str, float]:
    """Sums over masked tokens that tell how far the policy is from the one that sampled, whatever the loss."""
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - sampled_logprobs_BT, 0.0)
    return {
        # Schulman's k3 estimator of KL(sampled || trained): exp(x) - 1 - x, with x the log ratio.
        "sampling/kl": float((log_ratio_BT.exp() - 1.0 - log_ratio_BT).sum()),
        "sampling/sampling_logp_difference/mean": float(log_ratio_BT.abs().sum()),
    }
