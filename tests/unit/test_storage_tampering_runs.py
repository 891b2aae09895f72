"""Tampering with checkpoints, config, code, evaluations and results, and with runs that come of others, is found."""

import os
from pathlib import Path
from typing import Any

import made_episodes
import made_run
import pytest
from made_episodes import file_of, table
from made_run import MadeRun
from tampering import Plant, flip, is_found

from storage import layout
from storage.objects import LocalStore
from storage.parts import encode_part

GROUP = "run-00000002"
CHECKPOINT = layout.checkpoint_folder("run", 2)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


# Checkpoints, config, code, results


def checkpoint_file_altered(run: MadeRun) -> str:
    flip(run.store.local_path(f"{CHECKPOINT}model.safetensors"))
    return f"{CHECKPOINT}model.safetensors"


def checkpoint_file_removed(run: MadeRun) -> str:
    run.store.local_path(f"{CHECKPOINT}trainer/optimizer.safetensors").unlink()
    return f"{CHECKPOINT}trainer/optimizer.safetensors"


def checkpoint_weights_replaced(run: MadeRun) -> str:
    """Log and description give the replaced file its true size and SHA-256."""
    name, description = f"{CHECKPOINT}model.safetensors", f"{CHECKPOINT}checkpoint.json"
    run.store.replace(
        name, run.store.read(f"{layout.checkpoint_folder('run', 0)}model.safetensors")
    )
    file = file_of(name, run.store.read(name)).model_dump(mode="json")
    run.edit(description, lambda told: told["files"].__setitem__(0, file))
    files = [
        file,
        *(
            file_of(f"{CHECKPOINT}{each}", run.store.read(f"{CHECKPOINT}{each}")).model_dump(
                mode="json"
            )
            for each in ("config.json", "trainer/optimizer.safetensors", "checkpoint.json")
        ),
    ]
    run.edit_fact("checkpoint", 2, files=files)
    return f"the weights in checkpoint {CHECKPOINT} have digest {made_episodes.weights_digest(0)}"


def last_checkpoint_pruned(run: MadeRun) -> str:
    run.edit_fact("pruned", 0, steps=[1, 2])
    return "the checkpoint of step 2 was pruned, which is the last one"


def results_altered(run: MadeRun) -> str:
    run.edit(layout.run_json_key("run"), lambda content: content["eval"].update(initial=0.9))
    return "run.json says eval"


def results_unreadable(run: MadeRun) -> str:
    run.store.replace(layout.run_json_key("run"), b"{")
    return f"{layout.run_json_key('run')} is not JSON"


def results_of_another_kind(run: MadeRun) -> str:
    run.store.replace(layout.run_json_key("run"), b"[]")
    return f"{layout.run_json_key('run')} is no JSON object"


def times_that_cannot_be(run: MadeRun) -> str:
    key, _ = run.find("end")
    run.edit(key, lambda entry: entry.update(at=1e300))
    return f"the log adds up to nothing that {layout.run_json_key('run')} could say"


def config_altered(run: MadeRun) -> str:
    run.edit(layout.config_key("run"), lambda config: config.update(steps=5))
    return f"{layout.config_key('run')} is not the config that incarnation 0 started with"


def config_unreadable(run: MadeRun) -> str:
    run.store.local_path(layout.config_key("run")).write_bytes(b"{")
    return layout.config_key("run")


def config_removed(run: MadeRun) -> str:
    run.store.local_path(layout.config_key("run")).unlink()
    return f"{layout.config_key('run')} cannot be relied on"


def source_altered(run: MadeRun) -> str:
    (key,) = run.store.keys("runs/run/source/")
    run.store.local_path(key).write_bytes(b"def reward(): pwned")
    return key


def evaluation_altered(run: MadeRun) -> str:
    run.edit_fact("evaluated", 0, sampled=0.9)
    return "evaluation initial was logged as 0.9 sampled"


def evaluated_part_removed(run: MadeRun) -> str:
    (key,) = run.store.keys(layout.evaluation_prefix("run", "initial"))
    run.store.local_path(key).unlink()
    return f"evaluation initial cannot be relied on: store {run.store.uri} holds no object '{key}'"


def evaluation_of_more_prompts(run: MadeRun) -> str:
    run.edit_fact("evaluated", 0, num_prompts=3)
    return "evaluation initial has 2 sampled episodes for 3 prompts"


def evaluation_on_training_prompts(run: MadeRun) -> str:
    episodes = table([0, 1], [0], evaluation="initial", held_out=False)
    data = encode_part(episodes)
    (key,) = run.store.keys(layout.evaluation_prefix("run", "initial"))
    run.store.replace(key, data)
    part = {**file_of(key, data).model_dump(mode="json"), "rows": 4}
    run.edit_fact("evaluated", 0, parts=[part])
    return "prompt p0 of evaluation initial was drawn for training as well"


