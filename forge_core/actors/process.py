"""What every process of a mesh can tell about itself."""

from __future__ import annotations

import os

from monarch.actor import Actor, endpoint


class ProcessInfo(Actor):
    """A second actor of the process: it answers while the first one works."""

    @endpoint
    async def pid(self) -> int:
        """Process id on its host."""
        return os.getpid()
