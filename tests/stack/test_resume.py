"""Runs whose process is killed go on from their store: nothing is lost, counted twice or generated again.

`make prove BAR=3.1` kills at thirty points; here it is one or two in each regime.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from audits import audit_store
from harness import assert_verified, command, told_of_flow_run
from s3_blocks import environment_with, save_writer
from s3_server import WRITER, S3Server

from benchmarks.kill_matrix import SMALL, Point, Survivor, survive, weights_bytes
from storage import layout
from storage.log import read_entries
from storage.objects import open_store
from storage.resume import read_ledger

RUN_SECONDS = 280
"""Longest wait for one run with all of its deaths; machines differ."""

pytestmark = pytest.mark.timeout(600)

IN_THE_WARM_START = Point(kind="started", nth=1, delay_seconds=0.3)
BETWEEN_STEP_AND_CHECKPOINT = Point(kind="batched", nth=5, delay_seconds=0.05)
WHILE_GENERATING = Point(kind="admitted", nth=3, delay_seconds=0.02)
AFTER_A_COMMIT = Point(kind="committed", nth=3, delay_seconds=0.0)


@dataclass(frozen=True)
class Case:
    """A run to be killed."""

    regime: str
    points: tuple[Point, ...]
    on_s3: bool = False


CASES = {
    "undisturbed": Case("sync", ()),
    "sync": Case("sync", (IN_THE_WARM_START, BETWEEN_STEP_AND_CHECKPOINT)),
    "async": Case("async", (AFTER_A_COMMIT,), on_s3=True),
    "hybrid": Case("hybrid", (WHILE_GENERATING,)),
}


@pytest.fixture(scope="module")
def surroundings(prefect_server: str, s3_server: S3Server) -> Iterator[None]:
    """One Prefect server for all, and AWS's variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def local_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed")


@pytest.fixture(scope="module")
def surviving(
    surroundings: None, local_store: Path, s3_server: S3Server
) -> Iterator[dict[str, tuple[str, Future[Survivor]]]]:
    """All of them under way, two at a time; the URI of each one's store with it."""
    remote = s3_server.new_uri()
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: (
                uri := remote if case.on_s3 else str(local_store),
                pool.submit(survive, uri, name, case.regime, [*case.points], audit_store),
            )
            for name, case in CASES.items()
        }


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_to_its_end(
    name: str, surviving: dict[str, tuple[str, Future[Survivor]]]
) -> None:
    survivor = surviving[name][1].result(RUN_SECONDS)
    assert survivor.problems == []
    assert len(survivor.deaths) == len(CASES[name].points), "each was killed in mid-run"
    assert all(death.last_step < 6 for death in survivor.deaths)


def test_steps_that_no_checkpoint_had_are_trained_again(
    surviving: dict[str, tuple[str, Future[Survivor]]],
) -> None:
    uri, survivor = surviving["sync"]
    assert [death.is_provisional for death in survivor.result(RUN_SECONDS).deaths] == [False, True]
    ledger = read_ledger(open_store(uri), "sync")
    assert len(ledger.trained) > len(ledger.steps) == 6
    assert ledger.forked_steps == set()


def test_in_sync_the_weights_are_those_of_the_undisturbed_run(
    surviving: dict[str, tuple[str, Future[Survivor]]],
) -> None:
    (uri, undisturbed), (_, killed) = surviving["undisturbed"], surviving["sync"]
    store = open_store(uri)
    assert killed.result().weights_digest == undisturbed.result().weights_digest != ""
    assert weights_bytes(store, "sync") == weights_bytes(store, "undisturbed")
    # Warm start, batches and rewards are the same, too, and so the run is told to be bitwise.
    whole, again = (read_ledger(store, run_id) for run_id in ("undisturbed", "sync"))
    assert again.weights == whole.weights
    summary = json.loads((Path(uri) / "runs/sync/run.json").read_bytes())
    assert (summary["bitwise"], summary["incarnations"]) == (True, 3)
    assert summary["retrained_steps"] > 0


