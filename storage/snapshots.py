"""Snapshots: pinned sets of commits, which give the same episodes in the same order for ever.

A snapshot holds what the logs of its runs counted when it was taken. It can be stored as a record
and opened again, after more was committed and after its parts were compacted and removed.

Example:
    snapshot = take_snapshot(store, ["r1", "r2"], Filters(min_reward=0.5))
    for table in snapshot.tables(["response_token_ids", "reward"]):
        ...
    again = open_snapshot(store, snapshot.record)
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from storage import layout
from storage.episodes import columns_schema, policy_version_bounds
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import ObjectNotFound, ObjectStore
from storage.parts import CommitReader
from storage.records import Commit, Record, read_record
from storage.runs import read_config
from storage.tombstones import refuse_deleted


class Filters(Record):
    """Which episodes are wanted. None: all of them in that respect."""

    environments: tuple[str, ...] | None = None
    """Names of environments."""
    min_policy_version: int | None = None
    """No token that the policy wrote is of an older version."""
    max_policy_version: int | None = None
    """No token that the policy wrote is of a newer version."""
    min_reward: float | None = None
    """The reward is at least this."""
    max_reward: float | None = None
    """The reward is at most this."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        for name in ("policy_version", "reward"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{name} {least} is above max_{name} {most}: no episode fits")
        return self

    def exclude(self, commit: Commit) -> bool:
        """Whether no episode of the commit can be wanted, by what its record says."""
        return (
            (self.environments is not None and not set(self.environments) & {*commit.environments})
            or _below(commit.policy_version_max, self.min_policy_version)
            or _below(self.max_policy_version, commit.policy_version_min)
            or _below(commit.reward_max, self.min_reward)
            or _below(self.max_reward, commit.reward_min)
        )

    def include(self, commit: Commit) -> bool:
        """Whether every episode of the commit is wanted, by what its record says."""
        return not (
            (self.environments is not None and not set(self.environments) >= {*commit.environments})
            or _below(commit.policy_version_min, self.min_policy_version)
            or _below(self.max_policy_version, commit.policy_version_max)
            or _below(commit.reward_min, self.min_reward)
            or _below(self.max_reward, commit.reward_max)
        )

    @property
    def columns(self) -> list[str]:
        """What is read of an episode to tell whether it is wanted."""
        versions = (self.min_policy_version, self.max_policy_version) != (None, None)
        rewards = (self.min_reward, self.max_reward) != (None, None)
        return [
            *(["environment"] if self.environments is not None else []),
            *(["response_token_ids", "mask", "token_policy_versions"] if versions else []),
            *(["reward"] if rewards else []),
        ]

    def rows(self, table: pa.Table) -> np.ndarray:
        """For each episode, whether it is wanted; the table has at least `columns`."""
        wanted = np.ones(table.num_rows, bool)
        if self.environments is not None:
            names = pa.array(self.environments, pa.string())
            wanted &= np.asarray(pc.is_in(table["environment"], names)).astype(bool)
        if (self.min_policy_version, self.max_policy_version) != (None, None):
            oldest, newest = policy_version_bounds(table)
            wanted &= _within(oldest, self.min_policy_version, None)
            wanted &= _within(newest, None, self.max_policy_version)
        if (self.min_reward, self.max_reward) != (None, None):
            wanted &= _within(np.asarray(table["reward"]), self.min_reward, self.max_reward)
        return wanted


