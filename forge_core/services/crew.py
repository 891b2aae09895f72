"""The replicas of a service: how they join, leave, and what becomes of the service when one is not started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from forge_core.services.dispatch import Dispatch, Seat
from forge_core.services.errors import ServiceFailed
from forge_core.services.health import end_tasks
from forge_core.services.options import ServiceOptions
from forge_core.services.replica import MakeReplica
from forge_core.services.supervision import GaveUp, Prepare, Supervisor, Transition

logger = logging.getLogger(__name__)


class Crew:
    """The replicas of one service.

    With `route_around` a replica that is not started again is left out, as long as another is there; otherwise that is
    the end of the service, which resolves `over`.
    """

    def __init__(
        self,
        name: str,
        make: MakeReplica,
        dispatch: Dispatch,
        options: ServiceOptions,
        *,
        prepare: Prepare | None,
        tell: Callable[[Transition], None],
    ) -> None:
        self.supervisors: dict[Seat, Supervisor] = {}
        """By seat, in order."""
        self.over: asyncio.Future[ServiceFailed] = asyncio.get_running_loop().create_future()
        """Resolves at the end of the service, if that is a failure."""
        self._name = name
        self._make = make
        self._dispatch = dispatch
        self._options = options
        self._prepare = prepare
        self._tell = tell
        self._lives: dict[Supervisor, asyncio.Task[None]] = {}
        self._left_out: set[Supervisor] = set()
        self._scaling = asyncio.Lock()

    async def scale_to(self, replicas: int) -> None:
        """Return once there are so many: new ones serve, those beyond have finished what they had.

        Raises ValueError if that is less than one, and what keeps a new replica from serving; then the new ones are
        gone again.
        """
        if replicas < 1:
            raise ValueError(f"{self._name} cannot have {replicas} replicas: give 1 or more")
        async with self._scaling:
            seats = list(self.supervisors)
            if replicas < len(seats):
                await self._dismiss(seats[replicas:])
            joining = [self._join(index) for index in range(len(seats), replicas)]
            try:
                await asyncio.gather(*(supervisor.started for supervisor in joining))
            except BaseException as error:
                await self._end(joining)
                if isinstance(error, GaveUp):
                    raise ServiceFailed(f"{self._name}: {error}") from error.__cause__
                raise

    async def close(self) -> None:
        """Stop all, and refuse what waits."""
        self._dispatch.fail(ServiceFailed(f"{self._name} is closed"), list(self.supervisors))
        await self._end(list(self.supervisors.values()))

    def _join(self, index: int) -> Supervisor:
        seat = Seat(index=index, name=f"{self._name}-{index}")
        supervisor = Supervisor(
            seat, self._make, self._dispatch, self._options, prepare=self._prepare, tell=self._tell
        )
        self.supervisors[seat] = supervisor
        life = asyncio.create_task(supervisor.run(), name=seat.name)
        self._lives[supervisor] = life
        life.add_done_callback(lambda done: self._ended(supervisor, done))
        return supervisor

    async def _dismiss(self, seats: list[Seat]) -> None:
        """Have some finish what they have, then forget them."""
        leaving = [self.supervisors[seat] for seat in seats]
        for supervisor in leaving:
            supervisor.leave()
        await asyncio.wait([self._lives[supervisor] for supervisor in leaving])
        await self._end(leaving)

    async def _end(self, supervisors: list[Supervisor]) -> None:
        await end_tasks(*(self._lives.pop(supervisor) for supervisor in supervisors))
        for supervisor in supervisors:
            supervisor.seat.has_left = True
            self._left_out.discard(supervisor)
            del self.supervisors[supervisor.seat]

    def _ended(self, supervisor: Supervisor, life: asyncio.Task[None]) -> None:
        """A replica's place is not filled any more."""
        error = None if life.cancelled() else life.exception()
        if error is None or not supervisor.has_served:  # in the latter case `started` has raised it
            return
        self._left_out.add(supervisor)
        if self._options.policy == "route_around" and len(self._left_out) < len(self.supervisors):
            logger.error("%s goes on without %s: %s", self._name, supervisor.seat.name, error)
            supervisor.seat.has_left = True
            self._dispatch.close(supervisor.seat, failed=True)
        elif not self.over.done():
            over = ServiceFailed(f"{self._name} is over: {error}")
            over.__cause__ = error.__cause__ if isinstance(error, GaveUp) else error
            self._dispatch.fail(over, list(self.supervisors))
            self.over.set_result(over)
            for other in self._lives.values():
                other.cancel()
