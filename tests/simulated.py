"""Replicas without processes, and an event loop whose clock jumps to whatever is due next."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_core.services.errors import ReplicaLost
from forge_core.services.health import Failure


class _Jumping(selectors.DefaultSelector):
    """Never waits: where nothing is ready, it is later."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits, and nothing will ever happen")
            self.now += max(timeout, 0.0)
        return ready


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop in which a week passes as fast as what happens in it."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def simulate(main: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` in simulated time; no task may be left."""
    with asyncio.Runner(loop_factory=SimulatedTime) as runner:

        async def checked() -> Any:
            result = await main
            await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left: {left}"
            return result

        return runner.run(checked())


@dataclass(eq=False)
class World:
    """What the simulated replicas of a test have in common."""

    seconds: float = 0.01
    """What a request takes, unless it says itself."""
    start_seconds: float = 0.1
    """What a replica takes to start."""
    failing_starts: int = 0
    """Starts that are still to fail."""
    made: list[SimulatedReplica] = field(default_factory=list)
    """Every life of every replica."""
    answers: Counter[Any] = field(default_factory=Counter)
    """How often each value was answered by an endpoint."""
    cancelled: list[int] = field(default_factory=list)
    """Requests that replicas gave up."""

    def make(self, name: str) -> SimulatedReplica:
        replica = SimulatedReplica(name, self)
        self.made.append(replica)
        return replica

    @property
    def alive(self) -> list[SimulatedReplica]:
        """The lives that are not over, by name."""
        return sorted((each for each in self.made if each.is_up), key=lambda replica: replica.name)


class SimulatedReplica:
    """Answers after a while; dies and hangs when told to.

    Endpoints: `echo(value, seconds=...)`, `fail(error)`, `forever()`, and `deaf(seconds)`, which cannot be cancelled.
    """

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.pids: Sequence[int | None] = (None,)
        self.calls: list[str] = []
        self.is_up = False
        self.is_hung = False
        self.is_stopped = False
        self._world = world
        self._failure: Failure | None = None
        self._running: dict[int, asyncio.Task[Any]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}

    async def start(self) -> None:
        await asyncio.sleep(self._world.start_seconds)
        if self._world.failing_starts > 0:
            self._world.failing_starts -= 1
            raise ReplicaLost(f"{self.name} has no room")
        self.is_up = True

    async def setup(self, *, timeout_seconds: float) -> None:
        self.calls.append("setup")

    async def call(
        self,
        endpoint: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float,
        number: int | None = None,
    ) -> Any:
        number = -1 if number is None else number
        if self._failure is not None:
            raise ReplicaLost(self._failure.reason)
        self.calls.append(endpoint)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        if self.is_hung or not self.is_up:
            return await reply
        running = asyncio.create_task(getattr(self, f"_{endpoint}")(*args, **(kwargs or {})))
        self._running[number] = running

        def settle(done: asyncio.Task[Any]) -> None:
            self._running.pop(number)
            if done.cancelled() and (self.is_hung or not self.is_up):
                return  # nobody hears of it until `abandon`
            self._replies.pop(number)
            if done.cancelled():
                self._world.cancelled.append(number)
            elif (error := done.exception()) is not None:
                if not reply.done():
                    reply.set_exception(error)
            elif not reply.done():
                reply.set_result(done.result())

        running.add_done_callback(settle)
        return await reply

    async def cancel(self, number: int, *, timeout_seconds: float) -> None:
        if (running := self._running.get(number)) is not None:
            running.cancel()
            async with asyncio.timeout(timeout_seconds):
                await asyncio.wait([running])

    async def beat(self, rank: int) -> None:
        if not self.is_up:
            raise RuntimeError("Killed(sig=9)")
        if self.is_hung:
            await asyncio.get_running_loop().create_future()

    async def turn(self, rank: int) -> None:
        await self.beat(rank)

    def die(self) -> None:
        """As by SIGKILL: calls to it are not answered any more, heartbeats refused."""
        self.is_up = False
        self._end_running()

    def hang(self) -> None:
        """As by SIGSTOP: nothing is answered."""
        self.is_hung = True
        self._end_running()

    def _end_running(self) -> None:
        for running in self._running.values():
            running.cancel()

    def abandon(self, failure: Failure) -> None:
        self._failure = self._failure or failure
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ReplicaLost(failure.reason))

    def kill(self) -> None:
        self.is_up = False

    async def explain(self) -> str | None:
        return "Killed(sig=9)"

    async def stop(self, grace_seconds: float) -> None:
        self.is_up, self.is_stopped = False, True
        running = list(self._running.values())
        self._end_running()
        if running:
            await asyncio.wait(running)

    async def _echo(self, value: Any, seconds: float | None = None) -> Any:
        await asyncio.sleep(self._world.seconds if seconds is None else seconds)
        self._world.answers[value] += 1
        return value

    async def _fail(self, error: BaseException) -> None:
        await asyncio.sleep(self._world.seconds)
        raise error

    async def _forever(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _deaf(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        while (left := until - asyncio.get_running_loop().time()) > 0 and not self.is_stopped:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                if self.is_stopped:
                    raise
