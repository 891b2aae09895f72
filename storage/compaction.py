"""Compaction: the many small parts of a run's commits, once more in a few large ones.

    1. rows of small parts ──▶ compacted parts, read back and compared      nobody knows of them yet
    2. compaction record, put-if-absent                                     `CommitReader` finds them
    3. `storage.gc`, later: the small parts are removed                     readers go on in the large

Whoever dies between two of these leaves files that nothing names, which are garbage. Of two compactors
of one run the first to write the record of that number wins; the other's parts are garbage as well.
Commits and log are not touched.
"""

import hashlib
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage import layout
from storage.episodes import schema_of
from storage.objects import ObjectStore
from storage.part_file import OpenPart
from storage.parts import CommitReader, check_file, write_part
from storage.places import CompactedCommit, Compaction, newest_places, read_compactions
from storage.records import Commit, PartRef

_logger = logging.getLogger(__name__)

SMALL_ROWS = 1000
"""Parts of fewer episodes are compacted."""
TARGET_ROWS = 4096
"""Episodes after which a compacted part is full."""
MOST_ROWS = 10_000
"""No compacted part has more episodes."""
TARGET_BYTES = 64 << 20
"""Bytes of the small parts, after which a compacted part is full; it is held in memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Commits whose rows would make one compacted part."""

    commits: tuple[Commit, ...]
    """The commits, in order."""

    @property
    def rows(self) -> int:
        """Number of their episodes."""
        return sum(commit.rows for commit in self.commits)


def plan_compaction(
    store: ObjectStore, run_id: str, commits: Sequence[Commit], *, whole: bool
) -> list[Batch]:
    """Which of these commits, in the log's order, are worth compacting together.

    Without `whole`, what does not fill a part yet is left for later, as more may follow.
    """
    places = newest_places(read_compactions(store, run_id))
    parts = {
        commit.key: places[commit.key].part if commit.key in places else commit.part
        for commit in commits
    }
    batches: list[list[Commit]] = [[]]
    for commit in commits:
        part = parts[commit.key]
        if part.rows >= SMALL_ROWS or part.bytes >= TARGET_BYTES:
            continue
        open_batch = batches[-1]
        rows = sum(each.rows for each in open_batch)
        num_bytes = sum(each.part.bytes for each in open_batch)
        if rows >= TARGET_ROWS or rows + commit.rows > MOST_ROWS or num_bytes >= TARGET_BYTES:
            batches.append([commit])
        else:
            open_batch.append(commit)
    # One part to one part would be no gain.
    full = [
        Batch(tuple(each))
        for each in batches
        if len({parts[commit.key].key for commit in each}) > 1
    ]
    return full if whole else [each for each in full if each.rows >= SMALL_ROWS]


def compact(store: ObjectStore, run_id: str, batches: Sequence[Batch]) -> Compaction | None:
    """Write the batches as compacted parts and make them count.

    None if there is nothing to do or another compactor was faster. Raises ObjectNotFound and
    ValueError if a part cannot be read.
    """
    if not batches:
        return None
    compactions = read_compactions(store, run_id)
    number = compactions[-1].number + 1 if compactions else 0
    # No two attempts share a part: that of a lost one may be removed at any time.
    prefix = layout.compacted_prefix(run_id, number, uuid.uuid4().hex[:8])
    reader = CommitReader(store)
    parts: list[PartRef] = []
    compacted: list[CompactedCommit] = []
    for index, batch in enumerate(batches):
        tables = [reader.read(commit) for commit in reader.ahead(batch.commits)]
        parts.append(write_part(store, f"{prefix}-{index:03d}", pa.concat_tables(tables)))
        ends = np.cumsum([commit.rows for commit in batch.commits])
        compacted += [
            CompactedCommit(
                commit=commit.key,
                sha256=commit.part.sha256,
                rows_digest=rows_digest(table),
                part=index,
                offset=int(end) - commit.rows,
            )
            for commit, table, end in zip(batch.commits, tables, ends, strict=True)
        ]
    compaction = Compaction(
        run_id=run_id,
        number=number,
        parts=tuple(parts),
        commits=tuple(compacted),
        created_at=time.time(),
    )
    check_compaction(store, compaction, [each for batch in batches for each in batch.commits])
    if store.put_if_absent(layout.compaction_key(run_id, number), compaction.to_bytes()):
        return compaction
    _logger.warning("another compactor of run %s was faster; its compaction stands", run_id)
    return None


def check_compaction(store: ObjectStore, compaction: Compaction, commits: Sequence[Commit]) -> None:
    """Read the compacted parts and compare the rows of these commits with their digests.

    Raises ObjectNotFound and ValueError if the rows of one are not there or others.
    """
    by_key = {commit.key: commit for commit in commits}
    by_part: dict[int, list[CompactedCommit]] = {}
    for each in compaction.commits:
        if each.commit in by_key:
            by_part.setdefault(each.part, []).append(each)
    for index, held in by_part.items():
        part = compaction.parts[index]
        opened = OpenPart.of(part.key, check_file(part, store.read(part.key)))
        # Those that were digested; later ones are the same for all.
        columns = schema_of(opened.version).names
        for each in held:
            rows = by_key[each.commit].rows
            table = pa.concat_tables(t for _, t in opened.slices(each.offset, rows, columns))
            if table.num_rows != rows or rows_digest(table) != each.rows_digest:
                raise ValueError(
                    f"{part.key} has other episodes than commit {each.commit} had when it was compacted"
                )


def rows_digest(table: pa.Table) -> str:
    """Hex digest of the episodes' values, whatever file, chunks or version of pyarrow they come from."""
    hasher = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        hasher.update(f"{name}:".encode())
        _hash(column, hasher)
    return hasher.hexdigest()


def _hash(values: pa.Array, hasher: "hashlib._Hash") -> None:
    kind = values.type
    # Not `str(kind)` of what is nested: what the values of a list are called depends on who read it.
    name = kind if not pa.types.is_nested(kind) else "list" if pa.types.is_list(kind) else "struct"
    hasher.update(f"{name} {len(values)} ".encode())
    hasher.update(np.asarray(values.is_valid()).astype(bool).tobytes())
    if pa.types.is_list(kind):
        lengths = pc.list_value_length(values).fill_null(0)
        hasher.update(np.asarray(lengths).astype("<i8").tobytes())
        _hash(pc.list_flatten(values), hasher)
    elif pa.types.is_struct(kind):
        for child in values.flatten():
            _hash(child, hasher)
    elif pa.types.is_string(kind):
        lengths = pc.binary_length(values).fill_null(0)
        hasher.update(np.asarray(lengths).astype("<i8").tobytes())
        hasher.update("".join(values.drop_null().to_pylist()).encode())
    else:
        fixed = values.cast(pa.int64()) if pa.types.is_timestamp(kind) else values
        numbers = np.asarray(fixed.fill_null(0) if fixed.null_count else fixed)
        hasher.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
