"""Health: processes that are dead, stopped or hang are found, and busy ones are left alone.

The processes are real; in each, one thread answers lines as a heartbeat actor would, beside one that misbehaves.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from forge_core.services.evidence import ProcessSample, process_ended, sample_process
from forge_core.services.health import FailureKind, HealthOptions, Judge, watch

QUICK = HealthOptions(
    interval_seconds=0.1, silence_seconds=0.6, busy_seconds=0.3, asleep_seconds=1.2
)
FOUND_SECONDS = 30.0

PROGRAM = """
import collections, ctypes, itertools, sys, threading, time

def misbehave():
    kind = sys.argv[1]
    if kind == "loop in C":
        collections.deque(itertools.repeat(None), maxlen=0)
    elif kind == "sleep in C":
        ctypes.PyDLL(None).sleep(1000)
    elif kind == "loop":
        while True: pass
    elif kind == "sleep":
        time.sleep(1000)

for line in sys.stdin:
    sys.stdout.write(line)
    sys.stdout.flush()
    if line == "1\\n":
        threading.Thread(target=misbehave, daemon=True).start()
"""


class Process:
    """Answers each line with the same line."""

    name = "worker-0"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pids = (process.pid,)
        self.beats = 0
        self._beaten = asyncio.Condition()

    async def beaten(self, times: int) -> None:
        """Wait until so many heartbeats were answered."""
        async with self._beaten:
            await self._beaten.wait_for(lambda: self.beats >= times)

    async def beat(self, rank: int) -> None:
        line = b"%d\n" % (self.beats + 1)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line)
        answer = await self._process.stdout.readline()
        assert answer in (line, b""), "an answer to another heartbeat"
        if not answer:
            await asyncio.get_running_loop().create_future()
        async with self._beaten:
            self.beats += 1
            self._beaten.notify_all()


@asynccontextmanager
async def running(kind: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, kind, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Process(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def found(target: Process) -> FailureKind:
    async with asyncio.timeout(FOUND_SECONDS):
        return (await watch(target, QUICK)).kind


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("loop in C", FailureKind.SPINS), ("sleep in C", FailureKind.SLEEPS)],
)
def test_what_holds_the_lock_of_python_hangs(kind: str, expected: FailureKind) -> None:
    async def scenario() -> None:
        async with running(kind) as process:
            assert await found(process) == expected

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["loop", "sleep"])
def test_what_only_works_or_waits_does_not(kind: str) -> None:
    async def scenario() -> None:
        async with running(kind) as process:
            watching = asyncio.create_task(watch(process, QUICK))
            beaten = asyncio.create_task(process.beaten(12))
            await asyncio.wait({beaten, watching}, return_when=asyncio.FIRST_COMPLETED)
            assert not watching.done(), watching.result()
            watching.cancel()
            await asyncio.wait([watching])

    asyncio.run(scenario())


def test_death_and_stop_are_found_and_name_the_process() -> None:
    async def scenario() -> None:
        for number, expected in ((signal.SIGKILL, "ended"), (signal.SIGSTOP, "is stopped")):
            async with running("nothing") as process:
                watching = asyncio.create_task(watch(process, QUICK))
                await process.beaten(1)
                os.kill(process.pids[0], number)
                async with asyncio.timeout(FOUND_SECONDS):
                    failure = await watching
                assert f"process {process.pids[0]} of worker-0 {expected}" in failure.reason

    asyncio.run(scenario())


def test_watching_leaves_no_task_and_no_file_open() -> None:
    async def scenario() -> None:
        async with running("nothing") as process:
            before = len(os.listdir("/proc/self/fd"))
            watching = asyncio.create_task(watch(process, QUICK))
            await process.beaten(1)
            assert len(os.listdir("/proc/self/fd")) == before + 1
            watching.cancel()
            await asyncio.wait([watching])
            assert len(os.listdir("/proc/self/fd")) == before
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_process_that_never_was_has_ended() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert sample_process(child.pid) is None
    asyncio.run(asyncio.wait_for(process_ended(child.pid), 5))


def test_a_child_that_nobody_waited_for_has_ended() -> None:
    child = subprocess.Popen(["true"])
    asyncio.run(asyncio.wait_for(process_ended(child.pid), 5))
    assert sample_process(child.pid) is None
    child.wait()


# What silence means


def verdict(samples: list[ProcessSample | None], seconds: float = 0.5) -> FailureKind | None:
    judge = Judge(HealthOptions())
    for sample in samples:
        kind = judge.wait(seconds, sample)
        if kind is not None:
            return kind
    return None


def starved(cpu_seconds: float) -> ProcessSample:
    return ProcessSample(is_stopped=False, is_asleep=False, cpu_seconds=cpu_seconds)


def test_a_process_that_waits_for_a_cpu_is_never_blamed() -> None:
    assert verdict([starved(0.9)] * 10_000) is None
    # A thousandth of a core, as on a machine that swaps: not half a second of work in a quarter of an hour.
    assert verdict([starved(i * 0.25e-3) for i in range(1800)]) is None


def test_one_that_got_the_cpu_is_blamed_once_it_had_half_a_second_of_it() -> None:
    assert verdict([starved(i * 0.5) for i in range(6)]) == FailureKind.SPINS
    assert verdict([starved(i * 0.5) for i in range(4)]) is None
    # On a crowded machine that takes longer.
    crowded = [starved(i * 0.05) for i in range(25)]
    assert verdict(crowded[:10]) is None and verdict(crowded) == FailureKind.SPINS


def test_what_was_computed_before_the_silence_does_not_count() -> None:
    assert verdict([starved(1000.0)] * 100) is None


def test_sleeping_counts_although_a_thread_is_sometimes_seen_awake() -> None:
    asleep = ProcessSample(is_stopped=False, is_asleep=True, cpu_seconds=1.0)
    assert verdict([asleep] * 21) == FailureKind.SLEEPS
    assert verdict([asleep] * 19) is None
    mostly = ([asleep] * 9 + [starved(1.0)]) * 3
    assert verdict(mostly) == FailureKind.SLEEPS
    assert verdict([asleep, starved(1.0)] * 1000) is None


def test_a_stop_counts_from_its_beginning() -> None:
    stopped = ProcessSample(is_stopped=True, is_asleep=False, cpu_seconds=1.0)
    assert verdict([stopped] * 5) == FailureKind.STOPPED
    assert verdict(([stopped] * 4 + [starved(1.0)]) * 100) is None


def test_an_unseen_process_is_given_longer() -> None:
    assert verdict([None] * 59) is None
    assert verdict([None] * 60) == FailureKind.UNREACHABLE


def test_seconds_that_this_process_lost_do_not_count() -> None:
    """Its event loop stands still for far longer than silence is borne."""

    class Answering:
        name = "answering"
        pids = (None,)
        asked = 0

        async def beat(self, rank: int) -> None:
            self.asked += 1
            await asyncio.sleep(0.05)

    async def scenario() -> None:
        target = Answering()
        options = HealthOptions(interval_seconds=0.01, unseen_seconds=0.5)
        watching = asyncio.create_task(watch(target, options))
        for _ in range(3):
            await asyncio.sleep(0.02)
            time.sleep(0.8)  # noqa: ASYNC251
        assert not watching.done() and target.asked > 0
        watching.cancel()
        await asyncio.wait([watching])

    asyncio.run(scenario())
