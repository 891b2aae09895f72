"""A model of values, and how it learns.

Shapes: B sequences, L tokens, T = L - 1 predicted positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from forge_core.algorithms import optimizer_state
from forge_core.algorithms.batch import MicroBatch, Sequence, collate, share, split
from forge_core.algorithms.forward import computing_in, hidden_states, on_mask
from forge_core.algorithms.gae import value_loss
from forge_core.algorithms.metrics import Largest, StepMetrics
from forge_core.algorithms.rollback import Rollback
from forge_core.config import Precision, RunConfig
from forge_core.sharding import load_weights

_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"


class ValueModel(torch.nn.Module):
    """A language model's decoder with one number as its output; the number is 0 before it has learned."""

    def __init__(self, language_model: Any, precision: Precision = "model") -> None:
        super().__init__()
        self._precision: Precision = precision
        self.decoder = language_model.get_decoder()
        self.head = torch.nn.Linear(language_model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The value of the state before each token of the mask, 0 off it, shape (B, T)."""
        with computing_in(self._precision, batch.mask_BT.device):
            values_1K = self.head(hidden_states(self.decoder, batch)).squeeze(-1)
        return on_mask(values_1K.float(), batch.mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticOutcome:
    """What a critic's step did."""

    metrics: dict[str, float]
    """Means over the step's tokens, and norms."""
    nonfinite: str | None = None
    """What of the value loss or its gradient was not finite, in words; nothing has changed then."""


class CriticLearner:
    """A model of values with its optimizer, in one process."""

    def __init__(
        self, language_model: torch.nn.Module, config: RunConfig, device: torch.device, pad_id: int
    ) -> None:
        self.model = ValueModel(language_model, config.trainer.precision).to(device).eval()
        self._config = config
        self._device = device
        self._pad_id = pad_id
        self._before: Rollback | None = None
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.algorithm.critic.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def train_step(self, sequences: list[Sequence]) -> CriticOutcome:
        """All epochs and minibatches of a step on sequences with `values` and `returns`.

        With a loss or gradient that is not finite nothing has changed.
        """
        settings = self._config.algorithm.critic
        minibatches = [sequences[i :: settings.minibatches] for i in range(settings.minibatches)]
        minibatches = [minibatch for minibatch in minibatches if minibatch]
        self._before = Rollback(self.model, self._optimizer)
        metrics = StepMetrics()
        for minibatch in minibatches * settings.epochs:
            loss, norm = self._accumulate(minibatch, metrics)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._optimizer.zero_grad()
                self.undo()
                told = f"the critic's loss is {loss:g} and its gradient's norm {norm:g}"
                return CriticOutcome(metrics={}, nonfinite=told)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return CriticOutcome(metrics=metrics.reduced(lambda values, _: values))

    def _accumulate(self, minibatch: list[Sequence], metrics: StepMetrics) -> tuple[float, float]:
        """The gradient of a minibatch, by micro-batches; its loss and the gradient's norm."""
        num_tokens = max(1, sum(sum(sequence.mask) for sequence in minibatch))
        loss = 0.0
        limit, packed = self._config.trainer.micro_batch_tokens, self._config.trainer.packing
        for run in split(share(minibatch, 0, 1), limit, packed=packed):
            batch = collate(run, self._pad_id, self._device, packed=packed)
            part, told = value_loss(
                self.model(batch),
                batch.figures_BT["values"],
                batch.figures_BT["returns"],
                batch.mask_BT,
                clip=self._config.algorithm.critic.clip,
                num_tokens=num_tokens,
            )
            part.backward()
            loss += float(part.detach())
            metrics.add(told)
        norm = float(
            torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self._config.optimizer.max_gradient_norm
            )
        )
        metrics.add({"critic/grad_norm": Largest(norm)})
        return loss, norm

    def undo(self) -> None:
        """Make everything what it was before the last step; harmless before the first."""
        if self._before is not None:
            self._before.undo()

    def full_state(self) -> dict[str, torch.Tensor]:
        """Copies of weights and moments, by names that `load_state` knows."""
        moments, _ = optimizer_state.full_state(self.model, self._optimizer)
        weights = self.model.state_dict()
        return {
            **{f"{_WEIGHTS}{name}": w.detach().cpu().clone() for name, w in weights.items()},
            **{f"{_OPTIMIZER}{name}": tensor for name, tensor in moments.items()},
        }

    def load_state(self, pieces: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Take over what `full_state` gave. Raises ValueError if it does not fit the model."""
        state = {name: tensor for piece in pieces for name, tensor in piece.items()}
        load_weights(self.model, [_under(_WEIGHTS, state)])
        self._optimizer.state.clear()
        optimizer_state.load_state(self.model, self._optimizer, [_under(_OPTIMIZER, state)])


def _under(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
