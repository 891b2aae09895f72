"""Whoever tampers with a finished run is found by `forgeflow verify`: it names what is wrong and exits 1."""

import os
from pathlib import Path
from typing import Any

import made_run
import pyarrow as pa
import pytest
from made_episodes import file_of
from made_run import MadeRun
from tampering import Plant, flip, is_found, run_verify
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
    flip(run.part(1))
    return run.part(1).name


def part_of_another_round(run: MadeRun) -> str:
    run.part(1).write_bytes(run.part(0).read_bytes())
    return run.part(1).name


def unscored_part_altered(run: MadeRun) -> str:
    (key,) = run.store.keys(layout.generated_prefix("run", "r0"))
    flip(run.store.local_path(key))
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


def commit_of_other_groups_in_the_log(run: MadeRun) -> str:
    run.edit_fact("committed", 0, episodes=5)
    return f"the log has other groups or episodes in {run.commit_key(0)} than its part has"


def commit_by_other_scores(run: MadeRun) -> str:
    run.edit_fact("committed", 0, score_set="later")
    return f"{run.commit_key(0)} was committed with scores 'later', not the run's"


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


PLANTS: list[Plant] = [
    part_removed, part_truncated, part_bit_altered, part_of_another_round,
    unscored_part_altered, reward_altered_in_place, reward_altered_and_commit_rewritten,
    commit_altered, commit_of_a_short_part, commit_of_other_groups_in_the_log,
    commit_by_other_scores, commit_removed, commit_of_another_round, entry_altered_figures,
    entry_altered_weights, entry_altered_groups, entry_altered_drop, entry_unreadable,
    entry_missing_in_the_middle, entry_missing_at_the_end,
    entry_missing_with_those_after_it_moved_up, end_missing, entry_doubled_in_place,
    step_doubled, entry_doubled_at_the_end, entry_after_a_seal, entry_under_anothers_key,
    entries_reordered, entry_of_another_run, start_of_another_run, group_trained_twice,
    group_trained_and_dropped, age_bound_lowered, claim_names_a_later_entry,
    claim_names_an_earlier_entry, seal_removed, claim_of_another_run, claim_with_other_versions,
    claim_removed, newest_claim_removed,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_in_a_finished_run_is_found(store: LocalStore, plant: Plant) -> None:
    is_found(made_run.finished(store), plant)


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
    assert run_verify(store, run.run_id) == (0, [])


def test_what_a_zombie_wrote_in_the_place_of_the_seal_is_found(store: LocalStore) -> None:
    run = made_run.finished(store)
    key = store.keys(layout.entry_prefix("run", 0))[-1]
    zombie = {"facts": [{"kind": "dropped", "group_ids": [GROUP], "reason": "stale", "step": None}]}
    run.edit(key, lambda entry: entry.update(zombie))
    code, problems = run_verify(store, run.run_id)
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
