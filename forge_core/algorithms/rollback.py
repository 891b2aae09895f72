"""A rank's share of a model and its optimizer as they were, for a step that has to be undone."""

from __future__ import annotations

from typing import Any

import torch

from forge_core.sharding import reshard


class Rollback:
    """Copies on the CPU of this rank's shards of parameters and optimizer state, without communication.

    Example:
        before = Rollback(model, optimizer)
        ...  # updates
        before.undo()  # every bit as it was
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        reshard(model)
        self._model = model
        self._optimizer = optimizer
        self._parameters = [_copy(parameter) for parameter in model.parameters()]
        self._states = [
            {name: _copy(value) for name, value in optimizer.state.get(parameter, {}).items()}
            for parameter in model.parameters()
        ]

    @torch.no_grad()
    def undo(self) -> None:
        """Make model and optimizer what they were."""
        reshard(self._model)
        for parameter, kept, state in zip(
            self._model.parameters(), self._parameters, self._states, strict=True
        ):
            _local(parameter).copy_(kept)
            if not state:
                self._optimizer.state.pop(parameter, None)
            for name, value in state.items():
                _local(self._optimizer.state[parameter][name]).copy_(value)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return _local(tensor).detach().to("cpu", copy=True)
