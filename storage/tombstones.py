"""What remains of a run that was deleted: one record, for good.

It is written before anything is removed, so that a deletion that was cut short is no half a run: from then on the run
does not exist, and deleting it again takes the rest away. Its id is never used again.
"""

from typing import Literal

from storage import layout
from storage.objects import ObjectInfo, ObjectStore
from storage.records import Record


class Tombstone(Record):
    """The record of a deletion."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    run_id: str
    """The run."""
    deleted_at: float
    """Unix seconds."""


def is_deleted(store: ObjectStore, run_id: str) -> bool:
    """Whether the run was deleted, if perhaps not all of its files are gone yet."""
    return store.exists(layout.deleted_key(run_id))


def refuse_deleted(store: ObjectStore, run_id: str) -> None:
    """Raise ValueError if the run was deleted."""
    if is_deleted(store, run_id):
        raise ValueError(f"run {run_id!r} was deleted from store {store.uri}: name another run")


def stored_runs(store: ObjectStore) -> list[str]:
    """Sorted ids of all runs of which anything is stored, deleted ones among them."""
    folders = [
        layout.RUNS,
        *(f"{layout.EPISODES}{each}/" for each in store.folders(layout.EPISODES)),
    ]
    return sorted({run_id for folder in folders for run_id in store.folders(folder)})


def objects_of(store: ObjectStore, run_id: str) -> list[ObjectInfo]:
    """Everything that is stored of a run, its tombstone excepted."""
    folders = [
        layout.run_folder(run_id),
        *(f"{layout.EPISODES}{each}/{run_id}/" for each in store.folders(layout.EPISODES)),
    ]
    tombstone = layout.deleted_key(run_id)
    return [info for folder in folders for info in store.listing(folder) if info.key != tombstone]
