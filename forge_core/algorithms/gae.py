"""Advantages of tokens by a critic: generalized advantage estimation, and what the critic learns from it.

Shapes: B sequences, T response tokens, padded on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from forge_core.algorithms import batch as batches
from forge_core.algorithms.advantages import whitened
from forge_core.algorithms.metrics import Mean, Metrics, mean_of
from forge_core.config import AlgorithmConfig


def generalized_advantages(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Advantage of each token of the mask, 0 off it, shape (B, T).

    A_t = delta_t + gamma lambda A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, where t + 1 is the next token of the
    mask and both are 0 after the last: Schulman et al. 2016, arXiv 1506.02438, equations 11, 12 and 16. What lies
    between two tokens of the mask, such as a tool's answer, is no action and takes no time.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_values_B = torch.zeros_like(rewards_BT[:, 0])
    next_advantages_B = torch.zeros_like(next_values_B)
    for t in reversed(range(rewards_BT.shape[1])):
        counts_B = mask_BT[:, t]
        deltas_B = rewards_BT[:, t] + gamma * next_values_B - values_BT[:, t]
        found_B = deltas_B + gamma * gae_lambda * next_advantages_B
        advantages_BT[:, t] = torch.where(counts_B, found_B, 0.0)
        next_advantages_B = torch.where(counts_B, found_B, next_advantages_B)
        next_values_B = torch.where(counts_B, values_BT[:, t], next_values_B)
    return advantages_BT


def value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip: float,
    num_tokens: float,
) -> tuple[torch.Tensor, Metrics]:
    """Share of the mean over all tokens of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, scalar.

    `num_tokens` are those of the whole minibatch. With `clip` 0 it is (V - R)^2 / 2. Huang et al. 2022, "The 37
    implementation details of proximal policy optimization", detail 9; as in TRL's PPOTrainer.
    """
    # `where`, not a product: off the mask anything may stand, and nan * 0 is nan.
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    old_BT, returns_BT = (torch.where(mask_BT, each, 0.0) for each in (old_values_BT, returns_BT))
    errors_BT = (values_BT - returns_BT).square()
    worst_BT = errors_BT
    if clip:
        near_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
        worst_BT = torch.maximum(errors_BT, (near_BT - returns_BT).square())
    told: Metrics = {
        "val/clipfrac_avg": mean_of((worst_BT > errors_BT).float(), mask_BT),
        "loss/value_avg": mean_of(worst_BT / 2, mask_BT),
    }
    return worst_BT.sum() / 2 / num_tokens, told


def with_advantages(
    sequences: Sequence[batches.Sequence], token_rewards_BT: torch.Tensor, config: AlgorithmConfig
) -> tuple[list[batches.Sequence], Metrics]:
    """Sequences that have `values`, with `returns` and `advantages` of their response tokens.

    Returns are advantages + values (Schulman et al. 2017, arXiv 1707.06347, section 5), from before `scale_advantages`
    makes the batch's advantages of mean 0 and spread 1.
    """
    values_BT = padded([sequence.figures["values"] for sequence in sequences])
    mask_BT = padded([[float(each) for each in sequence.mask] for sequence in sequences]).bool()
    advantages_BT = generalized_advantages(
        token_rewards_BT,
        values_BT,
        mask_BT,
        gamma=config.critic.gamma,
        gae_lambda=config.critic.gae_lambda,
    )
    returns_BT = torch.where(mask_BT, advantages_BT + values_BT, 0.0)
    told = {
        "val/explained_variance": _explained_variance(values_BT[mask_BT], returns_BT[mask_BT]),
        "val/value_mean": mean_of(values_BT, mask_BT),
        "val/return_mean": mean_of(returns_BT, mask_BT),
    }
    if config.scale_advantages:
        advantages_BT = whitened(advantages_BT, mask_BT)
    found = [
        dataclasses.replace(
            sequence,
            figures={
                **sequence.figures,
                "advantages": advantages_BT[row, : len(sequence.mask)].tolist(),
                "returns": returns_BT[row, : len(sequence.mask)].tolist(),
            },
        )
        for row, sequence in enumerate(sequences)
    ]
    return found, told


def _explained_variance(values: torch.Tensor, returns: torch.Tensor) -> Mean:
    """1 - Var(R - V) / Var(R), 0 where all returns are the same."""
    spread = float(returns.var(correction=0))
    explained = 1.0 - float((returns - values).var(correction=0)) / spread if spread else 0.0
    return Mean(explained, 1.0)


def final_rewards(rewards: Sequence[float], masks: Sequence[Sequence[bool]]) -> torch.Tensor:
    """Each sequence's reward at its last token of the mask, 0 at the others, shape (B, T)."""
    rewards_BT = padded([[0.0] * len(mask) for mask in masks])
    for row, (reward, mask) in enumerate(zip(rewards, masks, strict=True)):
        last = max((place for place, counts in enumerate(mask) if counts), default=None)
        if last is not None:
            rewards_BT[row, last] = reward
    return rewards_BT


def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Figures of response tokens in float64, padded on the right with zeros, shape (B, T)."""
    return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)
