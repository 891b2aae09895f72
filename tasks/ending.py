"""How a run ends that SIGTERM asks to: the step under way is let end, then its state is kept, both within the grace.

    SIGTERM ──▶ the trainer's step ends, none begins ──▶ the flow is cancelled ──▶ checkpoint ──▶ meshes are stopped
            └───────────────────────── shutdown.grace_seconds ───────────────────────────┘

Clouds take machines back by it, and so does a cancellation from Prefect's pages. A step that does not end in time is
given up with the run, and nothing is kept: the run then goes on from the checkpoint before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Ending:
    """What a signal that ends the run has to wait for."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._asked_at: float | None = None
        self._between_steps = asyncio.Event()
        self._between_steps.set()

    @property
    def seconds_left(self) -> float:
        """Of the grace; all of it before the signal."""
        since = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        return max(0.0, self._grace_seconds - since)

    @property
    def may_keep_state(self) -> bool:
        """Whether the signal came, and the trainer is in no step."""
        return self._asked_at is not None and self._between_steps.is_set()

    async def let_step_end(self) -> None:
        """Begin to end: wait for the step under way, no longer than the grace; none begins after it."""
        self._asked_at = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_seconds):
                await self._between_steps.wait()

    @asynccontextmanager
    async def during_a_step(self) -> AsyncIterator[None]:
        """The trainer works on a step inside. Once the run ends this is not entered: the cancellation comes instead."""
        if self._asked_at is not None:
            await asyncio.Event().wait()
        self._between_steps.clear()
        try:
            yield
        except asyncio.CancelledError:
            # The trainer may be in the midst of it, and stands nowhere that could be kept.
            raise
        except BaseException:
            self._between_steps.set()
            raise
        self._between_steps.set()
