"""`verify` follows a run through its steps, and to the runs that it was resumed, forked or replayed from."""

import os
from pathlib import Path

import made_episodes
import made_run
import pytest
from made_episodes import table
from made_run import MadeRun

from storage import facts, layout
from storage.annotations import ScoreSet, complete_set, open_set, write_scores
from storage.objects import LocalStore
from storage.parts import read_commits
from storage.records import Controller


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    # No power fails here, and waiting for the disk is what a made run would take most of its time for.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


@pytest.fixture
def run(store: LocalStore) -> MadeRun:
    """A run that could finish now."""
    return made_run.finished(store, end=False)


# Steps, forks and resumed runs


def test_other_weights_of_a_step_are_found_unless_they_are_recorded(store: LocalStore) -> None:
    run = made_run.resumed(store, end=False)
    run.claim()
    run.restore(0)
    run.train(1, [0, 1], salt=1)
    run.train(2, [2, 3], salt=1)
    run.train(3, [4])
    assert run.problems() == [("fork", "step 1"), ("fork", "step 2")]
    for step in (1, 2):
        run.log.append(facts.Diverged(step=step, reason="other CPU"))
    assert run.problems() == []


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
    assert run.problems() == [("provisional", offender)]
    assert "before steps 2, 3 were trained again after step 1" in run.told("provisional")


def test_draws_go_on_while_only_the_trainer_is_started_again(store: LocalStore) -> None:
    """Within an incarnation what steps are owed is in batches already; a new step before them is still too early."""
    run = made_run.resumed(store, end=False)
    run.restore(0)
    run.admit(5, [6])
    run.train(1, [0, 1])
    assert ("provisional", "run-00000006") not in run.problems()
    run.round(6, [7], table([7], [3, 3]))
    run.train(4, [7])
    assert ("provisional", "step 4") in run.problems()


def test_a_new_step_in_place_of_provisional_ones_is_found(store: LocalStore) -> None:
    run = made_run.resumed(store, end=False)
    run.round(5, [6], table([6], [3, 3]))
    run.claim()
    run.restore(3)
    run.train(4, [6])
    run.claim()
    run.restore(0)
    run.train(5, [])
    assert ("provisional", "step 5") in run.problems()


def test_a_step_of_a_trainer_that_restored_nothing_is_found(run: MadeRun) -> None:
    run.claim()
    run.round(3, [5], table([5], [2, 2]))
    run.train(3, [5])
    assert run.problems() == [("restored", "step 3")]


def test_a_step_that_is_trained_again_without_cause_is_found(run: MadeRun) -> None:
    run.train(2, [2, 3], age=1)
    assert run.problems() == [("retraining", "step 2")]


def test_other_weights_than_the_checkpoints_are_found(run: MadeRun) -> None:
    run.claim()
    run.restore(2, salt=1)
    assert "weights restored of step 2 are not those of its checkpoint" in run.told("restored")


def test_a_pruned_checkpoint_cannot_be_restored(run: MadeRun) -> None:
    run.claim()
    run.restore(1)
    assert "step 1 was restored, whose checkpoint was pruned before" in run.told("restored")


@pytest.mark.parametrize(("step", "which"), [(0, "first"), (2, "last")])
def test_the_first_and_the_last_checkpoint_are_never_pruned(
    run: MadeRun, step: int, which: str
) -> None:
    run.log.append(facts.Pruned(steps=(step,)))
    assert f"the checkpoint of step {step} was pruned, which is the {which} one" in run.told(
        "pruned"
    )
    run.end()
    assert f"finished without a checkpoint of step {step}" in run.told("checkpoint")


def test_a_checkpoint_that_is_gone_and_was_not_pruned_is_found(run: MadeRun) -> None:
    run.rewrite_log(lambda entries: entries.pop(-1))
    assert {kind for kind, _ in run.problems()} == {"checkpoint"}
    assert "checkpoints/00000001/model.safetensors" in run.told("checkpoint")


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
    assert run.problems() == ([] if recorded else [("warm_start", "run")])


def test_a_warm_start_of_what_has_weights_already_is_found(store: LocalStore) -> None:
    run = made_run.finished(store, end=False)
    run.warm_start()
    assert "warm-started although it had weights already" in run.told("warm_start")
    fork = MadeRun(store, "fork", parent_run_id="run", parent_step=0)
    fork.log.append(
        facts.Forked(
            parent_run_id="run",
            parent_step=0,
            step=0,
            checkpoint=layout.checkpoint_folder("run", 0),
            weights_digest=made_episodes.weights_digest(0),
        )
    )
    assert fork.problems() == []
    fork.warm_start()
    assert fork.problems() == [("warm_start", "fork")]


def test_a_checkpoint_that_was_not_there_cannot_be_pruned(run: MadeRun) -> None:
    run.log.append(facts.Pruned(steps=(7,)))
    assert run.problems() == [("pruned", "step 7")]


def test_a_fork_that_begins_after_another_step_is_found(store: LocalStore) -> None:
    run = made_run.forked(store, made_run.finished(store))
    run.edit_fact("forked", step=1)
    assert "the run's steps begin after step 1 where step 2 is due" in run.told("fork")


def test_a_fork_of_another_step_than_the_configs_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other)
    run.edit_fact("forked", parent_step=0)
    assert "goes on from step 0 of run run; its config says step 2 of run run" in run.told("fork")
    assert "has no such checkpoint of step 0" in run.told("fork")


