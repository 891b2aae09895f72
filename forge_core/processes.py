"""The processes that a run's meshes live on: started one by one, stopped all at once, within a grace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_KILL_TIMEOUT_SECONDS = 2.0


class Processes:
    """The process meshes of one run: started one by one, stopped all at once."""

    def __init__(self, grace_seconds: float, startup_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._startup_seconds = startup_seconds
        self._meshes: dict[str, Any] = {}
        self._pids: dict[str, list[int]] = {}

    async def start(
        self, name: str, procs: int, environment: dict[str, str] | Callable[[int], dict[str, str]]
    ) -> Any:
        """Spawn a mesh and wait until each of its processes has told its pid."""
        from monarch.actor import default_bootstrap_cmd, this_host

        from forge_core.actors.process import ProcessInfo

        command = default_bootstrap_cmd()

        def bootstrap(point: Any) -> Any:
            own = environment(point["procs"]) if callable(environment) else environment
            return command.with_env(own)

        mesh = this_host().spawn_procs(
            per_host={"procs": procs}, name=name, bootstrap_command=bootstrap
        )
        self._meshes[name] = mesh
        info = mesh.spawn(f"{name}-process", ProcessInfo)
        async with asyncio.timeout(self._startup_seconds):
            answers = await info.pid.call()
        self._pids[name] = list(answers.values())
        return mesh

    async def stop(self) -> None:
        """Stop every mesh, whatever state it is in."""
        await asyncio.gather(*(self._stop(name) for name in self._meshes))

    async def _stop(self, name: str) -> None:
        """Ask, wait out the grace, kill; then let Monarch note it."""
        mesh = self._meshes[name]
        try:
            async with asyncio.timeout(max(self._grace_seconds, 0.01)):
                await mesh.stop("run ended")
            return
        except TimeoutError:
            logger.info("mesh %s takes longer than %g s to stop: killed", name, self._grace_seconds)
        except Exception as error:
            logger.warning("mesh %s did not stop in order, and is killed: %s", name, error)
        for pid in self._pids.get(name, ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_KILL_TIMEOUT_SECONDS):
                await mesh.stop("killed")
