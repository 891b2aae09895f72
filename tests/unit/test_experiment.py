"""An experiment's decision: when a checkpoint is promoted, once, and what is refused."""

import asyncio
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from made_episodes import table
from made_run import MadeRun
from typer.testing import CliRunner

from flows.cli import app
from forge_core.comparison import compare, judge
from forge_core.config import RunConfig
from forge_core.config.promotion import PromotionConfig
from forge_core.placement.roles import mesh_names
from forge_core.settings import load_config
from storage import facts, layout
from storage.deleting import deletable, expired
from storage.evaluations import prompt_scores
from storage.garbage import Limits
from storage.objects import LocalStore
from storage.parts import write_part
from storage.promotions import (
    Decision,
    ExperimentPlan,
    against_run,
    candidate_run,
    keep_decision,
    keep_plan,
    read_decisions,
)
from tasks.promotion import against_config, decide, plan_experiment, standing_of

CRITERIA = PromotionConfig(resamples=1000)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


def evaluated(
    store: LocalStore, run_id: str, rewards: Sequence[float], *, prompts: str = "held-out-"
) -> MadeRun:
    """A finished run whose checkpoint of step 0 has these scores, greedy answers half as good."""
    config = load_config(preset="tiny", file=None, overrides=[]).model_dump(mode="json")
    run = MadeRun(store, run_id, **config)
    run.warm_start()
    run.checkpoint(0)
    rows = table(range(len(rewards)), [0], run_id=run_id, evaluation="final").to_pylist()
    for row in rows:
        row["prompt_id"] = f"{prompts}{row['draw']}"
        row["reward"] = rewards[row["draw"]] / (1 + row["sample"])
    halves = (rows[::2], rows[1::2])
    prefix = layout.evaluation_prefix(run_id, "final")
    schema = table([0], [0]).schema
    run.log.append(
        facts.Evaluated(
            name="final",
            policy_version=0,
            sampled=sum(rewards) / len(rewards),
            greedy=sum(rewards) / len(rewards) / 2,
            num_prompts=len(rewards),
            parts=tuple(
                write_part(store, f"{prefix}-{i}", pa.Table.from_pylist(half, schema))
                for i, half in enumerate(halves)
            ),
        )
    )
    run.end()
    return run


def carried_out(
    store: LocalStore,
    experiment_id: str,
    rewards: Sequence[float],
    *,
    against: Sequence[float] = (),
    criteria: PromotionConfig = CRITERIA,
    prompts: str = "held-out-",
) -> Decision:
    """All that an experiment does once its runs are finished."""
    evaluated(store, candidate_run(experiment_id), rewards)
    standing = standing_of(store, experiment_id, criteria.line)
    if standing.promoted is not None:
        other = against_run(experiment_id, standing.promoted.number)
        evaluated(store, other, against, prompts=prompts)
    assert keep_decision(store, decide(store, experiment_id, criteria, standing))
    decision = standing_of(store, experiment_id, criteria.line).own
    assert decision is not None
    return decision


LOW, HIGH = [0.0, 0.25] * 20, [0.75, 0.5] * 20


def test_the_first_is_promoted_and_the_same_again_is_declined(store: LocalStore) -> None:
    first = carried_out(store, "first", LOW)
    assert (first.promoted, first.number, first.against) == (True, 1, None)
    assert first.reason == "no checkpoint of line default was promoted before"
    again = carried_out(store, "again", LOW, against=LOW)
    assert (again.promoted, again.number, again.against) == (False, 2, 1)
    assert again.reason == (
        "0.125 against 0.125 of first-candidate@0 on 40 prompts: gain +0, 95% interval +0 to +0, "
        "which does not lie above 0"
    )


def test_a_better_one_takes_the_place_and_the_next_is_held_against_it(store: LocalStore) -> None:
    carried_out(store, "first", LOW)
    better = carried_out(store, "better", HIGH, against=LOW)
    assert better.promoted and "all of it above 0" in better.reason
    worse = carried_out(store, "worse", LOW, against=HIGH)
    assert (worse.promoted, worse.against) == (False, 2)
    assert worse.comparison is not None and worse.comparison.high < 0


def test_greedy_answers_are_compared_if_they_are_asked_for(store: LocalStore) -> None:
    greedy = PromotionConfig(resamples=1000, score="greedy")
    carried_out(store, "first", LOW)
    decision = carried_out(store, "better", HIGH, against=LOW, criteria=greedy)
    assert decision.comparison is not None
    assert (decision.score, decision.comparison.gain) == (0.3125, 0.25)


