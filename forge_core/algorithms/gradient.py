"""The gradient of a model that ranks share: its norm, and the bound on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from forge_core.sharding import Layout, local_part

_EPSILON = 1e-6
"""Keeps a norm of zero from being divided by, as in `torch.nn.utils.clip_grad_norm_`."""


def clip(model: torch.nn.Module, largest_norm: float, layout: Layout) -> float:
    """Scale the gradient down to `largest_norm` if its norm is larger; the norm before, the same on every rank.

    The norm is over all parameters, each element counted once, however many ranks hold it. Collective.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    _agree(gradients, layout)
    squares = [
        torch.linalg.vector_norm(local_part(each)).double().square() / layout.copies(each)
        for each in gradients
    ]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    norm = float(total.sqrt())
    scale = largest_norm / (norm + _EPSILON)
    if scale < 1.0:
        for each in gradients:
            local_part(each).mul_(scale)
    return norm


def _agree(gradients: list[Any], layout: Layout) -> None:
    """Make the gradients of what tensor parallel neighbours each have a copy of the same to the bit, by their mean.

    They are the same but for kernels that add in no fixed order; without this the copies would drift apart unseen.
    """
    if layout.tensor is None:
        return
    parts = [local_part(each) for each in gradients if each.device_mesh.ndim == 1]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=layout.tensor.get_group())
    flat /= layout.tensor.size()
    for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(mean.view_as(part))
