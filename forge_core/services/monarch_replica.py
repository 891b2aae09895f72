"""A replica that is an actor on processes of its own.

    start: processes, their heartbeat actor, the actor itself ──▶ setup ──▶ calls ──▶ stop

A call is one message to the actor, and its answer.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError

from forge_core.actor_mesh import ActorMesh, why
from forge_core.placement.allocator import Slot
from forge_core.process_environment import process_environment
from forge_core.processes import HEARTBEAT_SECONDS, ProcessMesh
from forge_core.services.actor import ServedActor
from forge_core.services.declaration import Declaration
from forge_core.services.errors import ReplicaLost
from forge_core.services.health import Failure
from forge_core.services.places import Place, Places


class MonarchReplica:
    """One life of an actor."""

    def __init__(
        self, name: str, needs: Declaration, places: Places, *, startup_seconds: float
    ) -> None:
        self.name = name
        self._needs = needs
        self._places = places
        self._startup_seconds = startup_seconds
        self._is_served = issubclass(needs.actor, ServedActor)
        self._has_place = False
        self._mesh: ProcessMesh | None = None
        self._life: ActorMesh | None = None
        self._by_rank: list[Any] = []
        self._failure: Failure | None = None

    @property
    def pids(self) -> Sequence[int | None]:
        """Process id by rank."""
        return () if self._mesh is None else self._mesh.pids

    @property
    def mesh(self) -> ProcessMesh:
        """Its processes, once started."""
        assert self._mesh is not None, f"{self.name} has not started"
        return self._mesh

    @property
    def actors(self) -> Any:
        """Monarch mesh of its actors, once started."""
        return self._started.actors

    @property
    def _started(self) -> ActorMesh:
        assert self._life is not None, f"{self.name} has not started"
        return self._life

    async def start(self) -> None:
        """Spawn the processes and the actors on them. Raises ReplicaLost if Monarch cannot."""
        place = self._places.take(self.name, self._needs)
        self._has_place = True
        try:
            await self._spawn(place)
        except SupervisionError as error:
            raise ReplicaLost(why(error)) from error

    async def _spawn(self, place: Place) -> None:
        needs, name = self._needs, self.name
        self._mesh = await ProcessMesh.spawn(
            name,
            place.slots,
            self._environment,
            startup_seconds=self._startup_seconds,
            host=place.host,
        )
        actors = self._mesh.mesh.spawn(name, needs.actor, *needs.arguments, **needs.named_arguments)
        self._life = ActorMesh(self._mesh, actors)
        if self._failure is not None:
            self._life.abandon(self._failure)
        if self._is_served:
            flat = actors.flatten("rank")
            self._by_rank = [flat.slice(rank=rank) for rank in range(len(self._mesh.pids))]

    def _environment(self, slot: Slot) -> dict[str, str]:
        # An actor that asked for no core computes little.
        own = process_environment(len(slot.cores) or 1, slot.gpus)
        return {**own, **self._needs.environment}

    async def setup(self, *, timeout_seconds: float) -> None:
        """The actor's own `setup`, on every rank."""
        if self._is_served:
            async with asyncio.timeout(timeout_seconds):
                await self._started.answered("setup", self.actors.run_setup.call)

    async def call(
        self,
        endpoint: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float,
        number: int | None = None,
    ) -> Any:
        """One actor's answer, or those of all ranks in order. See `Replica.call`."""
        if self._failure is not None:
            raise ReplicaLost(self._failure.reason)
        life, named, is_one = self._started, kwargs or {}, self._needs.processes == 1
        if number is None:
            number = life.own_number()
        target = life.actors.serve if self._is_served else getattr(life.actors, endpoint)
        send = target.call_one if is_one else target.call
        if self._is_served:
            send = functools.partial(send, number, endpoint, args, named)
        else:
            send = functools.partial(send, *args, **named)
        async with asyncio.timeout(timeout_seconds):
            answer = await life.answered(endpoint, send, number=number)
        return answer if is_one else list(answer.values())

    async def cancel(self, number: int, *, timeout_seconds: float) -> None:
        """Have the actor give a request up, and wait until it has answered in whatever way."""
        life = self._life
        if life is None or not life.is_under_way(number):
            return
        async with asyncio.timeout(timeout_seconds):
            if self._is_served:
                # Not waited for: that the request itself is answered says as much.
                life.actors.give_up.call(number).as_asyncio().add_done_callback(_retrieve)
            await life.until_answered(number)

    async def beat(self, rank: int) -> None:
        """Answered by the process."""
        await self.mesh.beat(rank)

    async def turn(self, rank: int) -> None:
        """Answered by the actor; at once by one that cannot be asked."""
        if self._is_served:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await self._by_rank[rank].turn.call_one()

    def abandon(self, failure: Failure) -> None:
        """End every call under way, and refuse those to come."""
        self._failure = self._failure or failure
        if self._life is not None:
            self._life.abandon(failure)

    def kill(self) -> None:
        """End its processes and give its place back, unless some are on another machine."""
        if self._mesh is not None:
            self._mesh.kill_processes()
        if None not in self.pids:
            self._give_back()

    async def explain(self) -> str | None:
        """What Monarch knows of its death."""
        return None if self._life is None else await self._life.explain()

    async def stop(self, grace_seconds: float) -> None:
        """Stop the processes, by force if there is no grace or they outlast it."""
        try:
            if self._mesh is not None:
                await (self._mesh.stop(grace_seconds) if grace_seconds > 0 else self._mesh.kill())
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._has_place:
            self._has_place = False
            self._places.give_back(self.name)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take notice of an error that nobody waits for."""
    if not future.cancelled():
        future.exception()
