"""`verify` finds nothing wrong with sound runs, and what breaks one of its rules."""

import os
from pathlib import Path

import made_run
import pyarrow as pa
import pytest
from made_run import CONFIG, MadeRun, table

from storage import facts, layout
from storage.annotations import ScoreSet, complete_set, open_set, write_scores
from storage.compaction import compact, plan_compaction
from storage.episodes import SCHEMA
from storage.log import RunLog
from storage.objects import LocalStore
from storage.parts import read_commits
from storage.records import Controller
from storage.runs import store_config
from storage.summary import write_run_json
from storage.verify import verify
from storage.verify_weights import WeightsDigest


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    # No power fails here, and waiting for the disk is what a made run would take most of its time for.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


@pytest.fixture
def run(store: LocalStore) -> MadeRun:
    """A run that could finish now."""
    return made_run.finished(store, end=False)


def _problems(run: MadeRun) -> list[tuple[str, str]]:
    return [(each.kind, each.offender) for each in verify(run.store, run.run_id).problems]


def _says(run: MadeRun, kind: str) -> str:
    """All sentences of a kind."""
    problems = verify(run.store, run.run_id).problems
    return " | ".join(each.sentence for each in problems if each.kind == kind)


def test_a_sound_run_has_no_problem(run: MadeRun) -> None:
    run.end()
    report = verify(run.store, "run")
    assert report.problems == []
    assert report.ok
    assert dict(report.counted) == {
        "incarnations": 2,
        "entries": 19,
        "facts": 21,
        "groups": 5,
        "steps": 2,
        "retries": 0,
        "parts": 5,
        "bytes": report.counted["bytes"],
        "episodes": 24,
        "sources": 2,
        "checkpoints": 2,
        "pruned_checkpoints": 1,
    }


def test_a_resumed_a_forked_and_a_replaying_run_have_no_problem(store: LocalStore) -> None:
    other = made_run.finished(store)
    runs = (
        made_run.resumed(store, "resumed"),
        made_run.forked(store, other),
        made_run.replaying(store, other),
    )
    for run in runs:
        report = verify(store, run.run_id)
        assert report.problems == []
        assert report.counted["checkpoints"] == 2


# Groups


def test_a_group_that_was_trained_twice_is_found(run: MadeRun) -> None:
    run.train(3, [3], age=2)
    assert "run-00000003 was trained on at steps 2, 3 and may be used 1x" in _says(
        run, "trained_twice"
    )


def test_a_group_that_is_twice_in_a_batch_is_found(run: MadeRun) -> None:
    run.round(3, [5], table([5], [2, 2]))
    run.train(3, [5, 5])
    assert "run-00000005 is in the batch of step 3 2 times" in _says(run, "trained_twice")


def test_an_age_above_the_bound_is_found(run: MadeRun) -> None:
    run.round(3, [5], table([5], [2, 0]))
    run.train(3, [5], age=2)
    assert _problems(run) == [("age", "run-00000005")]
    assert "step 3 trained on group run-00000005 at age 2; at most 1 is allowed" in _says(
        run, "age"
    )


def test_tokens_of_a_version_that_was_not_there_yet_are_found(run: MadeRun) -> None:
    run.round(3, [5], table([5], [3, 2]))
    run.train(3, [5])
    assert "run-00000005, which has tokens of version 3" in _says(run, "age")


def test_an_age_that_was_logged_wrongly_is_found(run: MadeRun) -> None:
    run.edit_fact("step", 1, age_max=0, age_mean=0.0)
    assert "its episodes have 1 and 1.0" in _says(run, "age")


def test_a_group_that_was_dropped_and_trained_is_found(run: MadeRun) -> None:
    run.drop(2, "stale")
    assert "run-00000002" in _says(run, "trained_and_dropped")


def test_a_short_group_is_found(store: LocalStore) -> None:
    run = made_run.finished(store, cut=lambda table: table.slice(1))
    assert [each for each in _problems(run) if each[0] == "short_group"] == [
        ("short_group", "run-00000000"),
        ("short_group", "run-00000002"),
    ]
    assert "samples [1] where 0 to 1 are due" in _says(run, "short_group")


