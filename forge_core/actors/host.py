"""What a host tells of itself, on a process of its own there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from monarch.actor import Actor, current_rank, endpoint

from forge_core.placement.hosts import Host, this_machine


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """A host, as it sees itself."""

    host: Host
    """Its devices, less what is hidden from its worker."""
    missing: tuple[str, ...]
    """Paths that are not there."""


class HostAgent(Actor):
    """Looks at its host, and keeps a folder there."""

    def __init__(self, names: tuple[str, ...], folder: str) -> None:
        """`names` by rank; `folder` is one that nobody else uses."""
        self._name = names[current_rank().rank]
        self._folder = Path(folder)

    @endpoint
    def look(self, paths: tuple[str, ...]) -> HostReport:
        """Make the folder, and tell what is here, and which of some paths are not. Raises OSError."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        here = this_machine()
        host = Host(
            name=self._name, cores=here.cores, gpus=here.gpus, memory_bytes=here.memory_bytes
        )
        return HostReport(host=host, missing=tuple(p for p in paths if not Path(p).exists()))

    @endpoint
    def leave(self) -> None:
        """Remove the folder with what is left in it."""
        shutil.rmtree(self._folder, ignore_errors=True)
