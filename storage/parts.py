"""Parts, which are immutable Parquet files of episodes, and the commits that make them count.

A part's name ends in a digest of its bytes, so two contents never share a name, and a part that
nobody committed harms nobody. A commit is named by the logical place of the work in its run: every
attempt has the same name, the first counts.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Iterable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import layout
from storage.episodes import SCHEMA, Figures, check_schema, check_scored, check_table, reward_mean
from storage.objects import ObjectStore
from storage.records import Commit, FileRef, PartRef, read_record

_logger = logging.getLogger(__name__)

ROW_GROUP_SIZE = 1024
"""Episodes per row group: who wants a few rows decodes no more than this."""


def encode_part(table: pa.Table) -> bytes:
    """The Parquet file of the episodes; equal for equal tables.

    Raises ValueError as `check_table` does.
    """
    check_table(table)
    sink = pa.BufferOutputStream()
    whole = table.replace_schema_metadata(SCHEMA.metadata).combine_chunks()
    pq.write_table(whole, sink, compression="zstd", row_group_size=ROW_GROUP_SIZE)
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
    data = store.read(file.key)
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
    ValueError if the file is damaged, has another number of rows or is of another schema version.
    """
    data = store.read(part) if isinstance(part, str) else read_file(store, part)
    key = part if isinstance(part, str) else part.key
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    if file.schema_arrow.metadata != SCHEMA.metadata:
        raise ValueError(f"{key} is of schema {file.schema_arrow.metadata}, not {SCHEMA.metadata}")
    check_schema(file.schema_arrow)
    if isinstance(part, PartRef) and file.metadata.num_rows != part.rows:
        raise ValueError(
            f"{key} has {file.metadata.num_rows} episodes and was written with {part.rows}"
        )
    return file.read(columns=columns, use_threads=False)


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
    return [read_record(store, key, Commit) for key in keys]


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
    wanted = None if group_ids is None else pa.array(sorted(set(group_ids)), pa.string())
    names = columns if columns is not None else SCHEMA.names
    tables = [pa.schema([SCHEMA.field(name) for name in names], SCHEMA.metadata).empty_table()]
    for commit in read_commits(store, run_id) if commits is None else commits:
        if wanted is None:
            tables.append(read_part(store, commit.part, columns))
        elif not set(commit.group_ids).isdisjoint(wanted.to_pylist()):
            table = read_part(store, commit.part, [*dict.fromkeys([*names, "group_id"])])
            tables.append(table.filter(pc.is_in(table["group_id"], wanted)).select(names))
    return pa.concat_tables(tables)