def intervals_overlapping(run: MadeRun) -> str:
    key, place = run.find("intervals", 0)

    def overlap(entry: dict[str, Any]) -> None:
        intervals = entry["facts"][place]["intervals"]
        intervals.append({**intervals[0], "kind": "train"})

    run.edit(key, overlap)
    return "intervals of mesh trainer overlap"


# Runs that were resumed, forked, or made of others


def provisional_steps_not_trained_again(run: MadeRun) -> str:
    run.rewrite_log(lambda entries: entries.pop(2))
    return "step 2 came after step 0"


def provisional_step_with_other_groups(run: MadeRun) -> str:
    run.edit_fact("step", 2, group_ids=["run-00000002", "run-00000003"])
    return "step 1 was trained again on other groups than before"


def provisional_step_forgotten(run: MadeRun) -> str:
    run.rewrite_log(lambda entries: entries.pop(3))
    return "group run-00000004 was admitted before steps 2 were trained again"


def other_weights_restored(run: MadeRun) -> str:
    run.edit_fact("restored", 0, weights_digest="other")
    return "the weights restored of step 0 are not those of its checkpoint"


def advantage_made_up(run: MadeRun) -> str:
    run.edit_fact("batched", 0, advantages={"run-00000005-000": 1.0})
    return "run-00000005 was dropped as no_signal, and its episodes have one"


def parent_of_the_fork_altered(run: MadeRun) -> str:
    run.edit_fact("forked", 0, parent_run_id="other")
    return "its config says step 2 of run run"


def fork_of_other_weights(run: MadeRun) -> str:
    run.edit_fact("forked", 0, weights_digest="other")
    return "run run has no such checkpoint of step 2"


def replayed_commit_altered(run: MadeRun) -> str:
    key = layout.commit_key("run", "round-000000")
    run.edit(key, lambda commit: commit.update(rows=3))
    return key


def replayed_commit_removed(run: MadeRun) -> str:
    key = layout.commit_key("run", "round-000000")
    run.store.local_path(key).unlink()
    return f"commit {key}, of which groups were replayed, cannot be relied on"


def replayed_group_used_too_often(run: MadeRun) -> str:
    run.edit_fact("step", 1, group_ids=["run-00000000", "run-00000000"])
    return "group run-00000000 is in the batch of step 2 2 times"


def replayed_group_of_a_commit_that_never_counted(run: MadeRun) -> str:
    other = MadeRun(run.store, "run")
    other.commit(7, table([7], [0, 0]))
    draw = made_episodes.draw_of("run", 7).model_dump(mode="json")
    run.edit_fact("replayed", 0, commit=other.commit_key(7), draws=[draw])
    return "group run-00000007 was replayed of run run, whose log never drew it so"


IN_A_FINISHED_RUN: list[Plant] = [
    checkpoint_file_altered, checkpoint_file_removed, checkpoint_weights_replaced,
    last_checkpoint_pruned, results_altered, results_unreadable, results_of_another_kind,
    times_that_cannot_be, config_altered, config_unreadable, config_removed, source_altered,
    evaluation_altered, evaluated_part_removed, evaluation_of_more_prompts,
    evaluation_on_training_prompts, intervals_overlapping,
]  # fmt: skip
IN_A_RESUMED_RUN: list[Plant] = [
    provisional_steps_not_trained_again, provisional_step_with_other_groups,
    provisional_step_forgotten, other_weights_restored, advantage_made_up,
]  # fmt: skip
IN_A_FORK: list[Plant] = [parent_of_the_fork_altered, fork_of_other_weights]
IN_A_REPLAY: list[Plant] = [
    replayed_commit_altered, replayed_commit_removed, replayed_group_used_too_often,
    replayed_group_of_a_commit_that_never_counted,
]  # fmt: skip


@pytest.mark.parametrize("plant", IN_A_FINISHED_RUN)
def test_what_is_planted_in_a_finished_run_is_found(store: LocalStore, plant: Plant) -> None:
    is_found(made_run.finished(store), plant)


@pytest.mark.parametrize("plant", IN_A_RESUMED_RUN)
def test_what_is_planted_in_a_resumed_run_is_found(store: LocalStore, plant: Plant) -> None:
    is_found(made_run.resumed(store), plant)


@pytest.mark.parametrize("plant", IN_A_FORK)
def test_what_is_planted_in_a_fork_is_found(store: LocalStore, plant: Plant) -> None:
    is_found(made_run.forked(store, made_run.finished(store)), plant)


@pytest.mark.parametrize("plant", IN_A_REPLAY)
def test_what_is_planted_in_a_replay_is_found(store: LocalStore, plant: Plant) -> None:
    is_found(made_run.replaying(store, made_run.finished(store)), plant)
