"""Where a mesh's time goes: intervals that do not overlap, on the clock of the process that works.

A timeline is always inside exactly one interval. Work is marked with `during(kind)`; between two pieces of
work the process waits, and the kind of wait follows from what it did last (a generator that has generated
waits for new weights, one that has loaded weights waits for a slot). Idle is therefore measured, not
inferred, and what a mesh did in a run adds up to the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from storage.process_facts import IntervalKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One stretch of a mesh's time."""

    kind: IntervalKind
    """What it was spent on."""
    start: float
    """Unix time, seconds."""
    end: float
    """Unix time, seconds."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in fewer intervals: neighbours of one kind that touch are one."""
    found: list[Interval] = []
    for each in intervals:
        if found and found[-1].kind == each.kind and found[-1].end == each.start:
            found[-1] = Interval(kind=each.kind, start=found[-1].start, end=each.end)
        else:
            found.append(each)
    return found


class Timeline:
    """The intervals of one process.

    Example:
        timeline = Timeline(started_at=spawn_time, waits={"train": "wait_batch"}, default_wait="wait_batch")
        with timeline.during("train"):
            ...
        intervals = timeline.drain()
    """

    def __init__(
        self,
        *,
        started_at: float,
        waits: Mapping[IntervalKind, IntervalKind],
        default_wait: IntervalKind,
    ) -> None:
        # Anchored once and advanced by the monotonic clock: a stepped wall clock cannot make intervals overlap.
        self._offset = time.time() - time.monotonic()
        self._waits = dict(waits)
        self._default_wait = default_wait
        self._kind: IntervalKind = "startup"
        self._working: IntervalKind | None = None
        self._since = started_at
        self._closed: list[Interval] = []

    def now(self) -> float:
        """Unix time of this timeline's clock, seconds."""
        return time.monotonic() + self._offset

    def _switch(self, kind: IntervalKind) -> None:
        now = max(self.now(), self._since)
        if now > self._since:
            self._closed.append(Interval(kind=self._kind, start=self._since, end=now))
        self._kind, self._since = kind, now

    @contextmanager
    def during(self, kind: IntervalKind) -> Iterator[None]:
        """Mark work of `kind`; afterwards the work around it goes on, or the process waits for what follows."""
        outer, self._working = self._working, kind
        self._switch(kind)
        try:
            yield
        finally:
            self._working = outer
            self._switch(outer or self._waits.get(kind, self._default_wait))

    def drain(self) -> list[Interval]:
        """The intervals since the last drain, up to now; the one under way is cut here and goes on."""
        self._switch(self._kind)
        closed, self._closed = self._closed, []
        return closed
