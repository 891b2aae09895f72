"""What every process of a mesh can tell about itself."""

from __future__ import annotations

import os
from dataclasses import dataclass

from monarch.actor import Actor, endpoint

from forge_core.actors.told_logs import LogLine, ToldLogs
from forge_core.services.evidence import this_machine


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, and the machine on which its id means something."""

    pid: int
    """Process id."""
    machine: str
    """Equal for processes that can see each other's ids."""


class ProcessInfo(Actor):
    """A second actor of the process, with a thread of its own: it answers while the first one works."""

    def __init__(self) -> None:
        self._logs = ToldLogs.install()

    @endpoint
    async def pid(self) -> int:
        """Process id on its host."""
        return os.getpid()

    @endpoint
    async def identity(self) -> ProcessIdentity:
        """Process id and host."""
        return ProcessIdentity(os.getpid(), this_machine())

    @endpoint
    async def beat(self) -> tuple[LogLine, ...]:
        """A heartbeat: that it is answered says that the process lives.

        It brings what was logged since the one before.
        """
        return self._logs.drain()
