"""Writing a checkpoint in the background, while training goes on.

    begin ──▶ WRITING ──▶ told by `finished`, once
                 └─ failed: `finished` raises; `again` writes what was taken once more

One is written at a time. What is written was copied from training before `begin`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from storage.records import FileRef

Write = Callable[[], tuple[str, tuple[FileRef, ...]]]
"""Writes one checkpoint; its folder and its files."""


class CheckpointWriter:
    """One thread that writes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._step: int | None = None
        self._write: Write | None = None
        self._future: Future[tuple[str, tuple[FileRef, ...]]] | None = None

    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step is the one that was begun last; its state need not be taken again."""
        return self._step == step

    def begin(self, step: int, write: Write) -> None:
        """Write the checkpoint of a step; whatever was begun before is waited for by the thread."""
        self._step, self._write = step, write
        self._future = self._pool.submit(write)

    def again(self) -> None:
        """Write what was begun last once more, if it failed."""
        if self._future is None and self._write is not None:
            self._future = self._pool.submit(self._write)

    async def finished(self, *, wait: bool) -> tuple[str, tuple[FileRef, ...]] | None:
        """Folder and files of what was begun last, or None while it is being written.

        Raises what the writing raised, once; `again` then writes anew.
        """
        future = self._future
        if future is None:
            raise RuntimeError("no checkpoint is being written")
        if not wait and not future.done():
            return None
        try:
            written = await asyncio.wrap_future(future)
        except Exception:
            self._future = None
            raise
        # What was taken is as large as model and optimizer: it is let go.
        self._write = None
        return written
