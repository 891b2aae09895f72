"""Events that a run tells Prefect's server, for triggers and automations to act on.

| event | resource | when |
|---|---|---|
| `forgeflow.checkpoint.written` | `forgeflow.checkpoint.RUN@STEP` | the log has a checkpoint |
| `forgeflow.run.stalled` | `forgeflow.run.RUN` | no step for five times the median of the last ones |
"""

from __future__ import annotations

import contextvars
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prefect.events import emit_event

from storage import facts

_FACTOR = 5.0
_NUM_STEPS = 50
"""Newest steps that the median is of."""
_FEWEST_STEPS = 2
"""Durations of which a median says something."""
_SHORTEST_SECONDS = 30.0
"""No stall is told before: short steps vary with whatever else the machine does."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """No step has come for long."""

    step: int
    """The last one."""
    seconds: float
    """Since then."""
    median_seconds: float
    """What a step takes."""


class StallWatch:
    """Holds the time since the last step against the median of the steps before; tells each stall once.

    Times are seconds of a monotonic clock.
    """

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step
        self._durations: deque[float] = deque(maxlen=_NUM_STEPS)
        self._newest: tuple[int, float] | None = None
        self._is_told = False

    def take(self, step: int, now: float) -> None:
        """A step was completed."""
        if self._newest is not None:
            self._durations.append(now - self._newest[1])
        self._newest, self._is_told = (step, now), False

    def look(self, now: float) -> Stall | None:
        """The stall that is to be told now."""
        if self._newest is None or len(self._durations) < _FEWEST_STEPS or self._is_told:
            return None
        step, at = self._newest
        median = statistics.median(self._durations)
        if step >= self._last_step or now - at < max(_FACTOR * median, _SHORTEST_SECONDS):
            return None
        self._is_told = True
        return Stall(step=step, seconds=now - at, median_seconds=median)


class RunEvents:
    """A listener that tells a run's events; they are sent in the background, and no run waits or fails for one."""

    def __init__(self, run_id: str, store_uri: str, last_step: int) -> None:
        self._run_id = run_id
        self._store_uri = store_uri
        self._watch = StallWatch(last_step)
        self._lock = threading.Lock()

    def __call__(self, fact: facts.Fact) -> None:
        """Take a fact into account."""
        if isinstance(fact, facts.Step):
            with self._lock:
                self._watch.take(fact.step, time.monotonic())
        elif isinstance(fact, facts.Checkpoint):
            checkpoint = f"{self._run_id}@{fact.step}"
            emit_event(
                "forgeflow.checkpoint.written",
                resource={"prefect.resource.id": f"forgeflow.checkpoint.{checkpoint}"},
                payload={
                    "checkpoint": checkpoint,
                    "run_id": self._run_id,
                    "step": fact.step,
                    "store": self._store_uri,
                },
            )

    def look(self) -> None:
        """Tell a stall, if there is one."""
        with self._lock:
            stall = self._watch.look(time.monotonic())
        if stall is None:
            return
        emit_event(
            "forgeflow.run.stalled",
            resource={"prefect.resource.id": f"forgeflow.run.{self._run_id}"},
            payload={
                "run_id": self._run_id,
                "step": stall.step,
                "seconds": round(stall.seconds),
                "median_seconds": round(stall.median_seconds, 1),
            },
        )


@contextmanager
def telling_events(run_id: str, store_uri: str, last_step: int) -> Iterator[RunEvents]:
    """A listener whose run is looked after from a thread, which an event loop that hangs does not hold up."""
    events, ended = RunEvents(run_id, store_uri, last_step), threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            events.look()

    # In this context, for Prefect finds the server's address by it.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(look,), daemon=True)
    thread.start()
    try:
        yield events
    finally:
        ended.set()
        thread.join()
