"""Where a run's metrics go besides its log: TensorBoard, or a class of the user's.

    fact ──▶ values at a step ──▶ every sink that the config's `sinks` names

A sink is told of what is true already. One that fails costs a warning in the log and nothing else; one that cannot be
opened ends the run before anything is started.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forge_core.config import RunConfig
from forge_core.user_code import load_object
from storage import facts
from tasks.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkRun:
    """What a sink is opened for."""

    run_id: str
    """The run. One that goes on is opened again under the same id."""
    config: dict[str, Any]
    """Its whole config, as JSON has it."""
    folder: Path
    """The run's local folder, for a sink that writes files."""


class Sink(Protocol):
    """What takes a run's metrics. A class is one if it can be made of a `SinkRun` and has these two methods.

    Both are called on the flow's event loop, one after the other, and should be quick: a sink that talks to a server
    hands what it is told to a thread of its own.

    Example:
        class Printed:
            def __init__(self, run): self.name = run.run_id
            def write(self, step, values): print(self.name, step, values)
            def close(self, status): print(self.name, status)
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take metrics by name, of a step that was trained or of the weights after it.

        Of one step there may be several calls, and after a restore steps that were told of come again.
        """

    def close(self, status: str) -> None:
        """The run ends for now: it is 'finished', 'paused', 'failed' or 'cancelled'."""


BUILT_IN: dict[str, Callable[[SinkRun], Sink]] = {
    "tensorboard": lambda run: TensorBoard(run.folder / "tensorboard")
}


def values_of(fact: facts.Fact) -> Iterator[tuple[int, dict[str, float]]]:
    """What a fact measures, by the step that it is of."""
    if isinstance(fact, facts.Step):
        ages = {} if fact.age_max is None else {"age/max": float(fact.age_max)}
        yield fact.step, {**fact.metrics, **ages}
    elif isinstance(fact, facts.WarmStarted):
        for each in fact.validations:
            yield each.step, {"warm_start/validation_loss": each.loss}
    elif isinstance(fact, facts.Evaluated):
        passed = {f"eval/pass@{each.k}": each.probability for each in fact.pass_at}
        told = {"eval/sampled": fact.sampled, "eval/greedy": fact.greedy}
        yield fact.policy_version, {**told, **passed}
    elif isinstance(fact, facts.Published) and fact.parity is not None:
        yield fact.policy_version, {"parity/mean": fact.parity.mean, "parity/max": fact.parity.max}


class SinkListener:
    """Tells sinks what facts measure."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = sinks
        self._status = "failed"

    def __call__(self, fact: facts.Fact) -> None:
        """Hand on what a fact measures; what one sink raises keeps nothing from the others."""
        if isinstance(fact, facts.End):
            self._status = fact.status
        for step, values in values_of(fact):
            for name, sink in self._sinks.items():
                try:
                    sink.write(step, values)
                except Exception as error:  # It is the user's: it may raise anything.
                    logger.warning("sink %s failed at step %d: %s", name, step, error)

    def close(self, status: str | None = None) -> None:
        """Close all of them, whatever any of them raises; with what the log says of the end, unless it is given."""
        for name, sink in self._sinks.items():
            try:
                sink.close(status or self._status)
            except Exception as error:  # As above.
                logger.warning("sink %s could not be closed: %s", name, error)


@contextmanager
def open_sinks(config: RunConfig, run_id: str, folder: Path) -> Iterator[SinkListener]:
    """A listener that tells the config's sinks, which are closed on leaving.

    Raises ValueError that names the first sink that cannot be made, and why.
    """
    run = SinkRun(run_id=run_id, config=config.model_dump(mode="json"), folder=folder)
    listener = SinkListener({name: _make(name, run) for name in config.sinks})
    try:
        yield listener
    except Exception:
        listener.close("failed")
        raise
    except BaseException:
        listener.close("cancelled")
        raise
    listener.close()


def _make(name: str, run: SinkRun) -> Sink:
    maker = BUILT_IN.get(name) or load_object("sinks", name)
    try:
        made: Sink = maker(run)
    except Exception as error:  # It is the user's: it may raise anything.
        raise ValueError(f"sinks {name!r} cannot be opened: {error}") from error
    return made
