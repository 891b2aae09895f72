"""Collect and train apart on the real stack: four rounds in five runs, one of which is killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from audits import audit_store
from harness import assert_verified, command

from benchmarks.kill_matrix import SMALL, generated_again
from storage import layout
from storage.objects import open_store
from storage.resume import read_ledger

CONFIG = ("--preset", "tiny", *SMALL, "--set", "steps=4", "--set", "steps_per_round=1",
          "--set", "evaluation.num_prompts=4")  # fmt: skip
SECONDS = 150


class Commands:
    """Commands on one store."""

    def __init__(self, store: Path, prefect_server: str) -> None:
        self.store = store
        self._environment = {**os.environ, "PREFECT_API_URL": prefect_server}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*arguments, "--store", str(self.store)),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _end(self.start(*arguments))


def _end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.fixture(scope="module")
def told(
    prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Commands, dict[str, subprocess.CompletedProcess[str]]]:
    """All commands in their order, and what each of them said."""
    commands = Commands(tmp_path_factory.mktemp("apart"), prefect_server)
    said = {"begun": commands.run("train-rounds", "T", *CONFIG)}
    cut = commands.start("collect", "T", "--run-id", "cut")
    _until(lambda: (commands.store / layout.config_key("cut")).exists(), cut)
    # While the first is collected.
    other = commands.start("collect", "T", "--run-id", "other")
    _kill_once_generated(commands, cut)
    said["second"] = _end(other)
    said["waiting"] = commands.run("train-rounds", "T")
    said["resumed"] = commands.run("resume", "cut")
    said["early"] = commands.run("collect", "T")
    said["trained"] = commands.run("train-rounds", "T")
    said["third"] = commands.run("collect", "T")
    said["fourth"] = commands.run("collect", "T")
    said["last"] = commands.run("resume", "T")
    said["all"] = commands.run("collect", "T")
    return commands, said


def _kill_once_generated(commands: Commands, process: subprocess.Popen[str]) -> None:
    store = open_store(str(commands.store))
    _until(lambda: bool(read_ledger(store, "cut").generated), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return once it holds; fail if the process ends before."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_each_command_does_what_it_says_or_says_why_not(
    told: tuple[Commands, dict[str, subprocess.CompletedProcess[str]]],
) -> None:
    _, said = told
    codes = {name: each.returncode for name, each in said.items()}
    # A round that comes too early is not collected; a run that waits has done what there was to do.
    assert codes == {**dict.fromkeys(said, 0), "early": 1}, {k: v.stderr for k, v in said.items()}
    assert "paused:      round 1 is not collected: forgeflow collect T" in said["begun"].stdout
    assert "round 3 of run T would be trained on at age 2" in said["early"].stderr
    assert "All rounds of run T are collected" in said["all"].stdout


def test_every_round_is_trained_on_once_and_within_the_age_bound(
    told: tuple[Commands, dict[str, subprocess.CompletedProcess[str]]],
) -> None:
    commands, _ = told
    store = open_store(str(commands.store))
    trainer = read_ledger(store, "T")
    assert (trainer.status, trainer.current_step, trainer.pending) == ("finished", 4, [])
    # Rounds 1 and 2 are of version 0, rounds 3 and 4 of version 2.
    assert [trainer.steps[step].age_max for step in range(1, 5)] == [0, 1, 0, 1]
    collecting = ["cut", "other", "T-round-000003", "T-round-000004"]
    assert [fact.run_id for fact in trainer.replayed] == collecting
    for run_id in collecting:
        ledger = read_ledger(store, run_id)
        assert (ledger.status, ledger.pending, ledger.steps) == ("finished", [], {})
        assert {group.to_run for group in ledger.groups.values()} == {"T"}
    for run_id in ("T", *collecting):
        assert_verified(run_id, commands.store)
        audit_store(str(commands.store), run_id)


def test_a_killed_collection_is_resumed_without_generating_again(
    told: tuple[Commands, dict[str, subprocess.CompletedProcess[str]]],
) -> None:
    commands, _ = told
    store = open_store(str(commands.store))
    cut = read_ledger(store, "cut")
    assert (len(cut.incarnations), len(cut.generated)) == (2, 1)
    assert generated_again(store, "cut") == []
