"""Activation checkpointing: of a block only its input is kept, and the rest made again in the backward pass.

Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that a transformers model repeats, in order."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def recompute_activations(model: torch.nn.Module) -> None:
    """Have every block of a model do so. Before it is sharded: what FSDP does around a block then happens once a pass.

    Raises ValueError for a model that names no blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} does not tell which layers it repeats: set trainer.activation_checkpointing to "
            "false"
        )
    for block in blocks:
        # No random numbers: models train without dropout.
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
