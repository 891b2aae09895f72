"""A run whose processes can be found by the mesh they belong to, so that they can be made to fail."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from pathlib import Path

import psutil
from harness import Finished, command

from forge_core.processes import MESH_VARIABLE

MARK = "FORGEFLOW_TEST_MARK"


class Sufferer:
    """A run under way."""

    def __init__(self, store: Path, run_id: str, *options: str, seconds: float = 240.0) -> None:
        """Start a run of the tiny preset, each step of which is waited for so long at most."""
        self.store, self.run_id, self.mark = store, run_id, uuid.uuid4().hex
        self._seconds = seconds
        self.process = subprocess.Popen(
            command(
                "run", "--preset", "tiny", "--store", str(store), "--run-id", run_id, *options
            ),
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def count(self, kind: str) -> int:
        """Facts of a kind in the log so far."""
        log = self.store / "runs" / self.run_id / "log"
        paths = [path for path in log.iterdir() if path.name[0] != "."] if log.exists() else []
        return sum(
            fact["kind"] == kind
            for path in paths
            for fact in json.loads(path.read_bytes())["facts"]
        )

    def until(self, kind: str, number: int) -> None:
        """Wait for so many facts of a kind."""
        deadline = time.monotonic() + self._seconds
        while self.count(kind) < number:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"no {kind} {number} in {self._seconds:g} s"
            time.sleep(0.05)

    def processes(self, mesh: str | None = None) -> list[psutil.Process]:
        """Every process of the run, or of a mesh of it: the oldest first."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
            if variables.get(MARK) == self.mark and mesh in (None, variables.get(MESH_VARIABLE)):
                found.append(process)
        # By age, for numbers start over: what a process of a mesh has started is no rank of it.
        return sorted(found, key=psutil.Process.create_time)

    def finish(self) -> Finished:
        """Wait for its end."""
        told = self.process.communicate(timeout=self._seconds)[0]
        summary = json.loads((self.store / "runs" / self.run_id / "run.json").read_bytes())
        return Finished(self.process.returncode, summary, told, self.store, self.run_id)

    def end(self) -> None:
        """Leave nothing of it."""
        for process in self.processes():
            process.kill()
        self.process.communicate()
