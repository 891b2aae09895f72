"""What a loss is given, and what it gives.

Shapes: B sequences, T predicted positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_core.algorithms.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of a micro-batch. Off the mask, which marks what the policy wrote, anything may stand."""

    logprobs_BT: torch.Tensor
    """Under the weights in training, with gradient."""
    sampled_logprobs_BT: torch.Tensor
    """As recorded when the tokens were sampled."""
    advantages_BT: torch.Tensor
    """Per token; the same for all tokens of a sequence where the advantage is a sequence's."""
    entropy_BT: torch.Tensor
    """Entropy of each prediction, in nats; with gradient where the loss has an entropy bonus."""
    mask_BT: torch.Tensor
    """True where the policy wrote the token."""
    num_tokens: float
    """Masked tokens of the whole minibatch over all ranks, so that micro-batches' shares of a loss add up."""
    num_sequences: float
    """Its sequences that have any."""
    max_tokens: int
    """Most tokens that a response may have."""
    proximal_logprobs_BT: torch.Tensor | None = None
    """Under the trainer's weights at the start of the step; given where they anchor the ratio."""
    reference_logprobs_BT: torch.Tensor | None = None
    """Under the reference policy; given where there is one."""

    @property
    def anchor_logprobs_BT(self) -> torch.Tensor:
        """What ratios are taken against."""
        proximal_BT = self.proximal_logprobs_BT
        return self.sampled_logprobs_BT if proximal_BT is None else proximal_BT

    @property
    def has_tokens_B1(self) -> torch.Tensor:
        """Whether a sequence has any token that counts."""
        return self.mask_BT.any(dim=1, keepdim=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShare:
    """A micro-batch's share of the loss, and what it tells of the step."""

    loss: torch.Tensor
    """Scalar; the shares of all micro-batches and ranks add up to the minibatch's loss."""
    metrics: Metrics
    """By name."""
