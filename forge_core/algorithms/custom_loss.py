"""A loss of the user's in the place of the algorithm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.user_code import load_object

TokenLoss = Callable[..., torch.Tensor]


class CustomLoss:
    """Calls a function `(logprobs, sampled_logprobs, advantages, mask) -> loss per token` and checks what it gives.

    Shapes: (B, T) but for advantages, which are (B,). The loss of a batch is the mean over its masked tokens.
    """

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._function: TokenLoss = load_object("loss", reference)

    def __call__(self, tokens: Tokens, advantages_B: torch.Tensor) -> LossShare:
        """This micro-batch's share. Raises ValueError, naming the function, unless it gives a loss per token."""
        logprobs_BT, mask_BT = tokens.logprobs_BT, tokens.mask_BT
        if not mask_BT.any():  # padding, which keeps this rank in step with the others
            return LossShare(loss=logprobs_BT.sum() * 0.0, metrics={})
        # Off the mask stand prompts and padding, whose ratios could overflow in the backward pass.
        logprobs_BT = torch.where(mask_BT, logprobs_BT, 0.0)
        sampled_logprobs_BT = torch.where(mask_BT, tokens.sampled_logprobs_BT, 0.0)
        try:
            loss_BT: Any = self._function(logprobs_BT, sampled_logprobs_BT, advantages_B, mask_BT)
        except Exception as error:  # It is the user's: it may raise anything.
            raise ValueError(
                f"loss {self._reference!r} raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(loss_BT, torch.Tensor) or loss_BT.shape != logprobs_BT.shape:
            shape = tuple(getattr(loss_BT, "shape", ()))
            raise ValueError(
                f"loss {self._reference!r} returned {type(loss_BT).__name__} of shape {shape}; "
                f"a tensor of shape {tuple(logprobs_BT.shape)} is due, one loss per token"
            )
        # `where`, not a product: off the mask anything may stand, and nan * 0 is nan.
        total = torch.where(mask_BT, loss_BT, 0.0).sum()
        if not total.requires_grad:
            raise ValueError(
                f"loss {self._reference!r} returned a loss without a gradient; compute it from logprobs"
            )
        return LossShare(loss=total / tokens.num_tokens, metrics={})
