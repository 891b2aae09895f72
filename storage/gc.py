"""Garbage: objects that nothing which counts refers to, and nothing that may still count can come to.

What a run's log refers to is never garbage. Nor is anything that is younger than a bound, anything of a run whose log
is unreadable or contradicts itself, and anything of a run that may be going on. A commit that no log counts is
garbage only once its run has finished: whoever resumes an unfinished run takes it up. What is garbage is found again
right before it is deleted.

A part whose rows a compaction holds is garbage too, once these are read and compared.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from storage import facts, layout
from storage.compaction import check_compaction
from storage.contract import TEMPORARY
from storage.ledger import Ledger
from storage.log import read_incarnations
from storage.objects import LocalStore, ObjectInfo, ObjectNotFound, ObjectStore
from storage.places import newest_places, read_compactions
from storage.records import Commit, FileRef, Incarnation, Record, read_record
from storage.runs import read_config
from storage.tombstones import is_deleted, objects_of, stored_runs
from storage.verify_log import log_problems

Kind = Literal[
    "uncounted commits",
    "uncounted parts",
    "compacted parts",
    "generated parts",
    "checkpoint files",
    "source files",
    "files of deleted runs",
    "temporary files",
]

PROBES = "probe-"
"""How the keys begin under which `storage.s3_probe` tries a server."""

_DELETIONS = 20
"""Deletions between two looks whether somebody resumes the run."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that can go."""

    kind: Kind
    """What it was."""
    key: str
    """Its key; of a temporary file, which has none, the path in the store."""
    bytes: int
    """Size in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is left alone whatever refers to it."""

    before: float
    """Unix seconds: what was written later is left alone, and runs that showed life later."""
    is_alive: Callable[[Incarnation], bool] = lambda _: False
    """Whether an incarnation's controller is known to live, however quiet it is."""

    def spare(self, ledger: Ledger) -> bool:
        """Whether the run may be going on."""
        if ledger.status != "running":
            return False
        newest = ledger.incarnations[-1]
        seen = max([newest.controller.claimed_at, *ledger.last_at.values()])
        return seen >= self.before or self.is_alive(newest)

    def old(self, infos: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        """Those that are not left alone for their age."""
        return (info for info in infos if info.modified_at < self.before)


@dataclass(slots=True, kw_only=True)
class Found:
    """What of a store can go."""

    garbage: list[Garbage] = field(default_factory=list)
    """In the order in which it can be deleted."""
    spared: dict[str, str] = field(default_factory=dict)
    """Runs that were not looked into, and why."""


class _LeftAlone(Exception):
    """A run is not looked into; the message says why."""


def find_garbage(store: ObjectStore, limits: Limits) -> Found:
    """All garbage of a store; writes nothing. Raises OSError if the store fails."""
    found = Found()
    for run_id in stored_runs(store):
        try:
            found.garbage += _garbage_of(store, run_id, limits)
        except _LeftAlone as reason:
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
        except _LeftAlone as reason:
            deleted.spared[run_id] = str(reason)
    for each in _temporary_files(store, limits):
        if isinstance(store, LocalStore):
            (store.root / each.key).unlink(missing_ok=True)
        else:
            store.delete(each.key)
        deleted.garbage.append(each)
    return deleted


def _delete_of(store: ObjectStore, run_id: str, limits: Limits, deleted: list[Garbage]) -> None:
    """Delete the garbage of one run. Raises _LeftAlone, also in the midst if somebody resumes the run."""
    claims = _claims(store, run_id)
    garbage = [*_garbage_of(store, run_id, limits)]
    if any(each.kind == "compacted parts" for each in garbage):
        _check_compactions(store, run_id)
    for number, each in enumerate(garbage):
        if number % _DELETIONS == 0 and _claims(store, run_id) != claims:
            raise _LeftAlone("it was resumed meanwhile")
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


def _garbage_of(store: ObjectStore, run_id: str, limits: Limits) -> Iterator[Garbage]:
    """The garbage of one run. Raises _LeftAlone."""
    try:
        layout.check_run_id(run_id)
        if is_deleted(store, run_id):
            for info in limits.old(objects_of(store, run_id)):
                yield Garbage("files of deleted runs", info.key, info.bytes)
            return
        read_config(store, run_id)
        ledger, entries = read_sound_log(store, run_id)
        commits = {
            key: read_record(store, key, Commit)
            for key in store.keys(layout.commits_folder(run_id))
        }
        missing = [fact.commit for fact in ledger.committed if fact.commit not in commits]
        if missing:
            raise _LeftAlone(f"{missing[0]} is gone, and the log counts it")
        if limits.spare(ledger):
            raise _LeftAlone("by its log it is running")
        garbage = [
            *_uncounted(store, run_id, ledger, commits, limits),
            *_compacted(store, run_id, ledger, commits),
            *_beside(store, run_id, ledger, entries),
        ]
    except (ValueError, ObjectNotFound) as error:
        raise _LeftAlone(str(error)) from error
    old = {info.key for info in limits.old(info for _, info in garbage)}
    yield from (Garbage(kind, info.key, info.bytes) for kind, info in garbage if info.key in old)


def _uncounted(
    store: ObjectStore, run_id: str, ledger: Ledger, commits: dict[str, Commit], limits: Limits
) -> Iterator[tuple[Kind, ObjectInfo]]:
    """Commits that no log counts, and parts of no commit."""
    kept = {commit.part.key for commit in commits.values()}
    if ledger.status == "finished":
        # Records first: a part without its record is found again, a record without its part would be a riddle.
        for info in limits.old(store.listing(layout.commits_folder(run_id))):
            if info.key in commits and info.key not in ledger.commits:
                yield "uncounted commits", info
                kept.discard(commits[info.key].part.key)
    # A part that a lost attempt wrote may be the one that another attempt committed.
    kept |= {commits[key].part.key for key in ledger.commits}
    for info in store.listing(layout.data_folder(run_id)):
        if info.key not in kept:
            yield "uncounted parts", info


def _compacted(
    store: ObjectStore, run_id: str, ledger: Ledger, commits: dict[str, Commit]
) -> Iterator[tuple[Kind, ObjectInfo]]:
    """Parts whose rows the newest compactions hold, and parts of compactions that hold nothing any more."""
    compactions = read_compactions(store, run_id)
    places = newest_places(compactions)
    replaced = set()
    for key in ledger.commits:
        place = places.get(commits[key].key)
        if place is not None and place.sha256 == commits[key].part.sha256:
            replaced.add(commits[key].part.key)
    for info in store.listing(layout.data_folder(run_id)):
        if info.key in replaced:
            yield "compacted parts", info
    named = {part.key for compaction in compactions for part in compaction.parts}
    relied_on = {place.part.key for place in places.values()}
    for info in store.listing(layout.compacted_folder(run_id)):
        if info.key not in relied_on:
            yield "compacted parts" if info.key in named else "uncounted parts", info


def _beside(
    store: ObjectStore, run_id: str, ledger: Ledger, entries: list[facts.Entry]
) -> Iterator[tuple[Kind, ObjectInfo]]:
    """Files in the run's own folder that no entry names, and those of pruned checkpoints."""
    named = {
        key
        for entry in entries
        for fact in entry.facts
        if not (isinstance(fact, facts.Checkpoint) and fact.step in ledger.pruned)
        for key in _file_keys(fact)
    }
    folder = layout.run_folder(run_id)
    kinds: dict[str, Kind] = {
        "generated/": "generated parts",
        "evaluations/": "generated parts",
        "checkpoints/": "checkpoint files",
        "source/": "source files",
    }
    for name, kind in kinds.items():
        for info in store.listing(f"{folder}{name}"):
            if info.key not in named:
                yield kind, info


def _file_keys(value: object) -> Iterator[str]:
    """Keys of all files that a fact names, however deep."""
    if isinstance(value, FileRef):
        yield value.key
    elif isinstance(value, tuple):
        for each in value:
            yield from _file_keys(each)
    elif isinstance(value, Record):
        for each in vars(value).values():
            yield from _file_keys(each)


def _check_compactions(store: ObjectStore, run_id: str) -> None:
    """Read what parts would be deleted for. Raises _LeftAlone if it is not the same."""
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
        raise _LeftAlone(str(error)) from error


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


def read_sound_log(store: ObjectStore, run_id: str) -> tuple[Ledger, list[facts.Entry]]:
    """The ledger and the entries of a run. Raises ValueError unless the log is whole and makes sense."""
    incarnations = read_incarnations(store, run_id)
    if not incarnations:
        raise ValueError(f"run {run_id} was never begun, or all claims to it are gone")
    next_log = layout.entry_prefix(run_id, len(incarnations))
    for key in store.keys(layout.log_folder(run_id)):
        if key >= next_log:
            raise ValueError(f"{key} is of an incarnation whose claim is gone")
    entries: list[facts.Entry] = []
    problems = [*log_problems(store, run_id, incarnations, entries)]
    ledger = Ledger.fold(entries, incarnations)
    for problem in (*problems, *ledger.problems):
        raise ValueError(f"{problem.sentence}: `forgeflow verify {run_id}` tells more")
    return ledger, entries
