"""How far the policy is from a reference policy, token by token, and what that costs.

Shapes: B sequences, T predicted positions. The estimators are those of Schulman 2020, "Approximating KL divergence",
http://joschu.net/blog/kl-approx.html, with x = log p - log p_ref of a token that was sampled from p.
"""

from __future__ import annotations

import torch

from forge_core.algorithms.metrics import Mean, Metrics, mean_of
from forge_core.algorithms.primitives import Measured, log_ratio
from forge_core.algorithms.tokens import Tokens
from forge_core.config import Estimator, KLConfig


def divergence(
    logprobs_BT: torch.Tensor,
    reference_logprobs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    estimator: Estimator,
) -> torch.Tensor:
    """An estimate of KL(p || p_ref) at each token, 0 off the mask, shape (B, T).

    k1 = x, without bias, and negative at times; k2 = x^2 / 2, whose gradient is that of the divergence; k3 =
    exp(-x) - 1 + x, without bias and never negative, as in GRPO (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300,
    equation 4).
    """
    x_BT = log_ratio(logprobs_BT, reference_logprobs_BT, mask_BT)
    if estimator == "k1":
        return x_BT
    if estimator == "k2":
        return x_BT.square() / 2
    return (-x_BT).exp() - 1.0 + x_BT


def kl_penalty(tokens: Tokens, config: KLConfig) -> Measured:
    """What is added to each token's loss for its divergence, shape (B, T): zeros where that is a part of the reward.

    The metric `kl`, TRL's name, is the mean estimate under the weights in training, wherever it counts.
    """
    if tokens.reference_logprobs_BT is None:
        return torch.zeros_like(tokens.mask_BT, dtype=torch.float32), {}
    divergence_BT = divergence(
        tokens.logprobs_BT, tokens.reference_logprobs_BT, tokens.mask_BT, config.estimator
    )
    told = {"kl": mean_of(divergence_BT, tokens.mask_BT)}
    weight = config.coefficient if config.place == "loss" else 0.0
    return weight * divergence_BT, told


def lost_rewards(
    sampled_logprobs_BT: torch.Tensor,
    reference_logprobs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    config: KLConfig,
) -> tuple[torch.Tensor, Metrics]:
    """What each token loses of its reward for its divergence, 0 or less in the mean, shape (B, T).

    -coefficient x estimate, by the logprobs that were recorded at sampling: Ziegler et al. 2019, arXiv 1909.08593,
    equation 2. A loss with one reward a sequence takes the sum over its tokens.
    """
    divergence_BT = divergence(
        sampled_logprobs_BT, reference_logprobs_BT, mask_BT, config.estimator
    )
    lost_BT = -config.coefficient * divergence_BT
    return lost_BT, {"kl_penalty": Mean(-float(lost_BT.sum()), float(len(mask_BT)))}