def test_of_several_samples_the_mean_of_each_prompt_counts(store: LocalStore) -> None:
    rows = table([0, 1], [0], run_id="r", evaluation="final").to_pylist()
    rows += [
        {**row, "sample": 2, "reward": 9.0 + row["draw"], "episode_id": f"{row['group_id']}-002"}
        for row in rows
        if row["sample"]
    ]
    part = write_part(store, "p", pa.Table.from_pylist(rows, table([0], [0]).schema))
    told = facts.Evaluated(
        name="final",
        policy_version=0,
        sampled=0.55,
        greedy=9.5,
        num_prompts=2,
        num_samples=2,
        parts=(part,),
    )
    assert prompt_scores(store, told, "sampled").rewards == pytest.approx((0.5, 0.6))
    assert prompt_scores(store, told, "greedy").rewards == (9.0, 10.0)
    with pytest.raises(ValueError, match="has not the 4 sampled episodes of each of its 2 prompts"):
        prompt_scores(store, told.model_copy(update={"num_samples": 4}), "sampled")


def test_below_min_score_nothing_is_promoted(store: LocalStore) -> None:
    decision = carried_out(store, "first", LOW, criteria=PromotionConfig(min_score=0.5))
    assert decision.promoted is False
    assert decision.reason == "its score 0.125 is below min_score 0.5"


def test_lines_are_apart(store: LocalStore) -> None:
    carried_out(store, "first", HIGH)
    other = carried_out(store, "second", LOW, criteria=PromotionConfig(line="nightly"))
    assert (other.promoted, other.number) == (True, 1)


def test_other_prompts_are_not_compared(store: LocalStore) -> None:
    carried_out(store, "first", LOW)
    with pytest.raises(ValueError, match="did not answer the same prompts"):
        carried_out(store, "second", HIGH, against=LOW, prompts="others-")


def test_of_two_that_decide_at_once_one_looks_again(store: LocalStore) -> None:
    for name in ("left", "right"):
        evaluated(store, candidate_run(name), HIGH)
    standings = {name: standing_of(store, name, "default") for name in ("left", "right")}
    left, right = (decide(store, name, CRITERIA, each) for name, each in standings.items())
    assert left.promoted and right.promoted and left.number == right.number == 1
    assert keep_decision(store, left)
    assert not keep_decision(store, right)
    seen = standing_of(store, "right", "default")
    assert (seen.number, seen.own, seen.promoted) == (2, None, left)
    evaluated(store, against_run("right", 1), HIGH)
    assert keep_decision(store, decide(store, "right", CRITERIA, seen))
    assert [each.promoted for each in read_decisions(store, "default")] == [True, False]


def test_an_experiment_decides_once_however_often_it_is_begun(store: LocalStore) -> None:
    evaluated(store, candidate_run("e"), LOW)
    standing = standing_of(store, "e", "default")
    # Killed after its decision was stored, or held by two at once: both tell the same one.
    assert keep_decision(store, decide(store, "e", CRITERIA, standing))
    assert keep_decision(store, decide(store, "e", CRITERIA, standing))
    assert len(read_decisions(store, "default")) == 1
    own = standing_of(store, "e", "default").own
    assert own is not None and own.experiment_id == "e"


def test_a_gap_in_a_line_is_told(store: LocalStore) -> None:
    carried_out(store, "first", LOW)
    carried_out(store, "second", LOW, against=LOW)
    store.delete(layout.promotion_key("default", 1))
    with pytest.raises(ValueError, match=r"promotions/default/000001\.json is missing"):
        read_decisions(store, "default")


def test_the_run_of_a_promoted_checkpoint_is_not_deleted(store: LocalStore) -> None:
    carried_out(store, "first", LOW)
    everything = Limits(before=float("inf"))
    with pytest.raises(ValueError, match="made the newest promoted checkpoint of line default"):
        deletable(store, "first-candidate", everything)
    carried_out(store, "better", HIGH, against=LOW)
    assert deletable(store, "first-candidate", everything)
    runs, _ = expired(store, 0.0, now=float(2**40))
    assert set(runs) == {"first-candidate", "better-against-000001"}


def test_the_interval_holds_the_gain_in_so_many_of_all_cases() -> None:
    random.seed(7)
    truth, hits, cases = 0.1, 0, 200
    for _ in range(cases):
        baseline = [random.random() for _ in range(60)]
        candidate = [each + random.gauss(truth, 0.5) for each in baseline]
        compared = compare(candidate, baseline, CRITERIA)
        hits += compared.low <= truth <= compared.high
    # 95 of 100 up to chance, of which three standard deviations are 4.6 of 100.
    assert 0.90 <= hits / cases <= 0.996


def test_pairs_tell_what_means_alone_do_not() -> None:
    baseline = [float(i) for i in range(40)]
    candidate = [each + 0.1 + 0.01 * (i % 3) for i, each in enumerate(baseline)]
    compared = compare(candidate, baseline, CRITERIA)
    assert compared.low > 0.1 and compared.high < 0.12
    promoted, reason = judge(compared.candidate, compared, CRITERIA, against="r@1")
    assert promoted and "of r@1 on 40 prompts" in reason
    needs_more = PromotionConfig(min_gain=0.2)
    assert judge(compared.candidate, compared, needs_more, against="r@1")[0] is False


