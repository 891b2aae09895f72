"""The real stack, shared as far as tests allow: one Prefect server, and one whole run of the tiny preset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.stack)


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    code: int
    summary: dict[str, Any]
    errors: str
    store: Path
    run_id: str

    @property
    def folder(self) -> Path:
        return self.store / "runs" / self.run_id

    def facts(self, kind: str) -> list[dict[str, Any]]:
        """All facts of a kind, read as plain JSON."""
        entries = [
            json.loads(path.read_bytes()) for path in sorted((self.folder / "log").iterdir())
        ]
        return [fact for entry in entries for fact in entry["facts"] if fact["kind"] == kind]


def command(*arguments: str) -> list[str]:
    """The console script, from this interpreter's environment."""
    return [str(Path(sys.executable).parent / "forgeflow"), *arguments]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a real server that `forgeflow server` started."""
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    }
    process = subprocess.Popen(
        command("server", "--json"), stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    document = ""
    while not document.endswith("}\n"):
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        document += line
    try:
        yield json.loads(document)["api_url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


QUIET_ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
"""For a plain vLLM beside the run's own."""

_PAGE = 200
_EVENTS_SECONDS = 30


def _post(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return list(json.load(response))


def task_runs(api: str, flow_run_name: str, *, at_least: int) -> list[dict[str, Any]]:
    """A flow run's task runs, once the server has digested the events of `at_least` of them, or after a while."""
    flows = _post(f"{api}/flow_runs/filter", {"flow_runs": {"name": {"any_": [flow_run_name]}}})
    assert len(flows) == 1
    deadline = time.monotonic() + _EVENTS_SECONDS
    while True:
        found: list[dict[str, Any]] = []
        while len(found) % _PAGE == 0:
            query = {"task_runs": {"flow_run_id": {"any_": [flows[0]["id"]]}}}
            page = _post(f"{api}/task_runs/filter", {**query, "offset": len(found), "limit": _PAGE})
            found += page
            if len(page) < _PAGE:
                break
        if len(found) >= at_least or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


Start = Callable[..., "Callable[[], Finished]"]


@pytest.fixture(scope="session")
def start_run(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start `forgeflow run` in the background; the result waits for its end."""

    def start(
        run_id: str, *arguments: str, program: list[str] | None = None, timeout: float = 280
    ) -> Callable[[], Finished]:
        store = tmp_path_factory.mktemp(run_id)
        options = ["run", "--store", str(store), "--run-id", run_id, "--json", *arguments]
        process = subprocess.Popen(
            [*program, *options] if program else command(*options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PREFECT_API_URL": prefect_server},
        )

        def finish() -> Finished:
            out, errors = process.communicate(timeout=timeout)
            summary = json.loads(out) if out else {}
            log = store / "runs" / run_id / "output.log"
            if process.returncode and log.exists():
                errors += "\n" + log.read_text(errors="replace")[-4000:]
            return Finished(process.returncode, summary, errors, store, run_id)

        return finish

    return start


@pytest.fixture(scope="session")
def tiny_run(start_run: Start) -> Finished:
    """The whole tiny preset, seed 0."""
    run = start_run("tiny", "--preset", "tiny")()
    assert run.code == 0, run.errors
    return run
