"""Garbage collection: garbage is found, and found again right before it is deleted.

What garbage is, `storage.garbage` says. Before a part goes because a compaction holds its rows, these are read and
compared.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from storage import layout
from storage.compaction import check_compaction
from storage.contract import TEMPORARY
from storage.garbage import Garbage, LeftAlone, Limits, garbage_of
from storage.objects import LocalStore, ObjectNotFound, ObjectStore
from storage.places import newest_places, read_compactions
from storage.records import Commit, read_record
from storage.tombstones import stored_runs

PROBES = "probe-"
"""How the keys begin under which `storage.s3_probe` tries a server."""

_DELETIONS = 20
"""Deletions between two looks whether somebody resumes the run."""


@dataclass(slots=True, kw_only=True)
class Found:
    """What of a store can go."""

    garbage: list[Garbage] = field(default_factory=list)
    """In the order in which it can be deleted."""
    spared: dict[str, str] = field(default_factory=dict)
    """Runs that were not looked into, and why."""


def find_garbage(store: ObjectStore, limits: Limits) -> Found:
    """All garbage of a store; writes nothing. Raises OSError if the store fails."""
    found = Found()
    for run_id in stored_runs(store):
        try:
            found.garbage += garbage_of(store, run_id, limits)
        except LeftAlone as reason:
            found.spared[run_id] = str(reason)
    found.garbage += _temporary_files(store, limits)
    return found


def delete_garbage(store: ObjectStore, limits: Limits) -> Found:
    """Find garbage and delete it, run by run; what was deleted. Safe to repeat and to interrupt.

    Raises OSError if the store fails.
    """
    deleted = Found()
    for run_id in stored_runs(store):
        try:
            _delete_of(store, run_id, limits, deleted.garbage)
        except LeftAlone as reason:
            deleted.spared[run_id] = str(reason)
    for each in _temporary_files(store, limits):
        if isinstance(store, LocalStore):
            (store.root / each.key).unlink(missing_ok=True)
        else:
            store.delete(each.key)
        deleted.garbage.append(each)
    return deleted


def _delete_of(store: ObjectStore, run_id: str, limits: Limits, deleted: list[Garbage]) -> None:
    """Delete the garbage of one run. Raises LeftAlone, also in the midst if somebody resumes the run."""
    claims = _claims(store, run_id)
    garbage = [*garbage_of(store, run_id, limits)]
    if any(each.kind == "compacted parts" for each in garbage):
        _check_compactions(store, run_id)
    for number, each in enumerate(garbage):
        if number % _DELETIONS == 0 and _claims(store, run_id) != claims:
            raise LeftAlone("it was resumed meanwhile")
        store.delete(each.key)
        deleted.append(each)


def _claims(store: ObjectStore, run_id: str) -> list[str]:
    return store.keys(layout.incarnations_folder(run_id))


def sizes(garbage: Iterable[Garbage]) -> dict[str, dict[str, int]]:
    """Number of objects and bytes by kind."""
    objects, num_bytes = Counter[str](), Counter[str]()
    for each in garbage:
        objects[each.kind] += 1
        num_bytes[each.kind] += each.bytes
    return {kind: {"objects": objects[kind], "bytes": num_bytes[kind]} for kind in sorted(objects)}


def _check_compactions(store: ObjectStore, run_id: str) -> None:
    """Read what parts would be deleted for. Raises LeftAlone if it is not the same."""
    places = newest_places(read_compactions(store, run_id))
    try:
        for compaction in read_compactions(store, run_id):
            commits = [
                read_record(store, layout.commit_key(run_id, each.commit), Commit)
                for each in compaction.commits
                if compaction.parts[each.part] == places[each.commit].part
            ]
            check_compaction(store, compaction, commits)
    except (ValueError, ObjectNotFound) as error:
        raise LeftAlone(str(error)) from error


def _temporary_files(store: ObjectStore, limits: Limits) -> Iterator[Garbage]:
    """Unfinished writes of processes that are gone, or what their probes of a server left."""
    if not isinstance(store, LocalStore):
        for info in limits.old(store.listing(PROBES)):
            yield Garbage("temporary files", info.key, info.bytes)
        return
    for path in sorted(store.root.rglob(f"{TEMPORARY}*")):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # Its writer lives.
        if path.is_file() and status.st_mtime < limits.before:
            key = path.relative_to(store.root).as_posix()
            yield Garbage("temporary files", key, status.st_size)
