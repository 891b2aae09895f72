"""Traces and memory of the steps that the config's `profile.steps` names.

A trace is in Chrome's format, for ui.perfetto.dev or chrome://tracing; a memory snapshot tells, on a GPU, every
allocation (for pytorch.org/memory_viz), and elsewhere the process's memory and the bytes of its tensors by group.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from forge_core.config import ProfileConfig
from storage import layout
from storage.objects import ObjectStore

logger = logging.getLogger(__name__)

Sizes = Callable[[], Mapping[str, int]]
"""Bytes of a process's tensors by group."""


class Profiler:
    """Records one process; each of the steps once.

    Example:
        profiler = Profiler(config.profile, store, "trainer-0", sizes=lambda: {"parameters": 4096})
        with profiler.during(run_id, step=3):
            train()
    """

    def __init__(
        self, config: ProfileConfig, store: ObjectStore, process: str, *, sizes: Sizes
    ) -> None:
        self._config = config
        self._store = store
        self._process = process
        self._sizes = sizes
        self._recorded: set[int] = set()

    @contextmanager
    def during(self, run_id: str, step: int) -> Iterator[None]:
        """Record what runs inside, if the step is one of those, and store it."""
        bounds = self._config.steps
        if bounds is None or not bounds[0] <= step <= bounds[1] or step in self._recorded:
            yield
            return
        self._recorded.add(step)
        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        if on_gpu:
            torch.cuda.memory._record_memory_history()
        with profile(activities=activities, profile_memory=True) as recorded:
            yield
        try:
            self._write(run_id, step, recorded, on_gpu=on_gpu)
        except OSError as error:
            # The step is done, and to do it again for the sake of its trace would be worse than to have none.
            logger.warning("step %d left no whole trace of %s: %s", step, self._process, error)

    def _write(self, run_id: str, step: int, recorded: profile, *, on_gpu: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json.gz"
            recorded.export_chrome_trace(str(trace))
            self._keep(run_id, step, "trace.json.gz", trace.read_bytes())
            if on_gpu:
                snapshot = Path(folder) / "memory.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
                self._keep(run_id, step, "memory.pickle", snapshot.read_bytes())
            else:
                self._keep(
                    run_id, step, "memory.json", json.dumps(self._memory(), indent=2).encode()
                )

    def _memory(self) -> dict[str, object]:
        told: dict[str, object] = {"tensors_bytes": dict(self._sizes())}
        with contextlib.suppress(psutil.Error):
            process = psutil.Process().memory_info()
            told |= {"resident_bytes": process.rss, "virtual_bytes": process.vms}
        return told

    def _keep(self, run_id: str, step: int, kind: str, data: bytes) -> None:
        name = f"{self._process}-step-{step:06d}.{kind}"
        self._store.replace(f"{layout.profiles_folder(run_id)}{name}", data)
