"""What a replica and its service did, in bounded memory, as plain figures that a log can hold."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

_SHORTEST_SECONDS = 1e-5
_PER_OCTAVE = 16
_OCTAVES = 30
_WINDOW_SECONDS = 60
_KEPT_FAILURES = 20


class Latencies:
    """Counts of durations, in buckets that grow by 2**(1/16): percentiles are right to 4.5 %, from 10 us to 3 hours."""

    def __init__(self) -> None:
        self._counts = [0] * (_PER_OCTAVE * _OCTAVES)
        self.count = 0

    def add(self, seconds: float) -> None:
        """One duration more."""
        octaves = math.log2(max(seconds, _SHORTEST_SECONDS) / _SHORTEST_SECONDS)
        self._counts[min(int(octaves * _PER_OCTAVE), len(self._counts) - 1)] += 1
        self.count += 1

    def percentile(self, percent: float) -> float | None:
        """The duration, in seconds, that so many percent did not exceed; None if there was none."""
        if self.count == 0:
            return None
        wanted, seen = math.ceil(self.count * percent / 100.0), 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= max(wanted, 1):
                return _SHORTEST_SECONDS * 2.0 ** ((bucket + 1) / _PER_OCTAVE)
        raise AssertionError("the counts add up to `count`")


class Rate:
    """Events of the last minute."""

    def __init__(self) -> None:
        self._by_second: deque[tuple[int, int]] = deque()

    def add(self, now: float, number: int = 1) -> None:
        """So many events more."""
        second = int(now)
        if self._by_second and self._by_second[-1][0] == second:
            self._by_second[-1] = (second, self._by_second[-1][1] + number)
        else:
            self._by_second.append((second, number))
            self._forget(second)

    def per_second(self, now: float, since: float) -> float:
        """Mean over the last minute, or since `since` if that is shorter."""
        self._forget(int(now))
        seconds = max(min(now - since, float(_WINDOW_SECONDS)), 1.0)
        return sum(count for _, count in self._by_second) / seconds

    def _forget(self, second: int) -> None:
        while self._by_second and self._by_second[0][0] <= second - _WINDOW_SECONDS:
            self._by_second.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRecord:
    """One failure of a replica and what it cost."""

    at: float
    """When it was found, in seconds since the service opened."""
    kind: str
    """How it failed: a FailureKind, or `start` if it did not come to serve."""
    reason: str
    """One sentence."""
    requests: int
    """Requests that it had under way."""
    down_seconds: float | None
    """Until the replica served again; None if it does not yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """A replica at one moment; counts are of all its lives."""

    name: str
    """Its name in the service."""
    state: str
    """A State."""
    pids: tuple[int | None, ...]
    """Its processes, by rank; None for one that is not on this machine."""
    answered: int
    """Requests answered."""
    errors: int
    """Requests whose endpoint raised: the callers' errors."""
    cancelled: int
    """Requests given up by their callers, or past their deadline."""
    lost: int
    """Requests under way when it failed."""
    under_way: int
    """Requests that it has."""
    load: float
    """Sum of their costs."""
    answered_per_second: float
    """Over the last minute."""
    produced: int
    """What answers brought, such as tokens, where anybody counts it."""
    produced_per_second: float
    """Over the last minute."""
    seconds_p50: float | None
    """Median of the time from handing a request over to its answer."""
    seconds_p95: float | None
    """95th percentile of the same."""
    seconds_p99: float | None
    """99th percentile of the same."""
    restarts: int
    """Lives after the first."""
    failures: tuple[FailureRecord, ...]
    """The last ones."""
    failures_by_kind: dict[str, int]
    """How many there were of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSnapshot:
    """A service at one moment."""

    name: str
    """Its name."""
    seconds: float
    """Since it opened."""
    requests: int
    """Calls made."""
    retries: int
    """Further attempts that failed replicas made necessary."""
    overloaded: int
    """Calls refused because the queue was full."""
    late: int
    """Calls past their deadline."""
    queued: int
    """Requests that wait for a replica."""
    queued_most: int
    """Most that ever did."""
    queue_seconds_p50: float | None
    """Median of the wait for a replica, of those that had to wait."""
    queue_seconds_p99: float | None
    """99th percentile of the same."""
    sessions: int
    """Sessions that are open."""
    moved_sessions: int
    """Times that a session went to another replica because its own failed or left."""
    replicas: tuple[ReplicaSnapshot, ...]
    """Each replica."""

    def to_json(self) -> dict[str, Any]:
        """Numbers, words, sequences and tables only."""
        return asdict(self)


class ReplicaMetrics:
    """Counters of one place in a service, through all lives of its replica."""

    def __init__(self, opened_at: float) -> None:
        self._opened_at = opened_at
        self.answered = 0
        self.errors = 0
        self.cancelled = 0
        self.lost = 0
        self.lives = 0
        self._latencies = Latencies()
        self._rate = Rate()
        self.produced = 0
        self._yield = Rate()
        self._failures: deque[FailureRecord] = deque(maxlen=_KEPT_FAILURES)
        self._by_kind: Counter[str] = Counter()

    def answer(self, now: float, seconds: float) -> None:
        """A request was answered."""
        self.answered += 1
        self._latencies.add(seconds)
        self._rate.add(now)

    def produce(self, now: float, number: int) -> None:
        """Answers brought so much of what counts, such as tokens."""
        self.produced += number
        self._yield.add(now, number)

    def fail(self, now: float, kind: str, reason: str, requests: int) -> None:
        """A life ended in failure."""
        self.lost += requests
        self._by_kind[str(kind)] += 1
        self._failures.append(
            FailureRecord(
                at=now - self._opened_at,
                kind=str(kind),
                reason=reason,
                requests=requests,
                down_seconds=None,
            )
        )

    def explain(self, at: float, reason: str) -> None:
        """More is known of the failure that was found at `at`."""
        for position, record in enumerate(self._failures):
            if record.at == at - self._opened_at:
                self._failures[position] = replace(record, reason=reason)

    def serve(self, now: float) -> None:
        """A life begins to serve: what failed before is mended."""
        for position, record in enumerate(self._failures):
            if record.down_seconds is None:
                down_seconds = now - self._opened_at - record.at
                self._failures[position] = replace(record, down_seconds=down_seconds)

    def snapshot(
        self,
        now: float,
        *,
        name: str,
        state: str,
        pids: Sequence[int | None],
        under_way: int,
        load: float,
    ) -> ReplicaSnapshot:
        """The figures now, with what is known elsewhere."""
        return ReplicaSnapshot(
            name=name,
            state=str(state),
            pids=tuple(pids),
            answered=self.answered,
            errors=self.errors,
            cancelled=self.cancelled,
            lost=self.lost,
            under_way=under_way,
            load=load,
            answered_per_second=self._rate.per_second(now, self._opened_at),
            produced=self.produced,
            produced_per_second=self._yield.per_second(now, self._opened_at),
            seconds_p50=self._latencies.percentile(50),
            seconds_p95=self._latencies.percentile(95),
            seconds_p99=self._latencies.percentile(99),
            restarts=max(self.lives - 1, 0),
            failures=tuple(self._failures),
            failures_by_kind=dict(self._by_kind),
        )