@pytest.mark.parametrize(
    ("left", "right", "told"),
    [
        ([1.0], [1.0, 2.0], "1 scores of the candidate and 2 of the baseline cannot be paired"),
        ([], [], "0 scores of the candidate"),
        ([float("nan")], [0.0], "a score is not finite"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(
    left: list[float], right: list[float], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        compare(left, right, CRITERIA)


def test_what_was_promoted_is_evaluated_as_the_candidate_was(store: LocalStore) -> None:
    promoted = carried_out(store, "first", LOW)
    chosen = ["steps=3", "evaluation.num_prompts=7", "seed=5"]
    candidate = load_config(preset="tiny", file=None, overrides=chosen)
    config = against_config(store, candidate, promoted)
    assert config.kind == "evaluate" and config.evaluation == candidate.evaluation
    assert (config.parent_run_id, config.parent_step, config.seed) == ("first-candidate", 0, 5)


def test_an_experiment_goes_on_with_what_it_was_begun_with(store: LocalStore) -> None:
    plan = ExperimentPlan(
        experiment_id="e", config=RunConfig().model_dump(mode="json"), promotion={"line": "a"}
    )
    assert keep_plan(store, plan) == keep_plan(store, plan) == plan
    with pytest.raises(ValueError, match=r"'e' was begun with another promotion \(line differ\)"):
        keep_plan(store, plan.model_copy(update={"promotion": {"line": "b"}}))


def test_one_that_older_code_began_goes_on_although_there_are_more_keys_now(
    store: LocalStore,
) -> None:
    config = load_config(preset="tiny", file=None, overrides=[])
    plan = ExperimentPlan(
        experiment_id="e",
        config=config.model_dump(mode="json", exclude={"sinks"}),
        promotion=PromotionConfig().model_dump(mode="json", exclude={"resamples"}),
    )
    keep_plan(store, plan)
    begun = plan_experiment.fn(store.uri, "e", config, PromotionConfig())
    assert asyncio.run(begun) == (config, PromotionConfig())
    with pytest.raises(ValueError, match="was begun with another"):
        asyncio.run(plan_experiment.fn(store.uri, "e", config, PromotionConfig(min_gain=0.5)))


def test_the_commands_tell_and_refuse(store: LocalStore) -> None:
    runner = CliRunner()

    def told(*arguments: str, code: int) -> str:
        done = runner.invoke(app, [*arguments, "--store", store.uri])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    assert "has no promoted checkpoint" in told("promoted", code=0)
    carried_out(store, "first", LOW)
    carried_out(store, "again", LOW, against=LOW)
    assert told("promoted", code=0).startswith("first-candidate@0 score 0.125 runs/first-cand")
    document = json.loads(told("promoted", "--json", code=0))
    assert document["promoted"] == "first-candidate@0"
    assert [each["promoted"] for each in document["decisions"]] == [True, False]
    assert "needs --preset, --config or --from" in told("experiment", code=2)
    wrong = ("experiment", "--preset", "tiny", "--confidence", "1.5")
    assert "--confidence 1.5: Input should be less than 1" in told(*wrong, code=2)
    wrong = ("experiment", "--preset", "tiny", "--line", "a/b")
    assert "line 'a/b' of promoted checkpoints is not usable" in told(*wrong, code=2)
    wrong = ("experiment", "--preset", "tiny", "--set", "warm_start_only=true")
    assert "warm_start makes no checkpoint to compare" in told(*wrong, code=2)
    keep_plan(
        store,
        ExperimentPlan(
            experiment_id="e", config=RunConfig().model_dump(mode="json"), promotion={"line": "a"}
        ),
    )
    wrong = ("experiment", "--experiment-id", "e", "--preset", "tiny")
    assert "'e' has begun, and goes on with what it was begun with" in told(*wrong, code=2)


def test_a_warm_start_alone_opens_the_trainer_alone() -> None:
    chosen = ["warm_start_only=true", "algorithm.kl.coefficient=0.1"]
    config = load_config(preset="tiny", file=None, overrides=chosen)
    assert (config.kind, mesh_names(config)) == ("warm_start", ("trainer",))
    with pytest.raises(ValueError, match="warm_start_only makes weights"):
        RunConfig(warm_start_only=True, parent_run_id="r", parent_step=0)
    with pytest.raises(ValueError, match="evaluate_only and warm_start_only exclude each other"):
        RunConfig(warm_start_only=True, evaluate_only=True, parent_run_id="r", parent_step=0)