def test_an_episode_of_another_prompt_is_found(store: LocalStore) -> None:
    def swap(table: pa.Table) -> pa.Table:
        place = SCHEMA.get_field_index("prompt_id")
        return table.set_column(place, SCHEMA.field(place), table["prompt_id"].take([1, 2, 0, 3]))

    run = made_run.finished(store, cut=lambda t: swap(t) if t.num_rows == 4 else t)
    assert _problems(run) == [("episode", "run-00000000-001"), ("episode", "run-00000001-000")]


def test_a_forgotten_group_is_found(run: MadeRun) -> None:
    run.admit(2, [5])
    run.end()
    assert _problems(run) == [("pending", "run-00000005")]


def test_admission_beyond_the_age_bound_is_found(run: MadeRun) -> None:
    run.admit(2, [5, 6, 7, 8])
    assert _problems(run) == []
    run.admit(2, [9])
    assert "5 groups were pending at once; the age bound allows 4" in _says(run, "admission")


def test_the_admission_of_other_runs_groups_has_no_bound(store: LocalStore) -> None:
    other = made_run.finished(store)
    replay = made_run.replaying(store, other, end=False)
    replay.edit(layout.config_key("replay"), lambda config: config.update(groups_per_step=0))
    assert "admission" not in [kind for kind, _ in _problems(replay)]


def test_a_group_without_a_signal_in_a_batch_is_found(run: MadeRun) -> None:
    run.round(3, [5, 6], table([5, 6], [2, 2], flat=[6]))
    run.train(3, [5, 6])
    assert _problems(run) == [("signal", "run-00000006")]


@pytest.mark.parametrize(
    ("flat", "advantages", "kinds"),
    [
        (True, None, []),
        (False, None, ["signal"]),
        (False, {}, []),
        (False, {"run-00000005-001": 0.0}, []),
        (False, {"run-00000005-001": 0.5}, ["signal"]),
        (True, {"run-00000005-001": 0.5}, ["signal"]),
    ],
)
def test_what_is_dropped_as_no_signal_has_none(
    run: MadeRun, flat: bool, advantages: dict[str, float] | None, kinds: list[str]
) -> None:
    run.round(3, [5], table([5], [2, 2], flat=[5] if flat else []))
    run.log.append(
        facts.Batched(step=3, group_ids=(), advantages=advantages),
        facts.Dropped(group_ids=("run-00000005",), reason="no_signal", step=3),
    )
    run.train(3, [], age=0)
    assert [kind for kind, _ in _problems(run)] == kinds


def test_a_group_that_was_never_scored_cannot_lack_a_signal(run: MadeRun) -> None:
    run.admit(3, [5])
    run.drop(5, "no_signal", step=3)
    assert "run-00000005 was dropped as no_signal and never scored" in _says(run, "signal")


def test_seeds_that_repeat_are_found(run: MadeRun) -> None:
    def seeded(draw: int, seed: int) -> pa.Table:
        place = SCHEMA.get_field_index("seed")
        return table([draw], [2, 2]).set_column(
            place, SCHEMA.field(place), pa.array([seed, draw], pa.int64())
        )

    run.round(3, [5], seeded(5, 77))
    run.round(4, [6], seeded(6, 77))
    assert _says(run, "seed") == (
        "episodes run-00000005-000, run-00000006-000 were sampled with one seed, 77"
    )


def test_a_group_that_is_generated_again_after_its_commit_is_found(run: MadeRun) -> None:
    run.log.append(run.generate(7, table([2], [1, 1])))
    assert _problems(run) == [("generated_again", "run-00000002")]


# Steps, forks and resumed runs


def test_other_weights_of_a_step_are_found_unless_they_are_recorded(store: LocalStore) -> None:
    run = made_run.resumed(store, end=False)
    run.claim()
    run.restore(0)
    run.train(1, [0, 1], salt=1)
    run.train(2, [2, 3], salt=1)
    run.train(3, [4])
    assert _problems(run) == [("fork", "step 1"), ("fork", "step 2")]
    for step in (1, 2):
        run.log.append(facts.Diverged(step=step, reason="other CPU"))
    assert _problems(run) == []


