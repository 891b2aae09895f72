"""Keeps one place of a service filled: starts a replica, watches it, and replaces it when it fails.

    STARTING ──ready──▶ SERVING ──leave──▶ DRAINING ──nothing under way──▶ STOPPED
     │    ▲                │                  │
     │    └──back-off──┐   │ failure          │ failure
     └────failure────▶ FAILED ◀───────────────┘ (STOPPED after that)
                         └── fail_fast, or a row of restarts too long: GaveUp

    ready = processes started, `setup` of the actor done, the service's `prepare` done

| waits | for | bounded by |
|---|---|---|
| STARTING | processes, `setup`, `prepare` | `startup_seconds`; death and stop of a process end it at once |
| SERVING | a failure, found by heartbeat or told by a caller; `leave` | |
| DRAINING | the requests under way | `drain_seconds` |
| FAILED | the back-off | `longest_delay_seconds`; `leave` ends it |
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from forge_core.services.dispatch import Dispatch, Seat
from forge_core.services.errors import ReplicaLost
from forge_core.services.health import Failure, FailureKind, end_tasks, watch
from forge_core.services.metrics import ReplicaMetrics, ReplicaSnapshot
from forge_core.services.options import ServiceOptions
from forge_core.services.replica import MakeReplica, Replica, State, Turns
from forge_core.services.restarts import Restarts

Prepare = Callable[[Replica], Awaitable[None]]
"""Awaited before a replica serves, in each of its lives: load what it is to serve, and prove that it does."""


class GaveUp(RuntimeError):
    """A replica failed and is not started again; the cause is chained."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A replica came into a state."""

    name: str
    """Name of the replica."""
    state: State
    """The state."""
    reason: str | None
    """Why, where it failed."""


