"""A service: replicas of one kind that are called as if they were one, and could not fail.

    Service ─▶ Answering ─▶ Dispatch: queue and router ─▶ Replica
       └─────▶ Crew ─▶ Supervisor, one per replica: starts, watches, replaces it

Every call is answered once, or raises once: what the endpoint raised, which is its caller's error and harms no replica;
DeadlineExceeded; Overloaded; ReplicaFailed when the attempts are used up; ServiceFailed when the service is over.
A request whose replica fails is asked again, so that an endpoint may be called a second time with it: `attempts=1`
forbids that.

| waits | for | unblocked by |
|---|---|---|
| a call | a replica, then its answer | see `dispatch`; deadline; cancellation; the end of the service |
| a request that is given up | the replica's word that it stopped | that word; the replica's end; `cancel_seconds` |
| `scale_to` | new replicas that serve, old ones that are drained | `startup_seconds`, `drain_seconds` |
| the body of `open` | whatever it does | cancelled when the service is over, which is then raised |
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from forge_core.services.answering import Answering
from forge_core.services.crew import Crew
from forge_core.services.dispatch import Dispatch
from forge_core.services.errors import ServiceFailed
from forge_core.services.fanout import Outcome, fan_out
from forge_core.services.metrics import ServiceSnapshot
from forge_core.services.options import ServiceOptions
from forge_core.services.replica import MakeReplica, State
from forge_core.services.routing import RoundRobin, Router
from forge_core.services.sessions import OnMove, Session
from forge_core.services.supervision import Prepare, Transition

logger = logging.getLogger(__name__)


class Service:
    """Made by `Service.open`; for actors by `forge_core.services.serving.serve`."""

    def __init__(
        self,
        name: str,
        dispatch: Dispatch,
        crew: Crew,
        answering: Answering,
        options: ServiceOptions,
    ) -> None:
        self.name = name
        self._dispatch = dispatch
        self._crew = crew
        self._answering = answering
        self._options = options
        self._clock = asyncio.get_running_loop().time
        self._opened_at = self._clock()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        name: str,
        make: MakeReplica,
        *,
        replicas: int,
        router: Router | None = None,
        options: ServiceOptions | None = None,
        prepare: Prepare | None = None,
        tell: Callable[[Transition], None] | None = None,
    ) -> AsyncIterator[Service]:
        """Start `replicas` replicas; enter once all serve; stop them on leaving, within their grace.

        `prepare` is awaited before a replica serves, in each of its lives. `tell` is told of every transition.
        Raises what a replica's `setup` raises when it starts for the first time, and ServiceFailed, also out of the
        body, once the service is over.
        """
        options = options or ServiceOptions()
        dispatch = Dispatch(
            router or RoundRobin(),
            max_queued=options.max_queued,
            max_under_way=options.max_under_way,
            max_load=options.max_load,
        )
        crew = Crew(name, make, dispatch, options, prepare=prepare, tell=tell or _log)
        answering = Answering(name, dispatch, crew.supervisors, options)
        try:
            async with _ended_by(crew.over):
                await crew.scale_to(replicas)
                yield cls(name, dispatch, crew, answering, options)
        finally:
            await answering.close()
            await crew.close()

    async def call(
        self,
        endpoint: str,
        *args: Any,
        timeout_seconds: float | None = None,
        cost: float = 1.0,
        attempts: int | None = None,
        patient: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Call an endpoint of one replica.

        `cost` is what the request weighs for the router and `max_load`, such as the tokens it may take. With `patient`
        a call waits for a place in a full queue; otherwise it raises Overloaded.
        """
        return await self._answering.ask(
            endpoint,
            args,
            kwargs,
            timeout_seconds=timeout_seconds,
            cost=cost,
            attempts=attempts,
            patient=patient,
        )

    @asynccontextmanager
    async def session(self, *, on_move: OnMove | None = None) -> AsyncIterator[Session]:
        """A session: its calls go to one replica, as long as that lives; see `forge_core.services.sessions`."""
        session = Session(self._answering, on_move)
        self._answering.open_sessions += 1
        try:
            yield session
        finally:
            session.close()
            self._answering.open_sessions -= 1

    async def fanout(
        self, endpoint: str, *args: Any, timeout_seconds: float | None = None, **kwargs: Any
    ) -> dict[str, Outcome]:
        """Call an endpoint of every replica at once, whatever it has under way; the outcome by replica.

        Nothing is tried again, and nothing raised: a replica that does not serve, fails, raises or is late has Failed.
        """
        seconds = self._options.timeout_seconds if timeout_seconds is None else timeout_seconds
        return await fan_out(
            self._answering,
            self._crew.supervisors.values(),
            endpoint,
            args,
            kwargs,
            timeout_seconds=seconds,
        )

    async def scale_to(self, replicas: int) -> None:
        """Return once there are so many: new ones serve, those beyond have finished what they had.

        Raises ValueError if that is less than one, and what keeps a new replica from serving; then the new ones are
        gone again.
        """
        await self._crew.scale_to(replicas)

    def metrics(self) -> ServiceSnapshot:
        """What the service did, as plain figures."""
        now, dispatch, answering = self._clock(), self._dispatch, self._answering
        return ServiceSnapshot(
            name=self.name,
            seconds=now - self._opened_at,
            requests=answering.requests,
            retries=answering.retries,
            overloaded=dispatch.overloaded,
            late=answering.late,
            queued=dispatch.queued,
            queued_most=dispatch.queued_most,
            queue_seconds_p50=dispatch.waits.percentile(50),
            queue_seconds_p99=dispatch.waits.percentile(99),
            sessions=answering.open_sessions,
            moved_sessions=answering.moved_sessions,
            replicas=tuple(each.snapshot() for each in self._crew.supervisors.values()),
        )


def _log(transition: Transition) -> None:
    level = logging.WARNING if transition.state is State.FAILED else logging.DEBUG
    logger.log(level, "%s is %s: %s", transition.name, transition.state, transition.reason)


@asynccontextmanager
async def _ended_by(over: asyncio.Future[ServiceFailed]) -> AsyncIterator[None]:
    """Cancel the body when `over` resolves, and raise that instead."""
    task = asyncio.current_task()
    assert task is not None
    is_inside, was_cancelled = True, False

    def cancel(_: object) -> None:
        nonlocal was_cancelled
        if is_inside:
            was_cancelled = True
            task.cancel()

    async def absorb() -> None:
        """Have a cancellation of ours that is still to come hit this, and nothing after it."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        if was_cancelled:
            task.uncancel()
        if task.cancelling():  # somebody else's as well
            raise asyncio.CancelledError

    over.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not was_cancelled or task.uncancel() > 0:
            raise
    except BaseException:
        if over.done():
            await absorb()
        raise
    else:
        if over.done():
            await absorb()
    finally:
        is_inside = False
    if over.done():
        raise over.result() from over.result().__cause__
