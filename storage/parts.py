"""Parts, which are immutable Parquet files of episodes, and the commits that make them count.

A part's name ends in a digest of its bytes, so two contents never share a name, and a part that
nobody committed harms nobody. A commit is named by the logical place of the work in its run: every
attempt has the same name, the first counts.

`CommitReader` finds a commit's rows wherever they lie; nobody else reads a commit's part.
"""

import contextlib
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import layout
from storage.episodes import (
    SCHEMA,
    Figures,
    check_schema,
    check_scored,
    check_table,
    columns_schema,
    reward_mean,
)
from storage.objects import ObjectNotFound, ObjectStore
from storage.part_file import OpenPart
from storage.places import Place, newest_places, read_compactions
from storage.records import Commit, FileRef, PartRef, read_record, read_records

_logger = logging.getLogger(__name__)

ROW_GROUP_SIZE = 1024
"""Episodes per row group: who wants a few rows decodes no more than this."""

_TEXTS = [field.name for field in SCHEMA if pa.types.is_string(field.type)]
"""Columns whose values are stored once; of tokens and their logprobs a dictionary costs more than it saves."""

_AHEAD = 64
"""Parts that are fetched at once at most."""


def encode_part(table: pa.Table) -> bytes:
    """The Parquet file of the episodes; equal for equal tables.

    Raises ValueError as `check_table` does.
    """
    check_table(table)
    sink = pa.BufferOutputStream()
    whole = table.replace_schema_metadata(SCHEMA.metadata).combine_chunks()
    pq.write_table(
        whole, sink, compression="zstd", row_group_size=ROW_GROUP_SIZE, use_dictionary=_TEXTS
    )
    return bytes(sink.getvalue())


def write_part(store: ObjectStore, key_prefix: str, table: pa.Table) -> PartRef:
    """Store the episodes under `<key_prefix>-<digest>.parquet`; safe to repeat.

    Raises ValueError as `check_table`.
    """
    data = encode_part(table)
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"{key_prefix}-{sha256[:8]}.parquet"
    part = PartRef(key=key, sha256=sha256, bytes=len(data), rows=table.num_rows)
    if not store.put_if_absent(key, data):
        read_file(store, part)  # The same part of another attempt, unless it was damaged since.
    return part


def read_file(store: ObjectStore, file: FileRef) -> bytes:
    """The bytes of a file.

    Raises ObjectNotFound, and ValueError if they are not the ones that were written.
    """
    return check_file(file, store.read(file.key))


def check_file(file: FileRef, data: bytes) -> bytes:
    """The bytes, if they are the file's. Raises ValueError if they are not."""
    if len(data) != file.bytes:
        raise ValueError(f"{file.key} has {len(data)} bytes and was written with {file.bytes}")
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ValueError(f"{file.key} has other bytes than were written: its SHA-256 differs")
    return data


def read_part(
    store: ObjectStore, part: PartRef | str, columns: list[str] | None = None
) -> pa.Table:
    """The episodes of a part, or some columns of them.

    A PartRef is held against the file; a key is taken on trust. Raises ObjectNotFound, and
    ValueError if the file is damaged, has another number of rows or is of a newer schema version.
    """
    if isinstance(part, PartRef):
        return _open_part(part, store.read(part.key)).read(columns)
    return OpenPart.of(part, store.read(part)).read(columns)


def _open_part(part: PartRef, data: bytes) -> OpenPart:
    opened = OpenPart.of(part.key, check_file(part, data))
    num_rows = opened.file.metadata.num_rows
    if num_rows != part.rows:
        raise ValueError(f"{part.key} has {num_rows} episodes and was written with {part.rows}")
    return opened