@pytest.mark.parametrize("new", ["draw", "step"])
def test_something_new_before_provisional_steps_are_trained_again_is_found(
    store: LocalStore, new: str
) -> None:
    run = made_run.resumed(store, end=False)
    run.claim()
    run.restore(0)
    run.train(1, [0, 1])
    if new == "draw":
        run.admit(5, [6])
        offender = "run-00000006"
    else:
        run.round(5, [6], table([6], [3, 3]))
        offender = "run-00000006"
    assert _problems(run) == [("provisional", offender)]
    assert "before steps 2, 3 were trained again after step 1" in _says(run, "provisional")


def test_a_new_step_in_place_of_provisional_ones_is_found(store: LocalStore) -> None:
    run = made_run.resumed(store, end=False)
    run.round(5, [6], table([6], [3, 3]))
    run.claim()
    run.restore(3)
    run.train(4, [6])
    run.claim()
    run.restore(0)
    run.train(5, [])
    assert ("provisional", "step 5") in _problems(run)


def test_a_step_of_a_trainer_that_restored_nothing_is_found(run: MadeRun) -> None:
    run.claim()
    run.round(3, [5], table([5], [2, 2]))
    run.train(3, [5])
    assert _problems(run) == [("restored", "step 3")]


def test_a_step_that_is_trained_again_without_cause_is_found(run: MadeRun) -> None:
    run.train(2, [2, 3], age=1)
    assert _problems(run) == [("retraining", "step 2")]


def test_other_weights_than_the_checkpoints_are_found(run: MadeRun) -> None:
    run.claim()
    run.restore(2, salt=1)
    assert "weights restored of step 2 are not those of its checkpoint" in _says(run, "restored")


def test_a_pruned_checkpoint_cannot_be_restored(run: MadeRun) -> None:
    run.claim()
    run.restore(1)
    assert "step 1 was restored, whose checkpoint was pruned before" in _says(run, "restored")


@pytest.mark.parametrize(("step", "which"), [(0, "first"), (2, "last")])
def test_the_first_and_the_last_checkpoint_are_never_pruned(
    run: MadeRun, step: int, which: str
) -> None:
    run.log.append(facts.Pruned(steps=(step,)))
    assert f"the checkpoint of step {step} was pruned, which is the {which} one" in _says(
        run, "pruned"
    )
    run.end()
    assert f"finished without a checkpoint of step {step}" in _says(run, "checkpoint")


def test_a_checkpoint_that_is_gone_and_was_not_pruned_is_found(run: MadeRun) -> None:
    run.rewrite_log(lambda entries: entries.pop(-1))
    assert {kind for kind, _ in _problems(run)} == {"checkpoint"}
    assert "checkpoints/00000001/model.safetensors" in _says(run, "checkpoint")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_second_warm_start_gives_the_same_weights_or_is_recorded(
    store: LocalStore, recorded: bool
) -> None:
    run = MadeRun(store)
    run.warm_start()
    run.claim()
    if recorded:
        run.log.append(facts.Diverged(step=0, reason="other CPU"))
    run.log.append(facts.WarmStarted(steps=0, loss=None, weights_digest="other", seconds=1.0))
    assert _problems(run) == ([] if recorded else [("warm_start", "run")])


def test_a_warm_start_of_what_has_weights_already_is_found(store: LocalStore) -> None:
    run = made_run.finished(store, end=False)
    run.warm_start()
    assert "warm-started although it had weights already" in _says(run, "warm_start")
    fork = MadeRun(store, "fork", parent_run_id="run", parent_step=0)
    fork.log.append(
        facts.Forked(
            parent_run_id="run",
            parent_step=0,
            step=0,
            checkpoint=layout.checkpoint_folder("run", 0),
            weights_digest=made_run.weights_digest(0),
        )
    )
    assert _problems(fork) == []
    fork.warm_start()
    assert _problems(fork) == [("warm_start", "fork")]


def test_a_checkpoint_that_was_not_there_cannot_be_pruned(run: MadeRun) -> None:
    run.log.append(facts.Pruned(steps=(7,)))
    assert _problems(run) == [("pruned", "step 7")]


