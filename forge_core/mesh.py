"""A mesh: actors of one kind on processes of their own, which may die and be replaced by new ones."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from forge_core.processes import Processes
from forge_core.services.errors import ReplicaLost
from forge_core.services.health import Failure, FailureKind, HealthOptions, watch
from forge_core.services.metrics import ReplicaMetrics, ReplicaSnapshot
from forge_core.services.policy import UnitName
from forge_core.services.replica import State

if TYPE_CHECKING:
    from forge_core.actor_mesh import ActorMesh

logger = logging.getLogger(__name__)

_preparing: ContextVar[frozenset[str]] = ContextVar("forgeflow_preparing", default=frozenset())
"""Names of the meshes that the current task prepares."""


class MeshCall(RuntimeError):
    """A call to a mesh that failed for a reason of the infrastructure: dead process, or no answer in time."""


class Mesh:
    """Actors of one kind, on processes that form one failure unit.

        open() ──▶ SERVING ── a process dies or hangs, or a call runs out of time ──▶ FAILED ── reopen() ──▶ PREPARED
                      ▲                                                                                         │
                      └─────────────────────────────────────── serve() ─────────────────────────────────────────┘

    A call to a failed mesh fails at once. Whoever reopens it tells the new actors what they need to know before they
    can take the place of the old, in `preparing()`, outside which nobody can call them before `serve()`.
    """

    def __init__(
        self,
        name: str,
        unit: UnitName,
        processes: Processes,
        spawn: Callable[[float], Awaitable[Any]],
    ) -> None:
        """`spawn` starts the mesh's processes, by its name, and gives their actors, whose clock begins when it is told
        (Unix seconds)."""
        self.name = name
        self.unit = unit
        self.failure: str | None = None
        """Why it cannot be called; None while it can."""
        self.failed_at = 0.0
        """Unix seconds at which that was noticed."""
        self.started_at = 0.0
        """Unix seconds at which the clock of its processes begins."""
        self.openings = 0
        """How often it was opened."""
        self._processes = processes
        self._spawn = spawn
        self._life: ActorMesh | None = None
        self._opened = asyncio.Condition()
        self._num_opened = 0
        self.loaded = asyncio.Event()
        """Set while its processes have imported and loaded what they need, in which they may have been deaf."""
        self._failed_opening = 0
        self.metrics = ReplicaMetrics(time.monotonic())
        """What it did, through all openings."""
        self.under_way = 0
        """Calls that are not answered yet."""
        self.load = 0.0
        """What those weigh, such as the tokens that they may take; where a call leaves work behind, with that work."""

    async def open(self, started_at: float) -> None:
        """Start the processes and their actors. Raises TimeoutError if they do not answer in time."""
        self.openings += 1
        self.metrics.lives = self.openings
        self.started_at = started_at
        self.loaded.clear()
        # Here, for it loads Monarch.
        from forge_core.actor_mesh import ActorMesh

        actors = await self._spawn(started_at)
        self._life = ActorMesh(self._processes[self.name], actors)
        async with self._opened:
            self._num_opened = self.openings
            self._opened.notify_all()

    async def reopen(self) -> None:
        """Put new processes in the place of those that are left of the old; they do not serve yet."""
        await self._processes.end(self.name)
        await self.open(time.time())

    async def until_opened(self, after: int) -> None:
        """Wait until its processes stand that come after those of the opening of this number."""
        async with self._opened:
            await self._opened.wait_for(lambda: self._num_opened > after)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Inside, its new actors can be called although they do not serve yet."""
        token = _preparing.set(_preparing.get() | {self.name})
        try:
            yield
        finally:
            _preparing.reset(token)

    def serve(self) -> None:
        """Let calls through again."""
        self.failure = None
        self.metrics.serve(time.monotonic())
        self.loaded.set()

    def has_failed(self) -> bool:
        """Whether calls to it fail at once."""
        return self.failure is not None

    def fail(self, reason: str) -> None:
        """End the calls under way, and let none through any more.

        The first reason of an opening stays. If it fails once more while it is started again, the first failure is the
        one that counts for how long it lasts.
        """
        if self.failure is None:
            self.failure, self.failed_at = reason, time.time()
            self._failed_opening = self.openings
            self.metrics.fail(time.monotonic(), FailureKind.DIED, reason, self.under_way)
        elif self.openings != self._failed_opening:
            self._failed_opening = self.openings
            logger.warning("%s failed while it was started again: %s", self.name, reason)
            self.failure = reason
        if self._life is not None:
            self._life.abandon(Failure(FailureKind.DIED, reason))

    async def watch(self, options: HealthOptions) -> int:
        """Return once one of its processes has failed; the others are killed, so that calls to them end.

        Gives the number of the opening whose processes they were.
        """
        opening = self._num_opened
        processes = self._processes[self.name]
        failure = await watch(processes, options)
        self._fail(opening, failure.reason)
        await processes.kill()
        return opening

    def produce(self, number: int) -> None:
        """An answer brought so many tokens or episodes."""
        self.metrics.produce(time.monotonic(), number)

    def snapshot(self) -> ReplicaSnapshot:
        """What it did so far."""
        return self.metrics.snapshot(
            time.monotonic(),
            name=self.name,
            state=State.SERVING if self.failure is None else State.FAILED,
            pids=() if self._life is None else self._life.pids,
            under_way=self.under_way,
            load=self.load,
        )

    async def call(
        self, endpoint: str, *args: Any, timeout_seconds: float, load: float = 0.0
    ) -> list[Any]:
        """Call an endpoint on every actor; answers in rank order. `load` is what the call weighs meanwhile.

        Raises what the endpoint raised (once all ranks have answered: the error of the lowest rank that failed), or
        MeshCall if an actor is dead, does not answer in time, or met a dead process itself.
        """
        began = time.monotonic()
        self.under_way, self.load = self.under_way + 1, self.load + load
        try:
            answers = await self._call(endpoint, args, timeout_seconds)
        except asyncio.CancelledError:
            self.metrics.cancelled += 1
            raise
        except Exception:
            if not self.has_failed():  # else it counts as lost
                self.metrics.errors += 1
            raise
        else:
            self.metrics.answer(now := time.monotonic(), now - began)
            return answers
        finally:
            self.under_way, self.load = self.under_way - 1, self.load - load

    async def _call(
        self, endpoint: str, args: tuple[Any, ...], timeout_seconds: float
    ) -> list[Any]:
        from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError

        if self.failure is not None and self.name not in _preparing.get():
            raise MeshCall(f"mesh {self.name} has failed: {self.failure}")
        assert self._life is not None, f"mesh {self.name} was not opened"
        opening, life = self.openings, self._life
        send = functools.partial(getattr(life.actors, endpoint).call, *args)
        try:
            # Not `wait_for`, which on Python 3.11 can swallow a cancellation.
            async with asyncio.timeout(timeout_seconds) as limit:
                answers = await life.answered(endpoint, send)
        except TimeoutError:
            if not limit.expired():  # the endpoint's own
                raise
            reason = f"did not answer {endpoint} within {timeout_seconds:g} s"
            self._fail(opening, reason)
            raise MeshCall(f"mesh {self.name} {reason}") from None
        except ReplicaLost as lost:
            self._fail(opening, str(lost))
            raise MeshCall(f"mesh {self.name} failed during {endpoint}: {lost}") from lost
        except SupervisionError as error:
            # What it asked is dead, not this mesh.
            raise MeshCall(
                f"mesh {self.name} failed during {endpoint}: {_one_line(error)}"
            ) from error
        return list(answers.values())

    def _fail(self, opening: int, reason: str) -> None:
        """As `fail`, unless the processes that failed have been replaced since."""
        if opening == self.openings:
            self.fail(reason)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