def test_a_fork_of_weights_that_the_parent_never_had_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other)
    other.edit_fact("checkpoint", 2, weights_digest="other")
    assert "runs/run/checkpoints/00000002/" in run.told("fork")


def test_a_fork_outlives_its_parent(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other)
    for key in store.keys("runs/run/"):
        store.local_path(key).unlink()
    assert run.problems() == []


def test_a_fork_that_the_log_does_not_tell_is_found(store: LocalStore) -> None:
    run = made_run.finished(store)
    run.edit(
        layout.config_key("run"), lambda config: config.update(parent_run_id="a", parent_step=2)
    )
    assert "says to go on from step 2 of run a, and the log tells no fork" in run.told("fork")


def test_a_step_before_the_fork_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.forked(store, other, end=False)
    run.train(2, [])
    assert "step 2 was trained in a run that goes on from step 2" in run.told("fork")


# Replays


def test_a_replayed_group_may_be_used_once_an_epoch(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store), end=False)
    run.train(3, ["run-00000000"], age=None)
    assert "run-00000000 was trained on at steps 1, 2, 3 and may be used 2x" in run.told(
        "trained_twice"
    )


def test_a_replay_of_a_run_that_the_config_does_not_name_is_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    run.edit(layout.config_key("replay"), lambda config: config["replay"].update(runs=["a"]))
    assert "groups of run run were replayed, which the config does not name" in run.told("replayed")


def test_an_age_of_replayed_groups_is_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    run.edit_fact("step", 0, age_max=0, age_mean=0.0)
    assert "step 1 was logged with ages, which groups of other runs do not have" in run.told("age")


def test_a_replay_of_what_the_other_log_does_not_count_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.replaying(store, other)
    key, _ = other.find("committed")
    store.local_path(key).unlink()
    assert "run-00000000 was replayed of run run, whose log never committed" in run.told("replayed")


def test_a_replay_of_another_draw_than_the_other_run_admitted_is_found(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.replaying(store, other)
    key, _ = run.find("replayed")
    run.edit(key, lambda entry: entry["facts"][0]["draws"][1].update(prompt_id="p7"))
    assert "run-00000001 was replayed of run run, whose log never drew it so" in run.told(
        "replayed"
    )
    assert "run-00000001-000 is not of the draw that was admitted" in run.told("episode")


def test_a_replayed_group_that_is_not_in_its_commit_is_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    key, _ = run.find("replayed")
    run.edit(
        key, lambda entry: entry["facts"][0].update(commit="episodes/commits/run/round-000001.json")
    )
    told = run.told("replayed")
    assert (
        "was replayed from episodes/commits/run/round-000001.json; run run committed it as" in told
    )
    assert "round-000001.json, which has no episode of it" in told


def test_a_replay_outlives_the_log_of_the_other_run(store: LocalStore) -> None:
    other = made_run.finished(store)
    run = made_run.replaying(store, other)
    for key in store.keys("runs/run/"):
        store.local_path(key).unlink()
    assert run.problems() == []


def test_a_log_of_another_run_that_cannot_be_read_is_told(store: LocalStore) -> None:
    other = made_run.finished(store)
    runs = made_run.forked(store, other), made_run.replaying(store, other)
    key, _ = other.find("admitted")
    store.replace(key, b"{")
    for run, kind in zip(runs, ("fork", "replayed"), strict=True):
        assert run.problems() == [(kind, "run")]
        assert key in run.told(kind)


def test_scores_that_the_config_does_not_name_are_found(store: LocalStore) -> None:
    run = _rescored(store, made_run.finished(store), [0.0, 1.0, 1.0, 0.0])
    run.edit(layout.config_key("rescored"), lambda config: config["replay"].update(scores="run"))
    assert "were replayed with scores 'later'; the config says 'run'" in run.told("replayed")


def _rescored(
    store: LocalStore, other: MadeRun, scores: list[float], *, of: str = "run"
) -> MadeRun:
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
        ids = [
            layout.episode_id(g.replace("run", of), s) for g in commit.group_ids for s in range(2)
        ]
        values = (scores * 2)[: len(ids)]
        write_scores(store, commit, "later", ids, values, [{}] * len(ids), reward_mean=0.0)
    complete_set(store, other.run_id, "later", commits)
    section = {"runs": [other.run_id], "scores": "later", "epochs": 1}
    run = MadeRun(store, "rescored", replay=section)
    run.warm_start()
    run.checkpoint(0)
    draws = tuple(made_episodes.draw_of(other.run_id, each) for each in (0, 1))
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
    assert _rescored(store, other, [0.0, 1.0, 1.0, 0.0]).problems() == []


def test_a_group_without_a_signal_by_later_scores_is_found(store: LocalStore) -> None:
    run = _rescored(store, made_run.finished(store), [0.0, 1.0, 0.5, 0.5])
    assert run.problems() == [("signal", "run-00000001")]


def test_scores_of_other_episodes_are_found(store: LocalStore) -> None:
    run = _rescored(store, made_run.finished(store), [0.0, 1.0, 1.0, 0.0], of="other")
    assert "episode run-00000000-000 has no score in the set that counts" in run.told("score")


def test_steps_with_other_scores_than_the_configs_are_found(store: LocalStore) -> None:
    run = made_run.replaying(store, made_run.finished(store))
    run.edit_fact("step", 0, score_set="later")
    assert "step 1 used scores 'later', not 'run'" in run.told("score")
