"""Parts and commits: bad episodes are refused by id, and the first commit stands."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_episodes import episode

from storage import episodes, layout
from storage.episodes import SCHEMA, Added, Figures, check_table, policy_version_bounds
from storage.objects import LocalStore, ObjectNotFound
from storage.parts import (
    CommitReader,
    commit_part,
    encode_part,
    read_commits,
    read_committed,
    read_part,
    write_part,
)

Row = dict[str, Any]


def _row(draw: int, sample: int) -> Row:
    return episode(
        draw,
        sample,
        environment="sums" if draw % 2 else "words",
        response_token_ids=[7, 8, 9],
        logprobs=[-0.5, -1.0, -0.25],
        mask=[True, True, True],
        token_policy_versions=[draw + 2, draw + 1, draw + 1],
        turns=[{"role": "assistant", "start": 0, "end": 3}],
        scores=[{"name": "exact", "value": float(sample)}],
    )


def _table(*draws: int) -> pa.Table:
    rows = [_row(draw, sample) for draw in draws for sample in (0, 1)]
    return pa.Table.from_pylist(rows, SCHEMA)


def test_a_part_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    table = _table(0, 1)
    part = write_part(store, layout.generated_prefix("run", "round-0"), table)
    assert part.key == f"runs/run/generated/round-0-{part.sha256[:8]}.parquet"
    assert (part.rows, part.bytes) == (4, len(store.read(part.key)))
    assert read_part(store, part).equals(table)
    assert read_part(store, part.key, ["reward"]).to_pydict() == {"reward": [0.0, 1.0, 0.0, 1.0]}
    assert write_part(store, "runs/run/generated/round-0", table) == part


def test_equal_tables_have_equal_parts_however_they_are_chunked() -> None:
    whole = _table(0, 1)
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    assert encode_part(chunked) == encode_part(whole)
    assert encode_part(whole.replace_schema_metadata({})) == encode_part(whole)


def test_a_damaged_part_is_refused_by_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    part = write_part(store, "part", _table(0))
    data = store.read(part.key)
    store.replace(part.key, data[:-1])
    with pytest.raises(ValueError, match=f"{part.key} has {part.bytes - 1} bytes"):
        read_part(store, part)
    store.replace(part.key, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ValueError, match=f"{part.key} has other bytes"):
        read_part(store, part)
    with pytest.raises(ValueError, match=f"{part.key} has other bytes"):
        write_part(store, "part", _table(0))
    store.local_path(part.key).unlink()
    with pytest.raises(ObjectNotFound, match=part.key):
        read_part(store, part)


def _store_file(store: LocalStore, table: pa.Table, version: str) -> None:
    """Put a Parquet file of the table, whatever it is, under `part.parquet`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"forgeflow.schema_version": version}), sink)
    store.replace("part.parquet", sink.getvalue().to_pybytes())


def test_a_part_of_a_newer_schema_version_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    _store_file(store, _table(0).append_column("luck", pa.array([1, 2])), "3")
    with pytest.raises(ValueError, match=r"part\.parquet is of schema version 3.*up to 2: read it"):
        read_part(store, "part.parquet")
    for version in ("", "one", "-1"):
        _store_file(store, _table(0), version)
        with pytest.raises(ValueError, match=r"part\.parquet is no part of episodes"):
            read_part(store, "part.parquet")


def test_a_part_of_an_older_schema_version_is_read_as_one_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = (
        Added(version=1, name="attempts", value=1),
        Added(version=1, name="answer", value=None),
    )
    monkeypatch.setattr(episodes, "ADDED", added)
    store = LocalStore(tmp_path)
    old = _table(0).drop_columns(["attempts", "answer"])
    _store_file(store, old, "0")
    table = read_part(store, "part.parquet")
    check_table(table)
    assert (table["attempts"].to_pylist(), table["answer"].to_pylist()) == ([1, 1], [None, None])
    assert table.drop_columns(["attempts", "answer"]).equals(old)
    some = read_part(store, "part.parquet", ["attempts", "sample"])
    assert some.to_pydict() == {"attempts": [1, 1], "sample": [0, 1]}
    assert read_part(store, "part.parquet", ["answer"]).to_pydict() == {"answer": [None, None]}
    assert write_part(store, "new", table).rows == 2
    # A part of today must have them.
    _store_file(store, old, "1")
    with pytest.raises(ValueError, match=r"missing columns \['answer', 'attempts'\]"):
        read_part(store, "part.parquet")


