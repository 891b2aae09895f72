"""What a replay trains on: the runs' own steps, whatever was asked for of them, the same whenever it is planned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from flows.replay_config import check_replay, replay_config
from forge_core.actors.messages import TrainRequest
from forge_core.algorithms.data import load_batch
from forge_core.config import RunConfig
from forge_core.replay import PlannedStep, plan_replay, read_sources
from forge_core.scorers import counted_commits
from forge_core.user_code import load_object
from storage import facts
from storage.annotations import ScoreSet, complete_set, open_set, write_scores
from storage.ledger import Ledger
from storage.log import RunLog, read_entries, read_incarnations
from storage.parts import read_commit
from storage.records import Controller
from storage.runs import store_config
from tasks import run as run_module
from tasks.replay import recall
from tasks.run import ActiveRun

MakeRun = Callable[..., Any]


def configure(*runs: Any, **how: Any) -> RunConfig:
    """The config that the command would make."""
    return replay_config([run.run_id for run in runs], store=runs[0].store.uri, **how)


def plan(*runs: Any, **how: Any) -> tuple[PlannedStep, ...]:
    replay = configure(*runs, **how).replay
    assert replay is not None
    return plan_replay(runs[0].store, replay, read_sources(runs[0].store, replay))


def draws(steps: Sequence[PlannedStep]) -> list[list[int]]:
    """Which draws each step considers."""
    return [[int(group_id[-8:]) for group_id in step.group_ids] for step in steps]


def score(run: Any, name: str, scores: Callable[[int, int], float], upto: int = 10**6) -> None:
    """A set of scores: a number for each draw and sample."""
    controller = Controller.this_process(versions={}, git_commit=None)
    open_set(
        run.store,
        ScoreSet(
            run_id=run.run_id,
            name=name,
            verifier="v",
            scorer="v",
            environment=None,
            source=None,
            controller=controller,
            created_at=0.0,
        ),
    )
    commits = counted_commits(run.store, run.run_id)[:upto]
    for commit in commits:
        rows = read_commit(run.store, commit, ["episode_id", "draw", "sample"]).to_pylist()
        values = [scores(row["draw"], row["sample"]) for row in rows]
        ids = [row["episode_id"] for row in rows]
        write_scores(run.store, commit, name, ids, values, [{}] * len(ids), reward_mean=0.0)
    complete_set(run.store, run.run_id, name, commits)


def test_the_default_is_the_runs_own_batches_in_their_order(past_run: MakeRun) -> None:
    """Steps of which nothing was trained on count, for the learning rate goes by steps."""
    run = past_run("r1", steps=3)
    run.step(1, [0, 1, 2, 3], flat=[1])
    run.step(2, [4, 5, 6, 7], flat=[4, 5, 6, 7])
    run.step(3, [8, 9, 10, 11])
    steps = plan(run)
    assert draws(steps) == [[0, 2, 3], [], [8, 9, 10, 11]]
    assert [step.step for step in steps] == [1, 2, 3]
    assert [len(step.replayed) for step in steps] == [1, 0, 1]
    (fact,) = steps[0].replayed
    assert fact.commit == "episodes/commits/r1/000001-000.json"
    assert (fact.run_id, fact.group_size, fact.score_set) == ("r1", 2, "run")
    assert [(draw.draw, draw.prompt_id) for draw in fact.draws] == [(0, "p0"), (2, "p2"), (3, "p3")]
    config = configure(run)
    assert (config.steps, config.parent_run_id, config.parent_step) == (3, "r1", 0)


def test_runs_follow_one_another_and_epochs_repeat_them(past_run: MakeRun) -> None:
    one, two = past_run("r1"), past_run("r2", groups_per_step=8)
    one.step(1, [0, 1])
    two.step(1, [0, 1, 2, 3, 4, 5])
    steps = plan(two, one, epochs=2)
    assert [step.group_ids[0][:2] for step in steps] == ["r2", "r1", "r2", "r1"]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    config = configure(one, two, epochs=2)
    assert (config.steps, config.groups_per_step) == (4, 8)


def test_what_no_step_has_considered_comes_last(past_run: MakeRun) -> None:
    """A run that broke off, or that only collected."""
    run = past_run("r1", groups_per_step=2)
    run.step(1, [0, 1])
    run.round(2, [2, 3, 4, 5, 6])
    run.drop([3], "end_of_run", None)
    run.batch(2, [2])
    assert draws(plan(run)) == [[0, 1], [2], [4, 5], [6]]
    score(run, "new", lambda draw, sample: sample)
    assert draws(plan(run, scores="new")) == [[0, 1], [2], [3, 4], [5, 6]]


def test_by_other_scores_all_that_a_step_considered_counts(past_run: MakeRun) -> None:
    run = past_run("r1")
    run.step(1, [0, 1, 2, 3], flat=[1, 2])
    score(run, "new", lambda draw, sample: draw * sample)
    assert draws(plan(run, scores="new")) == [[0, 1, 2, 3]]
    assert draws(plan(run)) == [[0, 3]]


def test_filters_leave_whole_groups(past_run: MakeRun) -> None:
    run = past_run("r1")
    run.step(1, [0, 1, 2], version=0)
    run.step(2, [3, 4], version=1, environment="words")
    run.step(3, [5, 6], version=1)
    assert draws(plan(run, overrides=["replay.environment=sums"])) == [[0, 1, 2], [5, 6]]
    assert draws(plan(run, overrides=["replay.max_policy_version=0"])) == [[0, 1, 2]]
    assert draws(plan(run, overrides=["replay.min_policy_version=1"])) == [[3, 4], [5, 6]]
    score(run, "new", lambda draw, sample: draw + sample)
    kept = ["replay.min_reward=1.5", "replay.max_reward=4.5"]
    assert draws(plan(run, scores="new", overrides=kept)) == [[1, 2], [3, 4]]
    assert draws(plan(run, overrides=["replay.min_reward=0.5"])) == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(ValueError, match="nothing is left to train on: loosen the filters"):
        plan(run, overrides=["replay.min_reward=0.6"])


def test_a_part_of_several_versions_is_opened(past_run: MakeRun) -> None:
    run = past_run("r1")
    run.step(1, [0, 1], version={0: 0, 1: 3})
    assert draws(plan(run, overrides=["replay.max_policy_version=2"])) == [[0]]


def test_a_plan_is_of_the_log_as_it_was(past_run: MakeRun) -> None:
    """Whoever resumes a replay makes the same plan, whatever the past run has done since."""
    run = past_run("r1")
    run.step(1, [0, 1])
    config = configure(run)
    run.step(2, [2, 3])
    assert config.replay is not None
    sources = read_sources(run.store, config.replay)
    assert draws(plan_replay(run.store, config.replay, sources)) == [[0, 1]]
    assert draws(plan(run)) == [[0, 1], [2, 3]]


def test_advantages_of_a_loop_are_those_of_the_replay(past_run: MakeRun) -> None:
    run = past_run("r1")
    given = {"r1-00000000-000": 2.0, "r1-00000001-001": -1.0}
    run.step(1, [0, 1], advantages=given)
    assert [step.advantages for step in plan(run)] == [given]
    score(run, "new", lambda draw, sample: draw)
    assert [step.advantages for step in plan(run, scores="new")] == [None]
    assert [s.advantages for s in plan(run, scores="new", overrides=["replay.min_reward=1"])] == [
        None
    ]


def test_the_config_is_the_runs_own_without_what_a_replay_does_not_do(past_run: MakeRun) -> None:
    run = past_run(
        "r1",
        regime="async",
        max_policy_age=3,
        reward="rewards.py:gone",
        warm_start={"steps": 9},
        seed=5,
        optimizer={"learning_rate": 0.5},
    )
    run.step(1, [0])
    run.checkpoint(7)
    config = configure(run, overrides=["optimizer.warmup_steps=0", "loss=losses.py:mine"])
    assert (config.regime, config.max_policy_age, config.window) == ("sync", 0, 1)
    assert (config.reward, config.warm_start.steps) == (None, 0)
    assert (config.seed, config.optimizer.learning_rate) == (5, 0.5)
    assert (config.optimizer.warmup_steps, config.loss) == (0, "losses.py:mine")
    with pytest.raises(ValueError, match=r"loss .* there is no file losses.py"):
        check_replay(config, run.store.uri, None)
    other = past_run("r2")
    other.step(1, [0])
    assert configure(other, origin="r1@7").parent_step == 7
    assert configure(other, origin="r1").parent_run_id == "r1"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"origin": "r1@5"}, "'r1' has no checkpoint of step 5: take one of 0"),
        ({"origin": "r9@5"}, "no run 'r9'"),
        ({"origin": "r1@last"}, "names no step"),
        ({"scores": "new"}, r"no scores 'new' \(it has: half\)"),
        ({"scores": "half"}, "cover 1 of its 2 commits: rescore it again"),
        ({"overrides": ["steps=3"]}, "steps 3 is not within 1 and 2"),
        ({"overrides": ["steps=0"]}, "steps 0 is not within 1 and 2"),
        ({"overrides": ["reward=r.py:f"]}, "--set reward=r.py:f: a replay scores nothing: rescore"),
        ({"overrides": ["model.path=x"]}, "--set model.path=x: the model is that of the checkp"),
        ({"overrides": ["regime=async"]}, "--set regime=async: a replay has none; leave it out"),
        ({"overrides": ["replay.enviroment=x"]}, "replay.enviroment = 'x': no such key"),
        (
            {"overrides": ["replay.min_reward=2", "replay.max_reward=1"]},
            "replay.min_reward 2.0 is above max_reward 1.0",
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    past_run: MakeRun, how: dict[str, Any], words: str
) -> None:
    run = past_run("r1")
    run.step(1, [0])
    run.step(2, [1])
    score(run, "half", lambda draw, sample: sample, upto=1)
    with pytest.raises(ValueError, match=words) as caught:
        configure(run, **how)
    assert len(str(caught.value).splitlines()) == 1


def test_runs_that_do_not_fit_are_refused(past_run: MakeRun) -> None:
    run, empty = past_run("r1"), past_run("r2")
    large = past_run("r3", group_size=4)
    other = past_run("r4", model={"tiny": {"hidden_size": 64}})
    for each in (run, large, other):
        each.step(1, [0])
    with pytest.raises(ValueError, match="'r2' has no committed groups"):
        configure(run, empty)
    with pytest.raises(ValueError, match="'r3' have 4 samples and those of run 'r1' 2"):
        configure(run, large)
    with pytest.raises(ValueError, match="'r4' are of another model than the weights of run 'r1'"):
        configure(run, other)
    with pytest.raises(ValueError, match="names 'r1' twice: set epochs"):
        configure(run, run)
    again = past_run("r5")
    for fact in plan(run)[0].replayed:
        again.log.append(fact)
    with pytest.raises(ValueError, match=r"'r5' generated nothing itself: replay .* r1"):
        configure(again)


def test_the_example_is_short_and_scores_as_it_says() -> None:
    example = Path(__file__).parents[2] / "examples" / "new_reward_on_old_episodes.py"
    assert len(example.read_text().splitlines()) < 60
    reward = load_object("reward", f"{example}:digits_in_place")
    fields = [{"sorted_numbers": ["1", "3", "7", "9"]}] * 3
    assert reward(["?"] * 3, ["[1,3,7,9]", "[1,7,3,9]", ""], fields) == [1.0, 0.5, 0.0]


@contextmanager
def replaying(config: RunConfig, store: Any, run_id: str = "new") -> Iterator[ActiveRun]:
    """A replay in this process, without a trainer."""
    store_config(store, run_id, config.model_dump(mode="json"))
    log = RunLog.claim(store, run_id, Controller.this_process(versions={}, git_commit=None))
    run = ActiveRun(
        run_id=run_id,
        config=config,
        store_uri=store.uri,
        store=store,
        log=log,
        ledger=Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id)),
        meshes=cast(Any, None),
        environment=cast(Any, None),
        folder=store.root,
    )
    token = run_module._current.set(run)
    try:
        yield run
    finally:
        run_module._current.reset(token)


def replay_steps(run: ActiveRun, steps: Sequence[PlannedStep]) -> list[Any]:
    """Each step's batch; the log says that it was trained on."""
    batches = []
    for step in steps:
        batch = asyncio.run(cast(Any, recall).__wrapped__(step))
        assert asyncio.run(cast(Any, recall).__wrapped__(step)) == batch
        batches.append(batch)
        run.append(
            facts.Step(
                step=step.step,
                group_ids=batch.group_ids,
                score_set=batch.score_set,
                weights_digest=f"w{step.step}",
                policy_version=step.step,
                optimizer_updates=1,
                age_max=None,
                age_mean=None,
                metrics={},
                checkpoint=None,
            )
        )
    return batches


