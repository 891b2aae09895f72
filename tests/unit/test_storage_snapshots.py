"""Snapshots: what the logs counted, filtered to the row, the same for ever."""

from pathlib import Path

import pyarrow as pa
import pytest
from stored_run import StoredRun, table_of

from storage import layout
from storage.objects import LocalStore, ObjectNotFound
from storage.records import Commit
from storage.snapshots import Filters, SnapshotRecord, open_snapshot, take_snapshot
from storage.tombstones import Tombstone


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def run(store: LocalStore) -> StoredRun:
    """Three commits: versions 0, 2 and 4 and the one after each; rewards from 0, 2 and 4."""
    run = StoredRun(store)
    run.commit([0, 1], version=0)
    run.commit([2, 3], version=2, environment="words")
    run.commit([4, 5], version=4)
    return run


def _draws(table: pa.Table) -> list[int]:
    return list(dict.fromkeys(table["draw"].to_pylist()))


def _break_parts(store: LocalStore, commits: list[Commit]) -> None:
    for commit in commits:
        store.replace(commit.part.key, b"broken")


def test_a_snapshot_is_what_the_logs_count_when_it_is_taken(run: StoredRun) -> None:
    other = StoredRun(run.store, "other")
    other.commit([7])
    run.unlogged_commit([9])
    snapshot = take_snapshot(run.store, ["run", "other"])
    tables = [table_of("other", [7]), *(table_of("run", pair) for pair in ([0, 1], [2, 3], [4, 5]))]
    due = pa.concat_tables(tables)["episode_id"]
    assert snapshot.table(["episode_id"])["episode_id"].equals(due)
    assert snapshot.record.runs == ("other", "run")
    run.commit([6])
    assert snapshot.table(["episode_id"])["episode_id"].equals(due)
    again = open_snapshot(
        run.store, SnapshotRecord.model_validate_json(snapshot.record.to_bytes(), strict=True)
    )
    assert again.record == snapshot.record
    assert again.table().equals(snapshot.table())
    assert take_snapshot(run.store, ["run", "other"]).record.sha256 != snapshot.record.sha256


@pytest.mark.parametrize(
    ("filters", "draws", "opened"),
    [
        (Filters(), [0, 1, 2, 3, 4, 5], [0, 1, 2]),
        (Filters(environments=("words", "none")), [2, 3], [1]),
        (Filters(min_policy_version=2), [2, 3, 4, 5], [1, 2]),
        (Filters(min_policy_version=1), [2, 3, 4, 5], [0, 1, 2]),
        (Filters(max_policy_version=3), [0, 1, 2, 3], [0, 1]),
        (Filters(max_policy_version=2), [0, 1], [0, 1]),
        (Filters(min_reward=3.05), [3, 4, 5], [1, 2]),
        (Filters(min_reward=2.0, max_reward=2.0), [2], [1]),
        (Filters(max_reward=-1.0), [], []),
        (Filters(min_reward=1.0, max_policy_version=1, environments=("sums",)), [1], [0]),
    ],
)
def test_filters_prune_by_commit_and_then_choose_rows(
    run: StoredRun, filters: Filters, draws: list[int], opened: list[int]
) -> None:
    everything = take_snapshot(run.store, ["run"]).commits
    _break_parts(run.store, [each for n, each in enumerate(everything) if n not in opened])
    snapshot = take_snapshot(run.store, ["run"], filters)
    assert list(snapshot.commits) == [everything[number] for number in opened]
    table = snapshot.table(["reward", "draw"])
    assert table.column_names == ["reward", "draw"]
    assert _draws(table) == draws
    rows = zip(table["draw"].to_pylist(), table["reward"].to_pylist(), strict=True)
    for draw, reward in rows:
        assert (filters.min_reward or -9) <= reward <= (filters.max_reward or 9), draw


def test_one_of_a_groups_episodes_may_be_wanted(run: StoredRun) -> None:
    rewards = take_snapshot(run.store, ["run"], Filters(min_reward=3.05)).table(["reward"])
    assert rewards["reward"].to_pylist() == [3.1, 4.0, 4.1, 5.0, 5.1]


def test_filters_that_nothing_can_pass_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_reward 2\.0 is above max_reward 1\.0"):
        Filters(min_reward=2.0, max_reward=1.0)
    with pytest.raises(ValueError, match="min_policy_version 3 is above max_policy_version 2"):
        Filters(min_policy_version=3, max_policy_version=2)


def test_no_more_than_a_row_group_is_decoded_at_a_time(store: LocalStore) -> None:
    run = StoredRun(store)
    run.commit(range(1300))
    run.commit([2000])
    sizes = [table.num_rows for table in take_snapshot(store, ["run"]).tables(["draw"])]
    assert sizes == [1024, 1024, 552, 2]


def test_a_damaged_part_or_commit_is_refused_by_name(run: StoredRun) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    first = snapshot.commits[0]
    _break_parts(run.store, [first])
    with pytest.raises(ValueError, match=first.part.key):
        snapshot.table()
    run.store.local_path(first.part.key).unlink()
    with pytest.raises(ObjectNotFound, match=first.part.key):
        snapshot.table()
    changed = first.model_copy(update={"rows": first.rows + 1})
    run.store.replace(snapshot.record.commits[0], changed.to_bytes())
    with pytest.raises(ValueError, match="a commit of runs run is not what it was"):
        open_snapshot(run.store, snapshot.record)
    run.store.local_path(snapshot.record.commits[0]).unlink()
    for attempt in (
        lambda: open_snapshot(run.store, snapshot.record),
        lambda: take_snapshot(run.store, ["run"]),
    ):
        with pytest.raises(ValueError, match=f"{snapshot.record.commits[0]} is gone"):
            attempt()


def test_runs_that_do_not_exist_or_were_deleted_have_no_snapshot(run: StoredRun) -> None:
    with pytest.raises(ValueError, match="no run 'none'"):
        take_snapshot(run.store, ["none"])
    record = take_snapshot(run.store, ["run"]).record
    tombstone = Tombstone(run_id="run", deleted_at=0.0)
    run.store.put_if_absent(layout.deleted_key("run"), tombstone.to_bytes())
    with pytest.raises(ValueError, match="run 'run' was deleted"):
        take_snapshot(run.store, ["run"])
    with pytest.raises(ValueError, match="run 'run' was deleted"):
        open_snapshot(run.store, record)


def test_columns_that_there_are_not_are_refused(run: StoredRun) -> None:
    with pytest.raises(ValueError, match="episodes have no column luck"):
        take_snapshot(run.store, ["run"]).table(["luck"])
