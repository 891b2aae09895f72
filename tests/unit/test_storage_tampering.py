"""Whoever tampers with a finished run is found by `forgeflow verify`: it names what is wrong and exits 1."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_run
import pyarrow as pa
import pytest
from made_run import MadeRun, file_of, table
from typer.testing import CliRunner

from flows.cli import app
from storage import facts, layout
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import describe_commit, encode_part, read_part
from storage.records import Commit, PartRef, read_record

GROUP = "run-00000002"
CHECKPOINT = layout.checkpoint_folder("run", 2)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


def _verify(store: LocalStore, run_id: str) -> tuple[int, list[str]]:
    """Exit code of `forgeflow verify`, and the problems that it tells."""
    arguments = ["verify", run_id, "--store", store.uri, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.stdout, done.stderr
    return done.exit_code, json.loads(done.stdout)["problems"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _with_reward(episodes: pa.Table, row: int, reward: float) -> pa.Table:
    place = SCHEMA.get_field_index("reward")
    rewards = episodes["reward"].to_pylist()
    rewards[row] = reward
    return episodes.set_column(place, SCHEMA.field(place), pa.array(rewards, pa.float64()))


# Parts and commits


def part_removed(run: MadeRun) -> str:
    run.part(0).unlink()
    return run.commit_key(0)


def part_truncated(run: MadeRun) -> str:
    path = run.part(1)
    path.write_bytes(path.read_bytes()[:-10])
    return path.name


def part_bit_altered(run: MadeRun) -> str:
    _flip(run.part(1))
    return run.part(1).name


def part_of_another_round(run: MadeRun) -> str:
    run.part(1).write_bytes(run.part(0).read_bytes())
    return run.part(1).name


def unscored_part_altered(run: MadeRun) -> str:
    (key,) = run.store.keys(layout.generated_prefix("run", "r0"))
    _flip(run.store.local_path(key))
    return key


def reward_altered_in_place(run: MadeRun) -> str:
    path = run.part(0)
    path.write_bytes(encode_part(_with_reward(read_part(run.store, _key(run, path)), 1, 0.0)))
    return path.name


def reward_altered_and_commit_rewritten(run: MadeRun) -> str:
    """Part, name of the part and commit record agree; what the trainer said of its batch does not."""
    path = run.part(0)
    altered = _with_reward(read_part(run.store, _key(run, path)), 1, 0.9)
    data = encode_part(altered)
    sha256 = file_of("", data).sha256
    key = f"{layout.episodes_prefix('run', 'round-000000')}-{sha256[:8]}.parquet"
    run.store.replace(key, data)
    path.unlink()
    part = PartRef(key=key, sha256=sha256, bytes=len(data), rows=altered.num_rows)
    old = read_record(run.store, run.commit_key(0), Commit)
    new = describe_commit("run", old.key, part, altered, created_at=old.created_at)
    run.store.replace(run.commit_key(0), new.to_bytes())
    return "step 1 was logged with a mean reward"


def commit_altered(run: MadeRun) -> str:
    run.edit(run.commit_key(0), lambda commit: commit.update(reward_mean=0.9))
    return run.commit_key(0)


def commit_of_a_short_part(run: MadeRun) -> str:
    """A group lost one of its episodes, and part, commit and log all say so."""
    episodes = read_part(run.store, _key(run, run.part(1))).slice(1)
    data = encode_part(episodes)
    path = run.part(1)
    path.write_bytes(data)
    part = PartRef(
        key=_key(run, path), sha256=file_of("", data).sha256, bytes=len(data), rows=len(episodes)
    )
    new = describe_commit("run", "round-000001", part, episodes, created_at=0.0)
    run.store.replace(run.commit_key(1), new.to_bytes())
    run.edit_fact("committed", 1, episodes=len(episodes))
    return f"group {GROUP} has samples [1]"


def commit_removed(run: MadeRun) -> str:
    run.store.local_path(run.commit_key(1)).unlink()
    return run.commit_key(1)


def commit_of_another_round(run: MadeRun) -> str:
    run.store.replace(run.commit_key(1), run.store.read(run.commit_key(0)))
    return run.commit_key(1)


def _key(run: MadeRun, path: Path) -> str:
    return path.relative_to(run.store.root).as_posix()


# The log


def entry_altered_figures(run: MadeRun) -> str:
    run.edit_fact("generated", 0, response_tokens=1)
    return "response_tokens = 1"


def entry_altered_weights(run: MadeRun) -> str:
    run.edit_fact("step", 1, weights_digest="other")
    return "the weights of policy version 2"


def entry_altered_groups(run: MadeRun) -> str:
    run.edit_fact("step", 1, group_ids=[GROUP])
    return "run-00000003 is neither trained on nor dropped"


def entry_altered_drop(run: MadeRun) -> str:
    """A group that could have been trained on is said to have had no signal."""
    run.edit_fact("step", 1, group_ids=[GROUP])
    run.edit_fact("dropped", 0, group_ids=["run-00000003", "run-00000004"])
    return "run-00000003 was dropped as no_signal, and its episodes have one"


def entry_unreadable(run: MadeRun) -> str:
    key, _ = run.find("committed", 1)
    run.store.local_path(key).write_bytes(b'{"facts":')
    return key


def entry_missing_in_the_middle(run: MadeRun) -> str:
    key, _ = run.find("committed", 1)
    run.store.local_path(key).unlink()
    return key


def entry_missing_at_the_end(run: MadeRun) -> str:
    """The last one that the successor names."""
    key, _ = run.find("checkpoint", 1)
    run.store.local_path(key).unlink()
    return key


def entry_missing_with_those_after_it_moved_up(run: MadeRun) -> str:
    run.rewrite_log(lambda entries: entries.pop(4))
    return f"group {GROUP} was trained on at step 2 and never committed"


def end_missing(run: MadeRun) -> str:
    run.rewrite_log(lambda entries: entries.pop())
    return 'status = "finished"; the log says "running"'


def entry_doubled_in_place(run: MadeRun) -> str:
    run.rewrite_log(lambda entries: entries.insert(5, entries[4]))
    return layout.entry_key("run", 1, 5)


def step_doubled(run: MadeRun) -> str:
    def double(entries: list[list[Any]]) -> None:
        place = next(i for i, told in enumerate(entries) if told[0]["kind"] == "step")
        entries.insert(place, entries[place])

    run.rewrite_log(double)
    return "step 2 was trained again, and no checkpoint"


def entry_doubled_at_the_end(run: MadeRun) -> str:
    run.rewrite_log(lambda entries: entries.append(entries[4]))
    return "was written after its incarnation had ended"


def entry_after_a_seal(run: MadeRun) -> str:
    """A controller that was about to take the run over had sealed it, and somebody wrote on."""
    seal = {"kind": "sealed", "host": "host", "pid": 1}
    run.rewrite_log(lambda entries: entries.insert(-1, [seal]))
    return "was written after its incarnation was sealed"


def entry_under_anothers_key(run: MadeRun) -> str:
    run.store.replace(layout.entry_key("run", 1, 4), run.store.read(layout.entry_key("run", 1, 3)))
    return f"{layout.entry_key('run', 1, 4)} holds entry 3 of incarnation 1"


def entries_reordered(run: MadeRun) -> str:
    def swap(entries: list[list[Any]]) -> None:
        entries[2], entries[4] = entries[4], entries[2]

    run.rewrite_log(swap)
    return f"group {GROUP} was committed and never admitted before"


def entry_of_another_run(run: MadeRun) -> str:
    other = made_run.finished(run.store, "other")
    key = layout.entry_key("other", 1, 2)
    run.store.replace(layout.entry_key("run", 1, 2), other.store.read(key))
    return "group other-00000002 is not named after draw 2 of run run"


def start_of_another_run(run: MadeRun) -> str:
    run.edit_fact("started", 1, run_id="other")
    return "was written for run other"


def group_trained_twice(run: MadeRun) -> str:
    run.edit_fact("step", 1, group_ids=[GROUP, "run-00000000"])
    return "group run-00000000 was trained on at steps 1, 2"


def group_trained_and_dropped(run: MadeRun) -> str:
    run.edit_fact("dropped", 0, group_ids=["run-00000003", "run-00000004"])
    return "run-00000003 was trained on at step 2 and dropped as no_signal"


def age_bound_lowered(run: MadeRun) -> str:
    run.edit(layout.config_key("run"), lambda config: config.update(max_policy_age=0))
    return f"step 2 trained on group {GROUP} at age 1; at most 0 is allowed"


# Claims


def claim_names_a_later_entry(run: MadeRun) -> str:
    _claim_ends_at(run, 99)
    return "is missing, and later entries rely on it"


def claim_names_an_earlier_entry(run: MadeRun) -> str:
    """So that entries that were acknowledged would not count any more."""
    _claim_ends_at(run, 3)
    return f"incarnation 0 ended before {layout.entry_key('run', 0, 4)}, and no seal stands there"


def _claim_ends_at(run: MadeRun, seq: int) -> None:
    key = layout.incarnation_key("run", 1)
    run.edit(key, lambda claim: claim.update(previous_last={"incarnation": 0, "seq": seq}))


def seal_removed(run: MadeRun) -> str:
    (key,) = [
        key
        for key in run.store.keys(layout.entry_prefix("run", 0))
        if b'"sealed"' in run.store.read(key)
    ]
    run.store.local_path(key).unlink()
    return key


def claim_of_another_run(run: MadeRun) -> str:
    run.edit(layout.incarnation_key("run", 1), lambda claim: claim.update(run_id="other"))
    return "incarnation 1 speaks of another run"


def claim_with_other_versions(run: MadeRun) -> str:
    key = layout.incarnation_key("run", 1)
    run.edit(key, lambda claim: claim["controller"].update(versions={"torch": "0"}))
    return "run.json says versions"


def claim_removed(run: MadeRun) -> str:
    run.store.local_path(layout.incarnation_key("run", 0)).unlink()
    return "incarnation 0 of run run is missing"


def newest_claim_removed(run: MadeRun) -> str:
    run.store.local_path(layout.incarnation_key("run", 1)).unlink()
    return f"{layout.entry_key('run', 1, 0)} is of an incarnation that nobody claimed"


# Checkpoints, config, code, results


def checkpoint_file_altered(run: MadeRun) -> str:
    _flip(run.store.local_path(f"{CHECKPOINT}model.safetensors"))
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
    return f"the weights in checkpoint {CHECKPOINT} have digest {made_run.weights_digest(0)}"


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


def evaluation_on_training_prompts(run: MadeRun) -> str:
    episodes = table([0, 1], [0], evaluation="initial", held_out=False)
    data = encode_part(episodes)
    (key,) = run.store.keys(layout.evaluation_prefix("run", "initial"))
    run.store.replace(key, data)
    part = {**file_of(key, data).model_dump(mode="json"), "rows": 4}
    run.edit_fact("evaluated", 0, parts=[part])
    return "prompt p-0 of evaluation initial was drawn for training as well"


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


def replayed_group_used_too_often(run: MadeRun) -> str:
    run.edit_fact("step", 1, group_ids=["run-00000000", "run-00000000"])
    return "group run-00000000 is in the batch of step 2 2 times"


def replayed_group_of_a_commit_that_never_counted(run: MadeRun) -> str:
    other = MadeRun(run.store, "run")
    other.commit(7, table([7], [0, 0]))
    draw = made_run.draw_of("run", 7).model_dump(mode="json")
    run.edit_fact("replayed", 0, commit=other.commit_key(7), draws=[draw])
    return "group run-00000007 was replayed of run run, whose log never drew it so"


Plant = Callable[[MadeRun], str]

IN_A_FINISHED_RUN: list[Plant] = [
    part_removed, part_truncated, part_bit_altered, part_of_another_round, unscored_part_altered,
    reward_altered_in_place, reward_altered_and_commit_rewritten, commit_altered,
    commit_of_a_short_part, commit_removed, commit_of_another_round, entry_altered_figures,
    entry_altered_weights, entry_altered_groups, entry_altered_drop, entry_unreadable,
    entry_missing_in_the_middle, entry_missing_at_the_end,
    entry_missing_with_those_after_it_moved_up, end_missing, entry_doubled_in_place, step_doubled,
    entry_doubled_at_the_end, entry_after_a_seal, entry_under_anothers_key, entries_reordered, entry_of_another_run,
    start_of_another_run, group_trained_twice, group_trained_and_dropped, age_bound_lowered,
    claim_names_a_later_entry, claim_names_an_earlier_entry, seal_removed, claim_of_another_run,
    claim_with_other_versions, claim_removed, newest_claim_removed, checkpoint_file_altered,
    checkpoint_file_removed, checkpoint_weights_replaced, last_checkpoint_pruned, results_altered, results_unreadable,
    results_of_another_kind, times_that_cannot_be,
    config_altered, config_unreadable, config_removed, source_altered, evaluation_altered,
    evaluation_on_training_prompts, intervals_overlapping,
]  # fmt: skip
IN_A_RESUMED_RUN: list[Plant] = [
    provisional_steps_not_trained_again, provisional_step_with_other_groups,
    provisional_step_forgotten, other_weights_restored, advantage_made_up,
]  # fmt: skip
IN_A_FORK: list[Plant] = [parent_of_the_fork_altered, fork_of_other_weights]
IN_A_REPLAY: list[Plant] = [
    replayed_commit_altered, replayed_group_used_too_often,
    replayed_group_of_a_commit_that_never_counted,
]  # fmt: skip


def _is_found(run: MadeRun, plant: Plant) -> None:
    assert _verify(run.store, run.run_id) == (0, [])
    words = plant(run)
    code, problems = _verify(run.store, run.run_id)
    assert code == 1
    assert words in " | ".join(problems)


@pytest.mark.parametrize("plant", IN_A_FINISHED_RUN)
def test_what_is_planted_in_a_finished_run_is_found(store: LocalStore, plant: Plant) -> None:
    _is_found(made_run.finished(store), plant)


@pytest.mark.parametrize("plant", IN_A_RESUMED_RUN)
def test_what_is_planted_in_a_resumed_run_is_found(store: LocalStore, plant: Plant) -> None:
    _is_found(made_run.resumed(store), plant)


@pytest.mark.parametrize("plant", IN_A_FORK)
def test_what_is_planted_in_a_fork_is_found(store: LocalStore, plant: Plant) -> None:
    _is_found(made_run.forked(store, made_run.finished(store)), plant)


@pytest.mark.parametrize("plant", IN_A_REPLAY)
def test_what_is_planted_in_a_replay_is_found(store: LocalStore, plant: Plant) -> None:
    _is_found(made_run.replaying(store, made_run.finished(store)), plant)


def test_what_a_zombie_writes_beyond_the_seal_does_not_count(store: LocalStore) -> None:
    run = made_run.finished(store)
    seq = len(store.keys(layout.entry_prefix("run", 0)))
    claim = facts.Entry(
        incarnation=0,
        seq=seq,
        at=0.0,
        facts=(facts.Dropped(group_ids=(GROUP,), reason="stale", step=None),),
    )
    store.put_if_absent(layout.entry_key("run", 0, seq), claim.to_bytes())
    store.put_if_absent(layout.entry_key("run", 0, seq + 5), b"\x80\x04.")
    assert _verify(store, run.run_id) == (0, [])


def test_what_a_zombie_wrote_in_the_place_of_the_seal_is_found(store: LocalStore) -> None:
    run = made_run.finished(store)
    key = store.keys(layout.entry_prefix("run", 0))[-1]
    zombie = {"facts": [{"kind": "dropped", "group_ids": [GROUP], "reason": "stale", "step": None}]}
    run.edit(key, lambda entry: entry.update(zombie))
    code, problems = _verify(store, run.run_id)
    assert code == 1
    assert f"ended before {key}, and no seal stands there" in " | ".join(problems)


def test_problems_are_told_to_people(store: LocalStore) -> None:
    run = made_run.finished(store)
    key = commit_removed(run)
    done = CliRunner().invoke(app, ["verify", "run", "--store", store.uri])
    assert done.exit_code == 1
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("Problem: ")]
    assert key in problem
    assert done.stdout.endswith("1 problems.\n")
