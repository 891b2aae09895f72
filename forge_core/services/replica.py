"""What a service needs of a replica, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from forge_core.services.health import Failure


class State(StrEnum):
    """Where a replica stands; `forge_core.services.seat` has the way from one to the next."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Replica(Protocol):
    """One life of a replica: started once, stopped once, replaced by another when it failed.

    It is watched as `forge_core.services.health.Watched`.
    """

    @property
    def name(self) -> str:
        """Name in logs and reasons."""

    @property
    def pids(self) -> Sequence[int | None]:
        """Process id by rank, once started; None for one that is not on this machine."""

    async def start(self) -> None:
        """Start the processes. Raises whatever keeps them from it; what was started is then stopped."""

    async def setup(self, *, timeout_seconds: float) -> None:
        """Make it ready to serve. Raises what the actor's own `setup` raises, ReplicaLost, and TimeoutError."""

    async def call(
        self,
        endpoint: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float,
        number: int | None = None,
    ) -> Any:
        """Call an endpoint. `number`, unlike that of any other request that it has, is what `cancel` will name.

        Raises what the endpoint raises, ReplicaLost, and TimeoutError. What is cancelled or late goes on until
        `cancel`.
        """

    async def cancel(self, number: int, *, timeout_seconds: float) -> None:
        """Have it give a request up; return once it has, or at once if it does not have it. Raises TimeoutError."""

    async def beat(self, rank: int) -> None:
        """Return once a process has answered a heartbeat. Raises RuntimeError if it is known to be dead."""

    async def turn(self, rank: int) -> None:
        """Return once the actor itself, between two endpoints' awaits, has answered."""

    def abandon(self, failure: Failure) -> None:
        """Raise ReplicaLost from every call under way, and from those to come."""

    def kill(self) -> None:
        """End its processes on this machine at once; if those are all, give its place back."""

    async def explain(self) -> str | None:
        """Why it died, if anybody knows; within seconds, and before `stop`."""

    async def stop(self, grace_seconds: float) -> None:
        """Stop it, in whatever state it is; at once if there is no grace."""


MakeReplica = Callable[[str], Replica]
"""Makes a replica of a name; it is started later."""


@dataclass(frozen=True, slots=True)
class Turns:
    """A replica as `watch` sees it by the actor that serves, instead of the one beside it."""

    replica: Replica
    """The replica."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.replica.name

    @property
    def pids(self) -> Sequence[int | None]:
        """Its processes."""
        return self.replica.pids

    async def beat(self, rank: int) -> None:
        """Return once the actor got to it."""
        await self.replica.turn(rank)
