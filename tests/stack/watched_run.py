"""A run whose processes are watched from outside: what they hold of the memory, and on which cores they may run."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from harness import Finished, command

from forge_core.processes import MESH_VARIABLE

_SAMPLE_SECONDS = 0.02


@dataclass
class Watched:
    """What was seen of a run's generators and trainer."""

    finished: Finished
    samples: list[dict[str, int]] = field(default_factory=list)
    """Resident bytes by mesh, all its processes together, at moments when both were there."""
    cores: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    """By mesh, the cores that its processes may run on."""

    @property
    def largest_bytes(self) -> int:
        """Most that both held together."""
        return max(sum(sample.values()) for sample in self.samples)

    def largest_alone(self, mesh: str) -> int:
        """Most that a mesh held."""
        return max(sample[mesh] for sample in self.samples)


def watch_run(
    store: Path,
    run_id: str,
    *options: str,
    environment: dict[str, str],
    prefix: Sequence[str] = (),
    seconds: float = 280,
) -> Watched:
    """Run the tiny preset to its end and watch it; `prefix` is what the command is run by."""
    arguments = ["run", "--preset", "tiny", "--store", str(store), "--run-id", run_id, "--json"]
    process = subprocess.Popen(
        [*prefix, *command(*arguments, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    watched = Watched(Finished(0, {}, "", store, run_id))
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, watched, ended))
    watcher.start()
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        ended.set()
        watcher.join()
        if process.poll() is None:
            process.kill()
    summary: dict[str, Any] = json.loads(out) if out else {}
    watched.finished = Finished(process.returncode, summary, errors, store, run_id)
    return watched


def _watch(pid: int, watched: Watched, ended: threading.Event) -> None:
    meshes: dict[int, tuple[str, psutil.Process]] = {}
    while not ended.is_set():
        for child in _children(pid):
            if child.pid not in meshes and (mesh := _mesh(child)) is not None:
                meshes[child.pid] = (mesh, child)
        held: dict[str, int] = {}
        for mesh, process in meshes.values():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                held[mesh] = held.get(mesh, 0) + process.memory_info().rss
                cores = watched.cores.setdefault(mesh, set())
                cores.add(tuple(process.cpu_affinity() or ()))
            except psutil.NoSuchProcess:
                continue
        if len(held) == 2:
            watched.samples.append(held)
        time.sleep(_SAMPLE_SECONDS)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _mesh(process: psutil.Process) -> str | None:
    """Generator or trainer, if it is one."""
    try:
        name = process.environ().get(MESH_VARIABLE, "")
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    return name if name.startswith(("generator-", "trainer")) else None