def test_a_fork_that_begins_after_another_step_is_found(store: LocalStore) -> None:
    run = made_run.forked(store, made_run.finished(store))
    run.edit_fact("forked", step=1)
    assert "the run's steps begin after step 1 where step 2 is due" in _says(run, "fork")


def test_a_fork_of_another_step_than_the_configs_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other)
    run.edit_fact("forked", parent_step=0)
    assert "goes on from step 0 of run run; its config says step 2 of run run" in _says(run, "fork")
    assert "has no such checkpoint of step 0" in _says(run, "fork")


def test_a_fork_of_weights_that_the_parent_never_had_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other)
    other.edit_fact("checkpoint", 2, weights_digest="other")
    assert "runs/run/checkpoints/00000002/" in _says(run, "fork")


def test_a_fork_outlives_its_parent(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other)
    for key in store.keys("runs/run/"):
        store.local_path(key).unlink()
    assert _problems(run) == []


def test_a_fork_that_the_log_does_not_tell_is_found(store: LocalStore) -> None:
    run = made_run.finished(store)
    run.edit(
        layout.config_key("run"), lambda config: config.update(parent_run_id="a", parent_step=2)
    )
    assert "says to go on from step 2 of run a, and the log tells no fork" in _says(run, "fork")


def test_a_step_before_the_fork_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other, end=False)
    run.train(2, [])
    assert "step 2 was trained in a run that goes on from step 2" in _says(run, "fork")


# Replays


def test_a_replayed_group_may_be_used_once_an_epoch(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store), end=False)
    run.train(3, ["run-00000000"], age=None)
    assert "run-00000000 was trained on at steps 1, 2, 3 and may be used 2x" in _says(
        run, "trained_twice"
    )


def test_a_replay_of_a_run_that_the_config_does_not_name_is_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    run.edit(layout.config_key("replay"), lambda config: config["replay"].update(runs=["a"]))
    assert "groups of run run were replayed, which the config does not name" in _says(
        run, "replayed"
    )


def test_an_age_of_replayed_groups_is_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    run.edit_fact("step", 0, age_max=0, age_mean=0.0)
    assert "step 1 was logged with ages, which groups of other runs do not have" in _says(
        run, "age"
    )


def test_a_replay_of_what_the_other_log_does_not_count_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.replaying(store, other)
    key, _ = other.find("committed")
    store.local_path(key).unlink()
    assert "run-00000000 was replayed of run run, whose log never committed" in _says(
        run, "replayed"
    )


def test_a_replay_of_another_draw_than_the_other_run_admitted_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.replaying(store, other)
    key, _ = run.find("replayed")
    run.edit(key, lambda entry: entry["facts"][0]["draws"][1].update(prompt_id="p-7"))
    assert "run-00000001 was replayed of run run, whose log never drew it so" in _says(
        run, "replayed"
    )
    assert "run-00000001-000 is not of the draw that was admitted" in _says(run, "episode")


def test_a_replayed_group_that_is_not_in_its_commit_is_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    key, _ = run.find("replayed")
    run.edit(
        key, lambda entry: entry["facts"][0].update(commit="episodes/commits/run/round-000001.json")
    )
    assert "run-00000000 was replayed from episodes/commits/run/round-000001.json" in _says(
        run, "replayed"
    )