def test_an_async_runs_episodes_are_replayed_from_s3_with_a_blocks_credentials(
    surviving: dict[str, tuple[str, Future[Survivor]]],
    prefect_server: str,
    s3_server: S3Server,
    tmp_path: Path,
) -> None:
    """To the run's own weights; and the secret is in nothing that the replay leaves or tells."""
    uri, survivor = surviving["async"]
    survivor.result(RUN_SECONDS)
    block = save_writer(prefect_server, s3_server, tmp_path)
    done = subprocess.run(
        command("replay", "async", "--run-id", "replayed", "--store", uri, "--verbose"),
        env=environment_with(block, prefect_server),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    store = open_store(uri)
    run, again = (read_ledger(store, run_id) for run_id in ("async", "replayed"))
    assert [again.steps[n].group_ids for n in again.steps] == [
        run.steps[n].group_ids for n in run.steps
    ]
    assert again.weights == run.weights
    assert_verified("replayed", uri)
    audit_store(uri, "replayed")
    told = told_of_flow_run(prefect_server, "replayed")
    assert uri in told
    left = b"".join(store.read_many(store.keys("")))
    assert WRITER[1] not in told + done.stdout + done.stderr
    assert WRITER[1].encode() not in left


def test_a_finished_run_says_so_and_is_left_alone(
    surviving: dict[str, tuple[str, Future[Survivor]]],
) -> None:
    uri, survivor = surviving["undisturbed"]
    survivor.result(RUN_SECONDS)
    before = len(read_entries(open_store(uri), "undisturbed"))
    done = _run(command("resume", "undisturbed", "--store", uri))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Run undisturbed is finished: 6 of 6 steps are trained." in done.stdout
    assert len(read_entries(open_store(uri), "undisturbed")) == before


def test_a_fork_trains_on_from_a_finished_run(
    surviving: dict[str, tuple[str, Future[Survivor]]],
) -> None:
    uri, survivor = surviving["undisturbed"]
    survivor.result(RUN_SECONDS)
    refused = _run(command("run", "--from", "undisturbed@6", "--store", uri))
    assert refused.returncode == 2
    assert "nothing to train after step 6" in refused.stderr
    done = _run(
        command(
            "run", "--from", "undisturbed@6", "--store", uri, "--run-id", "fork", "--json",
            "--set", "steps=8", "--set", "optimizer.learning_rate=1e-4",
        )
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["parent_run_id"], summary["steps"], summary["optimizer_updates"]) == (
        "undisturbed", 8, 8,
    )  # fmt: skip
    store = open_store(uri)
    fork, parent = read_ledger(store, "fork"), read_ledger(store, "undisturbed")
    assert (min(fork.steps), fork.weights[6]) == (7, parent.weights[6])
    drawn = {group.draw.draw for group in fork.groups.values() if group.draw}
    assert drawn == set(range(6 * 16, 8 * 16)), "prompts go on where the parent's ended"
    assert_verified("fork", Path(uri))
    audit_store(uri, "fork")


def test_of_two_controllers_of_one_run_exactly_one_goes_on(
    surroundings: None, local_store: Path
) -> None:
    """A resume beside a living run is refused, and takes it over if told to; then the living one ends."""
    options = ["--preset", "tiny", "--run-id", "taken", "--store", str(local_store), *SMALL]
    first = subprocess.Popen(
        command("run", *options, "--set", "steps=30"), stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_for(local_store, "taken", "warm_started")
        refused = _run(command("resume", "taken", "--store", str(local_store)))
        assert refused.returncode == 1
        assert f"held by process {first.pid} " in refused.stderr
        second = _run(command("resume", "taken", "--take-over", "--store", str(local_store)))
        code = first.wait(30)
    finally:
        first.kill()
        first.communicate()
    output = (local_store / "runs/taken/output.log").read_text(errors="replace")
    assert code == 1
    assert "Fenced" in output and "took the run over" in output
    assert second.returncode == 0, second.stderr
    ledger = read_ledger(open_store(str(local_store)), "taken")
    assert (ledger.status, ledger.current_step, len(ledger.incarnations)) == ("finished", 30, 2)
    assert_verified("taken", local_store)
    audit_store(str(local_store), "taken")


def test_prefects_retry_of_the_flow_run_goes_on_with_the_run(
    surroundings: None, prefect_server: str, tmp_path: Path
) -> None:
    """Its process is killed, Prefect notes it, and what a click on Retry does continues the run of the same id."""
    store = tmp_path / "store"
    config = _config(store)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "serve.py")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deployment = _until(lambda: _deployment(prefect_server))
        made = _post(
            f"{prefect_server}/deployments/{deployment}/create_flow_run",
            {"parameters": {"config": config, "store": str(store)}},
        )
        run_id = made["id"]
        _wait_for(store, run_id, "step")
        (claim,) = read_ledger(open_store(str(store)), run_id).incarnations
        subprocess.run(["kill", "-KILL", str(claim.controller.pid)], check=True, timeout=10)
        _until(lambda: _state(prefect_server, run_id) == "CRASHED")
        _post(
            f"{prefect_server}/flow_runs/{run_id}/set_state",
            {"state": {"type": "SCHEDULED"}, "force": True},
        )
        _until(lambda: _state(prefect_server, run_id) == "COMPLETED")
    finally:
        server.terminate()
        server.wait(20)
    ledger = read_ledger(open_store(str(store)), run_id)
    assert (ledger.status, ledger.current_step, len(ledger.incarnations)) == ("finished", 6, 2)
    assert_verified(run_id, store)


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=RUN_SECONDS)


def _wait_for(store: Path, run_id: str, kind: str) -> None:
    """Return once the run's log has a fact of this kind."""

    def is_there() -> bool:
        opened = open_store(str(store))
        if not opened.exists(layout.config_key(run_id)):
            return False
        return any(
            fact.kind == kind for entry in read_entries(opened, run_id) for fact in entry.facts
        )

    _until(is_there)


def _until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + RUN_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def _config(store: Path) -> dict[str, Any]:
    planned = _run(
        command("run", "--preset", "tiny", "--store", str(store), *SMALL, "--dry-run", "--json")
    )
    return dict(json.loads(planned.stdout)["config"])


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _deployment(api: str) -> str | None:
    found = _post(f"{api}/deployments/filter", {"deployments": {"name": {"any_": ["retried"]}}})
    return found[0]["id"] if found else None


def _state(api: str, run_id: str) -> str:
    with urllib.request.urlopen(f"{api}/flow_runs/{run_id}", timeout=30) as response:
        return str(json.load(response)["state_type"])
