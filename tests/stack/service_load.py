"""A steady load on a service whose replicas are made to fail, and what came of it.

Used by a short test, and by `make prove BAR=services` in full.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from served import Echo

from forge_core.services.declaration import Declaration
from forge_core.services.options import ServiceOptions
from forge_core.services.replica import State
from forge_core.services.service import Service
from forge_core.services.serving import serve
from forge_core.services.supervision import Transition

Way = Literal["kill", "stop", "loop"]
"""SIGKILL, SIGSTOP, or an endless loop that holds Python's lock."""

STACK = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": f"{STACK.parents[1]}:{STACK}"}
"""Where replicas find `served`: what this process searches does not travel."""


def echo(**needs: Any) -> Declaration:
    """`Echo`, routed around."""
    return Echo.options(**{"policy": "route_around", "environment": ENVIRONMENT, **needs})


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One failure that was brought about."""

    way: Way
    """How."""
    at: float
    """When, on the event loop's clock."""
    victim: str
    """Which replica."""
    found_seconds: float
    """Until the service knew."""
    start_seconds: float
    """From the blow until a replacement was being started."""
    load_seconds: float
    """What that took to start and set itself up."""
    others_seconds: float
    """Longest that any other replica then unharmed took to its next answer; infinite if one gave none any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What came of a load."""

    answers: dict[int, int]
    """By request, how many answers its caller got."""
    wrong: list[str]
    """Errors, and answers to something else."""
    blows: list[Blow]
    """What was brought about."""
    retries: int
    """Attempts after the first."""


@dataclass(slots=True)
class _Watcher:
    """Takes down what happens."""

    transitions: list[tuple[float, Transition]] = field(default_factory=list)
    answered: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By process, when it answered."""
    answers: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, transition: Transition) -> None:
        self.transitions.append((_now(), transition))
        self.news.set()

    async def serves(self, name: str, after: float) -> None:
        """Wait until a replica that failed serves again."""
        while not self._serves_again(name, after):
            self.news.clear()
            await self.news.wait()

    def is_harmed(self, name: str, struck_at: float) -> bool:
        """Whether a replica that was struck has not failed yet."""
        return not any(
            at > struck_at and each.name == name and each.state is State.FAILED
            for at, each in self.transitions
        )

    def _serves_again(self, name: str, after: float) -> bool:
        states = [each.state for at, each in self.transitions if each.name == name and at > after]
        return State.FAILED in states and states[-1] is State.SERVING

    def first(self, name: str, state: State, after: float) -> float:
        return next(
            at for at, each in self.transitions
            if at > after and each.name == name and each.state is state
        )  # fmt: skip


def _now() -> float:
    return asyncio.get_running_loop().time()


async def load(
    ways: Sequence[Way], *, num_requests: int, every_seconds: float, replicas: int = 4
) -> LoadResult:
    """Requests at an even pace; after each `every_seconds` a replica is made to fail, in one way after the other."""
    watcher = _Watcher()
    pace = num_requests / (every_seconds * (len(ways) + 1))
    options = ServiceOptions(timeout_seconds=30.0)
    async with serve(echo(replicas=replicas), options=options, tell=watcher.tell) as service:
        await service.fanout("pid")
        blows: list[tuple[Way, float, str, list[int]]] = []

        async def strike() -> None:
            for way in ways:
                await asyncio.sleep(every_seconds)
                blows.append(await _strike(service, way, _unharmed(service, watcher, blows)))

        striking = asyncio.create_task(strike())
        requests = []
        begin = _now()
        for number in range(num_requests):
            await asyncio.sleep(max(begin + number / pace - _now(), 0.0))
            requests.append(asyncio.create_task(_request(service, watcher, number)))
        await asyncio.gather(striking, *requests)
        async with asyncio.timeout(60):
            await asyncio.gather(*(watcher.serves(blow[2], after=blow[1]) for blow in blows))
        retries = service.metrics().retries
    return LoadResult(
        answers=dict(watcher.answers),
        wrong=watcher.wrong,
        blows=[_judge(watcher, *blow) for blow in blows],
        retries=retries,
    )


async def _request(service: Service, watcher: _Watcher, number: int) -> None:
    try:
        echoed, pid = await service.call("numbered", number, patient=True)
    except Exception as error:
        watcher.wrong.append(f"{number}: {type(error).__name__}: {error}")
        return
    watcher.answers[number] += 1
    watcher.answered[pid].append(_now())
    if echoed != number:
        watcher.wrong.append(f"{number} was answered by {echoed}")


def _unharmed(
    service: Service, watcher: _Watcher, blows: Sequence[tuple[Way, float, str, list[int]]]
) -> dict[str, int]:
    """Process by name of the replicas that serve and were not struck unnoticed; longest untouched first."""
    struck = {name: at for _, at, name, _ in blows}
    serving = {
        each.name: each.pids[0]
        for each in service.metrics().replicas
        if each.state == "serving" and each.pids[0] is not None
    }
    unharmed = [
        name for name in serving if name not in struck or not watcher.is_harmed(name, struck[name])
    ]
    return {name: serving[name] for name in sorted(unharmed, key=lambda n: struck.get(n, 0.0))}


async def _strike(
    service: Service, way: Way, unharmed: dict[str, int]
) -> tuple[Way, float, str, list[int]]:
    """Make the first of the unharmed replicas fail; the processes of the others."""
    assert unharmed, "every replica has failed already"
    victim, *others = unharmed
    at = _now()
    if way == "loop":
        # By message, to that one only.
        supervisors = {each.seat.name: each for each in service._crew.supervisors.values()}
        replica = supervisors[victim].replica
        assert replica is not None
        looping = asyncio.create_task(replica.call("loop_with_lock", timeout_seconds=60.0))
        looping.add_done_callback(lambda done: done.exception())
    else:
        os.kill(unharmed[victim], signal.SIGKILL if way == "kill" else signal.SIGSTOP)
    return way, at, victim, [unharmed[name] for name in others]


def _judge(watcher: _Watcher, way: Way, at: float, victim: str, others: list[int]) -> Blow:
    found = watcher.first(victim, State.FAILED, at)
    started = watcher.first(victim, State.STARTING, found)
    waits = [
        min((moment for moment in watcher.answered[pid] if moment > at), default=math.inf)
        for pid in others
    ]
    return Blow(
        way=way,
        at=at,
        victim=victim,
        found_seconds=found - at,
        start_seconds=started - at,
        load_seconds=watcher.first(victim, State.SERVING, started) - started,
        others_seconds=max((moment - at for moment in waits), default=math.inf),
    )
