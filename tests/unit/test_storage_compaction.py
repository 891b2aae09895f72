"""Compaction: the same rows in the same order, whoever looks, and wherever a compactor dies."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from stored_run import StoredRun, table_of

from storage import episodes, layout
from storage.compaction import (
    Plan,
    check_compaction,
    compact,
    plan_compaction,
    rows_digest,
)
from storage.objects import LocalStore, ObjectNotFound
from storage.parts import CommitReader, encode_part, read_commit, read_committed
from storage.places import Compaction, read_compactions
from storage.records import Commit
from storage.sampling import Sampler, sample
from storage.snapshots import Filters, Snapshot, open_snapshot, take_snapshot


class _Dies(Exception):
    pass


class _Faulty(LocalStore):
    """A store whose user dies before one of its writes, or just after it."""

    def die(self, write: int, *, after: bool) -> None:
        object.__setattr__(self, "plan", (write, after))
        object.__setattr__(self, "writes", 0)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        write, after = self.plan
        object.__setattr__(self, "writes", self.writes + 1)
        if self.writes == write and not after:
            raise _Dies
        created = super().put_if_absent(key, data)
        if self.writes == write:
            raise _Dies
        return created

    plan: tuple[int, bool] = (0, False)
    writes: int = 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """A run of nine small commits and a large one in their midst."""
    run = StoredRun(LocalStore(tmp_path_factory.mktemp("made") / "store"))
    for number in range(10):
        draws = range(1000, 1500) if number == 4 else range(3 * number, 3 * number + 3)
        run.commit(draws, version=number, environment="words" if number % 3 == 0 else "sums")
    return run


@pytest.fixture
def run(made: StoredRun, tmp_path: Path) -> StoredRun:
    return made.copied_to(tmp_path / "store")


def _compact(run: StoredRun, *, whole: bool = True) -> Compaction | None:
    commits = take_snapshot(run.store, [run.run_id]).commits
    return compact(run.store, plan_compaction(run.store, run.run_id, commits, whole=whole))


def _remove(run: StoredRun, commits: Sequence[Commit]) -> None:
    for commit in commits:
        run.store.local_path(commit.part.key).unlink()


def _reads(snapshot: Snapshot) -> Iterator[pa.Table]:
    """A snapshot in every way that it can be read."""
    yield snapshot.table()
    yield snapshot.table(["reward", "turns"])
    yield pa.concat_tables(CommitReader(snapshot.store).read(each) for each in snapshot.commits)
    yield sample(snapshot, 700, seed=3)
    yield Sampler(snapshot).sample(900, seed=3, columns=["episode_id"], replace=True)
    chosen = {"run-00000001", "run-00000008", "run-00001003"}
    yield read_committed(snapshot.store, "run", group_ids=chosen, commits=snapshot.commits)
    filters = Filters(environments=("words",), min_policy_version=4, max_reward=19.0)
    yield take_snapshot(snapshot.store, ["run"], filters).table()


def test_a_reader_of_an_old_snapshot_never_notices(run: StoredRun) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    before = list(_reads(snapshot))
    open_reader, sampler = CommitReader(run.store, cache_bytes=1), Sampler(snapshot)
    open_reader.read(snapshot.commits[0])
    under_way = snapshot.tables(["episode_id"])
    first = next(under_way)
    compaction = _compact(run)
    assert compaction is not None
    assert [part.rows for part in compaction.parts] == [54]
    assert len(compaction.commits) == 9
    for left, right in zip(before, _reads(snapshot), strict=True):
        assert left.equals(right)
    _remove(run, [commit for commit in snapshot.commits if commit.rows < 1000])
    for left, right in zip(before, _reads(snapshot), strict=True):
        assert left.equals(right)
    assert open_snapshot(run.store, snapshot.record).table().equals(before[0])
    assert read_commit(run.store, snapshot.commits[7]).equals(
        table_of("run", [21, 22, 23], version=7)
    )
    for commit in snapshot.commits:
        assert open_reader.read(commit).equals(read_commit(run.store, commit))
    assert sampler.sample(700, seed=3).equals(before[3])
    assert pa.concat_tables([first, *under_way]).equals(before[0].select(["episode_id"]))


def test_a_newer_compaction_takes_over_from_an_older(run: StoredRun) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    before = snapshot.table()
    first = _compact(run)
    assert first is not None
    _remove(run, [commit for commit in snapshot.commits if commit.rows < 1000])
    reader = CommitReader(run.store, cache_bytes=1)
    assert pa.concat_tables(map(reader.read, snapshot.commits)).equals(before)
    assert _compact(run) is None, "one part was made of one part"
    run.commit([500, 501])
    second = _compact(run)
    assert second is not None
    assert (second.number, len(second.parts), len(second.commits)) == (1, 1, 10)
    run.store.local_path(first.parts[0].key).unlink()
    assert pa.concat_tables(map(reader.read, snapshot.commits)).equals(before)
    assert snapshot.table().equals(before)


def test_what_does_not_fill_a_part_waits_unless_the_run_is_over(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = take_snapshot(run.store, ["run"]).commits
    small = [commit for commit in commits if commit.rows < 1000]

    def plan(*, whole: bool) -> list[list[int]]:
        planned = plan_compaction(run.store, "run", commits, whole=whole)
        return [[small.index(commit) for commit in batch] for batch in planned.batches]

    assert plan(whole=False) == []
    assert plan(whole=True) == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
    monkeypatch.setattr("storage.compaction.SMALL_ROWS", 18)
    monkeypatch.setattr("storage.compaction.TARGET_ROWS", 18)
    assert plan(whole=True) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    monkeypatch.setattr("storage.compaction.MOST_ROWS", 12)
    assert plan(whole=False) == []
    assert plan(whole=True) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    monkeypatch.setattr("storage.compaction.TARGET_BYTES", small[0].part.bytes * 3 // 2)
    monkeypatch.setattr("storage.compaction.MOST_ROWS", 100)
    assert plan(whole=True) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_rows_that_lie_together_are_compacted_together(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = take_snapshot(run.store, ["run"]).commits
    small = [commit for commit in commits if commit.rows < 1000]
    compact(run.store, Plan(run_id="run", number=0, batches=((small[1], small[3], small[8]),)))
    monkeypatch.setattr("storage.compaction.TARGET_ROWS", 18)
    plan = plan_compaction(run.store, "run", commits, whole=True)
    assert plan.number == 1
    batches = [[small.index(commit) for commit in batch] for batch in plan.batches]
    assert batches == [[0, 1, 3, 8], [2, 4, 5], [6, 7]]


def test_of_two_compactors_one_wins_and_the_other_is_harmless(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    before = snapshot.table()
    plan = plan_compaction(run.store, "run", snapshot.commits, whole=True)
    racing: list[Compaction | None] = []
    late = plan_compaction(run.store, "run", snapshot.commits, whole=True)

    def meanwhile(*arguments: Any) -> None:
        if not racing:
            racing.append(None)
            racing[0] = compact(run.store, plan)
        check_compaction(*arguments)

    monkeypatch.setattr("storage.compaction.check_compaction", meanwhile)
    assert compact(run.store, plan) is None
    assert read_compactions(run.store, "run") == racing
    assert compact(run.store, late) is None, "what was planned before the other one won"
    assert len(run.store.keys(layout.compacted_folder("run"))) == 3
    _remove(run, [commit for commit in snapshot.commits if commit.rows < 1000])
    assert snapshot.table().equals(before)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_compactor_may_die_at_any_write(run: StoredRun, write: int, after: bool) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    before = snapshot.table()
    small = [commit for commit in snapshot.commits if commit.rows < 1000]
    plan = Plan(run_id="run", number=0, batches=(tuple(small[:4]), tuple(small[4:])))
    faulty = _Faulty(run.store.root)
    faulty.die(write, after=after)
    with pytest.raises(_Dies):
        compact(faulty, plan)
    stands = bool(read_compactions(run.store, "run"))
    assert stands == (write == 3 and after)
    assert snapshot.table().equals(before)
    if not stands:
        assert _compact(run) is not None
    _remove(run, small)
    assert snapshot.table().equals(before)


def test_rows_that_are_not_those_of_the_commit_are_found(run: StoredRun) -> None:
    compaction = _compact(run)
    assert compaction is not None
    commits = take_snapshot(run.store, ["run"]).commits
    check_compaction(run.store, compaction, commits)
    moved = compaction.model_copy(
        update={
            "commits": tuple(
                each.model_copy(update={"offset": max(0, each.offset - 1)})
                for each in compaction.commits
            )
        }
    )
    with pytest.raises(ValueError, match="has other episodes than commit 000001-000"):
        check_compaction(run.store, moved, commits)
    run.store.replace(compaction.parts[0].key, b"broken")
    with pytest.raises(ValueError, match=compaction.parts[0].key):
        check_compaction(run.store, compaction, commits)


def test_a_compaction_of_another_part_or_beyond_its_end_is_not_believed(run: StoredRun) -> None:
    compaction = _compact(run)
    assert compaction is not None
    commit = take_snapshot(run.store, ["run"]).commits[0]
    _remove(run, [commit])
    key = layout.compaction_key("run", 0)
    first = compaction.commits[0]

    def rewrite(**update: Any) -> None:
        changed = (first.model_copy(update=update), *compaction.commits[1:])
        run.store.replace(key, compaction.model_copy(update={"commits": changed}).to_bytes())

    rewrite(sha256="0" * 64)
    with pytest.raises(ObjectNotFound, match=commit.part.key):
        read_commit(run.store, commit)
    rewrite(offset=50)
    with pytest.raises(ValueError, match=r"has 54 episodes.*000000-000 would be 6 from number 50"):
        read_commit(run.store, commit)
    run.store.replace(key, b"\x80\x04.")
    with pytest.raises(ValueError, match=f"{key} is no valid Compaction"):
        read_commit(run.store, commit)


def test_a_digest_is_that_of_the_values() -> None:
    table = table_of("run", range(8), version=1)
    digest = rows_digest(table)
    assert rows_digest(table_of("run", range(9), version=1).slice(0, 16)) == digest
    assert rows_digest(pa.concat_tables([table.slice(0, 5), table.slice(5)])) == digest
    read = pa.concat_tables([episodes.SCHEMA.empty_table(), table])
    assert encode_part(read) and rows_digest(read) == digest
    rows = table.to_pylist()
    changes: list[dict[str, Any]] = [
        {"answer": None},
        {"answer": ""},
        {"reward": None},
        {"response": "22"},
        {"response_token_ids": [1, 1, 8]},
        {"logprobs": [-0.5, -2.0, 0.0]},
        {"turns": [{"role": "assistant", "start": 0, "end": 2}]},
        {"turns": []},
        {"scores": None},
        {"draw": 17},
    ]
    digests = {digest}
    for change in changes:
        changed = [*rows[:3], {**rows[3], **change}, *rows[4:]]
        digests.add(rows_digest(pa.Table.from_pylist(changed, episodes.SCHEMA)))
    # The same tokens and letters, divided otherwise among two episodes.
    for name, first, second in (
        ("prompt_token_ids", [], [5, 5, 5]),
        ("response", "", "222"),
    ):
        for left, right in ((first, second), (second, first)):
            moved = [*rows[:3], {**rows[3], name: left}, {**rows[4], name: right}, *rows[5:]]
            digests.add(rows_digest(pa.Table.from_pylist(moved, episodes.SCHEMA)))
    assert len(digests) == 1 + len(changes) + 4


def test_compacted_parts_of_an_older_schema_are_checked_as_they_were(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    compaction = _compact(run)
    assert compaction is not None
    commits = take_snapshot(run.store, ["run"]).commits
    grown = episodes.SCHEMA.append(pa.field("luck", pa.int64()))
    grown = grown.with_metadata({"forgeflow.schema_version": "3"})
    for module in ("episodes", "part_file", "parts"):
        monkeypatch.setattr(f"storage.{module}.SCHEMA", grown)
    monkeypatch.setattr(episodes, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(
        episodes, "ADDED", (*episodes.ADDED, episodes.Added(version=3, name="luck", value=7))
    )
    check_compaction(run.store, compaction, commits)
    _remove(run, commits[:1])
    assert read_commit(run.store, commits[0], ["luck"])["luck"].to_pylist() == [7] * 6
