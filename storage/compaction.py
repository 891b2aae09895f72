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
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A compaction that is worth making."""

    run_id: str
    """The run."""
    number: int
    """Number of the compaction."""
    batches: tuple[tuple[Commit, ...], ...]
    """For each compacted part, the commits whose rows it will hold, in order."""


def plan_compaction(
    store: ObjectStore, run_id: str, commits: Sequence[Commit], *, whole: bool
) -> Plan:
    """Which of these commits, in the log's order, are worth compacting together.

    Without `whole`, what does not fill a part yet is left for later, as more may follow.
    """
    compactions = read_compactions(store, run_id)
    places = newest_places(compactions)
    # What lies together goes together: of a compacted part all rows are in use, or none.
    small: dict[str, list[Commit]] = {}
    for commit in commits:
        place = places.get(commit.key)
        part = commit.part if place is None else place.part
        if part.rows < SMALL_ROWS and part.bytes < TARGET_BYTES:
            small.setdefault(part.key, []).append(commit)
    batches: list[list[list[Commit]]] = [[]]
    for of_part in small.values():
        held = [commit for each in batches[-1] for commit in each]
        num_bytes = sum(commit.part.bytes for commit in held)
        full = _rows(held) >= TARGET_ROWS or num_bytes >= TARGET_BYTES
        if full or _rows(held) + _rows(of_part) > MOST_ROWS:
            batches.append([])
        batches[-1].append(of_part)
    chosen = [
        tuple(commit for of_part in batch for commit in of_part)
        for batch in batches
        if len(batch) > 1  # One part made of one part would be no gain.
    ]
    return Plan(
        run_id=run_id,
        number=compactions[-1].number + 1 if compactions else 0,
        batches=tuple(each for each in chosen if whole or _rows(each) >= SMALL_ROWS),
    )


def _rows(commits: Iterable[Commit]) -> int:
    return sum(commit.rows for commit in commits)


def compact(store: ObjectStore, plan: Plan) -> Compaction | None:
    """Write the commits as compacted parts and make them count.

    None if there is nothing to do or another compactor was faster. Raises ObjectNotFound and
    ValueError if a part cannot be read.
    """
    if not plan.batches:
        return None
    # No two attempts share a part: that of a lost one may be removed at any time.
    prefix = layout.compacted_prefix(plan.run_id, plan.number, uuid.uuid4().hex[:8])
    reader = CommitReader(store)
    parts: list[PartRef] = []
    compacted: list[CompactedCommit] = []
    for index, batch in enumerate(plan.batches):
        tables = [reader.read(commit) for commit in reader.ahead(batch)]
        parts.append(write_part(store, f"{prefix}-{index:03d}", pa.concat_tables(tables)))
        ends = np.cumsum([commit.rows for commit in batch])
        compacted += [
            CompactedCommit(
                commit=commit.key,
                sha256=commit.part.sha256,
                rows_digest=rows_digest(table),
                part=index,
                offset=int(end) - commit.rows,
            )
            for commit, table, end in zip(batch, tables, ends, strict=True)
        ]
    compaction = Compaction(
        run_id=plan.run_id,
        number=plan.number,
        parts=tuple(parts),
        commits=tuple(compacted),
        created_at=time.time(),
    )
    check_compaction(store, compaction, [commit for batch in plan.batches for commit in batch])
    key = layout.compaction_key(plan.run_id, plan.number)
    if store.put_if_absent(key, compaction.to_bytes()) or store.read(key) == compaction.to_bytes():
        return compaction
    _logger.warning("another compactor was faster: %s stands as it made it", key)
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
            table = pa.concat_tables(opened.slices(each.offset, rows, columns))
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
