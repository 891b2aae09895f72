"""`verify` finds nothing wrong with sound runs, and what breaks one of its rules."""

import os
from pathlib import Path

import made_episodes
import made_run
import pyarrow as pa
import pytest
from made_episodes import CONFIG, table
from made_run import MadeRun

from storage import facts, layout
from storage.compaction import compact, plan_compaction
from storage.episodes import SCHEMA
from storage.log import RunLog
from storage.objects import LocalStore
from storage.parts import read_commits
from storage.records import Controller
from storage.runs import store_config
from storage.summary import write_run_json
from storage.verify import verify


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    # No power fails here, and waiting for the disk is what a made run would take most of its time for.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


@pytest.fixture
def run(store: LocalStore) -> MadeRun:
    """A run that could finish now."""
    return made_run.finished(store, end=False)


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
        "failures": 0,
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
    assert "run-00000003 was trained on at steps 2, 3 and may be used 1x" in run.told(
        "trained_twice"
    )


def test_a_group_that_is_twice_in_a_batch_is_found(run: MadeRun) -> None:
    run.round(3, [5], table([5], [2, 2]))
    run.train(3, [5, 5])
    assert "run-00000005 is in the batch of step 3 2 times" in run.told("trained_twice")


def test_an_age_above_the_bound_is_found(run: MadeRun) -> None:
    run.round(3, [5], table([5], [2, 0]))
    run.train(3, [5], age=2)
    assert run.problems() == [("age", "run-00000005")]
    assert "step 3 trained on group run-00000005 at age 2; at most 1 is allowed" in run.told("age")


def test_tokens_of_a_version_that_was_not_there_yet_are_found(run: MadeRun) -> None:
    run.round(3, [5], table([5], [3, 2]))
    run.train(3, [5])
    assert "run-00000005, which has tokens of version 3" in run.told("age")


def test_an_age_that_was_logged_wrongly_is_found(run: MadeRun) -> None:
    run.edit_fact("step", 1, age_max=0, age_mean=0.0)
    assert "its episodes have 1 and 1.0" in run.told("age")


def test_a_group_that_was_dropped_and_trained_is_found(run: MadeRun) -> None:
    run.drop(2, "stale")
    assert "run-00000002" in run.told("trained_and_dropped")


def test_a_short_group_is_found(store: LocalStore) -> None:
    run = made_run.finished(store, cut=lambda table: table.slice(1))
    assert [each for each in run.problems() if each[0] == "short_group"] == [
        ("short_group", "run-00000000"),
        ("short_group", "run-00000002"),
    ]
    assert "samples [1] where 0 to 1 are due" in run.told("short_group")


def test_an_episode_of_another_prompt_is_found(store: LocalStore) -> None:
    def swap(table: pa.Table) -> pa.Table:
        place = SCHEMA.get_field_index("prompt_id")
        return table.set_column(place, SCHEMA.field(place), table["prompt_id"].take([1, 2, 0, 3]))

    run = made_run.finished(store, cut=lambda t: swap(t) if t.num_rows == 4 else t)
    assert run.problems() == [("episode", "run-00000000-001"), ("episode", "run-00000001-000")]


def test_a_forgotten_group_is_found(run: MadeRun) -> None:
    run.admit(2, [5])
    run.end()
    assert run.problems() == [("pending", "run-00000005")]


def test_admission_beyond_the_age_bound_is_found(run: MadeRun) -> None:
    run.admit(2, [5, 6, 7, 8])
    assert run.problems() == []
    run.admit(2, [9])
    assert "5 groups were pending at once; the age bound allows 4" in run.told("admission")


def test_the_admission_of_other_runs_groups_has_no_bound(store: LocalStore) -> None:
    other = made_run.finished(store)
    replay = made_run.replaying(store, other, end=False)
    replay.edit(layout.config_key("replay"), lambda config: config.update(groups_per_step=0))
    assert "admission" not in [kind for kind, _ in replay.problems()]


def test_a_group_without_a_signal_in_a_batch_is_found(run: MadeRun) -> None:
    run.round(3, [5, 6], table([5, 6], [2, 2], flat=[6]))
    run.train(3, [5, 6])
    assert run.problems() == [("signal", "run-00000006")]


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
    assert [kind for kind, _ in run.problems()] == kinds


def test_a_group_that_was_never_scored_cannot_lack_a_signal(run: MadeRun) -> None:
    run.admit(3, [5])
    run.drop(5, "no_signal", step=3)
    assert "run-00000005 was dropped as no_signal and never scored" in run.told("signal")


