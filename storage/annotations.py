"""Sets of scores that a run's episodes were given later, beside those that it was trained on.

```
episodes/annotations/<run>/<name>/set.json             what scores; put first, once
                                 /source/…             the user's file that does, as it was
                                 /<commit>-….parquet   one part per commit of the run
                                 /commits/<commit>.json   makes that part count; the first one stands
                                 /complete/<n>.json    put last: the run's first n commits are scored
```

A set is about the commits that the run's log counts, in its order. A run that goes on outgrows its sets: they are
continued, and scores that stand are never given again.
"""

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt

from storage import layout
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import read_file
from storage.records import Commit, Controller, FileRef, PartRef, Record, read_record

SCHEMA = pa.schema(
    [
        pa.field("episode_id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("details", pa.string(), nullable=False),  # JSON: the score of each verifier.
    ],
    metadata={"forgeflow.annotation_schema_version": "1"},
)


class ScoreSet(Record):
    """What a set of scores is."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    run_id: str
    """Run whose episodes are scored."""
    name: str
    """Name of the set."""
    verifier: str
    """What scores, as it was named."""
    scorer: str
    """Name of the environment or of the user's function."""
    environment: dict[str, Any] | None
    """Section of the config that makes the environment, if one scores."""
    source: FileRef | None
    """The file of the user's code that scores, if it is theirs."""
    composition: dict[str, Any] | None = None
    """Sections `verifiers` and `scoring` of a config, if several verifiers make up the score."""
    sources: tuple[FileRef, ...] = ()
    """Files of the user's code among those, in the order of the names of the verifiers."""
    controller: Controller
    """Who began it."""
    created_at: float
    """Unix seconds."""

    @property
    def decides(self) -> tuple[Any, ...]:
        """All that the scores depend on."""
        alone = self.scorer, self.environment, self.source and self.source.sha256
        if self.composition is None:
            return alone
        return *alone, self.composition, *(file.sha256 for file in self.sources)


class _Means(Record):
    """Base of records about scores."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    run_id: str
    """Run whose episodes are scored."""
    name: str
    """Name of the set."""
    reward_mean: float
    """Mean reward that the run's own verifiers gave."""
    score_mean: float
    """Mean of the new scores."""
    created_at: float
    """Unix seconds."""


class ScoredBy(Record):
    """Who gave scores."""

    version: str
    """What its scores depend on beside prompt and response: code, libraries, parameters."""
    seconds: float
    """What it took for all of the commit's episodes."""


class Scores(_Means):
    """The record that makes the scores of one commit count."""

    commit: str
    """Key of the commit record."""
    sha256: str
    """Hex digest of the part that the commit names."""
    part: PartRef
    """The scores, in the order of the commit's episodes."""
    scored_by: dict[str, ScoredBy] = Field(default_factory=dict)
    """By verifier; empty before this was kept."""


class Covered(_Means):
    """The record that the first commits of a run are scored, every one."""

    num_commits: NonNegativeInt
    """Number of commits, in the order in which the run's log counts them."""
    commits_sha256: str
    """Hex digest over which commits and parts they are."""
    num_episodes: NonNegativeInt
    """Number of episodes."""


def open_set(store: ObjectStore, wanted: ScoreSet) -> ScoreSet:
    """Begin a set, or go on with it.

    Raises ValueError if the name is taken by scores of another verifier.
    """
    if store.put_if_absent(layout.score_set_key(wanted.run_id, wanted.name), wanted.to_bytes()):
        return wanted
    found = read_set(store, wanted.run_id, wanted.name)
    if found.decides != wanted.decides:
        where = ""
        if found.scorer == wanted.scorer and found.source is not None:
            where = f" as its file was, which is kept at {found.source.key}"
        raise ValueError(
            f"scores {wanted.name!r} of run {wanted.run_id!r} are those of verifier {found.verifier!r}{where}: take "
            "another --name"
        )
    return found


def read_set(store: ObjectStore, run_id: str, name: str) -> ScoreSet:
    """What a set is. Raises ValueError, with the names that there are, if the run has no such set."""
    try:
        return read_record(store, layout.score_set_key(run_id, name), ScoreSet)
    except ObjectNotFound:
        there = ", ".join(store.folders(layout.annotations_folder(run_id))) or "none"
        raise ValueError(
            f"run {run_id!r} has no scores {name!r} (it has: {there}): `forgeflow rescore` makes some"
        ) from None


def write_scores(
    store: ObjectStore,
    commit: Commit,
    name: str,
    episode_ids: Sequence[str],
    scores: Sequence[float],
    details: Sequence[Mapping[str, Any]],
    *,
    reward_mean: float,
    scored_by: Mapping[str, ScoredBy] | None = None,
) -> Scores:
    """Store the scores of a commit's episodes and make them count.

    Idempotent by set and commit: scores that stand are returned as they stand. Raises ValueError unless there is one
    finite score for every episode.
    """
    if found := find_scores(store, commit, name):
        return found
    faults = [e for e, s in zip(episode_ids, scores, strict=True) if not math.isfinite(s)]
    if faults:
        raise ValueError(f"episode {faults[0]} has no finite score")
    if len(set(episode_ids)) != commit.rows:
        raise ValueError(
            f"commit {commit.key} of run {commit.run_id} has {commit.rows} episodes and was given "
            f"{len(set(episode_ids))} scores"
        )
    texts = [json.dumps(each, sort_keys=True) for each in details]
    arrays = [pa.array(each) for each in (episode_ids, map(float, scores), texts)]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    record = Scores(
        run_id=commit.run_id,
        name=name,
        commit=layout.commit_key(commit.run_id, commit.key),
        sha256=commit.part.sha256,
        part=_write_part(store, layout.scores_prefix(commit.run_id, name, commit.key), table),
        reward_mean=reward_mean,
        score_mean=math.fsum(scores) / len(scores),
        scored_by=dict(scored_by or {}),
        created_at=time.time(),
    )
    key = layout.scores_key(commit.run_id, name, commit.key)
    if not store.put_if_absent(key, record.to_bytes()):
        return read_record(store, key, Scores)
    return record


def _write_part(store: ObjectStore, prefix: str, table: pa.Table) -> PartRef:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = bytes(sink.getvalue())
    sha256 = hashlib.sha256(data).hexdigest()
    # A name of its own, for one that another attempt left may be garbage, and just be going.
    key = f"{prefix}-{uuid.uuid4().hex[:8]}.parquet"
    part = PartRef(key=key, sha256=sha256, bytes=len(data), rows=table.num_rows)
    if not store.put_if_absent(key, data):
        read_file(store, part)  # Put by this very attempt, whose answer was lost.
    return part


def find_scores(store: ObjectStore, commit: Commit, name: str) -> Scores | None:
    """The record of a commit's scores, if there is one. Raises ValueError if it is about another commit."""
    key = layout.scores_key(commit.run_id, name, commit.key)
    try:
        record = read_record(store, key, Scores)
    except ObjectNotFound:
        return None
    if record.sha256 != commit.part.sha256:
        raise ValueError(f"{key} is about other episodes than commit {commit.key} holds")
    return record


def read_scores(store: ObjectStore, commit: Commit, name: str) -> dict[str, float]:
    """The scores of a commit's episodes by their id.

    Raises ValueError if the set has none of this commit, or they are damaged.
    """
    record = find_scores(store, commit, name)
    if record is None:
        raise ValueError(
            f"scores {name!r} lack commit {commit.key} of run {commit.run_id!r}: rescore the run again"
        )
    scores = dict(_read_part(store, record.part))
    if not all(map(math.isfinite, scores.values())) or len(scores) != commit.rows:
        raise ValueError(
            f"{record.part.key} has not one finite score for each of {commit.rows} episodes"
        )
    return scores


def _read_part(store: ObjectStore, part: PartRef) -> Iterator[tuple[str, float]]:
    try:
        data = read_file(store, part)
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    except ObjectNotFound as error:
        raise ValueError(f"{part.key} is gone: rescore under another name") from error
    except pa.ArrowException as error:
        raise ValueError(f"{part.key} is no Parquet file: {error}") from error
    # Before anything is decoded: no extension type of somebody else's is ever made from it.
    if not file.schema_arrow.equals(SCHEMA, check_metadata=True):
        raise ValueError(f"{part.key} is no part of scores: its columns are others")
    table = file.read(["episode_id", "score"], use_threads=False)
    return zip(table["episode_id"].to_pylist(), table["score"].to_pylist(), strict=True)


def complete_set(store: ObjectStore, run_id: str, name: str, commits: Sequence[Commit]) -> Covered:
    """Say that these commits, all that the run's log counts in their order, are scored. Idempotent.

    Raises ValueError if one of them is not.
    """
    rows, rewards, scores = 0, [], []
    for commit in commits:
        record = find_scores(store, commit, name)
        if record is None:
            raise ValueError(f"scores {name!r} lack commit {commit.key} of run {run_id!r}")
        rows += commit.rows
        rewards.append(record.reward_mean * commit.rows)
        scores.append(record.score_mean * commit.rows)
    covered = Covered(
        run_id=run_id,
        name=name,
        num_commits=len(commits),
        commits_sha256=_digest(commits),
        num_episodes=rows,
        reward_mean=math.fsum(rewards) / max(1, rows),
        score_mean=math.fsum(scores) / max(1, rows),
        created_at=time.time(),
    )
    key = layout.covered_key(run_id, name, len(commits))
    if not store.put_if_absent(key, covered.to_bytes()):
        return read_record(store, key, Covered)
    return covered


def read_covered(store: ObjectStore, run_id: str, name: str) -> Covered | None:
    """How far a set has come; None while it is not complete."""
    keys = store.keys(layout.covered_folder(run_id, name))
    return read_record(store, keys[-1], Covered) if keys else None


def check_covers(store: ObjectStore, run_id: str, name: str, commits: Sequence[Commit]) -> None:
    """Raise ValueError unless a set covers these commits, the first that the run's log counts, in their order."""
    read_set(store, run_id, name)
    covered = read_covered(store, run_id, name)
    if covered is None or covered.num_commits < len(commits):
        done = 0 if covered is None else covered.num_commits
        raise ValueError(
            f"scores {name!r} of run {run_id!r} cover {done} of its {len(commits)} commits: rescore it again, which "
            "goes on where it stopped"
        )
    if covered.num_commits == len(commits) and covered.commits_sha256 != _digest(commits):
        raise ValueError(f"scores {name!r} of run {run_id!r} are about other commits than its log")


def _digest(commits: Sequence[Commit]) -> str:
    hasher = hashlib.sha256()
    for commit in commits:
        hasher.update(f"{commit.key} {commit.part.sha256} {commit.rows}\n".encode())
    return hasher.hexdigest()
