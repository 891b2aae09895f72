"""Supervised training: steps, validation in between, an early stop, and the best weights in the end.

step ──every `validate_every`──▶ validation loss ──lower than ever──▶ weights are kept
                                        └─`patience` times not──▶ stop ──▶ the weights that were kept
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from forge_core.algorithms import batch as sequences
from forge_core.config import WarmStartConfig

if TYPE_CHECKING:
    from forge_core.algorithms.rollback import Rollback
    from forge_core.algorithms.step import Learner

Batch = list[sequences.Sequence]


class SupervisedTraining:
    """One warm start. Collective: every rank does the same.

    `run` that failed is called again, and goes on from where it stood: what was learned is not learned twice.
    """

    def __init__(
        self,
        learner: Learner,
        config: WarmStartConfig,
        batch: Callable[[int], Batch],
        validation: Sequence[sequences.Sequence] = (),
    ) -> None:
        self._learner = learner
        self._config = config
        self._batch = batch
        self._validation = list(validation)
        self._best: Rollback | None = None
        self._best_loss = math.inf
        self._since_best = 0
        """Validations since the best one."""
        self.steps = 0
        """Optimizer steps that were made."""
        self.best_step: int | None = None
        """Step whose weights are kept; None without validation."""
        self.loss: float | None = None
        """Mean loss of the last step's batch before it, in nats per token."""
        self.validations: list[tuple[int, float]] = []
        """Steps that were made by then, and the validation loss, in nats per token."""

    def run(self) -> None:
        """Train to the last step or the early stop, and take the best weights."""
        if self._validation and not self.validations:
            self._validate()
        while self.steps < self._config.steps and not self._is_over():
            self.loss = self._learner.supervised_step(self.steps, self._batch(self.steps))
            self.steps += 1
            is_due = self.steps % self._config.validate_every == 0
            if self._validation and (is_due or self.steps == self._config.steps):
                self._validate()
        if self._best is not None:
            self._best.undo()
            self._best = None

    def _is_over(self) -> bool:
        patience = self._config.patience
        return patience is not None and self._since_best >= patience

    def _validate(self) -> None:
        loss = self._learner.supervised_loss(self._validation)
        self.validations.append((self.steps, loss))
        self._since_best += 1
        if loss < self._best_loss:
            self._best_loss, self._since_best, self.best_step = loss, 0, self.steps
            self._best = self._learner.keep()
