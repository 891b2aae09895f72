"""One life of actors: the processes that they are on, and the calls to them that are under way.

    message ──▶ under way ──▶ answer: what the endpoint returned or raised
                    └─ abandon ──▶ ReplicaLost

Monarch tells of a dead process half a second late, and of calls to a mesh that was killed and stopped sometimes never;
so `abandon` ends every call under way itself. `forge_core.mesh` replaces one life by the next for a run's meshes,
`forge_core.services.supervision` for those of services.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import ActorError

from forge_core.processes import ProcessMesh
from forge_core.services.errors import ReplicaLost
from forge_core.services.health import Failure

_EXPLAIN_SECONDS = 5.0
"""Longest wait for what Monarch tells within half a second where the machine has time for it."""


class ActorMesh:
    """Actors on the processes of a mesh, of which one that fails takes the others with it."""

    def __init__(self, processes: ProcessMesh, actors: Any) -> None:
        self.processes = processes
        self.actors = actors
        """Monarch mesh of the actors; None where nobody calls them."""
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._failure: Failure | None = None
        # Of messages that nobody will name: below those of requests, which begin at 0.
        self._numbers = itertools.count(-1, -1)

    @property
    def name(self) -> str:
        """Name of the mesh."""
        return self.processes.name

    @property
    def pids(self) -> Sequence[int | None]:
        """Process id by rank; None for one on another machine."""
        return self.processes.pids

    async def answered(
        self, endpoint: str, send: Callable[[], Any], *, number: int | None = None
    ) -> Any:
        """The answer to a message that `send` sends, giving Monarch's future. Whoever calls this sets a deadline.

        `number`, unlike that of any other message under way, is what `until_answered` will name. Raises what the
        endpoint raised, or ReplicaLost if the actors are at fault. What is cancelled goes on in the actors.
        """
        if self._failure is not None:
            raise ReplicaLost(self._failure.reason)
        try:
            answer: asyncio.Future[Any] = send().as_asyncio()
        except SupervisionError as error:
            raise ReplicaLost(why(error)) from error
        if number is None:
            number = self.own_number()
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
        if isinstance(error, ActorError):
            cause = error.exception
            cause.add_note(f"raised in {self.name}, endpoint {endpoint}:\n{error}")
            if not isinstance(cause, Exception):  # a cancellation there is none here
                return RuntimeError(f"{endpoint} of {self.name} ended by {type(cause).__name__}")
            return cause
        if isinstance(error, RuntimeError):
            # Monarch's own: what an endpoint raises comes as an ActorError.
            lost = ReplicaLost(why(error))
            lost.__cause__ = error
            return lost
        return error

    def own_number(self) -> int:
        """Of a message that is no request."""
        return next(self._numbers)

    async def until_answered(self, number: int) -> None:
        """Return once a message is answered in whatever way; at once if none of that number is under way."""
        if (answer := self._answers.get(number)) is not None:
            await asyncio.wait([answer])

    def is_under_way(self, number: int) -> bool:
        """Whether a message of this number is not answered yet."""
        return number in self._answers

    def abandon(self, failure: Failure) -> None:
        """End every call under way, and refuse those to come."""
        self._failure = self._failure or failure
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ReplicaLost(failure.reason))
        for answer in list(self._answers.values()):
            answer.cancel()

    async def explain(self) -> str | None:
        """What Monarch knows of the death of a process."""
        try:
            async with asyncio.timeout(_EXPLAIN_SECONDS):
                await asyncio.gather(
                    *(self.processes.beat(rank) for rank in range(len(self.processes.pids)))
                )
        except SupervisionError as error:
            return why(error)
        except TimeoutError:
            pass
        return None


def why(error: BaseException) -> str:
    """Monarch's reason on one line, without the addresses of actors that it begins with."""
    told = str(error)
    return " ".join((told.rpartition("have failed:")[2] or told).split())[:500]
