"""A replica that is an actor on processes of its own.

    start: processes, their heartbeat actor, the actor itself ──▶ setup ──▶ calls ──▶ stop

A call is one message to the actor, and its answer. Monarch tells of a dead process half a second late, and of calls to
a mesh that was killed and stopped sometimes never; so `abandon` ends every call under way itself.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import ActorError

from forge_core.placement.allocator import Slot
from forge_core.process_environment import process_environment
from forge_core.processes import HEARTBEAT_SECONDS, ProcessMesh
from forge_core.services.actor import ServedActor
from forge_core.services.declaration import Declaration
from forge_core.services.errors import ReplicaLost
from forge_core.services.fault_hook import handle_faults_of
from forge_core.services.health import Failure
from forge_core.services.places import Place, Places

_EXPLAIN_SECONDS = 5.0
"""Longest wait for what Monarch tells within half a second where the machine has time for it."""


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
        self.actors: Any = None
        """Monarch mesh of its actors, once started."""
        self._by_rank: list[Any] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._failure: Failure | None = None
        # Of messages that the service does not count: below its own, which begin at 0.
        self._numbers = itertools.count(-1, -1)

    @property
    def pids(self) -> Sequence[int | None]:
        """Process id by rank."""
        return () if self._mesh is None else self._mesh.pids

    @property
    def mesh(self) -> ProcessMesh:
        """Its processes, once started."""
        assert self._mesh is not None, f"{self.name} has not started"
        return self._mesh

    async def start(self) -> None:
        """Spawn the processes and the actors on them. Raises ReplicaLost if Monarch cannot."""
        place = self._places.take(self.name, self._needs)
        self._has_place = True
        try:
            await self._spawn(place)
        except SupervisionError as error:
            raise ReplicaLost(_why(error)) from error

    async def _spawn(self, place: Place) -> None:
        needs, name = self._needs, self.name
        handle_faults_of(name, f"{name}-process")
        self._mesh = await ProcessMesh.spawn(
            name,
            place.slots,
            self._environment,
            startup_seconds=self._startup_seconds,
            host=place.host,
        )
        self.actors = self._mesh.mesh.spawn(
            name, needs.actor, *needs.arguments, **needs.named_arguments
        )
        if self._is_served:
            flat = self.actors.flatten("rank")
            self._by_rank = [flat.slice(rank=rank) for rank in range(len(self._mesh.pids))]

    def _environment(self, slot: Slot) -> dict[str, str]:
        # An actor that asked for no core computes little.
        own = process_environment(len(slot.cores) or 1, slot.gpus)
        return {**own, **self._needs.environment}

    async def setup(self, *, timeout_seconds: float) -> None:
        """The actor's own `setup`, on every rank."""
        if self._is_served:
            async with asyncio.timeout(timeout_seconds):
                await self._answered(next(self._numbers), "setup", self.actors.run_setup.call())

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
        named, is_one = kwargs or {}, self._needs.processes == 1
        if number is None:
            number = next(self._numbers)
        async with asyncio.timeout(timeout_seconds):
            if self._is_served:
                message = (number, endpoint, args, named)
                send = self.actors.serve
                future = send.call_one(*message) if is_one else send.call(*message)
            else:
                send = getattr(self.actors, endpoint)
                future = send.call_one(*args, **named) if is_one else send.call(*args, **named)
            answer = await self._answered(number, endpoint, future)
        return answer if is_one else list(answer.values())

    async def _answered(self, number: int, endpoint: str, future: Any) -> Any:
        """The answer to a message. Raises what the endpoint raised, or ReplicaLost."""
        answer: asyncio.Future[Any] = future.as_asyncio()
        # The caller waits for a future of its own: it can be ended without ending the message.
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number], self._replies[number] = answer, reply
        answer.add_done_callback(functools.partial(self._settle, number, endpoint))
        try:
            return await reply
        finally:
            self._replies.pop(number, None)

    def _settle(self, number: int, endpoint: str, answer: asyncio.Future[Any]) -> None:
        self._answers.pop(number, None)
        reply = self._replies.pop(number, None)
        error = None if answer.cancelled() else answer.exception()
        if reply is None or reply.done():
            return
        if answer.cancelled():
            reply.cancel()
        elif error is None:
            reply.set_result(answer.result())
        else:
            reply.set_exception(self._translated(endpoint, error))

    def _translated(self, endpoint: str, error: BaseException) -> BaseException:
        if isinstance(error, SupervisionError):
            lost = ReplicaLost(_why(error))
            lost.__cause__ = error
            return lost
        if isinstance(error, ActorError):
            cause = error.exception
            cause.add_note(f"raised in {self.name}, endpoint {endpoint}:\n{error}")
            if not isinstance(cause, Exception):  # a cancellation there is none here
                return RuntimeError(f"{endpoint} of {self.name} ended by {type(cause).__name__}")
            return cause
        return error

    async def cancel(self, number: int, *, timeout_seconds: float) -> None:
        """Have the actor give a request up, and wait until it has answered in whatever way."""
        answer = self._answers.get(number)
        if answer is None:
            return
        async with asyncio.timeout(timeout_seconds):
            if self._is_served:
                # Not waited for: that the request itself is answered says as much.
                self.actors.give_up.call(number).as_asyncio().add_done_callback(_retrieve)
            await asyncio.wait([answer])

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
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ReplicaLost(failure.reason))
        for answer in list(self._answers.values()):
            answer.cancel()

    def kill(self) -> None:
        """End its processes and give its place back, unless some are on another machine."""
        if self._mesh is not None:
            self._mesh.kill_processes()
        if None not in self.pids:
            self._give_back()

    async def explain(self) -> str | None:
        """What Monarch knows of its death."""
        try:
            async with asyncio.timeout(_EXPLAIN_SECONDS):
                await asyncio.gather(*(self.beat(rank) for rank in range(len(self.pids))))
        except SupervisionError as error:
            return _why(error)
        except TimeoutError:
            pass
        return None

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


def _why(error: BaseException) -> str:
    """Monarch's reason on one line, without the addresses of actors that it begins with."""
    return " ".join(str(error).rpartition("have failed:")[2].split())[:500]
