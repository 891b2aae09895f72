"""Actors that the tests of services call."""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import time

from forge_core.services.actor import ServedActor, concurrent_endpoint, one_at_a_time


class Unsendable(Exception):
    """Cannot be built again from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


class Echo(ServedActor):
    """Says what it is told, and misbehaves on demand."""

    def __init__(self, prefix: str = "", load_seconds: float = 0.0) -> None:
        self._prefix = prefix
        self._load_seconds = load_seconds
        self._given_up = 0
        self._order: list[int] = []

    async def setup(self) -> None:
        await asyncio.sleep(self._load_seconds)

    @concurrent_endpoint
    async def say(self, value: str, seconds: float = 0.0) -> str:
        if seconds:
            await asyncio.sleep(seconds)
        return f"{self._prefix}{value}"

    @concurrent_endpoint
    async def numbered(self, number: int) -> tuple[int, int]:
        """The number and this process, after a moment."""
        await asyncio.sleep(0.01)
        return number, os.getpid()

    @concurrent_endpoint
    async def compute(self, seconds: float) -> int:
        """Compute without awaiting anything."""
        until, count = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            count += 1
        return count

    @concurrent_endpoint
    async def where(self) -> tuple[tuple[int, ...], str, str]:
        """Cores that it is bound to, GPUs that it sees, threads."""
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return cores, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]

    @concurrent_endpoint
    async def pid(self) -> int:
        return os.getpid()

    @concurrent_endpoint
    async def wait(self) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            self._given_up += 1

    @concurrent_endpoint
    async def given_up(self) -> int:
        return self._given_up

    @one_at_a_time
    async def in_turn(self, value: int) -> list[int]:
        self._order.append(value)
        await asyncio.sleep(0.01)
        self._order.append(value)
        return self._order

    @concurrent_endpoint
    async def fail(self, how: str) -> None:
        if how == "unsendable":
            raise Unsendable("one", "two")
        if how == "cancelled":
            raise asyncio.CancelledError
        raise ValueError(f"bad {how}")

    @concurrent_endpoint
    async def unsendable_answer(self) -> object:
        return (each for each in ())

    @concurrent_endpoint
    async def block(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251

    @concurrent_endpoint
    async def loop(self) -> None:
        while True:
            pass

    @concurrent_endpoint
    async def loop_with_lock(self) -> None:
        collections.deque(itertools.repeat(None), maxlen=0)

    @concurrent_endpoint
    async def exit(self, code: int) -> None:
        os._exit(code)


class FailsToStart(ServedActor):
    """Its setup raises."""

    async def setup(self) -> None:
        raise KeyError("no such weights")