def test_groups_are_let_in_once_and_what_is_flat_by_the_new_scores_is_dropped(
    past_run: MakeRun,
) -> None:
    past = past_run("r1")
    past.step(1, [0, 1], flat=[0])
    past.step(2, [2, 3])
    score(past, "new", lambda draw, sample: 0.0 if draw == 3 else 2.0 * sample)
    config = configure(past, scores="new", epochs=2)
    with replaying(config, past.store) as run:
        batches = replay_steps(run, plan(past, scores="new", epochs=2))
        assert [batch.group_ids for batch in batches] == [
            past.groups([0, 1]),
            past.groups([2]),
            past.groups([0, 1]),
            past.groups([2]),
        ]
        assert {batch.score_set for batch in batches} == {"new"}
        assert batches[0].metrics["reward"] == 1.0
        assert batches[1].metrics["frac_reward_zero_std"] == 0.5
        ledger = run.ledger
    assert not ledger.problems
    assert ledger.groups["r1-00000000"].steps == (1, 3)
    assert (ledger.dropped, ledger.pending) == ({"no_signal": 1}, [])
    assert ledger.groups.peak_pending == 2


def test_a_replay_goes_on_from_its_log(past_run: MakeRun) -> None:
    past = past_run("r1")
    past.step(1, [0, 1], flat=[0])
    past.step(2, [2, 3])
    score(past, "new", lambda draw, sample: draw * sample)
    config = configure(past, scores="new", epochs=2)
    steps = plan(past, scores="new", epochs=2)
    with replaying(config, past.store) as run:
        whole = replay_steps(run, steps)
    with replaying(config, past.store, "cut") as run:
        replay_steps(run, steps[:1])
        run.append(*steps[1].replayed)
    with replaying(config, past.store, "cut") as run:
        assert replay_steps(run, steps[1:]) == whole[1:]
        assert not run.ledger.problems


def test_the_trainer_reads_the_scores_that_count(past_run: MakeRun) -> None:
    past = past_run("r1")
    past.step(1, [0, 1])
    score(past, "new", lambda draw, sample: 5.0 * draw - sample)
    with replaying(configure(past, scores="new"), past.store) as run:
        (batch,) = replay_steps(run, plan(past, scores="new"))
    request = TrainRequest(
        run_id="new",
        step=1,
        commits=batch.commits,
        group_ids=batch.group_ids,
        score_set=batch.score_set,
    )
    loaded = load_batch(past.store, request, RunConfig())
    assert [sequence.advantage for sequence in loaded.sequences] == pytest.approx(
        [0.7071, -0.7071] * 2, abs=1e-3
    )
    assert loaded.metrics["trained_reward"] == 2.0
    assert (loaded.age_max, loaded.age_mean) == (None, None)
    own = TrainRequest(run_id="r1", step=1, commits=batch.commits, group_ids=batch.group_ids)
    loaded = load_batch(past.store, own, RunConfig())
    assert [sequence.advantage > 0 for sequence in loaded.sequences] == [False, True] * 2
    assert (loaded.age_max, loaded.age_mean) == (0, 0.0)
