"""What of a run is garbage: objects that nothing which counts refers to, and nothing that may still count can come to.

What a run's log refers to is never garbage. Nor is anything that is younger than a bound, anything of a run whose log
is unreadable or contradicts itself, and anything of a run that may be going on. A commit that no log counts is
garbage only once its run has finished: whoever resumes an unfinished run takes it up. A part of scores has a name of
its own, so that whoever goes on with a set never takes up one that an attempt before left.

A part whose rows a compaction holds is garbage too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from storage import facts, layout
from storage.annotations import Scores, read_set
from storage.ledger import Ledger
from storage.log import read_incarnations
from storage.objects import ObjectInfo, ObjectNotFound, ObjectStore
from storage.places import newest_places, read_compactions
from storage.records import Commit, FileRef, Incarnation, Record, read_record
from storage.runs import read_config
from storage.tombstones import is_deleted, objects_of
from storage.verify_log import log_problems

Kind = Literal[
    "uncounted commits",
    "uncounted parts",
    "compacted parts",
    "generated parts",
    "checkpoint files",
    "estimates",
    "source files",
    "uncounted scores",
    "files of deleted runs",
    "temporary files",
]


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


class LeftAlone(Exception):
    """A run is not looked into; the message says why."""


def garbage_of(store: ObjectStore, run_id: str, limits: Limits) -> Iterator[Garbage]:
    """The garbage of one run, in the order in which it can be deleted. Raises LeftAlone."""
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
            raise LeftAlone(f"{missing[0]} is gone, and the log counts it")
        if limits.spare(ledger):
            raise LeftAlone("by its log it is running")
        garbage = [
            *_uncounted(store, run_id, ledger, commits, limits),
            *_compacted(store, run_id, ledger, commits),
            *_beside(store, run_id, ledger, entries),
            *_scores(store, run_id),
        ]
    except (ValueError, ObjectNotFound) as error:
        raise LeftAlone(str(error)) from error
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
        "estimates/": "estimates",
        "source/": "source files",
    }
    for name, kind in kinds.items():
        for info in store.listing(f"{folder}{name}"):
            if info.key not in named:
                yield kind, info


def _scores(store: ObjectStore, run_id: str) -> Iterator[tuple[Kind, ObjectInfo]]:
    """Parts of scores that none of the records of their set names, and copies of what scored that the set does not."""
    for name in store.folders(layout.annotations_folder(run_id)):
        folder = layout.score_set_folder(run_id, name)
        records = store.keys(layout.scores_folder(run_id, name))
        named = {read_record(store, key, Scores).part.key for key in records}
        named |= {*_file_keys(read_set(store, run_id, name))}
        for info in store.listing(folder):
            if info.key not in named and info.key.endswith(".parquet"):
                yield "uncounted scores", info
        for info in store.listing(f"{folder}source/"):
            if info.key not in named:
                yield "source files", info


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
