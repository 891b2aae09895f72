"""The processes that a run's meshes live on: started where the plan says, watched, stopped within a grace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_core.placement.allocator import Grant, Slot
from forge_core.placement.plan import Plan
from forge_core.process_environment import MONARCH_ENVIRONMENT
from forge_core.services.fault_hook import handle_faults_of

logger = logging.getLogger(__name__)
told = logging.getLogger(f"{__name__}.told")
"""Logs what the processes of meshes have logged, from the level that their config says."""

Environment = Callable[[Slot], dict[str, str]]
"""Variables of a process of a mesh, by what it was granted."""

MESH_VARIABLE = "FORGEFLOW_MESH"
"""Environment variable by which a process can be told from others: the name of its mesh."""

HEARTBEAT_SECONDS = 600.0
"""Longest wait for a heartbeat. Long before, whoever watches has judged by what the process does meanwhile."""

_KILL_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMesh:
    """Processes that live and die together; `forge_core.services.health.watch` finds out when they fail."""

    name: str
    """Name in logs, and of the mesh in Monarch."""
    mesh: Any
    """Monarch process mesh, to spawn actors on."""
    pids: tuple[int | None, ...]
    """Process id by rank; None for one on another machine."""
    info: Any
    """Actor mesh that answers heartbeats."""
    heartbeats: tuple[Any, ...]
    """The same, rank by rank."""

    @staticmethod
    async def spawn(
        name: str,
        slots: Sequence[Slot],
        environment: Environment,
        *,
        startup_seconds: float,
        host: Any = None,
        log_level: str = "warning",
    ) -> ProcessMesh:
        """Spawn a process in each slot of a Monarch host mesh, this machine unless given, and wait until each has told
        who it is. Raises TimeoutError if that takes longer than `startup_seconds`; what was spawned is then stopped."""
        from monarch.actor import default_bootstrap_cmd, this_host

        from forge_core.actors.process import ProcessInfo
        from forge_core.actors.told_logs import LEVEL_VARIABLE
        from forge_core.services.evidence import this_machine

        told.setLevel(log_level.upper())
        # Whoever has the mesh watches it.
        handle_faults_of(name, f"{name}-process")
        command = default_bootstrap_cmd()
        # Those of this machine inherit it.
        inherited = {} if host is None else MONARCH_ENVIRONMENT

        def bootstrap(point: Any) -> Any:
            own = environment(slots[point["procs"]])
            named = {MESH_VARIABLE: name, LEVEL_VARIABLE: log_level}
            return command.with_env({**inherited, **own, **named})

        mesh = (this_host() if host is None else host).spawn_procs(
            per_host={"procs": len(slots)},
            name=name,
            bootstrap_command=bootstrap,
            proc_bind=_core_binding(slots),
        )
        try:
            info = mesh.spawn(f"{name}-process", ProcessInfo)
            async with asyncio.timeout(startup_seconds):
                answers = await info.identity.call()
        except BaseException:
            await _stop_mesh(mesh, "did not start")
            raise
        here = this_machine()
        identities = list(answers.values())
        return ProcessMesh(
            name=name,
            mesh=mesh,
            pids=tuple(who.pid if who.machine == here else None for who in identities),
            info=info,
            heartbeats=tuple(info.flatten("procs").slice(procs=i) for i in range(len(identities))),
        )

    async def beat(self, rank: int) -> None:
        """Return once the process has answered a heartbeat, and log what it has logged since the last one.

        Raises RuntimeError if it is known to be dead.
        """
        async with asyncio.timeout(HEARTBEAT_SECONDS):
            lines = await self.heartbeats[rank].beat.call_one()
        for line in lines:
            told.log(line.level, "%s rank %d: %s: %s", self.name, rank, line.logger, line.message)

    async def stop(self, grace_seconds: float) -> None:
        """Ask, wait out the grace, kill; then let Monarch note it. Whatever state the processes are in."""
        try:
            async with asyncio.timeout(max(grace_seconds, 0.01)):
                await self.mesh.stop("run ended")
            return
        except TimeoutError:
            logger.info("mesh %s takes longer than %g s to stop: killed", self.name, grace_seconds)
        except Exception as error:
            logger.warning("mesh %s did not stop in order, and is killed: %s", self.name, error)
        await self.kill()

    def kill_processes(self) -> None:
        """End those on this machine at once, also if they are stopped or hang; `kill` or `stop` is still to follow."""
        for pid in self.pids:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def kill(self) -> None:
        """End the processes, and let Monarch note it."""
        self.kill_processes()
        await _stop_mesh(self.mesh, "killed")


async def _stop_mesh(mesh: Any, reason: str) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_KILL_TIMEOUT_SECONDS):
            await mesh.stop(reason)


class Processes:
    """The process meshes of one run: started one by one where its plan says, stopped all at once."""

    def __init__(
        self,
        plan: Plan,
        grace_seconds: float,
        startup_seconds: float,
        hosts: Mapping[str, Any] | None = None,
        log_level: str = "warning",
    ) -> None:
        """`hosts` has the Monarch mesh of each host but this machine, by name."""
        self._plan = plan
        self._hosts = hosts or {}
        self._grace_seconds = grace_seconds
        self._startup_seconds = startup_seconds
        self._log_level = log_level
        self._meshes: dict[str, ProcessMesh] = {}

    def grant(self, name: str) -> Grant:
        """What a mesh holds, or will when it is started. Raises DoesNotFit."""
        return self._plan.take(name)

    async def start(self, name: str, environment: Environment) -> Any:
        """Spawn a mesh and wait until each of its processes has told its pid; its Monarch handle."""
        grant = self.grant(name)
        mesh = await ProcessMesh.spawn(
            name,
            grant.slots,
            environment,
            startup_seconds=self._startup_seconds,
            host=self._hosts.get(grant.host),
            log_level=self._log_level,
        )
        self._meshes[name] = mesh
        return mesh.mesh

    def __getitem__(self, name: str) -> ProcessMesh:
        """A mesh that was started."""
        return self._meshes[name]

    async def end(self, name: str) -> None:
        """Kill a mesh, so that another may take its name and what it held; harmless if there is none."""
        if (mesh := self._meshes.pop(name, None)) is not None:
            await mesh.kill()
        self._plan.give_back(name)

    async def stop(self) -> None:
        """Stop every mesh, whatever state it is in."""
        await asyncio.gather(*(mesh.stop(self._grace_seconds) for mesh in self._meshes.values()))
        for name in self._meshes:
            self._plan.give_back(name)


def _core_binding(slots: Sequence[Slot]) -> list[dict[str, str]] | None:
    """Monarch's form of the cores of each process; None where none is bound."""
    if not any(slot.cores for slot in slots):
        return None
    return [{"cpus": ",".join(map(str, slot.cores))} for slot in slots]
