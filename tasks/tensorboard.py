"""TensorBoard files of a run, from its facts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from storage import facts


class TensorBoard(AbstractContextManager["TensorBoard"]):
    """A listener that writes one run's step metrics, evaluations and parity to event files in a folder."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._folder = folder
        self._run_id = run_id
        self._is_told_of_it = True
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def __call__(self, fact: facts.Fact) -> None:
        """Write what a fact measures; not those of another run that the same flow opens."""
        if isinstance(fact, facts.Started):
            self._is_told_of_it = fact.run_id == self._run_id
        if not self._is_told_of_it:
            return
        if isinstance(fact, facts.Step):
            ages = {} if fact.age_max is None else {"age/max": float(fact.age_max)}
            self._write(fact.step, {**fact.metrics, **ages})
        elif isinstance(fact, facts.WarmStarted):
            for each in fact.validations:
                self._write(each.step, {"warm_start/validation_loss": each.loss})
        elif isinstance(fact, facts.Evaluated):
            values = {"eval/sampled": fact.sampled, "eval/greedy": fact.greedy}
            self._write(fact.policy_version, values)
        elif isinstance(fact, facts.Published) and fact.parity is not None:
            values = {"parity/mean": fact.parity.mean, "parity/max": fact.parity.max}
            self._write(fact.policy_version, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._writer is None:
            # Deferred: it imports torch, which flows and tasks must not do when they are imported.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