class Supervisor:
    """One place of a service. `run` is its whole life, and what ends it ends the replica."""

    def __init__(
        self,
        seat: Seat,
        make: MakeReplica,
        dispatch: Dispatch,
        options: ServiceOptions,
        *,
        prepare: Prepare | None,
        tell: Callable[[Transition], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.seat = seat
        self.state = State.STARTING
        self.replica: Replica | None = None
        self.metrics = ReplicaMetrics(loop.time())
        self.started: asyncio.Future[None] = loop.create_future()
        """Resolves once it serves for the first time, or raises why it does not."""
        self._clock = loop.time
        self._make = make
        self._dispatch = dispatch
        self._options = options
        self._prepare = prepare
        self._tell = tell
        self._restarts = Restarts(options.restarts)
        self._leaving = asyncio.Event()
        self._told: asyncio.Future[Failure] = loop.create_future()
        self._served_from = math.nan
        self._dead: dict[Replica, asyncio.Task[Failure]] = {}

    @property
    def has_served(self) -> bool:
        """Came to serve at least once."""
        started = self.started
        return started.done() and not started.cancelled() and started.exception() is None

    def snapshot(self) -> ReplicaSnapshot:
        """What the replica did."""
        seat = self.seat
        return self.metrics.snapshot(
            self._clock(),
            name=seat.name,
            state=self.state,
            pids=() if self.replica is None else self.replica.pids,
            under_way=seat.under_way,
            load=seat.load,
        )

    def leave(self) -> None:
        """Take no further requests, finish what is under way, and stop."""
        self.seat.has_left = True
        self._leaving.set()

    def report(self, replica: Replica, failure: Failure) -> None:
        """A caller found that `replica` failed. Nothing happens if it was replaced already."""
        if replica is self.replica and not self._told.done():
            self._told.set_result(failure)

    async def run(self) -> None:
        """Return once it has left. Raises GaveUp; from the start of the first life also what `setup` raised."""
        try:
            while not self._leaving.is_set():
                failure = await self._live()
                if failure is None or self._leaving.is_set():
                    break
                delay = self._delay()
                if delay is None:
                    failure = await self._explained(failure)
                    raise self._giving_up(failure) from failure.cause
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._leaving.wait()
            self._to(State.STOPPED)
        except BaseException as error:
            if not self.started.done():
                self.started.set_exception(error)
                self.started.exception()  # whoever opens the service may be gone
            raise
        finally:
            await asyncio.gather(*self._dead.values(), return_exceptions=True)

    def _giving_up(self, failure: Failure) -> GaveUp:
        if self._options.policy == "fail_fast":
            return GaveUp(f"{failure.reason}; its policy is fail_fast")
        most = self._options.restarts.most
        return GaveUp(f"{failure.reason}; the last of {most + 1} failures in a row")

    def _delay(self) -> float | None:
        if self._options.policy == "fail_fast":
            return None
        served = 0.0 if math.isnan(self._served_from) else self._clock() - self._served_from
        return self._restarts.after(served)

    async def _live(self) -> Failure | None:
        """One life. The failure that ended it, or None if it left."""
        life, self.metrics.lives = self.metrics.lives, self.metrics.lives + 1
        self._served_from = math.nan
        self._told = asyncio.get_running_loop().create_future()
        self._to(State.STARTING)
        # Each life has a name of its own, which its processes and their logs carry.
        name = self.seat.name if life == 0 else f"{self.seat.name}-r{life}"
        self.replica = replica = self._make(name)
        grace_seconds, burial = 0.0, None
        try:
            failure = await self._begin(replica, is_first=life == 0)
            if failure is None:
                self._serve()
                failure = await self._until_over(replica)
            if failure is None:
                grace_seconds = self._options.grace_seconds
                return None
            burial = self._fail(replica, failure)
            if None in replica.pids:  # what is on another machine lives on until it is stopped
                await asyncio.wait([burial])
            return failure
        finally:
            self._dispatch.close(self.seat, failed=True)
            replica.abandon(Failure(FailureKind.DIED, f"{name} was stopped"))
            if burial is None:
                await replica.stop(grace_seconds)

    async def _begin(self, replica: Replica, *, is_first: bool) -> Failure | None:
        """Make a replica ready. The failure if it cannot be; raises what is not its, but its author's."""
        options = self._options
        # Loading may hold Python's lock for long; a process that is dead or stopped loads nothing.
        lenient = dataclasses.replace(
            options.health, busy_seconds=math.inf, asleep_seconds=math.inf
        )
        try:
            async with asyncio.timeout(options.startup_seconds) as limit:
                await replica.start()
                return await _first(watch(replica, lenient), self._make_ready(replica))
        except (ReplicaLost, OSError) as error:  # TimeoutError among them
            reason = f"{replica.name} did not start: {type(error).__name__}: {error}"
            if limit.expired():
                reason = f"{replica.name} was not ready within {options.startup_seconds:g} s"
            return Failure(FailureKind.NOT_STARTED, reason, error)
        except Exception as error:
            if is_first:
                raise
            reason = f"{replica.name} did not start: {type(error).__name__}: {error}"
            return Failure(FailureKind.NOT_STARTED, reason, error)

    async def _make_ready(self, replica: Replica) -> None:
        await replica.setup(timeout_seconds=self._options.startup_seconds)
        if self._prepare is not None:
            await self._prepare(replica)

    def _serve(self) -> None:
        self._served_from = self._clock()
        self.metrics.serve(self._served_from)
        self._to(State.SERVING)
        self._dispatch.open(self.seat)
        if not self.started.done():
            self.started.set_result(None)

    async def _until_over(self, replica: Replica) -> Failure | None:
        """The failure that ends its serving, or None once it has left and nothing is under way."""
        options = self._options
        watches: set[asyncio.Future[Any]] = {
            self._told,
            asyncio.create_task(watch(replica, options.health)),
        }
        if options.turn_seconds is not None:
            patience = dataclasses.replace(options.health, silence_seconds=options.turn_seconds)
            watches.add(asyncio.create_task(watch(Turns(replica), patience)))
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({*watches, leaving}, return_when=asyncio.FIRST_COMPLETED)
            failed = _result(watches)
            if failed is not None:
                return failed
            self._to(State.DRAINING)
            self._dispatch.close(self.seat, failed=False)
            if self.seat.under_way:
                drained = asyncio.get_running_loop().create_future()
                self.seat.on_idle = functools.partial(_resolve, drained)
                await asyncio.wait(
                    {*watches, drained},
                    timeout=options.drain_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            return _result(watches)
        finally:
            self.seat.on_idle = None
            await end_tasks(leaving, *watches)

    def _fail(self, replica: Replica, failure: Failure) -> asyncio.Task[Failure]:
        """Have everything under way go elsewhere at once, and what is left of the replica end in the background."""
        now, requests = self._clock(), self.seat.under_way
        self._dispatch.close(self.seat, failed=True)
        replica.abandon(failure)
        replica.kill()
        self.metrics.fail(now, failure.kind, failure.reason, requests)
        self._to(State.FAILED, failure.reason)
        burial = self._dead[replica] = asyncio.create_task(self._bury(replica, failure, now))
        return burial

    async def _bury(self, replica: Replica, failure: Failure, at: float) -> Failure:
        """The failure with what is known of its cause."""
        try:
            if failure.kind is FailureKind.DIED and (why := await replica.explain()) is not None:
                failure = dataclasses.replace(failure, reason=f"{failure.reason}: {why}")
                self.metrics.explain(at, failure.reason)
            return failure
        finally:
            await replica.stop(0.0)
            self._dead.pop(replica, None)

    async def _explained(self, failure: Failure) -> Failure:
        """The last failure, once all that can be known of it is known."""
        burial = self._dead.get(self.replica) if self.replica is not None else None
        return failure if burial is None else await burial

    def _to(self, state: State, reason: str | None = None) -> None:
        self.state = state
        self._tell(Transition(self.seat.name, state, reason))


async def _first(
    watching: Coroutine[Any, Any, Failure], working: Coroutine[Any, Any, None]
) -> Failure | None:
    """The failure that is found before the work is done; None if it is done before."""
    tasks = asyncio.create_task(watching), asyncio.create_task(working)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done = tasks[1] if tasks[1].done() else tasks[0]
        return done.result()
    finally:
        await end_tasks(*tasks)


def _result(futures: Iterable[asyncio.Future[Failure]]) -> Failure | None:
    return next((each.result() for each in futures if each.done()), None)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
