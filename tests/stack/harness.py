"""What the tests of the real stack share besides fixtures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def assert_verified(run_id: str, store: Path | str) -> None:
    """`forgeflow verify` finds nothing wrong with the run."""
    result = subprocess.run(
        command("verify", run_id, "--store", str(store)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout


Start = Callable[..., "Callable[[], Finished]"]
"""`start_run`: takes a run id and the options of `forgeflow run`; what it returns waits for the end."""

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


def told_of_flow_run(api: str, name: str) -> str:
    """All that a server tells of a flow run: its parameters, task runs, logs and artifacts."""
    (flow,) = _post(f"{api}/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
    of_run = {"flow_run_id": {"any_": [flow["id"]]}}
    parts = {
        kind: _post(f"{api}/{kind}/filter", {kind: of_run})
        for kind in ("task_runs", "logs", "artifacts")
    }
    assert parts["task_runs"] and parts["artifacts"]
    return json.dumps([flow, parts])


def artifacts(api: str, flow_run_name: str) -> dict[str, str]:
    """The newest content of each artifact of a flow run, as text, by its key."""
    (flow,) = _post(f"{api}/flow_runs/filter", {"flow_runs": {"name": {"any_": [flow_run_name]}}})
    query = {"artifacts": {"flow_run_id": {"any_": [flow["id"]]}}, "sort": "CREATED_DESC"}
    found = _post(f"{api}/artifacts/filter", query)
    return {each["key"]: str(each["data"]) for each in reversed(found)}


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