class _Bomb:
    """What would run code if anything unpickled it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return open, (f"{_Bomb.crater}", "w")  # type: ignore[return-value]

    crater: Path


def test_no_pickle_in_a_part_is_ever_loaded(tmp_path: Path) -> None:
    _Bomb.crater = tmp_path / "crater"
    bomb = pickle.dumps(_Bomb())
    store = LocalStore(tmp_path / "store")
    # Where pyarrow once unpickled: an extension type of Python's, in the schema that a Parquet file embeds.
    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    fields = [field.with_metadata(marks) for field in SCHEMA]
    table = pa.Table.from_arrays(_table(0).columns, schema=pa.schema(fields))
    table = table.replace_schema_metadata({"pandas": bomb, "forgeflow.schema_version": "1"})
    for content in (pa.BufferOutputStream(), None):
        if content is not None:
            pq.write_table(table, content)
        store.replace("part.parquet", bomb if content is None else content.getvalue().to_pybytes())
        try:
            read_part(store, "part.parquet")
        except ValueError as error:
            assert "part.parquet" in str(error)
    assert not _Bomb.crater.exists()
    pickle.loads(bomb).close()
    assert _Bomb.crater.exists()


def test_a_table_with_other_columns_is_refused_by_column() -> None:
    table = _table(0).drop_columns(["seed"]).append_column("luck", pa.array([1, 2]))
    table = table.set_column(
        table.schema.get_field_index("draw"), "draw", table["draw"].cast("int32")
    )
    with pytest.raises(ValueError, match=r"missing columns \['seed'\].*\['luck'\].*draw: int32"):
        check_table(table)


def _without_seed(row: Row) -> None:
    row["seed"] = None


def _short_logprobs(row: Row) -> None:
    row["logprobs"] = [-0.5, -1.0]


def _long_mask(row: Row) -> None:
    row["mask"] = [True] * 4


def _no_versions(row: Row) -> None:
    row["token_policy_versions"] = []


def _infinite_logprob(row: Row) -> None:
    row["logprobs"] = [-0.5, float("-inf"), -0.25]


def _null_logprob(row: Row) -> None:
    row["logprobs"] = [-0.5, None, -0.25]


def _nothing_written(row: Row) -> None:
    row["mask"] = [False] * 3


def _empty(row: Row) -> None:
    for name in ("response_token_ids", "logprobs", "mask", "token_policy_versions"):
        row[name] = []


def _double(row: Row) -> None:
    row["episode_id"] = "run-00000000-000"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_without_seed, "has no seed"),
        (_short_logprobs, "one value of logprobs per token"),
        (_long_mask, "one value of mask per token"),
        (_no_versions, "one value of token_policy_versions per token"),
        (_infinite_logprob, "a logprob that is not finite"),
        (_null_logprob, "a logprob that is not finite"),
        (_nothing_written, "no token that the policy wrote"),
        (_empty, "no token that the policy wrote"),
        (_double, "is there twice"),
    ],
)
def test_a_senseless_episode_is_refused_by_id(spoil: Callable[[Row], None], complaint: str) -> None:
    rows = [_row(draw, sample) for draw in (0, 1) for sample in (0, 1)]
    spoil(rows[2])
    with pytest.raises(ValueError, match=complaint) as error:
        check_table(pa.Table.from_pylist(rows, SCHEMA))
    assert rows[2]["episode_id"] in str(error.value)
    assert rows[3]["episode_id"] not in str(error.value)


def test_a_table_without_episodes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        encode_part(SCHEMA.empty_table())


def test_tokens_that_the_policy_did_not_write_have_no_say() -> None:
    row = _row(3, 0)
    row["mask"] = [True, False, True]
    row["logprobs"] = [-0.5, float("nan"), -0.25]
    for unsaid in (-1, 99):
        row["token_policy_versions"] = [4, unsaid, 6]
        table = pa.Table.from_pylist([_row(0, 0), row], SCHEMA)
        check_table(table)
        oldest, newest = policy_version_bounds(table)
        assert (oldest.tolist(), newest.tolist()) == ([1, 4], [2, 6])


def test_figures_are_those_of_the_episodes_also_in_a_slice() -> None:
    assert Figures.of(_table(0, 3, 1).slice(2)) == Figures(
        group_ids=("run-00000003", "run-00000001"),
        rows=4,
        policy_version_min=2,
        policy_version_max=5,
        prompt_tokens=8,
        response_tokens=12,
        environments=("sums",),
    )


def test_the_first_commit_of_a_key_stands(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = commit_part(store, "run", "round-0", _table(0, 1))
    assert commit_part(store, "run", "round-0", _table(2)) == first
    assert first.part.key == f"episodes/data/run/round-0-{first.part.sha256[:8]}.parquet"
    assert store.keys("episodes/commits/") == ["episodes/commits/run/round-0.json"]
    assert (first.group_ids, first.rows) == (("run-00000000", "run-00000001"), 4)
    assert (first.policy_version_min, first.policy_version_max) == (1, 3)
    assert (first.reward_min, first.reward_max, first.reward_mean) == (0.0, 1.0, 0.5)
    assert first.environments == ("sums", "words")
    assert read_commits(store, "run") == [first]


def test_episodes_without_a_reward_or_of_another_run_are_not_committed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for reward in (None, float("nan")):
        rows = [_row(0, 0), {**_row(0, 1), "reward": reward}]
        with pytest.raises(ValueError, match=r"no finite reward: run-00000000-001"):
            commit_part(store, "run", "round-0", pa.Table.from_pylist(rows, SCHEMA))
    with pytest.raises(ValueError, match=r"'other' is given episodes of \['run'\]"):
        commit_part(store, "other", "round-0", _table(0))
    assert store.keys("") == []


def test_only_committed_episodes_are_read_and_only_those_asked_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    commits = [commit_part(store, "run", f"round-{n}", _table(2 * n, 2 * n + 1)) for n in (0, 1)]
    write_part(store, layout.episodes_prefix("run", "round-2"), _table(4))
    assert read_committed(store, "run")["draw"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]
    pinned = read_committed(store, "run", commits=commits[1:], columns=["draw"])
    assert pinned.to_pydict() == {"draw": [2, 2, 3, 3]}
    store.local_path(commits[0].part.key).unlink()
    chosen = read_committed(store, "run", group_ids=["run-00000003"], columns=["sample", "draw"])
    assert chosen.to_pydict() == {"sample": [0, 1], "draw": [3, 3]}
    assert read_committed(store, "none").num_rows == 0


def test_parts_are_fetched_several_at_a_time_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    commits = [commit_part(store, "run", f"round-{n}", _table(n)) for n in range(6)]
    fetched: list[list[int]] = []
    numbers = {commit.part.key: number for number, commit in enumerate(commits)}
    read = LocalStore.read

    def read_many(self: LocalStore, keys: list[str]) -> list[bytes]:
        fetched.append([numbers[key] for key in keys])
        return [read(self, key) for key in keys]

    def read_one(self: LocalStore, key: str) -> bytes:
        fetched.append([numbers.get(key, -1)])
        return read(self, key)

    monkeypatch.setattr(LocalStore, "read_many", read_many)
    monkeypatch.setattr(LocalStore, "read", read_one)
    sizes = [commit.part.bytes for commit in commits]

    reader = CommitReader(store, cache_bytes=3 * max(sizes))
    for commit in reader.ahead(commits):
        reader.read(commit)
    assert fetched == [[0, 1, 2], [3, 4, 5]]
    fetched.clear()
    for commit in (commits[5], commits[4], commits[0]):
        reader.read(commit)
    assert fetched == [[0]], "the ones read last were kept"
    fetched.clear()
    # One is damaged: those before it are read all the same.
    data = store.local_path(commits[2].part.key).read_bytes()
    store.replace(commits[2].part.key, data[:-1])
    reader = CommitReader(store)
    coming = reader.ahead(commits)
    assert [reader.read(next(coming)).num_rows for _ in range(2)] == [2, 2]
    with pytest.raises(ValueError, match=commits[2].part.key):
        reader.read(next(coming))
    # One is gone: they are read one by one, and that one is looked for again after a look at the compactions.
    store.local_path(commits[2].part.key).unlink()
    fetched.clear()
    reader = CommitReader(store)
    with pytest.raises(ObjectNotFound, match=commits[2].part.key):
        for commit in reader.ahead(commits):
            reader.read(commit)
    assert fetched == [[0, 1, 2, 3, 4, 5], [0], [1], [2], [2], [2]]
