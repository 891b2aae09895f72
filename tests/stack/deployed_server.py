"""A real `forgeflow server` for tests, and what they ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import command

GRACE_SECONDS = 20
TINY = {
    "preset": "tiny",
    "steps": 3,
    "groups_per_step": 8,
    "overrides": [
        "warm_start.steps=2",
        "evaluation.num_prompts=8",
        "checkpoint.every=1",
        f"shutdown.grace_seconds={GRACE_SECONDS}",
    ],
}
"""A form of a run that takes a few seconds of computing."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Server:
    """A running `forgeflow server`."""

    process: subprocess.Popen[str]
    api: str
    store: Path
    state: Path

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request to the API."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.api + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def start(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Start a deployment as the pages do; the flow run's id."""
        found = self.call("GET", f"/deployments/name/{deployment}")
        body = {"parameters": {"store": str(self.store), **parameters}}
        run = self.call("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return str(run["id"])

    def state_of(self, flow_run: str) -> str:
        """Type of a flow run's state."""
        return str(self.call("GET", f"/flow_runs/{flow_run}")["state"]["type"])

    def wait(self, flow_run: str, *states: str, seconds: float = 240) -> None:
        """Until a flow run is in one of some states."""
        deadline = time.monotonic() + seconds
        while (now := self.state_of(flow_run)) not in states:
            told = (self.state / "worker.log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline and now not in ENDED, f"{now}\n{told}"
            time.sleep(0.5)

    def wait_again(self, flow_run: str, state: str, seconds: float) -> None:
        """As `wait`, through deaths of the server and ends that are not the last."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if self.state_of(flow_run) == state:
                    return
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def wait_for_step(self, run_id: str, seconds: float = 240) -> None:
        """Until a run has made a step."""
        log, deadline = self.store / "runs" / run_id / "log", time.monotonic() + seconds
        while not any('"kind":"step"' in entry.read_text() for entry in log.glob("*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def child(self, word: str) -> psutil.Process:
        """The process of the worker, or of the server (`uvicorn`)."""
        (found,) = [
            each for each in psutil.Process(self.process.pid).children() if word in each.cmdline()
        ]
        return found

    def set_state(self, flow_run: str, state: str, name: str) -> None:
        """As the buttons of the pages do."""
        body = {"state": {"type": state, "name": name}, "force": False}
        self.call("POST", f"/flow_runs/{flow_run}/set_state", body)


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    """A server with worker and deployments; when it is stopped nothing of it is left."""
    store, state = folder / "store", folder / "state"
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    arguments = ["--json", "--store", str(store), "--state", str(state), *options]
    process = subprocess.Popen(
        command("server", *arguments), stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    document = ""
    while not document.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        document += line
    below = psutil.Process(process.pid).children(recursive=True)
    try:
        yield Server(process, json.loads(document)["api_url"], store, state)
    finally:
        below += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
        _, alive = psutil.wait_procs(below, timeout=5)
        assert not alive
