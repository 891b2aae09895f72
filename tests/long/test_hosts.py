"""A run whose generator and trainer lie on workers that run already: real ones, on loopback, a core each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import rewards
from harness import Finished, assert_verified
from sufferer import Sufferer

from forge_core.processes import MESH_VARIABLE

START_SECONDS = 120.0


@dataclass(frozen=True)
class Attached:
    """What was seen of the run."""

    finished: Finished
    meshes: list[set[str]]
    """By worker, the meshes that had processes on it."""
    left: list[str]
    """Meshes that still have processes on a worker after the run."""
    workers_live: bool
    folders: list[Path]
    """What is left of the run in the hosts' folder."""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def _worker(core: int) -> Iterator[tuple[str, psutil.Process]]:
    """A worker that answers, and its address."""
    port = _free_port()
    address = f"tcp://127.0.0.1:{port}"
    module = "forge_core.placement.worker"
    process = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, "-m", module, address],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield address, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def _on(worker: psutil.Process) -> dict[str, psutil.Process]:
    """By mesh, its process on a worker."""
    found = {}
    for child in worker.children():
        try:
            found[child.environ().get(MESH_VARIABLE, "")] = child
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    found.pop("", None)
    return found


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attached]:
    """Two steps; after the first the generator dies."""
    folder = tmp_path_factory.mktemp("hosts")
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        started = [stack.enter_context(_worker(cores[i % len(cores)])) for i in range(2)]
        addresses, workers = [list(each) for each in zip(*started, strict=True)]
        run = Sufferer(
            tmp_path_factory.mktemp("store"), "attached", "--set", "hosts.source=workers",
            "--set", f"hosts.workers={addresses}", "--set", f"hosts.folder={folder}",
            "--set", "steps=2", "--set", "generators.threads=1", "--set", "trainer.ranks=1",
            "--set", "groups_per_step=16", "--set", "warm_start.steps=5",
            "--set", "evaluation.num_prompts=20",
            "--set", f"reward={rewards.__file__}:by_hash",
        )  # fmt: skip
        try:
            run.until("step", 1)
            on = [_on(worker) for worker in workers]
            [generator] = [each["generator-0"] for each in on if "generator-0" in each]
            generator.kill()
            finished = run.finish()
        finally:
            run.end()
        yield Attached(
            finished=finished,
            meshes=[set(each) for each in on],
            left=[mesh for worker in workers for mesh in _on(worker)],
            workers_live=all(worker.is_running() for worker in workers),
            folders=list(folder.iterdir()),
        )


def test_the_run_is_like_any_other(attached: Attached) -> None:
    assert attached.finished.code == 0, attached.finished.errors
    assert_verified("attached", attached.finished.store)
    assert attached.finished.summary["steps"] == 2


def test_what_computes_lies_on_the_workers(attached: Attached) -> None:
    assert sorted(map(sorted, attached.meshes)) == [["generator-0"], ["trainer"]]


def test_whoever_dies_there_starts_again_there(attached: Attached) -> None:
    assert [failed["mesh"] for failed in attached.finished.facts("failed")] == ["generator-0"]


def test_workers_go_on_and_nothing_is_left_on_them(attached: Attached) -> None:
    assert attached.workers_live
    assert attached.left == [] and attached.folders == []