def test_seeds_that_repeat_are_found(run: MadeRun) -> None:
    def seeded(draw: int, seed: int) -> pa.Table:
        place = SCHEMA.get_field_index("seed")
        return table([draw], [2, 2]).set_column(
            place, SCHEMA.field(place), pa.array([seed, draw], pa.int64())
        )

    run.round(3, [5], seeded(5, 77))
    run.round(4, [6], seeded(6, 77))
    assert run.told("seed") == (
        "episodes run-00000005-000, run-00000006-000 were sampled with one seed, 77"
    )


def test_a_group_that_is_generated_again_after_its_commit_is_found(run: MadeRun) -> None:
    run.log.append(run.generate(7, table([2], [1, 1])))
    assert run.problems() == [("generated_again", "run-00000002")]


# Evaluations, checkpoints and the rest


def test_a_part_of_another_size_than_was_logged_is_found(run: MadeRun) -> None:
    run.edit_fact("committed", 0, bytes=1)
    assert "the log says 1 bytes of" in run.told("commit")


def test_a_wrong_score_of_an_evaluation_is_found(run: MadeRun) -> None:
    run.evaluate("final", 2, greedy=0.9)
    assert "as 0.9 greedy; its episodes give 1.05" in run.told("evaluation")


def test_a_wrong_pass_at_k_is_found(run: MadeRun) -> None:
    """Of the sampled answers, with rewards 0 and 0.1, none is right."""
    run.evaluate("final", 2, pass_at={1: 0.5})
    assert "with pass@1 0.5; its episodes give 0.0" in run.told("evaluation")


def test_a_held_out_prompt_that_was_trained_on_is_found(run: MadeRun) -> None:
    run.evaluate("final", 2, held_out=False)
    assert "prompt p0 of evaluation final" in run.told("held_out")


def test_an_evaluation_of_other_weights_is_found(run: MadeRun) -> None:
    run.edit_fact("evaluated", policy_version=2)
    assert "is logged for policy version 2; its tokens are of [0]" in run.told("evaluation")


def test_an_evaluation_that_lacks_a_prompt_is_found(run: MadeRun) -> None:
    run.edit_fact("evaluated", num_prompts=3)
    assert "prompt 2 of evaluation initial has samples [] where [0, 1] are due" in run.told(
        "evaluation"
    )


def test_an_evaluation_under_anothers_name_is_found(run: MadeRun) -> None:
    run.edit_fact("evaluated", name="final")
    assert "run-initial-00000000-000 is not of evaluation final of run run" in run.told("episode")


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
    file = made_episodes.file_of(description, data).model_dump(mode="json")
    run.edit(key, lambda entry: entry["facts"][0]["files"].__setitem__(-1, file))
    assert f"{description} says other things than the log of step" in run.told("checkpoint")


def test_rows_of_a_part_that_was_compacted_away_are_read(run: MadeRun) -> None:
    commits = read_commits(run.store, "run")
    assert compact(run.store, plan_compaction(run.store, "run", commits, whole=True))
    run.part(0).unlink()
    run.part(1).unlink()
    report = verify(run.store, "run")
    assert report.problems == []
    assert report.counted["compactions"] == 1


def test_a_compaction_that_cannot_be_read_is_found(run: MadeRun) -> None:
    commits = read_commits(run.store, "run")
    assert compact(run.store, plan_compaction(run.store, "run", commits, whole=True))
    run.store.replace(layout.compaction_key("run", 0), b"{")
    assert [kind for kind, _ in run.problems()] == ["compaction"]


def test_a_compaction_that_holds_other_rows_is_found(run: MadeRun) -> None:
    commits = read_commits(run.store, "run")
    assert compact(run.store, plan_compaction(run.store, "run", commits, whole=True))
    key = layout.compaction_key("run", 0)
    run.edit(key, lambda compaction: compaction["commits"][0].update(rows_digest="0" * 64))
    assert run.problems() == [("compaction", key)]


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
    assert [kind for kind, _ in run.problems()] == kinds


def test_a_run_json_that_lags_behind_a_living_run_is_no_problem(store: LocalStore) -> None:
    store_config(store, "run", CONFIG)
    log = RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))
    write_run_json(store, "run")
    log.append(facts.Retry(stage="train", attempt=1, cause="test", seconds=1.0))
    assert verify(store, "run").ok


def test_a_config_without_bounds_is_found(run: MadeRun) -> None:
    run.edit(layout.config_key("run"), lambda config: config.pop("max_policy_age"))
    assert "sets no max_policy_age" in run.told("config")


@pytest.mark.parametrize("replay", [3, {}, {"runs": "a"}, {"runs": [], "epochs": "2"}])
def test_a_config_with_half_a_replay_is_found(run: MadeRun, replay: object) -> None:
    run.edit(layout.config_key("run"), lambda config: config.update(replay=replay))
    assert "sets no whole replay" in run.told("config")


def test_an_unknown_run_is_refused(store: LocalStore) -> None:
    with pytest.raises(ValueError, match="has no run 'absent'"):
        verify(store, "absent")
