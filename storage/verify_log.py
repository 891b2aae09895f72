"""The part of `verify` that reads claims and entries: whether they are all there and belong together."""

from collections.abc import Iterator
from itertools import pairwise

from storage import layout, log
from storage.facts import Entry, Sealed, Started
from storage.groups import Problem
from storage.objects import ObjectNotFound, ObjectStore
from storage.records import Incarnation


def log_problems(
    store: ObjectStore, run_id: str, incarnations: list[Incarnation], entries: list[Entry]
) -> Iterator[Problem]:
    """Faults in what claims and entries say of each other.

    Fills `entries` up to the first unreadable one.
    """
    yield from _claims(run_id, incarnations)
    keys = log.counting_keys(store, run_id, incarnations)
    yield from _gaps(store, run_id, incarnations, keys)
    yield from _seals(store, run_id, incarnations)
    yield from _unclaimed(store, run_id, len(incarnations))
    for key in keys:
        try:
            entries.append(log.read_entry(store, key))
        except (ValueError, ObjectNotFound) as error:
            yield Problem("entry", key, f"{error}; nothing after it was read")
            return
        for fact in entries[-1].facts:
            if isinstance(fact, Started) and fact.run_id != run_id:
                yield Problem("entry", key, f"{key} was written for run {fact.run_id}")
    yield from _late(run_id, entries)


def _claims(run_id: str, incarnations: list[Incarnation]) -> Iterator[Problem]:
    for number, incarnation in enumerate(incarnations):
        last = incarnation.previous_last
        if (incarnation.run_id, incarnation.incarnation) != (run_id, number) or (
            last is not None and last.incarnation != number - 1
        ):
            sentence = f"incarnation {number} speaks of another run or of other incarnations"
            yield Problem("incarnation", layout.incarnation_key(run_id, number), sentence)


def _gaps(
    store: ObjectStore, run_id: str, incarnations: list[Incarnation], keys: list[str]
) -> Iterator[Problem]:
    """Entries that are named by a later incarnation, or followed by others, and are not there."""
    for number in range(len(incarnations)):
        prefix = layout.entry_prefix(run_id, number)
        num_counting = sum(key.startswith(prefix) for key in keys)
        num_named = log.num_named(incarnations, number)
        num_present = len(store.keys(prefix))
        if num_counting < (num_present if num_named is None else num_named):
            key = layout.entry_key(run_id, number, num_counting)
            yield Problem("missing_entry", key, f"{key} is missing, and later entries rely on it")


def _seals(store: ObjectStore, run_id: str, incarnations: list[Incarnation]) -> Iterator[Problem]:
    """Every incarnation but the newest is sealed right after the last entry that its successor names.

    Without the seal its controller could have gone on writing what was acknowledged and does not count.
    """
    for number in range(len(incarnations) - 1):
        key = layout.entry_key(run_id, number, log.num_named(incarnations, number) or 0)
        try:
            is_sealed = _is_seal(log.read_entry(store, key))
        except (ValueError, ObjectNotFound):
            is_sealed = False
        if not is_sealed:
            sentence = (
                f"incarnation {number + 1} says that incarnation {number} ended before {key}, "
                "and no seal stands there"
            )
            yield Problem("seal", key, sentence)


def _unclaimed(store: ObjectStore, run_id: str, num_claimed: int) -> Iterator[Problem]:
    """Entries of incarnations that were never claimed, or whose claim is gone. They do not count."""
    claimed = tuple(layout.entry_prefix(run_id, number) for number in range(num_claimed))
    stray = [key for key in store.keys(layout.log_folder(run_id)) if not key.startswith(claimed)]
    # Of a living run, the next incarnation may have been claimed since.
    if stray and not store.exists(layout.incarnation_key(run_id, num_claimed)):
        more = f", and {len(stray) - 1} more" if len(stray) > 1 else ""
        sentence = f"{stray[0]} is of an incarnation that nobody claimed{more}"
        yield Problem("unclaimed", stray[0], sentence)


def _late(run_id: str, entries: list[Entry]) -> Iterator[Problem]:
    """Entries of an incarnation after it was sealed or had ended."""
    for before, entry in pairwise(entries):
        if entry.incarnation != before.incarnation or _is_seal(entry):
            continue
        key = layout.entry_key(run_id, entry.incarnation, entry.seq)
        if _is_seal(before):
            yield Problem("late_entry", key, f"{key} was written after its incarnation was sealed")
        elif any(fact.kind == "end" for fact in before.facts):
            yield Problem("late_entry", key, f"{key} was written after its incarnation had ended")


def _is_seal(entry: Entry) -> bool:
    return all(isinstance(fact, Sealed) for fact in entry.facts)
