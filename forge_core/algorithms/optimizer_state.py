"""An optimizer's state, gathered from all ranks and given back to any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from forge_core.sharding import reshard, shard_like


def full_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Collective: CPU tensors by `parameter/entry`, and the plain rest. Empty before the optimizer's first step."""
    tensors: dict[str, torch.Tensor] = {}
    reshard(model)
    for name, parameter in model.named_parameters():
        # In one order on every rank, whatever order a checkpoint was read in: each is a collective.
        for entry, value in sorted(optimizer.state.get(parameter, {}).items()):
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            # A copy: with one rank the full tensor is the optimizer's own, which the next step changes.
            tensors[f"{name}/{entry}"] = full.detach().cpu().clone()
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return tensors, {"param_groups": groups}


def load_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[Mapping[str, torch.Tensor]],
) -> None:
    """Give a fresh optimizer what `full_state` gave. Without communication.

    Raises ValueError for state of a parameter that the model has not got, or of another shape.
    """
    parameters = dict(model.named_parameters())
    for piece in pieces:
        for key, value in piece.items():
            name, _, entry = key.rpartition("/")
            if (parameter := parameters.get(name)) is None:
                raise ValueError(
                    f"the checkpoint has an optimizer's state of {name!r}, a parameter unknown here"
                )
            if value.shape not in (parameter.shape, torch.Size([])):
                raise ValueError(
                    f"the optimizer's {key!r} has shape {tuple(value.shape)} where {tuple(parameter.shape)} is due"
                )
            # As AdamW makes them itself: moments lie where the parameter does, the count of steps on the CPU.
            state = optimizer.state[parameter]
            state[entry] = value.clone() if value.ndim == 0 else shard_like(value, parameter)


def bytes_by_group(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this rank holds of parameters, their gradients, and the optimizer's state."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [value for p in parameters for value in optimizer.state.get(p, {}).values()]
    return {
        name: sum(_local_bytes(tensor) for tensor in tensors)
        for name, tensors in (
            ("parameters", parameters),
            ("gradients", gradients),
            ("optimizer", state),
        )
    }


def _local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())
