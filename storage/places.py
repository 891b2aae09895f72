"""Where the rows of a commit lie once its part was compacted.

    commit 000007-000 ── its part, while that is there
                     └── else rows 512 to 1023 of a compacted part, as the newest compaction says

A compaction adds a place and takes none away: commits and log stay the truth and are never edited,
and which parts are deleted later is the business of `storage.gc`. Of two compactions that hold the
same commit the newer one counts, so that what it replaced can go as well.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt

from storage import layout
from storage.objects import ObjectStore
from storage.records import Commit, PartRef, Record, read_record


class CompactedCommit(Record):
    """Which rows of a compacted part are a commit's."""

    commit: str
    """Name of the commit in its run."""
    sha256: str
    """Hex digest of the part that the commit names."""
    rows_digest: str
    """`storage.compaction.rows_digest` of the rows, which anyone can compute again."""
    part: NonNegativeInt
    """The compacted part, by its place in `parts`."""
    offset: NonNegativeInt
    """Its first row there; it has as many as the commit says, in the commit's order."""


class Compaction(Record):
    """The record that makes compacted parts count. The first of its number stands."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    run_id: str
    """The run whose commits it holds."""
    number: NonNegativeInt
    """Its number, from 0; the larger is the newer."""
    parts: tuple[PartRef, ...]
    """The compacted parts."""
    commits: tuple[CompactedCommit, ...]
    """The commits in them."""
    created_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a compaction has put the rows of a commit."""

    part: PartRef
    """The compacted part."""
    offset: int
    """Number of the commit's first row in it."""
    sha256: str
    """Hex digest of the part that the commit names."""

    def first_of(self, commit: Commit) -> int:
        """The commit's first row. Raises ValueError if the compacted part ends before its last."""
        if self.offset + commit.rows > self.part.rows:
            raise ValueError(
                f"{self.part.key} has {self.part.rows} episodes, and those of commit {commit.key} "
                f"would be {commit.rows} from number {self.offset}"
            )
        return self.offset


def read_compactions(store: ObjectStore, run_id: str) -> list[Compaction]:
    """All compactions of a run, oldest first. Raises ValueError if one is unreadable."""
    keys = store.keys(layout.compactions_folder(run_id))
    return [read_record(store, key, Compaction) for key in keys]


def newest_places(compactions: list[Compaction]) -> dict[str, Place]:
    """By name of the commit, where the newest compaction that holds it has put its rows."""
    return {
        each.commit: Place(part=compaction.parts[each.part], offset=each.offset, sha256=each.sha256)
        for compaction in compactions
        for each in compaction.commits
    }
