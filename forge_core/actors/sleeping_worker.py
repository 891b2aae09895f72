"""vLLM's sleep on CPU, where its own worker has none.

As at level 2 on a GPU, weights and key-value cache are given up: whoever wakes the engine loads a version next.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from forge_core.actors.held_memory import give_back
from forge_core.actors.offload import bytes_of, storages_of

_LEVEL = 2


class SleepingCPUWorker(CPUWorker):
    """A CPU worker that returns its memory while it sleeps."""

    def sleep(self, level: int = _LEVEL) -> None:
        """Give up weights and key-value cache. Raises ValueError for a level that would keep the weights."""
        if level != _LEVEL:
            raise ValueError(f"sleep level {level} keeps the weights where they are, in memory")
        model: Any = self.model_runner.model
        for module in model.modules():
            # Packed copies of its weights, which loading makes anew.
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = None
        storages = storages_of([*model.parameters(), *self.model_runner.kv_caches])
        self._emptied = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        give_back(torch.device("cpu"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take as much memory again, zeroed; there are no weights in it."""
        assert tags is None, "it sleeps and wakes as a whole"
        for storage, size in self._emptied:
            storage.resize_(size)
            bytes_of(storage).zero_()
        self._emptied = []
