"""Reward, loss, episodes and loop of the user's, on the real stack: the examples as the README shows them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import rewards
from harness import assert_verified, command

from storage.objects import open_store
from storage.resume import read_ledger

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = [
    "steps=2", "warm_start.steps=3", "evaluation.num_prompts=20", "groups_per_step=16",
    "trainer.ranks=1",
]  # fmt: skip
FRAGILE_LOSS = """
from pathlib import Path
from zlib import crc32

CALLS = Path(__file__).with_name("calls")

def of_half(prompts, completions, **columns):
    # Half of the prompts have no signal.
    is_flat = [sum(prompt.encode()) % 2 for prompt in prompts]
    return [
        0.5 if flat else crc32(completion.encode()) % 7 / 7
        for flat, completion in zip(is_flat, completions)
    ]

def fragile(logprobs, sampled_logprobs, advantages, mask):
    with CALLS.open("a") as file:
        file.write(".")
    is_second = len(CALLS.read_text()) == 2
    return -advantages[:, None] * logprobs * (float("nan") if is_second else 1.0)
"""
TWO_TURNS = """
from forge_core.rollout import Transcript

async def asks_twice(policy, prompt_text, *, seed):
    transcript = Transcript(policy, prompt_text, seed=seed)
    await transcript.policy_writes()
    transcript.tell("teacher", " Sure? ")
    await transcript.policy_writes()
    return transcript.episode()
"""
REFUSED_REWARD = """
def grades(prompts, completions, **columns):
    return ["good"] * len(completions)
