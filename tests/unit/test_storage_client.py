"""The client: a run's episodes, steps and groups as tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_run import StoredRun, table_of

from storage import facts
from storage.client import Run
from storage.compaction import compact, plan_compaction
from storage.deleting import delete_run
from storage.objects import LocalStore


@pytest.fixture
def made(tmp_path: Path) -> StoredRun:
    """Three groups trained on in two steps, one dropped."""
    run = StoredRun(LocalStore(tmp_path / "store"))
    run.commit([0, 1])
    run.commit([2, 3], version=1, environment="words")
    run.train(1, [0], reward=0.5)
    run.train(2, [1, 2], reward=0.75, loss=0.25)
    run.log.append(facts.Dropped(group_ids=("run-00000003",), reason="stale", step=2))
    return run


def test_episodes_are_those_that_the_log_counts(made: StoredRun) -> None:
    made.unlogged_commit([9])
    run = Run(made.store.uri, "run")
    due = pa.concat_tables([table_of("run", [0, 1]), table_of("run", [2, 3])])["episode_id"]
    assert run.episodes()["episode_id"].equals(due)
    batches = list(run.batches(["episode_id"]))
    assert [batch.num_rows for batch in batches] == [4, 4]
    assert pa.Table.from_batches(batches)["episode_id"].equals(due)
    some = run.episodes(["draw"], environments=["words"], min_reward=2.05)
    assert some.to_pydict() == {"draw": [2, 3, 3]}
    snapshot = run.snapshot(min_policy_version=1)
    assert snapshot.table(["draw"])["draw"].to_pylist() == [2, 2, 3, 3]
    assert snapshot.record.filters.min_policy_version == 1


def test_files_hold_each_episode_once_whatever_was_compacted(made: StoredRun) -> None:
    made.commit(range(100, 700))
    run = Run(made.store, "run")
    commits = run.snapshot().commits
    due = run.episodes().sort_by("episode_id")

    def check(*, parts: int) -> None:
        files = run.files()
        assert len(files) == parts
        table = pq.read_table(files)
        assert table.num_rows == due.num_rows
        assert table.sort_by("episode_id")["episode_id"].equals(due["episode_id"])

    check(parts=3)
    assert compact(made.store, plan_compaction(made.store, "run", commits, whole=True))
    check(parts=2)
    for commit in commits[:2]:
        made.store.delete(commit.part.key)
        check(parts=2)
    made.commit([800])
    due = run.episodes().sort_by("episode_id")
    check(parts=3)
    commits = run.snapshot().commits
    assert compact(made.store, plan_compaction(made.store, "run", commits, whole=True))
    check(parts=2)


def test_steps_and_groups_are_tables(made: StoredRun) -> None:
    made.train(2, [1, 2], reward=1.0, loss=0.125)
    run = Run(made.store, "run")
    assert run.steps().to_pydict() == {
        "step": [1, 2],
        "policy_version": [1, 2],
        "age_max": [1, 1],
        "age_mean": [1.0, 1.0],
        "groups": [1, 2],
        "optimizer_updates": [1, 1],
        "loss": [None, 0.125],
        "reward": [0.5, 1.0],
    }
    groups = run.groups()
    assert groups["group_id"].to_pylist() == [f"run-0000000{n}" for n in range(4)]
    assert groups["state"].to_pylist() == ["trained"] * 3 + ["dropped"]
    assert groups["steps"].to_pylist() == [[1], [2], [2], []]
    assert groups["reason"].to_pylist() == [None, None, None, "stale"]
    assert groups["draw"].to_pylist() == [0, 1, 2, 3]
    assert groups["prompt_id"].to_pylist() == ["p0", "p1", "p2", "p3"]
    first, second = (f"episodes/commits/run/00000{n}-000.json" for n in (0, 1))
    assert groups["commit"].to_pylist() == [first, first, second, second]
    assert groups["episodes"].to_pylist() == [2] * 4
    assert run.summary()["groups"]["dropped"] == {"stale": 1}
    assert run.config()["steps"] == 2


def test_a_run_without_anything_has_empty_tables(tmp_path: Path) -> None:
    run = Run(StoredRun(LocalStore(tmp_path / "store")).store, "run")
    assert run.steps().num_rows == run.groups().num_rows == run.episodes().num_rows == 0
    assert run.steps().column_names[:2] == ["step", "policy_version"]
    assert list(run.batches()) == []


def test_runs_that_do_not_exist_are_refused(made: StoredRun) -> None:
    with pytest.raises(ValueError, match="has no run 'none'"):
        Run(made.store.uri, "none")
    run = Run(made.store.uri, "run")
    delete_run(made.store, "run")
    for read in (run.episodes, run.steps, run.groups, run.summary, run.snapshot, run.config):
        with pytest.raises(ValueError, match="run 'run' was deleted"):
            read()
    with pytest.raises(ValueError, match="run 'run' was deleted"):
        Run(made.store.uri, "run")


def test_filters_and_columns_are_checked_in_one_sentence(made: StoredRun) -> None:
    run = Run(made.store, "run")
    for filters, complaint in (
        ({"luck": 1}, "episodes have no filter luck: take some of environments, "),
        ({"min_reward": "much"}, "filter min_reward: "),
        ({"min_reward": 2, "max_reward": 1}, "min_reward 2.0 is above max_reward 1.0"),
    ):
        with pytest.raises(ValueError, match=complaint) as refused:
            run.episodes(**filters)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="episodes have no column luck"):
        run.episodes(["luck"])
