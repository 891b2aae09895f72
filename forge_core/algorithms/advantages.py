"""Advantages: how much better a sample is than what was to be expected.

Shapes: N groups, G samples a group. Each function gives a tensor and the metrics that it measured on the way.
"""

from __future__ import annotations

import torch

from forge_core.algorithms.metrics import Mean, Metrics
from forge_core.config import AlgorithmConfig

STD_OFFSET = 1e-4
"""Keeps the division by the spread of almost equal values finite; the same as TRL's."""


def group_advantages(rewards_NG: torch.Tensor, *, scale: bool) -> tuple[torch.Tensor, Metrics]:
    """Advantage of each sample within its group, shape (N, G).

    A = (r - mean) / std over the group (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, section 4.1.2),
    with 1e-4 added to the sample standard deviation;
    without `scale`, A = r - mean (Dr.GRPO, Liu et al. 2025, arXiv 2503.20783). A group whose rewards are all
    equal gets exact zeros.
    """
    centred_NG = rewards_NG - rewards_NG.mean(dim=1, keepdim=True)
    if scale:
        centred_NG = centred_NG / (rewards_NG.std(dim=1, keepdim=True) + STD_OFFSET)
    return _of_groups_with_signal(centred_NG, rewards_NG)


def leave_one_out_advantages(
    rewards_NG: torch.Tensor, *, scale: bool
) -> tuple[torch.Tensor, Metrics]:
    """Advantage of each sample over the mean of the others of its group, shape (N, G).

    A_i = r_i - 1/(G - 1) sum over j != i of r_j: RLOO, Ahmadian et al. 2024, arXiv 2402.14740, equation 9; Kool et al.
    2019. With `scale`, (A - mean) / (std + 1e-4) over the whole batch, as TRL's `normalize_advantages`. Without it, a
    group whose rewards are all equal gets exact zeros.
    """
    size = rewards_NG.shape[1]
    others_NG = (rewards_NG.sum(dim=1, keepdim=True) - rewards_NG) / (size - 1)
    advantages_NG, told = _of_groups_with_signal(rewards_NG - others_NG, rewards_NG)
    if scale:
        advantages_NG = whitened(advantages_NG, torch.ones_like(advantages_NG, dtype=torch.bool))
    return advantages_NG, told


def _of_groups_with_signal(
    advantages_NG: torch.Tensor, rewards_NG: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    # Exact equality: the mean of equal numbers is not always that number.
    has_signal_N1 = (rewards_NG != rewards_NG[:, :1]).any(dim=1, keepdim=True)
    kept_NG = torch.where(has_signal_N1, advantages_NG, torch.zeros_like(advantages_NG))
    silent = Mean(float((~has_signal_N1).sum()), float(len(rewards_NG)))
    return kept_NG, {"frac_groups_without_signal": silent}


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (std + 1e-4) over the mask, 0 off it; the sample standard deviation, 0 for a single value."""
    kept = values[mask]
    if not kept.numel():
        return torch.zeros_like(values)
    spread = kept.std() if kept.numel() > 1 else kept.new_zeros(())
    return torch.where(mask, (values - kept.mean()) / (spread + STD_OFFSET), 0.0)


def overlong_penalty(
    lengths_NG: torch.Tensor, *, max_tokens: int, overlong_tokens: int, penalty: float
) -> tuple[torch.Tensor, Metrics]:
    """What a response loses of its reward for its length, shape (N, G): 0, or negative.

    With `overlong_tokens` c and `max_tokens` m, -penalty x (length - (m - c)) / c, between 0 and -penalty: DAPO, Yu et
    al. 2025, arXiv 2503.14476, equation 13. 0 for all where c is 0.
    """
    if not overlong_tokens:
        return torch.zeros_like(lengths_NG, dtype=torch.float64), {}
    beyond_NG = lengths_NG.double() - (max_tokens - overlong_tokens)
    lost_NG = -penalty * (beyond_NG / overlong_tokens).clamp(0.0, 1.0)
    return lost_NG, {"overlong_penalty": Mean(float(lost_NG.sum()), float(lost_NG.numel()))}


def estimated_advantages(
    rewards_NG: torch.Tensor, config: AlgorithmConfig
) -> tuple[torch.Tensor, Metrics]:
    """The advantages that go with the loss, one per sample, shape (N, G)."""
    if config.loss == "rloo":
        return leave_one_out_advantages(rewards_NG, scale=config.scale_advantages)
    return group_advantages(rewards_NG, scale=config.scale_advantages)