def test_a_replay_outlives_the_log_of_the_other_run(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.replaying(store, other)
    for key in store.keys("runs/run/"):
        store.local_path(key).unlink()
    assert _problems(run) == []


def test_a_log_of_another_run_that_cannot_be_read_is_told(store: LocalStore) -> None:
    other = made_run.finished(store)
    runs = made_run.forked(store, other), made_run.replaying(store, other)
    key, _ = other.find("admitted")
    store.replace(key, b"{")
    for run, kind in zip(runs, ("fork", "replayed"), strict=True):
        assert _problems(run) == [(kind, "run")]
        assert key in _says(run, kind)


def test_scores_that_the_config_does_not_name_are_found(store: LocalStore) -> None:
    run = _rescored(store, made_run.finished(store), [0.0, 1.0, 1.0, 0.0])
    run.edit(layout.config_key("rescored"), lambda config: config["replay"].update(scores="run"))
    assert "were replayed with scores 'later'; the config says 'run'" in _says(run, "replayed")


def _rescored(store: LocalStore, other: MadeRun, scores: list[float]) -> MadeRun:
    """A replay of the other run's first round with scores that it was given later."""
    controller = Controller.this_process(versions={}, git_commit=None)
    kept = ScoreSet(
        run_id=other.run_id,
        name="later",
        verifier="sums",
        scorer="sums",
        environment=None,
        source=None,
        controller=controller,
        created_at=0.0,
    )
    open_set(store, kept)
    commits = read_commits(store, other.run_id)
    for commit in commits:
        ids = [layout.episode_id(g, s) for g in commit.group_ids for s in range(2)]
        values = (scores * 2)[: len(ids)]
        write_scores(store, commit, "later", ids, values, [{}] * len(ids), reward_mean=0.0)
    complete_set(store, other.run_id, "later", commits)
    section = {"runs": [other.run_id], "scores": "later", "epochs": 1}
    run = MadeRun(store, "rescored", replay=section)
    run.warm_start()
    run.checkpoint(0)
    draws = tuple(made_run.draw_of(other.run_id, each) for each in (0, 1))
    run.log.append(
        facts.Replayed(
            run_id=other.run_id,
            commit=other.commit_key(0),
            draws=draws,
            group_size=2,
            score_set="later",
        )
    )
    run.train(1, ["run-00000000", "run-00000001"], age=None)
    run.edit_fact("step", score_set="later")
    return run


def test_later_scores_count_where_they_are_replayed(store: LocalStore) -> None:
    other = made_run.finished(store)
    assert _problems(_rescored(store, other, [0.0, 1.0, 1.0, 0.0])) == []


def test_a_group_without_a_signal_by_later_scores_is_found(store: LocalStore) -> None:
    run = _rescored(store, made_run.finished(store), [0.0, 1.0, 0.5, 0.5])
    assert _problems(run) == [("signal", "run-00000001")]


def test_steps_with_other_scores_than_the_configs_are_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    run.edit_fact("step", 0, score_set="later")
    assert "step 1 used scores 'later', not 'run'" in _says(run, "score")


# Evaluations, checkpoints and the rest


def test_a_wrong_score_of_an_evaluation_is_found(run: MadeRun) -> None:
    run.evaluate("final", 2, greedy=0.9)
    assert "as 0.9 greedy; its episodes give 1.05" in _says(run, "evaluation")


def test_a_held_out_prompt_that_was_trained_on_is_found(run: MadeRun) -> None:
    run.evaluate("final", 2, held_out=False)
    assert "prompt p-0 of evaluation final" in _says(run, "held_out")


def test_an_evaluation_of_other_weights_is_found(run: MadeRun) -> None:
    run.edit_fact("evaluated", policy_version=2)
    assert "is logged for policy version 2; its tokens are of [0]" in _says(run, "evaluation")


def test_an_evaluation_that_lacks_a_prompt_is_found(run: MadeRun) -> None:
    run.edit_fact("evaluated", num_prompts=3)
    assert "prompt 2 of evaluation initial has samples [] where [0, 1] are due" in _says(
        run, "evaluation"
    )


def test_an_evaluation_under_anothers_name_is_found(run: MadeRun) -> None:
    run.edit_fact("evaluated", name="final")
    assert "run-initial-00000000-000 is not of evaluation final of run run" in _says(run, "episode")


def test_a_checkpoint_without_a_description_has_no_digest_to_check(run: MadeRun) -> None:
    key, _ = run.find("checkpoint")
    run.edit(key, lambda entry: entry["facts"][0]["files"].pop())
    report = verify(run.store, "run")
    assert report.ok
    assert report.counted["checkpoints_without_digest"] == 1


def test_a_description_that_says_other_things_than_the_log_is_found(run: MadeRun) -> None:
    description = f"{layout.checkpoint_folder('run', 2)}checkpoint.json"
    run.edit(description, lambda content: content.update(step=7))
    data = run.store.read(description)
    key, _ = run.find("checkpoint", 2)
    file = made_run.file_of(description, data).model_dump(mode="json")
    run.edit(key, lambda entry: entry["facts"][0]["files"].__setitem__(-1, file))
    assert f"{description} says other things than the log of step" in _says(run, "checkpoint")


def test_rows_of_a_part_that_was_compacted_away_are_read(run: MadeRun) -> None:
    commits = read_commits(run.store, "run")
    assert compact(run.store, plan_compaction(run.store, "run", commits, whole=True))
    run.part(0).unlink()
    run.part(1).unlink()
    report = verify(run.store, "run")
    assert report.problems == []
    assert report.counted["compactions"] == 1


def test_a_compaction_that_holds_other_rows_is_found(run: MadeRun) -> None:
    commits = read_commits(run.store, "run")
    assert compact(run.store, plan_compaction(run.store, "run", commits, whole=True))
    key = layout.compaction_key("run", 0)
    run.edit(key, lambda compaction: compaction["commits"][0].update(rows_digest="0" * 64))
    assert _problems(run) == [("compaction", key)]


@pytest.mark.parametrize(
    ("intervals", "kinds"),
    [
        (((2e-4, 3e-4), (3e-4, 4e-4)), []),
        (((2e-4, 4e-4), (3e-4, 5e-4)), ["overlap"]),
        (((0.0, 2e-4),), ["overlap"]),
        (((4e-4, 3e-4),), ["interval"]),
        (((1.0, 3600.0),), ["interval"]),
    ],
)
def test_intervals_that_cannot_be_are_found(
    run: MadeRun, intervals: tuple[tuple[float, float], ...], kinds: list[str]
) -> None:
    run.mesh(*intervals)
    assert [kind for kind, _ in _problems(run)] == kinds


def test_a_run_json_that_lags_behind_a_living_run_is_no_problem(store: LocalStore) -> None:
    store_config(store, "run", CONFIG)
    log = RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))
    write_run_json(store, "run")
    log.append(facts.Retry(stage="train", attempt=1, cause="test", seconds=1.0))
    assert verify(store, "run").ok


