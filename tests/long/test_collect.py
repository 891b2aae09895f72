"""Collect and train apart on S3: three rounds of two steps; a collecting run and the training one are killed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from audits import audit_store
from harness import assert_verified, command
from s3_server import S3Server

from benchmarks.kill_matrix import SMALL, generated_again
from storage import layout
from storage.ledger import Ledger
from storage.objects import ObjectStore, open_store
from storage.resume import read_ledger

CONFIG = ("--preset", "tiny", *SMALL, "--set", "steps=5", "--set", "steps_per_round=2",
          "--set", "evaluation.num_prompts=4")  # fmt: skip
SECONDS = 150
COLLECTING = ["cut", "other", "T-round-000003"]

Said = dict[str, subprocess.CompletedProcess[str]]


class Commands:
    """Commands on one store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.at_death: Ledger | None = None
        """The training run's log when it was killed."""

    @property
    def store(self) -> ObjectStore:
        return open_store(self.uri)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*arguments, "--store", self.uri),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _end(self.start(*arguments))

    def kill_once(self, run_id: str, holds: Callable[[Ledger], bool],
                  process: subprocess.Popen[str]) -> Ledger:  # fmt: skip
        """Kill a run's process when its log has come so far; the log as it then is."""
        _until(lambda: holds(read_ledger(self.store, run_id)), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        return read_ledger(self.store, run_id)


def _end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.fixture(scope="module")
def told(prefect_server: str, s3_server: S3Server) -> Iterator[tuple[Commands, Said]]:
    """All commands in their order, and what each of them said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        commands = Commands(s3_server.new_uri())
        yield commands, _tell(commands)


def _tell(commands: Commands) -> Said:
    said = {"begun": commands.run("train-rounds", "T", *CONFIG)}
    cut = commands.start("collect", "T", "--run-id", "cut")
    _until(lambda: commands.store.exists(layout.config_key("cut")), cut)
    # While the first is collected.
    other = commands.start("collect", "T", "--run-id", "other")
    commands.kill_once("cut", lambda ledger: bool(ledger.generated), cut)
    said["second"] = _end(other)
    said["waiting"] = commands.run("train-rounds", "T")
    said["resumed"] = commands.run("resume", "cut")
    said["early"] = commands.run("collect", "T")
    training = commands.start("train-rounds", "T")
    # In mid-round: the batches of the second are chosen, and not all of its steps are trained.
    commands.at_death = commands.kill_once("T", lambda ledger: 4 in ledger.batches, training)
    said["trained"] = commands.run("resume", "T")
    said["third"] = commands.run("collect", "T")
    said["last"] = commands.run("train-rounds", "T")
    said["all"] = commands.run("collect", "T")
    return said


def _until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return once it holds; fail if the process ends before."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_each_command_does_what_it_says_or_says_why_not(
    told: tuple[Commands, Said],
) -> None:
    _, said = told
    codes = {name: each.returncode for name, each in said.items()}
    # A round that comes too early is not collected; a run that waits has done what there was to do.
    assert codes == {**dict.fromkeys(said, 0), "early": 1}, {k: v.stderr for k, v in said.items()}
    assert "paused:      round 1 is not collected: forgeflow collect T" in said["begun"].stdout
    assert "round 3 of run T would be trained on at age 4" in said["early"].stderr
    assert "All rounds of run T are collected" in said["all"].stdout


def test_every_round_is_trained_on_once_and_within_the_age_bound(
    told: tuple[Commands, Said],
) -> None:
    commands, _ = told
    trainer = read_ledger(commands.store, "T")
    assert (trainer.status, trainer.current_step, trainer.pending) == ("finished", 5, [])
    # Rounds 1 and 2 are of version 0, the last, of one step, is of version 4.
    assert [trainer.steps[step].age_max for step in range(1, 6)] == [0, 1, 2, 3, 0]
    assert [fact.run_id for fact in trainer.replayed] == COLLECTING
    for run_id in COLLECTING:
        ledger = read_ledger(commands.store, run_id)
        assert (ledger.status, ledger.pending, ledger.steps) == ("finished", [], {})
        assert {group.to_run for group in ledger.groups.values()} == {"T"}
    for run_id in ("T", *COLLECTING):
        assert_verified(run_id, commands.uri)
        audit_store(commands.uri, run_id)


def test_a_killed_training_run_trains_each_step_of_its_rounds_again_to_the_same_weights(
    told: tuple[Commands, Said],
) -> None:
    commands, _ = told
    before, after = commands.at_death, read_ledger(commands.store, "T")
    assert before is not None
    assert before.last_step in (2, 3)
    assert sorted(before.batches) == [1, 2, 3, 4]
    # What it let in and chose stands; no step of the log was lost or came out otherwise.
    assert before.replayed == after.replayed[:2]
    assert {step: after.batches[step] for step in before.batches} == before.batches
    assert before.weights.items() <= after.weights.items()
    assert after.forked_steps == set()


def test_a_killed_collection_is_resumed_without_generating_again(
    told: tuple[Commands, Said],
) -> None:
    commands, _ = told
    cut = read_ledger(commands.store, "cut")
    assert (len(cut.incarnations), len(cut.generated)) == (2, 1)
    assert generated_again(commands.store, "cut") == []
