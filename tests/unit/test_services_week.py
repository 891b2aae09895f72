"""What a service leaves behind in simulated time: after a week of faults, and step after step of a run."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from simulated import World, simulate

from forge_core.services.errors import DeadlineExceeded, Overloaded, ReplicaFailed
from forge_core.services.health import HealthOptions
from forge_core.services.options import ServiceOptions
from forge_core.services.restarts import RestartOptions
from forge_core.services.routing import LeastLoaded
from forge_core.services.service import Service

HOUR, WEEK = 3600.0, 7 * 24 * 3600.0
OPTIONS = ServiceOptions(
    policy="route_around",
    health=HealthOptions(interval_seconds=120.0, unseen_seconds=300.0),
    restarts=RestartOptions(most=20, longest_delay_seconds=600.0, sound_seconds=600.0),
    max_queued=8,
    max_under_way=4,
    attempts=4,
)


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    """pytest would keep every line, of which there are thousands."""
    caplog.set_level(logging.CRITICAL, "forge_core.services")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _one_request(service: Service, chance: random.Random, number: int) -> str:
    """A call of some kind; what came of it."""
    kind = chance.choices(
        ["echo", "fail", "cancel", "late", "session", "fanout", "patient"],
        [60, 5, 10, 5, 10, 3, 7],
    )[0]
    seconds = chance.expovariate(1 / 20.0)
    try:
        if kind == "fail":
            await service.call("fail", KeyError(number))
        elif kind == "late":
            await service.call("forever", timeout_seconds=seconds)
        elif kind == "cancel":
            call = asyncio.create_task(service.call("forever", timeout_seconds=HOUR))
            await asyncio.sleep(seconds)
            call.cancel()
            await call
        elif kind == "session":
            async with service.session() as session:
                for turn in range(3):
                    await session.call("echo", (number, turn), seconds, timeout_seconds=HOUR)
        elif kind == "fanout":
            await service.fanout("echo", number, seconds, timeout_seconds=HOUR)
        else:
            value = await service.call(
                "echo", number, seconds, timeout_seconds=HOUR, patient=kind == "patient"
            )
            assert value == number
    except (KeyError, DeadlineExceeded, Overloaded, ReplicaFailed) as error:
        return type(error).__name__
    except asyncio.CancelledError:
        if kind != "cancel":
            raise
    return kind


async def _faults(service: Service, world: World, chance: random.Random) -> None:
    """Replicas die, hang and fail to start; the service is scaled."""
    while True:
        await asyncio.sleep(chance.expovariate(1 / 1200.0))
        what = chance.choice(["die", "die", "hang", "no room", "scale", "all die"])
        if what == "no room":
            world.failing_starts = chance.randint(1, 3)
        elif what == "scale":
            await service.scale_to(chance.randint(2, 6))
        else:
            victims = world.alive if what == "all die" else world.alive[:1]
            for victim in victims:
                (victim.hang if what == "hang" else victim.die)()


def test_a_week_of_faults_leaves_queues_tasks_and_files_as_they_were() -> None:
    chance = random.Random(5)
    outcomes: Counter[str] = Counter()

    async def week(service: Service, world: World) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1)  # the first heartbeats are answered
        tasks, files = len(asyncio.all_tasks()), open_files()
        faults = asyncio.create_task(_faults(service, world, chance))
        requests: set[asyncio.Task[str]] = set()
        number = 0
        while loop.time() < WEEK:
            await asyncio.sleep(chance.expovariate(1 / 60.0))
            # Now and then more than fit into the queue.
            for _ in range(60 if chance.random() < 0.01 else 1):
                request = asyncio.create_task(_one_request(service, chance, number))
                requests.add(request)
                request.add_done_callback(requests.discard)
                request.add_done_callback(lambda done: outcomes.update([done.result()]))
                number += 1
        faults.cancel()
        await asyncio.wait(requests)
        await asyncio.sleep(2 * HOUR)  # the last failures are mended, what was given up is
        assert sum(outcomes.values()) == number > 10_000
        await service.scale_to(4)
        await asyncio.sleep(1)
        assert len(asyncio.all_tasks()) == tasks
        assert open_files() == files
        figures = service.metrics()
        assert (figures.queued, figures.sessions) == (0, 0)
        assert [each.state for each in figures.replicas] == ["serving"] * 4
        assert all(each.under_way == 0 and each.load == 0.0 for each in figures.replicas)
        assert figures.retries > 100 and figures.moved_sessions > 10
        # Requests that failed replicas had come on top, in front.
        assert 8 <= figures.queued_most <= 8 + 6 * 4
        assert sum(each.is_up for each in world.made) == 4
        assert all(not each._running for each in world.made)

    async def main() -> None:
        world = World(start_seconds=5.0)
        async with Service.open(
            "echo", world.make, replicas=4, options=OPTIONS, router=LeastLoaded()
        ) as service:
            await week(service, world)

    simulate(main())
    assert {"echo", "KeyError", "DeadlineExceeded", "Overloaded", "cancel"} <= outcomes.keys()
    assert outcomes["ReplicaFailed"] < 50, outcomes


def test_the_cost_of_a_step_does_not_grow() -> None:
    """Steps that are a call, a session, a fan-out and a snapshot each; a replica dies every hundred."""
    steps, chunk = 2_000, 100
    seconds: list[float] = []
    blocks: list[int] = []

    async def step(service: Service, number: int) -> Any:
        await service.call("echo", number % 7, cost=float(number % 5))
        async with service.session() as session:
            await session.call("echo", number % 7)
        await service.fanout("echo", "version")
        return service.metrics().to_json()

    async def main() -> None:
        world = World(start_seconds=0.01)
        options = replace(OPTIONS, health=HealthOptions(interval_seconds=0.5, unseen_seconds=2.0))
        options = replace(options, restarts=RestartOptions(sound_seconds=0.1))
        async with Service.open(
            "echo", world.make, replicas=2, options=options, router=LeastLoaded()
        ) as service:
            for begin in range(0, steps, chunk):
                started = time.process_time()
                for number in range(begin, begin + chunk):
                    await step(service, number)
                    if number % 100 == 50:
                        world.alive[0].die()
                seconds.append(time.process_time() - started)
                world.made[:] = [each for each in world.made if each.is_up]
                gc.collect()
                blocks.append(sys.getallocatedblocks())

    simulate(main())
    # Medians: the machine does other things as well.
    assert statistics.median(seconds[-8:]) < 1.3 * statistics.median(seconds[2:10]), seconds
    assert max(blocks[-8:]) - max(blocks[2:10]) < 500, blocks