def test_a_config_without_bounds_is_found(run: MadeRun) -> None:
    run.edit(layout.config_key("run"), lambda config: config.pop("max_policy_age"))
    assert "sets no max_policy_age" in _says(run, "config")


@pytest.mark.parametrize("replay", [3, {}, {"runs": "a"}, {"runs": [], "epochs": "2"}])
def test_a_config_with_half_a_replay_is_found(run: MadeRun, replay: object) -> None:
    run.edit(layout.config_key("run"), lambda config: config.update(replay=replay))
    assert "sets no whole replay" in _says(run, "config")


def test_an_unknown_run_is_refused(store: LocalStore) -> None:
    with pytest.raises(ValueError, match="has no run 'absent'"):
        verify(store, "absent")


# The digest of weights


def _torch_tensors() -> dict[str, object]:
    import torch

    embed = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    return {
        "lm_head.weight": embed,
        "embed.weight": embed,
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "ids": torch.tensor([[-1], [2]]),
        "flags": torch.tensor([True, False]),
    }


def test_the_digest_of_files_is_the_one_that_the_trainer_computes() -> None:
    from safetensors.torch import save

    from forge_core.weights import packing

    tensors: dict[str, object] = _torch_tensors()
    digest = WeightsDigest(tied={"lm_head.weight": "embed.weight"})
    digest.add("one", save({"embed.weight": tensors["embed.weight"], "ids": tensors["ids"]}))
    rest = {name: tensors[name] for name in ("scale", "empty", "flags")}
    digest.add("two", save(rest, metadata={"format": "pt"}))
    assert digest.hexdigest() == packing.digest(tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"\xff" * 16,
        (2).to_bytes(8, "little") + b"[]",
        (24).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}   ',
        (60).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60),
        b"\x80" * 100,
    ],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="weights is no safetensors file"):
        WeightsDigest(tied={}).add("weights", data)


def test_the_made_weights_have_the_digest_of_their_file() -> None:
    from safetensors.numpy import save

    digest = WeightsDigest(made_run.TIED)
    digest.add("weights", save(made_run.weights(3)))
    assert digest.hexdigest() == made_run.weights_digest(3)
