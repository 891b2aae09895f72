"""However a run ends, five seconds later nothing of it is left: no process, listener, shared memory or temp folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from harness import command

LEFT_SECONDS = 5.0
MARK = "FORGEFLOW_TEST_MARK"


@dataclass
class Victim:
    """A run under way, and how to recognise what belongs to it."""

    process: subprocess.Popen[str]
    mark: str
    store: Path
    temp: Path

    def kinds(self) -> set[str]:
        """Kinds of facts in the log so far."""
        log = self.store / "runs" / "victim" / "log"
        paths = [] if not log.exists() else [p for p in log.iterdir() if p.name[0] != "."]
        return {fact["kind"] for path in paths for fact in json.loads(path.read_bytes())["facts"]}

    def processes(self) -> list[psutil.Process]:
        """Every process that inherited the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        return found


# When each signal comes: while models load, in the first evaluation, and between two steps.
MOMENTS = {signal.SIGINT: "started", signal.SIGTERM: "warm_started", signal.SIGKILL: "step"}


@pytest.fixture(scope="module")
def shared_memory() -> set[str]:
    """What lay in shared memory before."""
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module")
def victims(
    tmp_path_factory: pytest.TempPathFactory, shared_memory: set[str]
) -> Iterator[dict[signal.Signals, Victim]]:
    """One run per signal, all started at once, each with a Prefect server of its own."""
    started = {}
    for number in MOMENTS:
        store, temp = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("temp")
        mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: mark, "TMPDIR": str(temp)}
        environment.pop("PREFECT_API_URL", None)
        process = subprocess.Popen(
            command(
                "run", "--preset", "tiny", "--store", str(store), "--run-id", "victim",
                "--set", "warm_start.steps=5", "--set", "evaluation.num_prompts=20",
                "--set", "trainer.ranks=1",
            ),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        started[number] = Victim(process, mark, store, temp)
    yield started
    for victim in started.values():
        for process in victim.processes():
            process.kill()
        victim.process.communicate()


@pytest.mark.parametrize("number", MOMENTS, ids=lambda number: number.name)
def test_nothing_is_left(number: signal.Signals, victims: dict[signal.Signals, Victim]) -> None:
    victim = victims[number]
    deadline = time.monotonic() + 200
    while MOMENTS[number] not in victim.kinds():
        assert victim.process.poll() is None, victim.process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = victim.processes()
    # The controller, its keeper, the Prefect server, and the processes of four meshes.
    assert len(before) >= 7
    assert any("uvicorn" in " ".join(process.cmdline()) for process in before)
    assert list(victim.temp.iterdir())
    listening = {
        connection.laddr.ip
        for process in before
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}

    victim.process.send_signal(number)
    deadline = time.monotonic() + LEFT_SECONDS
    while (left := victim.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [" ".join(process.cmdline())[:200] for process in left] == []
    victim.process.communicate(timeout=5)
    assert [path.name for path in victim.temp.iterdir()] == []
    if number == signal.SIGKILL:
        assert victim.process.returncode == -signal.SIGKILL
    else:
        assert victim.process.returncode == 1
        assert (
            json.loads((victim.store / "runs/victim/run.json").read_bytes())["status"]
            == "cancelled"
        )


def test_no_shared_memory_is_left(
    victims: dict[signal.Signals, Victim], shared_memory: set[str]
) -> None:
    assert all(not victim.processes() for victim in victims.values())
    assert set(os.listdir("/dev/shm")) <= shared_memory
