"""Samples: the rows that a seeded generator drew, and nothing else is decoded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from stored_run import StoredRun

from storage.objects import LocalStore
from storage.part_file import OpenPart
from storage.sampling import Sampler, sample
from storage.snapshots import Filters, Snapshot, open_snapshot, take_snapshot


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Three commits of 20, 2060 and 4 episodes; the second has three row groups."""
    run = StoredRun(LocalStore(tmp_path / "store"))
    run.commit(range(10))
    run.commit(range(10, 1040), version=2)
    run.commit(range(1040, 1042), version=4)
    return take_snapshot(run.store, ["run"])


def test_a_sample_is_the_drawn_rows_in_the_drawn_order(snapshot: Snapshot) -> None:
    everything = snapshot.table()
    for count in (1, 50, 2084):
        drawn = np.random.default_rng(17).choice(2084, count, replace=False)
        due = everything.take(pa.array(drawn))
        got = sample(snapshot, count, seed=17)
        assert got.equals(due)
        assert len(set(got["episode_id"].to_pylist())) == count
    again = open_snapshot(snapshot.store, snapshot.record)
    assert sample(again, 50, seed=17).equals(sample(snapshot, 50, seed=17))
    assert not sample(snapshot, 50, seed=18).equals(sample(snapshot, 50, seed=17))
    sampler = Sampler(snapshot)
    assert sampler.rows(np.array([3, 2083, 3, 20]), ["draw"])["draw"].to_pylist() == [
        1, 1041, 1, 10,
    ]  # fmt: skip
    repeated = sampler.sample(3000, seed=1, columns=["draw"], replace=True)
    assert repeated.num_rows == 3000
    assert sampler.sample(0, seed=1).num_rows == 0


def test_only_the_row_groups_of_drawn_rows_are_decoded(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[list[str], list[int]]] = []
    read = OpenPart.read

    def spy(self: OpenPart, columns: list[str], groups: list[int]) -> pa.Table:
        decoded.append((list(columns), list(groups)))
        return read(self, columns, groups)

    monkeypatch.setattr(OpenPart, "read", spy)
    Sampler(snapshot).rows(np.array([20 + 2059, 20 + 5, 20 + 7]), ["draw"])
    assert decoded == [(["draw"], [0, 2])]


def test_all_rows_are_drawn_alike(snapshot: Snapshot) -> None:
    sampler = Sampler(snapshot)
    counts = np.zeros(2084)
    for seed in range(20):
        table = sampler.sample(1042, seed=(3, seed), columns=["draw", "sample"])
        counts[np.asarray(table["draw"]) * 2 + np.asarray(table["sample"])] += 1
    # Each is drawn 10 times on average, with a standard deviation of sqrt(20 / 4).
    assert abs(counts.mean() - 10) < 1e-9
    assert 1.5 < counts.std() < 3.0
    assert counts.min() >= 0 < counts.max() < 20


def test_only_wanted_rows_are_drawn(snapshot: Snapshot) -> None:
    filters = Filters(min_reward=8.05, max_reward=1039.05)
    filtered = take_snapshot(snapshot.store, ["run"], filters)
    sampler = Sampler(filtered)
    assert sampler.num_rows == 1 + 2 + 2 * 1029 + 1
    drawn = sampler.sample(sampler.num_rows, seed=0, columns=["episode_id"])
    due = filtered.table(["episode_id"])
    assert drawn.sort_by("episode_id").equals(due.sort_by("episode_id"))
    assert sampler.rows(np.arange(5), ["episode_id"]).equals(due.slice(0, 5))


def test_more_than_there_is_cannot_be_drawn(snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="2085 episodes are to be drawn of 2084"):
        sample(snapshot, 2085, seed=0)
    empty = Sampler(take_snapshot(snapshot.store, ["run"], Filters(min_reward=9999.0)))
    assert empty.num_rows == 0
    with pytest.raises(ValueError, match="1 episodes are to be drawn of 0"):
        empty.sample(1, seed=0, replace=True)