class SnapshotRecord(Record):
    """A snapshot as it is stored: what a run that trains on it keeps."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    runs: tuple[str, ...]
    """Ids of the runs, sorted."""
    filters: Filters
    """Which of their episodes are wanted."""
    commits: tuple[str, ...]
    """Keys in the store of the commits that may hold wanted episodes, sorted."""
    sha256: str
    """Hex digest over all that decides which episodes these are, and in which order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A pinned set of commits and the episodes wanted of them, in the order of the commits' keys."""

    store: ObjectStore
    """Where they lie."""
    record: SnapshotRecord
    """The same to be stored."""
    commits: tuple[Commit, ...]
    """The commits, in the order of the record."""

    def tables(
        self, columns: Sequence[str] | None = None, *, reader: CommitReader | None = None
    ) -> Iterator[pa.Table]:
        """The episodes, at most a row group at a time, so that memory does not grow with the snapshot.

        Raises ObjectNotFound and ValueError as `read_part` does.
        """
        reader = reader or CommitReader(self.store)
        names = columns_schema(columns).names
        filters = self.record.filters
        for commit in reader.ahead(self.commits):
            if filters.include(commit):
                yield from reader.slices(commit, names)
                continue
            needed = [*dict.fromkeys([*names, *filters.columns])]
            for table in reader.slices(commit, needed):
                wanted = filters.rows(table)
                if wanted.any():
                    yield table.filter(pa.array(wanted)).select(names)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All episodes at once."""
        empty = columns_schema(columns).empty_table()
        return pa.concat_tables([empty, *self.tables(columns)])


def take_snapshot(
    store: ObjectStore, run_ids: Sequence[str], filters: Filters | None = None
) -> Snapshot:
    """What the logs of these runs count now, as far as it can hold wanted episodes; opens no part.

    Raises ValueError if a run does not exist, or its log or a commit is unreadable.
    """
    filters = filters or Filters()
    keys: set[str] = set()
    for run_id in run_ids:
        _check_exists(store, run_id)
        ledger = Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))
        keys.update(fact.commit for fact in ledger.committed)
    commits = dict(_read_commits(store, sorted(keys)))
    chosen = {key: commit for key, commit in commits.items() if not filters.exclude(commit)}
    runs = tuple(sorted(set(run_ids)))
    record = SnapshotRecord(
        runs=runs,
        filters=filters,
        commits=tuple(chosen),
        sha256=_digest(runs, filters, chosen.values()),
    )
    return Snapshot(store=store, record=record, commits=tuple(chosen.values()))


def open_snapshot(store: ObjectStore, record: SnapshotRecord) -> Snapshot:
    """The snapshot of a stored record.

    Raises ValueError if one of its runs was deleted, or a commit is not what it was.
    """
    for run_id in record.runs:
        _check_exists(store, run_id)
    commits = tuple(commit for _, commit in _read_commits(store, record.commits))
    if _digest(record.runs, record.filters, commits) != record.sha256:
        raise ValueError(
            f"a commit of runs {', '.join(record.runs)} is not what it was when the snapshot was taken: "
            "`forgeflow verify` tells which"
        )
    return Snapshot(store=store, record=record, commits=commits)


def _check_exists(store: ObjectStore, run_id: str) -> None:
    refuse_deleted(store, run_id)
    read_config(store, run_id)


def _read_commits(store: ObjectStore, keys: Sequence[str]) -> Iterator[tuple[str, Commit]]:
    for key in keys:
        try:
            yield key, read_record(store, key, Commit)
        except ObjectNotFound:
            raise ValueError(
                f"{key} is gone, and a log counts it: `forgeflow verify` tells what else is amiss"
            ) from None


def _digest(runs: Sequence[str], filters: Filters, commits: Iterable[Commit]) -> str:
    hasher = hashlib.sha256(filters.to_bytes() + "\n".join(runs).encode())
    for commit in commits:
        key = layout.commit_key(commit.run_id, commit.key)
        hasher.update(f"\n{key} {commit.part.sha256} {commit.rows}".encode())
    return hasher.hexdigest()


def _below(left: float | None, right: float | None) -> bool:
    return left is not None and right is not None and left < right


def _within(values: np.ndarray, least: float | None, most: float | None) -> np.ndarray:
    wanted = np.ones(len(values), bool)
    if least is not None:
        wanted &= values >= least
    if most is not None:
        wanted &= values <= most
    return wanted
