"""The real stack, shared as far as tests allow: one Prefect server, and one whole run of the tiny preset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Finished, Start, command

STACK = Path(__file__).parent / "stack"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests come first, while the whole run is under way; then what waits for it; then what wants quiet."""
    for item in items:
        if STACK in item.path.parents:
            item.add_marker(pytest.mark.stack)
    items.sort(key=lambda item: (STACK in item.path.parents, not _waits_for_tiny_run(item)))


def _waits_for_tiny_run(item: pytest.Item) -> bool:
    return "tiny_run" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _early_start(request: pytest.FixtureRequest) -> None:
    if any(_waits_for_tiny_run(item) for item in request.session.items):
        request.getfixturevalue("tiny_started")


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


@pytest.fixture(scope="session")
def start_run(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start `forgeflow run` in the background; the result waits for its end."""
    started: list[subprocess.Popen[str]] = []

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
        started.append(process)

        def finish() -> Finished:
            out, errors = process.communicate(timeout=timeout)
            summary = json.loads(out) if out else {}
            log = store / "runs" / run_id / "output.log"
            if process.returncode and log.exists():
                errors += "\n" + log.read_text(errors="replace")[-4000:]
            return Finished(process.returncode, summary, errors, store, run_id)

        return finish

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)


@pytest.fixture(scope="session")
def tiny_started(start_run: Start) -> Callable[[], Finished]:
    """The whole tiny preset, seed 0, under way."""
    return start_run("tiny", "--preset", "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_started: Callable[[], Finished]) -> Finished:
    """The whole tiny preset, seed 0."""
    run = tiny_started()
    assert run.code == 0, run.errors
    return run
