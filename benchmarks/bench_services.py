"""What a service costs: next to plain Monarch calls, and with many replicas next to few.

    python -m benchmarks.bench_services

Calls: the same trivial endpoint on the same four processes, with 64 calls under way, in turn through plain `call_one`
and through `Service.call`. The figure is the ratio of their calls per second, pair by pair.

Router: requests through the queue and a router alone, over 4 and over 512 simulated replicas that have as many requests
under way each, for each router. The figure is the ratio of the cost per request.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from forge_core.services.dispatch import Dispatch, QueuedRequest, Seat
from forge_core.services.routing import LeastLoaded, RoundRobin, Router

REPLICAS, UNDER_WAY, CALLS, PAIRS = 4, 64, 3000, 7
FEW, MANY, DECISIONS = 4, 512, 20_000

LEAST_RATIO = 0.5
"""Of the calls per second of plain Monarch."""
MOST_GROWTH = 1.5
"""Of a router's cost per request, from few to many replicas."""


async def calls_per_second(call: Callable[[int], Awaitable[Any]]) -> float:
    """Of `CALLS` calls, `UNDER_WAY` at a time."""
    numbers = iter(range(CALLS))

    async def caller() -> None:
        for number in numbers:
            assert await call(number) == number

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(UNDER_WAY)))
    return CALLS / (time.perf_counter() - started)


async def measure_calls() -> dict[str, Any]:
    """Pairs of plain and served calls."""
    from monarch.actor import concurrent_endpoint

    from forge_core.services.actor import ServedActor
    from forge_core.services.monarch_replica import MonarchReplica
    from forge_core.services.options import ServiceOptions
    from forge_core.services.serving import serve
    from forge_core.services.supervision import Replica

    class Trivial(ServedActor):
        @concurrent_endpoint
        async def same(self, value: int) -> int:
            return value

    actors: list[Any] = []

    async def keep(replica: Replica) -> None:
        assert isinstance(replica, MonarchReplica)
        actors.append(replica.actors)

    options = ServiceOptions(max_under_way=UNDER_WAY)
    speeds: dict[str, list[float]] = {"plain": [], "served": []}
    declaration = Trivial.options(replicas=REPLICAS)
    async with serve(declaration, options=options, prepare=keep) as service:

        async def plain(value: int) -> Any:
            async with asyncio.timeout(60):
                return await actors[value % REPLICAS].same.call_one(value)

        async def served(value: int) -> Any:
            return await service.call("same", value, timeout_seconds=60.0)

        await calls_per_second(plain), await calls_per_second(served)
        for _ in range(PAIRS):
            speeds["plain"].append(await calls_per_second(plain))
            speeds["served"].append(await calls_per_second(served))
    ratios = [a / b for a, b in zip(speeds["served"], speeds["plain"], strict=True)]
    return {
        "plain_per_second": statistics.median(speeds["plain"]),
        "served_per_second": statistics.median(speeds["served"]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def seconds_per_request(router: Router, num_replicas: int) -> float:
    """Of queue and router, with 8 requests under way on each of so many replicas."""
    dispatch = Dispatch(router, max_queued=1024, max_under_way=16, max_load=None)
    for index in range(num_replicas):
        dispatch.open(Seat(index=index, name=f"replica-{index}"))
    under_way = []
    for number in range(8 * num_replicas):
        request = QueuedRequest(number=number, endpoint="same", cost=1.0 + number % 7)
        assert dispatch.take(request) is not None
        under_way.append(request)
    started = time.perf_counter()
    for number in range(DECISIONS):
        done = under_way[number % len(under_way)]
        dispatch.give_back(done)
        assert dispatch.take(done) is not None
    return (time.perf_counter() - started) / DECISIONS


async def measure_router() -> dict[str, Any]:
    """Each router's cost over few and over many replicas."""
    figures: dict[str, Any] = {}
    for router in (RoundRobin, LeastLoaded):
        few, many = [], []
        for _ in range(PAIRS):
            few.append(seconds_per_request(router(), FEW))
            many.append(seconds_per_request(router(), MANY))
        ratios = [b / a for a, b in zip(few, many, strict=True)]
        figures[router.__name__] = {
            f"microseconds_of_{FEW}": statistics.median(few) * 1e6,
            f"microseconds_of_{MANY}": statistics.median(many) * 1e6,
            "ratio_median": statistics.median(ratios),
        }
    return figures


async def measure() -> dict[str, Any]:
    """Both, and whether they are within their bounds."""
    router, calls = await measure_router(), await measure_calls()
    return {
        "calls": calls,
        "router": router,
        "met": calls["ratio_median"] >= LEAST_RATIO
        and all(each["ratio_median"] <= MOST_GROWTH for each in router.values()),
    }


def main() -> None:
    """Measure, print, record."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmarks.record import write_record

    result = asyncio.run(measure())
    print(result)
    print(write_record("services", "python -m benchmarks.bench_services", result))


if __name__ == "__main__":
    main()
