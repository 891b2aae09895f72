"""Processes of a run that are killed or frozen in mid-step: it goes on, or ends at once where its config says so."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from audit import audit
from harness import Finished, assert_verified, command
from sufferer import Sufferer

REWARD = f"reward={Path(__file__).with_name('rewards.py')}:by_hash"
SMALL = (
    "--set", "warm_start.steps=5", "--set", "evaluation.num_prompts=20",
    "--set", "groups_per_step=16", "--set", "generators.threads=1", "--set", REWARD,
)  # fmt: skip
SECONDS = 240

# In this order, each once the run has come so many steps further: of a mesh's processes, one only.
FAILURES = {
    "generator-1": signal.SIGKILL,
    "trainer": signal.SIGKILL,
    "verifier": signal.SIGSTOP,
    "weights": signal.SIGKILL,
}


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """An async run with two replicas, in which one process after the other fails."""
    run = Sufferer(
        tmp_path_factory.mktemp("store"), "r", *SMALL, "--regime", "async", "--set", "steps=40",
        "--set", "generators.replicas=2", "--set", "trainer.ranks=2", "--set", "checkpoint.every=4",
    )  # fmt: skip
    try:
        for number, (mesh, what) in enumerate(FAILURES.items()):
            run.until("step", 2 + run.count("step"))
            run.processes(mesh)[0].send_signal(what)
            run.until("failed", number + 1)
        yield run.finish()
    finally:
        run.end()


def test_the_run_goes_on(survivor: Finished) -> None:
    assert survivor.code == 0, survivor.errors
    assert survivor.summary["status"] == "finished"
    assert survivor.summary["groups"]["pending"] == 0
    assert survivor.summary["steps"] == 40
    assert_verified("r", survivor.store)
    audit(str(survivor.store), "r")


def test_each_failure_is_told_with_what_it_cost(survivor: Finished) -> None:
    failures = survivor.facts("failed")
    assert [failure["mesh"] for failure in failures] == [*FAILURES]
    assert all(failure["seconds"] > 0 and failure["started_at"] for failure in failures)
    assert "is stopped" in failures[2]["cause"]
    assert survivor.summary["failures"] == len(FAILURES)
    report = (survivor.folder / "report.html").read_text()
    assert all(f"<td>{mesh}</td>" in report for mesh in FAILURES)


def test_the_others_go_on_while_a_replica_is_started_again(survivor: Finished) -> None:
    [lost] = [each for each in survivor.facts("failed") if each["mesh"] == "generator-1"]
    meanwhile = [
        entry
        for path in (survivor.folder / "log").iterdir()
        if lost["failed_at"] + 1
        < (entry := _entry(path))["at"]
        < lost["failed_at"] + lost["seconds"]
    ]
    generated = [f for e in meanwhile for f in e["facts"] if f["kind"] == "generated"]
    assert generated and {fact["replica"] for fact in generated} == {0}


def test_where_time_went_is_known_of_every_mesh(survivor: Finished) -> None:
    seconds = survivor.summary["seconds"]
    for mesh, spent in seconds["meshes"].items():
        assert spent["unaccounted"] <= 0.02 * seconds["total"], (mesh, spent)


def test_fail_fast_ends_the_run_at_once_and_resume_goes_on(tmp_path: Path) -> None:
    run = Sufferer(
        tmp_path, "r", *SMALL, "--set", "steps=4", "--set", "trainer.ranks=1", "--set", "faults.generators=fail_fast",
        "--set", "checkpoint.every=2",
    )  # fmt: skip
    try:
        run.until("step", 1)
        run.processes("generator-0")[0].kill()
        killed_at = time.monotonic()
        finished = run.finish()
        # The grace, and the leaving of the flow that follows it.
        assert (
            time.monotonic() - killed_at
            < finished.summary["config"]["shutdown"]["grace_seconds"] + 5
        )
        assert finished.code == 1
        assert "generator-0 failed: " in finished.errors
        assert "faults.generators is fail_fast" in finished.errors
        assert "Traceback" not in finished.errors
        assert not run.processes()
    finally:
        run.end()
    resumed = subprocess.run(
        command("resume", "r", "--store", str(tmp_path)), capture_output=True, timeout=SECONDS
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_verified("r", tmp_path)


def _entry(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))