class CommitReader:
    """Reads the episodes of commits wherever they lie, and keeps the parts that were read last.

    A commit's own part is read while it is there. When one turns out to be gone, the run's
    compactions are looked up, and from then on it is read there: the same rows in the same order.
    Each part is held against its digest when it is opened. One thread at a time.

    Example:
        reader = CommitReader(store)
        for commit in reader.ahead(commits):
            table = reader.read(commit, ["episode_id", "reward"])
    """

    def __init__(self, store: ObjectStore, *, cache_bytes: int = 64 << 20) -> None:
        self._store = store
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._parts: OrderedDict[str, tuple[OpenPart, int]] = OrderedDict()
        self._places: dict[str, dict[str, Place]] = {}

    def ahead(self, commits: Sequence[Commit]) -> Iterator[Commit]:
        """The commits in order; their parts are fetched several at a time, which is quicker from afar."""
        alone = 0
        for number, commit in enumerate(commits):
            known = commit.part.key in self._parts or commit.run_id in self._places
            if number >= alone and not known:
                several = commits[number : number + _AHEAD]
                # Where one is gone, each is looked for on its own.
                alone = number if self._fetch(several) else number + _AHEAD
            yield commit

    def read(self, commit: Commit, columns: Sequence[str] | None = None) -> pa.Table:
        """The commit's episodes. Raises ObjectNotFound and ValueError as `read_part` does."""
        empty = columns_schema(columns).empty_table()
        return pa.concat_tables([empty, *self.slices(commit, columns)])

    def slices(self, commit: Commit, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The commit's episodes, at most a row group at a time."""
        part, offset = self._find(commit)
        return part.slices(offset, commit.rows, columns)

    def take(self, commit: Commit, rows: np.ndarray, columns: Sequence[str] | None) -> pa.Table:
        """Some of the commit's rows by their numbers, in that order; no other row group is decoded."""
        part, offset = self._find(commit)
        wanted = rows + offset
        groups = np.searchsorted(part.ends, wanted, side="right")
        chosen, position = np.unique(groups, return_inverse=True)
        begins = np.concatenate([[0], part.ends])
        sizes = np.diff(begins)[chosen]
        shifts = np.cumsum(sizes) - sizes - begins[chosen]
        return part.read(columns, chosen.tolist()).take(pa.array(wanted + shifts[position]))

    def _find(self, commit: Commit) -> tuple[OpenPart, int]:
        """The part that holds the commit's rows, and the number of the first of them in it."""
        for _ in range(2):
            place = self._places.get(commit.run_id, {}).get(commit.key)
            try:
                if place is not None and place.sha256 == commit.part.sha256:
                    return self._open(place.part), place.first_of(commit)
                return self._open(commit.part), 0
            except ObjectNotFound:
                # Compacted since, or compacted again.
                compactions = read_compactions(self._store, commit.run_id)
                self._places[commit.run_id] = newest_places(compactions)
        return self._open(commit.part), 0

    def _open(self, part: PartRef) -> OpenPart:
        if part.key not in self._parts:
            self._keep(part, self._store.read(part.key))
        self._parts.move_to_end(part.key)
        return self._parts[part.key][0]

    def _fetch(self, commits: Iterable[Commit]) -> bool:
        """Read the parts of the first of these commits at once, as many as are kept; False if one is gone."""
        parts: list[PartRef] = []
        for part in dict.fromkeys(commit.part for commit in commits):
            if sum(each.bytes for each in (*parts, part)) > self._cache_bytes:
                break
            if part.key not in self._parts:
                parts.append(part)
        try:
            contents = self._store.read_many([part.key for part in parts])
        except ObjectNotFound:
            return False
        for part, data in zip(parts, contents, strict=True):
            # One that is damaged is refused when its turn comes.
            with contextlib.suppress(ValueError):
                self._keep(part, data)
        return True

    def _keep(self, part: PartRef, data: bytes) -> None:
        self._parts[part.key] = _open_part(part, data), part.bytes
        self._cached_bytes += part.bytes
        while self._cached_bytes > self._cache_bytes and len(self._parts) > 1:
            _, (_, num_bytes) = self._parts.popitem(last=False)
            self._cached_bytes -= num_bytes


def read_commit(
    store: ObjectStore, commit: Commit, columns: Sequence[str] | None = None
) -> pa.Table:
    """The episodes of one commit, wherever they lie; for several, a `CommitReader` is quicker."""
    return CommitReader(store).read(commit, columns)


def commit_part(store: ObjectStore, run_id: str, key: str, table: pa.Table) -> Commit:
    """Store scored episodes and make them count under the commit name `key`.

    Idempotent by `key`: if the commit exists it is returned as it stands, whatever the table.
    Raises ValueError as `check_table` and `check_scored` do, and if an episode is another run's.
    """
    commit_key = layout.commit_key(run_id, key)
    if store.exists(commit_key):
        return read_record(store, commit_key, Commit)
    check_schema(table.schema)
    check_scored(table)
    runs = table["run_id"].unique().to_pylist()
    if runs != [run_id]:
        raise ValueError(f"commit {key!r} of run {run_id!r} is given episodes of {runs}")
    part = write_part(store, layout.episodes_prefix(run_id, key), table)
    commit = describe_commit(run_id, key, part, table, created_at=time.time())
    if store.put_if_absent(commit_key, commit.to_bytes()):
        return commit
    first = read_record(store, commit_key, Commit)
    if first.part.sha256 != part.sha256:
        _logger.warning("commit %s stands with the part of another attempt", commit_key)
    return first


def describe_commit(
    run_id: str, key: str, part: PartRef, table: pa.Table, *, created_at: float
) -> Commit:
    """The commit record of a part that holds this table of scored episodes."""
    figures = Figures.of(table)
    rewards = pc.min_max(table["reward"]).as_py()
    return Commit(
        key=key,
        run_id=run_id,
        part=part,
        group_ids=figures.group_ids,
        rows=figures.rows,
        policy_version_min=figures.policy_version_min,
        policy_version_max=figures.policy_version_max,
        environments=figures.environments,
        reward_min=rewards["min"],
        reward_max=rewards["max"],
        reward_mean=reward_mean(table),
        created_at=created_at,
    )


def read_commits(store: ObjectStore, run_id: str) -> list[Commit]:
    """All commits of the run, sorted by name. Which of them count for the run, its log says."""
    keys = store.keys(layout.commits_folder(run_id))
    return read_records(store, keys, Commit)


def read_committed(
    store: ObjectStore,
    run_id: str,
    *,
    columns: list[str] | None = None,
    commits: Iterable[Commit] | None = None,
    group_ids: Collection[str] | None = None,
) -> pa.Table:
    """Committed episodes, in the order of the commits and as written in each.

    `commits` limits what is read to a pinned set, `group_ids` to some groups; parts that hold none
    of them are not opened. Raises ObjectNotFound and ValueError as `read_part` does.
    """
    chosen = read_commits(store, run_id) if commits is None else list(commits)
    names = SCHEMA.names if columns is None else columns
    wanted = None if group_ids is None else set(group_ids)
    if wanted is not None:
        chosen = [commit for commit in chosen if not wanted.isdisjoint(commit.group_ids)]
    reader = CommitReader(store)
    tables = [columns_schema(names).empty_table()]
    for commit in reader.ahead(chosen):
        if wanted is None or wanted.issuperset(commit.group_ids):
            tables.append(reader.read(commit, names))
        else:
            table = reader.read(commit, [*dict.fromkeys([*names, "group_id"])])
            of_groups = pc.is_in(table["group_id"], pa.array(sorted(wanted), pa.string()))
            tables.append(table.filter(of_groups).select(names))
    return pa.concat_tables(tables)
