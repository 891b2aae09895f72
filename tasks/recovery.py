"""What brings a mesh back that has failed, as the config's `faults` say.

    a process dies or hangs ──▶ its mesh FAILED ──┬─ fail_fast ────────────▶ FailedFast: the run ends, resumable
                                                  └─ restart, route_around ─▶ new processes ──▶ prepared ──▶ SERVING
                                                         ▲                          │
                                                         └──── back-off ◀── fails ──┘ too often in a row: CrashLoop

    unit          prepared by                                                  meanwhile
    generator     loading the model and the newest weights, passing the probe  its requests wait or go elsewhere
    trainer       the newest checkpoint, then the steps after it again         its stage is tried again
    reference     the model; its weights when it is asked                      its stage is tried again
    critic        the newest checkpoint, then the steps after it again         its stage is tried again
    verifier      naming what it scores with                                   its stage is tried again
    weight store  putting the trainer's weights                                its stage is tried again

A failure is a fact of the log once the mesh serves again, or at the end of the run, with what it cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from forge_core.config import RunConfig
from forge_core.mesh import Mesh, MeshCall
from forge_core.meshes import Meshes
from forge_core.services.health import HealthOptions
from forge_core.services.restarts import RestartOptions, Restarts
from storage import facts
from storage.log import Fenced
from tasks.together import first_of

logger = logging.getLogger(__name__)

_TRANSIENT = (MeshCall, OSError, TimeoutError)


# An import can hold Python's lock for seconds, on a busy machine for many; what never ends misses its deadline.
_PATIENT = HealthOptions(silence_seconds=60.0, asleep_seconds=120.0)


class FailedFast(RuntimeError):
    """A process failed, and the config says that the run ends with it."""


class CrashLoop(RuntimeError):
    """A mesh failed again and again, however often it was started."""


class Held(Protocol):
    """What has meshes that may fail: a run, or a set of scores that is being made of one."""

    run_id: str
    """The run."""
    config: RunConfig
    """What is done about a failure."""
    meshes: Meshes
    """Who is watched."""
    recovery: Recovery | None
    """What brings back those that fail."""

    @property
    def continued_by(self) -> str:
        """The command that goes on with it once it has ended, as part of a sentence."""

    async def prepare(self, mesh: Mesh) -> None:
        """Bring the new actors of a mesh to where the old ones stood. Raises MeshCall if they fail as well."""

    def settle(self) -> None:
        """Take in what was told although telling it failed."""

    def append(self, *new: facts.Fact) -> None:
        """Tell facts for good."""


class Recovery:
    """Watches the meshes of a run, and starts those again that fail.

    Example:
        async with guarded(run):  # run.recovery is set inside
            ...
            await run.recovery.revive(mesh)
    """

    def __init__(self, run: Held, group: asyncio.TaskGroup) -> None:
        self._run = run
        self._group = group
        self._locks: dict[str, asyncio.Lock] = {}
        faults = run.config.faults
        options = RestartOptions(
            most=faults.most_restarts,
            delay_seconds=faults.restart_delay_seconds,
            longest_delay_seconds=faults.longest_delay_seconds,
            sound_seconds=faults.sound_seconds,
        )
        self._restarts = {mesh.name: Restarts(options) for mesh in run.meshes.watched}
        self._served_at: dict[str, float] = {}
        self._num_failures: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_change: Callable[[], Awaitable[None]] | None = None
        """Awaited when a mesh has failed, and when it serves again."""

    def policy(self, mesh: Mesh) -> str:
        """What the config says is done about a failure of this mesh."""
        return str(getattr(self._run.config.faults, mesh.unit))

    def refuse(self, mesh: Mesh) -> None:
        """Raise FailedFast if the mesh has failed and the config handles that by ending the run."""
        if mesh.has_failed() and self.policy(mesh) == "fail_fast":
            raise FailedFast(
                f"{mesh.name} failed: {mesh.failure}; faults.{mesh.unit} is fail_fast, so this ends here and "
                f"{self._run.continued_by} goes on"
            )

    def refuse_any(self) -> None:
        """As `refuse`, for every mesh."""
        for mesh in self._run.meshes.watched:
            self.refuse(mesh)

    def begin(self, mesh: Mesh) -> None:
        """Have a mesh that has failed started again while the caller goes on. Raises FailedFast."""
        self.refuse(mesh)
        task = self._group.create_task(self.revive(mesh))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def watch(self) -> None:
        """Watch every mesh from now on."""
        for mesh in self._run.meshes.watched:
            self._tasks.add(self._group.create_task(self._keep(mesh)))

    def end(self) -> None:
        """Watch no longer, and give up what is being started again."""
        for task in tuple(self._tasks):
            task.cancel()

    async def revive(self, mesh: Mesh) -> None:
        """Return once a mesh that has failed serves again; at once if it does.

        Raises FailedFast, CrashLoop, and what its preparation raises for a reason that trying again would not mend.
        """
        async with self._locks.setdefault(mesh.name, asyncio.Lock()):
            if not mesh.has_failed():
                return
            self.refuse(mesh)
            cause, failed_at = str(mesh.failure), mesh.failed_at
            logger.warning("run %s: %s failed: %s", self._run.run_id, mesh.name, cause)
            await self._changed()
            await self._start_again(mesh, cause)
            mesh.serve()
            self._served_at[mesh.name] = time.monotonic()
            self._tell(mesh, cause, failed_at, started_at=mesh.started_at)
        await self._changed()

    def tell_lost(self) -> None:
        """Log the failures of meshes that are not back and will not come back any more."""
        for mesh in self._run.meshes.watched:
            if mesh.failure is not None:
                self._tell(mesh, mesh.failure, mesh.failed_at, started_at=None)

    def _tell(self, mesh: Mesh, cause: str, failed_at: float, *, started_at: float | None) -> None:
        self._num_failures[mesh.name] += 1
        self._run.append(
            facts.Failed(
                mesh=mesh.name,
                cause=cause,
                failures=self._num_failures[mesh.name],
                failed_at=failed_at,
                started_at=started_at,
                seconds=max(0.0, time.time() - failed_at),
            )
        )

    async def revive_all(self) -> None:
        """Bring back whatever has failed."""
        for mesh in self._run.meshes.watched:
            await self.revive(mesh)

    async def _start_again(self, mesh: Mesh, cause: str) -> None:
        while True:
            await self._back_off(mesh, cause)
            try:
                await mesh.reopen()
                with mesh.preparing():
                    await self._run.prepare(mesh)
                return
            except _TRANSIENT as error:
                cause = f"{type(error).__name__}: {error}"
                logger.warning("%s could not be started again: %s", mesh.name, cause)

    async def _back_off(self, mesh: Mesh, cause: str) -> None:
        """Wait before a restart, the longer the more there were in a row. Raises CrashLoop."""
        now = time.monotonic()
        delay = self._restarts[mesh.name].after(now - self._served_at.pop(mesh.name, now))
        if delay is None:
            most = self._run.config.faults.most_restarts
            raise CrashLoop(
                f"{mesh.name} failed again after {most} restarts in a row (faults.most_restarts {most}); the last "
                f"cause: {cause}"
            )
        await asyncio.sleep(delay)

    async def _keep(self, mesh: Mesh) -> None:
        while True:
            opening = await self._first_failure(mesh)
            self.begin(mesh)
            await mesh.until_opened(opening)

    async def _first_failure(self, mesh: Mesh) -> int:
        """Wait for the failure of a mesh's processes, with more patience until they have loaded what they need."""
        strict = HealthOptions(silence_seconds=self._run.config.faults.silence_seconds)
        loaded = asyncio.create_task(mesh.loaded.wait())
        watch = asyncio.create_task(mesh.watch(_PATIENT))
        try:
            await asyncio.wait({loaded, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                return watch.result()
        finally:
            loaded.cancel()
            watch.cancel()
        return await mesh.watch(strict)

    async def _changed(self) -> None:
        if self.on_change is not None:
            await self.on_change()


@asynccontextmanager
async def guarded(run: Held) -> AsyncIterator[None]:
    """Watch the meshes of a run inside, and start those again that fail.

    What nothing brings back ends what is inside, and is raised.
    """
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            run.recovery = recovery = Recovery(run, group)
            recovery.watch()
            try:
                yield
            finally:
                recovery.end()
                # What cannot be told any more must not hide why the run ends.
                with contextlib.suppress(OSError, Fenced):
                    recovery.tell_lost()
    except BaseExceptionGroup as failures:
        failure = first_of(failures)
    if failure is not None:
        raise failure
