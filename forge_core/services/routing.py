"""Which replica a request goes to.

A router is a class with one method. It is asked for one request at a time, never concurrently, and must answer at once.

Example:
    class First:
        def choose(self, candidates: Candidates, request: Request) -> Candidate:
            return candidates[0]

    async with Service.open(Echo.options(replicas=4), router=First()) as service: ...
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, overload


class Request(Protocol):
    """What a router may know of a request."""

    endpoint: str
    """What is called."""
    args: Sequence[Any]
    """With what, by position."""
    kwargs: Mapping[str, Any]
    """With what, by name."""
    cost: float
    """What it weighs, such as the tokens it may take."""


class Candidate(Protocol):
    """A replica that serves and has room."""

    index: int
    """Its place in the service, from 0; kept through restarts."""
    name: str
    """Its name."""
    load: float
    """Sum of the costs of the requests that it has under way."""
    under_way: int
    """Their number."""


class Router(Protocol):
    """Chooses."""

    def choose(self, candidates: Candidates, request: Request) -> Candidate:
        """One of `candidates`, of which there is at least one."""


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, candidates: Candidates, request: Request) -> Candidate:
        """The next one that has room."""
        chosen = candidates.after(self._last)
        self._last = chosen.index
        return chosen


class LeastLoaded:
    """The one with the least cost under way; of equals the one that has waited longest."""

    def choose(self, candidates: Candidates, request: Request) -> Candidate:
        """The least loaded."""
        return candidates.least_loaded()


class Candidates(Sequence[Candidate]):
    """The replicas that serve and have room, by index. No look at it takes longer the more there are.

    Loads are kept in a heap with entries that may be out of date: a change of load adds an entry, and those of before
    are dropped when they come up, or all at once when they are too many.
    """

    def __init__(self) -> None:
        self._indices: list[int] = []
        self._by_index: dict[int, Candidate] = {}
        # Kept only from the first question for the least loaded on.
        self._heap: list[tuple[float, int, int]] | None = None
        self._current: dict[int, int] = {}
        self._stamp = 0

    def add(self, candidate: Candidate) -> None:
        """It serves and has room now."""
        if candidate.index not in self._by_index:
            insort(self._indices, candidate.index)
        self._by_index[candidate.index] = candidate
        self.update(candidate)

    def remove(self, candidate: Candidate) -> None:
        """It does not, or has none."""
        if self._by_index.pop(candidate.index, None) is not None:
            del self._indices[bisect_left(self._indices, candidate.index)]
            self._current.pop(candidate.index, None)

    def update(self, candidate: Candidate) -> None:
        """Its load has changed."""
        if self._heap is not None and candidate.index in self._by_index:
            self._stamp += 1
            self._current[candidate.index] = self._stamp
            heapq.heappush(self._heap, (candidate.load, self._stamp, candidate.index))
            if len(self._heap) > 64 + 4 * len(self._by_index):
                self._rebuild()

    def after(self, index: int) -> Candidate:
        """The one with the next higher index, or else the first."""
        position = bisect_left(self._indices, index + 1)
        return self[position if position < len(self._indices) else 0]

    def least_loaded(self) -> Candidate:
        """The one with the least load; of equals the one whose load has not changed for longest."""
        if self._heap is None:
            self._heap = []
            for candidate in self:
                self.update(candidate)
        while True:
            _, stamp, index = self._heap[0]
            if self._current.get(index) == stamp:
                return self._by_index[index]
            heapq.heappop(self._heap)

    def _rebuild(self) -> None:
        assert self._heap is not None
        self._heap = [entry for entry in self._heap if self._current.get(entry[2]) == entry[1]]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Candidate]:
        return (self._by_index[index] for index in self._indices)

    def __contains__(self, candidate: object) -> bool:
        index = getattr(candidate, "index", None)
        return index is not None and self._by_index.get(index) is candidate

    @overload
    def __getitem__(self, position: int) -> Candidate: ...
    @overload
    def __getitem__(self, position: slice) -> list[Candidate]: ...
    def __getitem__(self, position: int | slice) -> Candidate | list[Candidate]:
        if isinstance(position, slice):
            return [self._by_index[index] for index in self._indices[position]]
        return self._by_index[self._indices[position]]
