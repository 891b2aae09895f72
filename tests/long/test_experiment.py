"""An experiment from a warm start, cut down at its end and begun again: one promotion; then a second one declines."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import assert_verified, command

from benchmarks.kill_matrix import SMALL
from storage.objects import LocalStore
from storage.promotions import read_decisions
from storage.resume import read_ledger

pytestmark = pytest.mark.timeout(900)
CHOSEN = ("--set", "steps=2", "--set", "evaluation.num_prompts=8")
SECONDS = 200


class Commands:
    """Commands on one store, with one Prefect server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = LocalStore(root)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*arguments, "--store", str(self.root)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        try:
            out, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        return out


@pytest.fixture(scope="module")
def commands(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        made = Commands(tmp_path_factory.mktemp("experiments"))
        made.run("warm-start", "--preset", "tiny", *SMALL, "--run-id", "begun")
        yield made


def test_an_experiment_promotes_once_and_the_next_declines(commands: Commands) -> None:
    warm = read_ledger(commands.store, "begun")
    assert warm.status == "finished" and list(warm.checkpoints) == [0] and not warm.steps
    first = commands.start(
        "experiment", "--from", "begun@0", *CHOSEN, "--experiment-id", "first", "--json"
    )
    _kill_when_trained(commands, first)
    assert read_decisions(commands.store, "default") == []
    decision = json.loads(commands.run("experiment", "--experiment-id", "first", "--json"))
    assert decision["promoted"] is True
    assert decision["checkpoint"]["run_id"] == "first-candidate"
    again = json.loads(commands.run("experiment", "--experiment-id", "first", "--json"))
    assert again == decision

    second = json.loads(
        commands.run(
            *("experiment", "--from", "begun@0", *CHOSEN, "--experiment-id", "second", "--json")
        )
    )
    assert second["promoted"] is False and "does not lie above 0" in second["reason"]
    assert second["comparison"]["num_prompts"] == 8
    # Of one config and, in sync, of one run to the bit: the two have the same weights and the same scores.
    assert second["checkpoint"]["weights_digest"] == decision["checkpoint"]["weights_digest"]
    assert second["comparison"]["gain"] == second["comparison"]["high"] == 0.0
    for run_id in ("begun", "first-candidate", "second-candidate", "second-against-000001"):
        assert_verified(run_id, commands.root)
    told = json.loads(commands.run("promoted", "--json"))
    assert told["promoted"] == "first-candidate@2" and len(told["decisions"]) == 2


def _kill_when_trained(commands: Commands, process: subprocess.Popen[str]) -> None:
    """Kill an experiment between its last step and its decision."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        try:
            if read_ledger(commands.store, "first-candidate").last_step == 2:
                break
        except ValueError:
            pass  # It has not begun yet.
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