"""


@dataclass
class Ended:
    code: int
    out: str
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "forge-store"

    def run(self) -> Path:
        (folder,) = (self.store / "runs").iterdir()
        return folder

    def facts(self, kind: str) -> list[dict[str, Any]]:
        entries = [json.loads(path.read_bytes()) for path in sorted((self.run() / "log").iterdir())]
        return [fact for entry in entries for fact in entry["facts"] if fact["kind"] == kind]

    def episodes(self, *columns: str) -> list[dict[str, Any]]:
        parts = [fact["commit"] for fact in self.facts("committed")]
        keys = [json.loads((self.store / commit).read_bytes())["part"]["key"] for commit in parts]
        return [
            row
            for key in keys
            for row in pq.read_table(self.store / key, columns=[*columns]).to_pylist()
        ]


Finish = Callable[[str], Ended]


@pytest.fixture(scope="session")
def finished(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finish]:
    """All of them at the same time; asked for one, waits for its end."""
    names = ("loop", "parts", "refused", "fragile", "fragile-async")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    (folders["parts"] / "turns.py").write_text(TWO_TURNS)
    (folders["refused"] / "mine.py").write_text(REFUSED_REWARD)
    for name in ("fragile", "fragile-async"):
        (folders[name] / "mine.py").write_text(FRAGILE_LOSS)
    python = sys.executable
    quick = [option for key in SHORT for option in ("--set", key)]
    commands = {
        "loop": [
            python, str(EXAMPLES / "own_loop.py"), *SHORT,
            f"reward={rewards.__file__}:by_hash",
        ],
        "parts": [
            python, str(EXAMPLES / "own_reward_and_loss.py"), *SHORT,
            "generate_episode=turns.py:asks_twice", "sampling.max_tokens=8",
        ],
        **{
            name: command(
                "run", "--preset", "tiny", *quick, "--set", "loss=mine.py:fragile",
                "--set", "reward=mine.py:of_half",
                "--set", "algorithm.dynamic_sampling_attempts=20", *more,
            )
            for name, more in (("fragile", ()), ("fragile-async", ("--regime", "async")))
        },
        "refused": command("run", "--preset", "tiny", *quick, "--set", "reward=mine.py:grades"),
    }  # fmt: skip
    processes = {
        name: subprocess.Popen(
            arguments,
            cwd=folders[name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PREFECT_API_URL": prefect_server},
        )
        for name, arguments in commands.items()
    }
    ended: dict[str, Ended] = {}

    def finish(name: str) -> Ended:
        if name not in ended:
            out, _ = processes[name].communicate(timeout=240)
            ended[name] = Ended(processes[name].returncode, out, folders[name])
        return ended[name]

    yield finish
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)


def test_a_loop_of_ones_own_runs_the_stages(finished: Finish) -> None:
    run = finished("loop")
    assert run.code == 0, run.out
    assert "score 0." in run.out
    (started,) = run.facts("started")
    assert [source["field"] for source in started["sources"]] == ["reward", "loss", "loop"]
    batched = run.facts("batched")
    assert [fact["step"] for fact in batched] == [1, 2] == [f["step"] for f in run.facts("step")]
    rewards = {e["episode_id"]: e["reward"] for e in run.episodes("episode_id", "reward")}
    for fact in batched:
        assert len(fact["advantages"]) > 1
        assert all(rewards[episode] == 1.0 for episode in fact["advantages"])
        assert {episode[:-4] for episode in fact["advantages"]} == set(fact["group_ids"])


def test_what_a_loop_learned_from_is_replayed_with_its_advantages_and_loss(
    finished: Finish, prefect_server: str, tmp_path: Path
) -> None:
    run = finished("loop")
    assert run.code == 0, run.out
    store = shutil.copytree(run.store, tmp_path / "store")
    done = subprocess.run(
        command("replay", run.run().name, "--run-id", "again", "--store", str(store)),
        cwd=run.folder,
        env={**os.environ, "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    opened = open_store(str(store))
    past, again = (read_ledger(opened, run_id) for run_id in (run.run().name, "again"))
    assert again.advantages == past.advantages
    assert again.weights == past.weights
    assert_verified("again", store)


def test_a_reward_scores_a_loss_trains_and_episodes_take_turns(finished: Finish) -> None:
    run = finished("parts")
    assert run.code == 0, run.out
    (started,) = run.facts("started")
    by_field = {source["field"]: source["file"] for source in started["sources"]}
    assert by_field.keys() == {"reward", "loss", "generate_episode"}
    for field, original in (
        ("reward", EXAMPLES / "own_reward_and_loss.py"),
        ("generate_episode", run.folder / "turns.py"),
    ):
        kept = (run.store / by_field[field]["key"]).read_bytes()
        assert kept == original.read_bytes()
        assert hashlib.sha256(kept).hexdigest() == by_field[field]["sha256"]
    episodes = run.episodes("turns", "mask", "logprobs", "scores", "response_token_ids")
    assert episodes
    for episode in episodes:
        assert [turn["role"] for turn in episode["turns"]] == ["policy", "teacher", "policy"]
        told = episode["turns"][1]
        assert episode["mask"] == [
            not told["start"] <= i < told["end"] for i in range(len(episode["mask"]))
        ]
        assert [score["name"] for score in episode["scores"]] == ["digits_in_place"]
    assert any(fact["optimizer_updates"] for fact in run.facts("step"))


@pytest.mark.parametrize("name", ["fragile", "fragile-async"])
def test_a_loss_that_is_not_finite_once_costs_a_batch_and_no_version(
    finished: Finish, name: str
) -> None:
    """It is at the second of four minibatches, after an update that has to be undone."""
    run = finished(name)
    assert run.code == 0, run.out
    dropped = [fact for fact in run.facts("dropped") if fact["reason"] == "nonfinite"]
    (given_up,) = dropped
    assert given_up["step"] == 1
    assert "the loss of 'mine.py:fragile' is nan" in given_up["cause"]
    assert "at update 2 of 4" in given_up["cause"]
    assert (run.store / given_up["batch"]).is_file()
    steps = run.facts("step")
    assert [fact["step"] for fact in steps] == [1, 2]
    assert all(fact["optimizer_updates"] == 4 for fact in steps)
    for fact in steps:
        # Those without a signal gave way to others.
        assert len(fact["group_ids"]) == 16
        assert set(fact["group_ids"]).isdisjoint(given_up["group_ids"])
    versions = [fact["policy_version"] for fact in run.facts("published")]
    assert versions == [0, 1, 2]
    flat = [g for f in run.facts("dropped") if f["reason"] == "no_signal" for g in f["group_ids"]]
    assert len(flat) >= 8


@pytest.mark.parametrize("name", ["loop", "parts", "fragile", "fragile-async"])
def test_verify_finds_it_in_order(finished: Finish, name: str) -> None:
    run = finished(name)
    assert_verified(run.run().name, run.store)


def test_a_reward_that_gives_no_number_is_one_sentence_and_no_reward(finished: Finish) -> None:
    run = finished("refused")
    assert run.code == 1
    (line,) = [line for line in run.out.splitlines() if "failed:" in line]
    assert "reward 'mine.py:grades' returned 'good', which is no finite number" in line
    assert "on the prompt '" in line
    assert not run.facts("evaluated") and not run.facts("retry")
