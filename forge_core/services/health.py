"""Tells processes that are dead, frozen or hang from those that are merely busy.

Every process has a second actor, with a thread of its own, that does nothing but answer heartbeats. What follows from
one that does not come depends on what the kernel says of the process:

    ended                                             died           at once, without a heartbeat
    a heartbeat is refused by Monarch                 died           at once
    every thread stopped                              stopped        after `silence_seconds`
    silent, and used the CPU meanwhile                spins          after `silence_seconds`
    silent, and asleep nearly all the while           sleeps         after `asleep_seconds`
    silent, and waits for a CPU or a disk             busy machine   never
    silent, and cannot be looked at (another host)    unreachable    after `unseen_seconds`

A process that works lets go of Python's lock every few milliseconds, so that on a loaded machine the answer comes late
but comes: only one that did get the CPU, for `busy_seconds`, a hundred times as long as Python lets a thread keep
others waiting, and yet did not answer, spins. Where this process itself was late, only a part of the time counts:
answers may lie here unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from forge_core.services.evidence import ProcessSample, process_ended, sample_process

_MOSTLY = 0.8


class FailureKind(StrEnum):
    """How a process, or what runs in it, failed."""

    DIED = "died"
    STOPPED = "stopped"
    SPINS = "spins"
    SLEEPS = "sleeps"
    UNREACHABLE = "unreachable"
    NOT_STARTED = "not_started"
    """It did not come to serve."""
    DEAF = "deaf"
    """It did not give up a request that was past its deadline."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What was found."""

    kind: FailureKind
    """How it failed."""
    reason: str
    """One sentence for people, naming the process."""
    cause: BaseException | None = None
    """What was raised, if anything was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthOptions:
    """How long silence is borne. All but `interval_seconds` count from the heartbeat that is not answered."""

    interval_seconds: float = 0.5
    """Between two heartbeats, and between two looks at a silent process."""
    silence_seconds: float = 2.5
    """Of a process that is stopped, or that computes."""
    busy_seconds: float = 0.5
    """Processor time, all threads together, that a process must have got during its silence to be called hanging."""
    asleep_seconds: float = 10.0
    """Of a process whose threads all sleep."""
    unseen_seconds: float = 30.0
    """Of a process on another host, which may as well be starved."""


class Watched(Protocol):
    """What can be watched: a mesh of processes, a replica."""

    @property
    def name(self) -> str:
        """Name in reasons."""

    @property
    def pids(self) -> Sequence[int | None]:
        """Process id by rank; None for one that is not on this machine."""

    async def beat(self, rank: int) -> None:
        """Return once the process has answered. Raises RuntimeError if it is known to be dead."""


class Judge:
    """What the silence of one process means, from how long it lasts and how the process spends it."""

    def __init__(self, options: HealthOptions) -> None:
        self._options = options
        self._seconds = 0.0
        self._stopped_seconds = 0.0
        self._asleep_seconds = 0.0
        self._first: ProcessSample | None = None

    def wait(self, seconds: float, sample: ProcessSample | None) -> FailureKind | None:
        """Take in further `seconds` of silence that end in `sample`, None where there is none; the verdict, if any."""
        options = self._options
        self._seconds += seconds
        if sample is None:
            return FailureKind.UNREACHABLE if self._seconds >= options.unseen_seconds else None
        self._first = self._first or sample
        self._stopped_seconds = self._stopped_seconds + seconds if sample.is_stopped else 0.0
        self._asleep_seconds += seconds if sample.is_asleep else 0.0
        if self._stopped_seconds >= options.silence_seconds:
            return FailureKind.STOPPED
        # Threads that wait for Python's lock look for it every few milliseconds, and may be seen at it.
        is_asleep = self._asleep_seconds >= _MOSTLY * self._seconds
        if is_asleep and self._asleep_seconds >= options.asleep_seconds:
            return FailureKind.SLEEPS
        is_busy = sample.cpu_seconds - self._first.cpu_seconds >= options.busy_seconds
        if self._seconds >= options.silence_seconds and is_busy:
            return FailureKind.SPINS
        return None

    @property
    def seconds(self) -> float:
        """The silence so far."""
        return self._seconds


_MEANINGS = {
    FailureKind.STOPPED: "is stopped",
    FailureKind.SPINS: "computes without letting anything else run",
    FailureKind.SLEEPS: "sleeps without letting anything else run",
    FailureKind.UNREACHABLE: "cannot be reached",
}


async def watch(target: Watched, options: HealthOptions | None = None) -> Failure:
    """Return once a process of `target` has failed; never otherwise.

    Example:
        failure = await watch(replica)
    """
    options = options or HealthOptions()
    ranks = range(len(target.pids))
    watches = [asyncio.create_task(_watch_process(target, rank, options)) for rank in ranks]
    try:
        done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        await end_tasks(*watches)


async def _watch_process(target: Watched, rank: int, options: HealthOptions) -> Failure:
    pid = target.pids[rank]
    called = (
        f"process {rank} of {target.name}" if pid is None else f"process {pid} of {target.name}"
    )
    ended = asyncio.create_task(_never() if pid is None else process_ended(pid))
    try:
        while True:
            beat = asyncio.create_task(target.beat(rank))
            try:
                failure = await _await_beat(beat, ended, pid, called, options)
            finally:
                await end_tasks(beat)
            if failure is not None:
                return failure
            await asyncio.wait({ended}, timeout=options.interval_seconds)
    finally:
        await end_tasks(ended)


async def _await_beat(
    beat: asyncio.Task[None],
    ended: asyncio.Task[None],
    pid: int | None,
    called: str,
    options: HealthOptions,
) -> Failure | None:
    """None once the heartbeat is answered."""
    clock = asyncio.get_running_loop().time
    judge = Judge(options)
    before = clock()
    while True:
        await asyncio.wait(
            {beat, ended},
            timeout=options.interval_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if ended.done():
            return Failure(FailureKind.DIED, f"{called} ended")
        if beat.done():
            error = beat.exception()
            if isinstance(error, TimeoutError):
                return Failure(FailureKind.UNREACHABLE, f"{called} answers no heartbeat", error)
            if error is not None:
                return Failure(FailureKind.DIED, f"{called}: {' '.join(str(error).split())[:500]}")
            return None
        now = clock()
        waited, before = min(now - before, 2 * options.interval_seconds), now
        kind = judge.wait(waited, None if pid is None else sample_process(pid))
        if kind is not None:
            return Failure(
                kind, f"{called} {_MEANINGS[kind]}: no heartbeat for {judge.seconds:.1f} s"
            )


async def _never() -> None:
    await asyncio.get_running_loop().create_future()


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait for it to end, however it does."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
