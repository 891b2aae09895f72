"""Proof that services keep their promise on real processes: failures are found and mended, and none is imagined."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

STACK = Path(__file__).parents[1] / "tests" / "stack"
# What the tests have is taken from there; their folder is no package.
sys.path.append(str(STACK))

NUM_REQUESTS, NUM_BLOWS, EVERY_SECONDS = 5000, 10, 2.0
WAYS = ("kill", "stop", "loop")
FOUND_SECONDS = {"kill": 2.0, "stop": 5.0, "loop": 5.0}
"""Longest until a failure is known, by how it was brought about."""
RESTART_SECONDS = 2.0
"""From then, or from the kill, until the replacement is being started; what it takes to load comes on top."""
OTHERS_SECONDS = 1.0

ALARM_MINUTES = 30.0
_CALLERS = 8


def prove_services() -> tuple[bool, dict[str, Any]]:
    """5,000 requests on four replicas, of which one fails every two seconds, ten times; for each way to fail."""
    from service_load import load

    results: dict[str, Any] = {}
    for way in WAYS:
        load_average, _ = psutil.getloadavg()[0], psutil.cpu_times_percent()
        done = asyncio.run(
            load([way] * NUM_BLOWS, num_requests=NUM_REQUESTS, every_seconds=EVERY_SECONDS)
        )
        idle_percent = psutil.cpu_times_percent().idle
        once = sum(count == 1 for count in done.answers.values())
        blows = [asdict(blow) for blow in done.blows]
        is_met = (
            not done.wrong
            and once == len(done.answers) == NUM_REQUESTS
            and len(blows) == NUM_BLOWS
            and all(_is_mended(blow) for blow in blows)
        )
        keys = ("found_seconds", "start_seconds", "load_seconds", "others_seconds")
        results[way] = {
            "met": is_met,
            "answered_once": once,
            "wrong": done.wrong[:20],
            "retries": done.retries,
            "load_average_before": load_average,
            "cpu_idle_percent": idle_percent,
            **{f"{key}_max": max(blow[key] for blow in blows) for key in keys},
            **{f"{key}_median": statistics.median(blow[key] for blow in blows) for key in keys},
            "blows": blows,
        }
        print(way, {k: v for k, v in results[way].items() if k != "blows"}, flush=True)
    return all(result["met"] for result in results.values()), results


def _is_mended(blow: dict[str, Any]) -> bool:
    found = blow["found_seconds"]
    since = 0.0 if blow["way"] == "kill" else found
    return bool(
        found <= FOUND_SECONDS[blow["way"]]
        and blow["start_seconds"] - since <= RESTART_SECONDS
        and blow["others_seconds"] <= OTHERS_SECONDS
    )


def prove_false_alarm() -> tuple[bool, dict[str, Any]]:
    """Thirty minutes with two endless loops per core beside four replicas that compute: not one restart."""
    with _busy_cores(2 * (os.cpu_count() or 1)):
        result = asyncio.run(_watch_for_alarms(60.0 * ALARM_MINUTES))
    is_met = (
        result["restarts"] == 0
        and not result["errors"]
        and result["seconds"] >= 60.0 * ALARM_MINUTES
        and result["cpu_idle_percent_max"] < 5.0
    )
    return is_met, result


async def _watch_for_alarms(seconds: float) -> dict[str, Any]:
    from service_load import echo

    from forge_core.services.options import ServiceOptions
    from forge_core.services.serving import serve

    begin, answered = time.monotonic(), 0
    errors: list[str] = []
    idle: list[float] = []
    loads: list[float] = []
    options = ServiceOptions(timeout_seconds=300.0)

    async def ask() -> None:
        nonlocal answered
        while time.monotonic() - begin < seconds:
            try:
                await service.call("compute", 0.02, timeout_seconds=300.0, patient=True)
                answered += 1
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    async def look() -> None:
        psutil.cpu_times_percent()
        while True:
            await asyncio.sleep(10.0)
            idle.append(psutil.cpu_times_percent().idle)
            loads.append(psutil.getloadavg()[0])

    async with serve(echo(replicas=4), options=options) as service:
        looking = asyncio.create_task(look())
        begin = time.monotonic()
        await asyncio.gather(*(ask() for _ in range(_CALLERS)))
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        figures = service.metrics()
    return {
        "seconds": time.monotonic() - begin,
        "restarts": sum(each.restarts for each in figures.replicas),
        "failures": [asdict(f) for each in figures.replicas for f in each.failures],
        "answered": answered,
        "errors": errors[:20],
        "answer_seconds_p99": [each.seconds_p99 for each in figures.replicas],
        # A sample is ten seconds long; its worst is the worst ten seconds.
        "cpu_idle_percent_max": max(idle),
        "cpu_idle_percent_mean": statistics.fmean(idle),
        "load_average_min": min(loads),
        "load_average_max": max(loads),
        "busy_processes": 2 * (os.cpu_count() or 1),
        "niceness": os.nice(0),
    }


@contextmanager
def _busy_cores(count: int) -> Iterator[None]:
    """Endless loops, of the niceness of this process; gone at the end."""
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=_loop, daemon=True) for _ in range(count)]
    try:
        for each in loops:
            each.start()
        yield
    finally:
        for each in loops:
            each.kill()
            each.join(10.0)


def _loop() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        for _ in range(1_000_000):
            pass


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {
    "services": prove_services,
    "false-alarm": prove_false_alarm,
}
