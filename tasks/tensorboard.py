"""TensorBoard's event files as a sink."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes metrics to event files in a folder, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As `Sink.write`."""
        if self._writer is None:
            # Deferred: it imports torch, which flows and tasks must not do when they are imported.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        """As `Sink.close`."""
        if self._writer is not None:
            self._writer.close()
