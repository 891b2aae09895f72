"""A run's log: incarnations are claimed, entries are appended, and only what counts is read.

    incarnations/000000 ◀── incarnations/000001 (previous_last: 000000-00000007)
      log/000000-00000000 … 00000007   count
      log/000000-00000008              the successor's seal: does not count
      log/000001-00000000 …            count as far as there are no gaps

A claim first seals the incarnation before it: it takes the next free place in that log. So the old
controller, if it still lives, finds another content under its own key at its next append and gets
`Fenced`; and each entry that it was told is written comes before the seal and counts.
"""

import threading
import time
from typing import Self

from storage import layout
from storage.facts import Entry, Fact, Sealed
from storage.objects import ObjectStore
from storage.records import (
    Controller,
    EntryPosition,
    Incarnation,
    read_record,
    read_records,
)


class Fenced(RuntimeError):
    """Another controller has taken the run over; this one must stop without further effects."""


class RunLog:
    """One controller's hold on a run, to which it appends. Threads may share it.

    Example:
        controller = Controller.this_process(versions=versions, git_commit=None)
        log = RunLog.claim(store, run_id, controller)
        log.append(Started(run_id=run_id, meshes=("generator", "trainer")))
    """

    def __init__(self, store: ObjectStore, incarnation: Incarnation) -> None:
        self.incarnation = incarnation
        self._store = store
        self._next_seq = 0
        self._unsettled: Entry | None = None
        self._lock = threading.Lock()

    @classmethod
    def claim(cls, store: ObjectStore, run_id: str, controller: Controller) -> Self:
        """Take the run over from whoever holds it.

        Raises Fenced if another controller does so at the same time and is faster.
        """
        incarnations = read_incarnations(store, run_id)
        number = len(incarnations)
        claimed = Incarnation(
            run_id=run_id,
            incarnation=number,
            previous_last=_seal(store, incarnations, controller) if incarnations else None,
            controller=controller,
        )
        if not _put_own(store, layout.incarnation_key(run_id, number), claimed.to_bytes()):
            raise Fenced(f"another controller just claimed incarnation {number} of run {run_id}")
        return cls(store, claimed)

    def append(self, *facts: Fact) -> Entry:
        """Write the facts as the next entry, which is durable and counts once this returns.

        Costs the same however long the log is. Raises Fenced if another controller took the run
        over, and OSError if the store fails; then the entry may have been written, which `settle` tells.
        """
        run_id, number = self.incarnation.run_id, self.incarnation.incarnation
        with self._lock:
            self._settle()
            entry = Entry(incarnation=number, seq=self._next_seq, at=time.time(), facts=facts)
            # Kept until its fate is known: the store may fail, or a signal come, when it is already written.
            self._unsettled = entry
            key = layout.entry_key(run_id, number, entry.seq)
            if not _put_own(self._store, key, entry.to_bytes()):
                self._unsettled = None
                raise Fenced(f"{key} was written by another controller, which took the run over")
            self._next_seq = entry.seq + 1
            self._unsettled = None
            return entry

    def settle(self) -> Entry | None:
        """The entry of an `append` that raised, if it was written all the same and so counts.

        Told once. Raises OSError if the store fails.
        """
        with self._lock:
            return self._settle()

    def _settle(self) -> Entry | None:
        entry = self._unsettled
        if entry is None:
            return None
        key = layout.entry_key(self.incarnation.run_id, entry.incarnation, entry.seq)
        written = self._store.exists(key) and self._store.read(key) == entry.to_bytes()
        if written:
            self._next_seq = entry.seq + 1
        self._unsettled = None
        return entry if written else None


def _seal(
    store: ObjectStore, incarnations: list[Incarnation], controller: Controller
) -> EntryPosition | None:
    """End the newest incarnation's log and return its last entry that counts, if it has any."""
    run_id, number = incarnations[-1].run_id, incarnations[-1].incarnation
    keys = counting_keys(store, run_id, incarnations)
    seq = sum(key.startswith(layout.entry_prefix(run_id, number)) for key in keys)
    sealed = Sealed(host=controller.host, pid=controller.pid)
    while True:
        entry = Entry(incarnation=number, seq=seq, at=time.time(), facts=(sealed,))
        if store.put_if_absent(layout.entry_key(run_id, number, seq), entry.to_bytes()):
            return EntryPosition(incarnation=number, seq=seq - 1) if seq else None
        seq += 1


def read_incarnations(store: ObjectStore, run_id: str) -> list[Incarnation]:
    """All incarnations of the run, in order. Raises ValueError if one is missing or unreadable."""
    keys = store.keys(layout.incarnations_folder(run_id))
    for number, key in enumerate(keys):
        if key != layout.incarnation_key(run_id, number):
            raise ValueError(
                f"incarnation {number} of run {run_id} is missing: found {key} in its place"
            )
    return read_records(store, keys, Incarnation)


def read_entries(store: ObjectStore, run_id: str) -> list[Entry]:
    """All entries of the run that count, in order. Raises ValueError if one is unreadable."""
    keys = counting_keys(store, run_id, read_incarnations(store, run_id))
    entries = read_records(store, keys, Entry)
    return [check_place(key, entry) for key, entry in zip(keys, entries, strict=True)]


def counting_keys(store: ObjectStore, run_id: str, incarnations: list[Incarnation]) -> list[str]:
    """Keys of the entries that count, in order.

    Of each incarnation these are the ones without gaps up to the last that its successor names.
    """
    present = set(store.keys(layout.log_folder(run_id)))
    keys = []
    for number in range(len(incarnations)):
        limit = num_named(incarnations, number)
        seq = 0
        while seq != limit and (key := layout.entry_key(run_id, number, seq)) in present:
            keys.append(key)
            seq += 1
    return keys


def num_named(incarnations: list[Incarnation], number: int) -> int | None:
    """How many entries of an incarnation its successor says count; None if it has no successor."""
    if number + 1 >= len(incarnations):
        return None
    last = incarnations[number + 1].previous_last
    return last.seq + 1 if last else 0


def read_entry(store: ObjectStore, key: str) -> Entry:
    """The entry under the key.

    Raises ObjectNotFound, and ValueError if it is unreadable or belongs elsewhere.
    """
    return check_place(key, read_record(store, key, Entry))


def check_place(key: str, entry: Entry) -> Entry:
    """The entry, if it is that of the key. Raises ValueError."""
    if not key.endswith(f"/{entry.incarnation:06d}-{entry.seq:08d}.json"):
        place = f"entry {entry.seq} of incarnation {entry.incarnation}"
        raise ValueError(f"{key} holds {place}, which belongs elsewhere")
    return entry


def _put_own(store: ObjectStore, key: str, data: bytes) -> bool:
    """Whether the object is ours.

    The same content under the key is: a store can lose the answer to our write.
    """
    return store.put_if_absent(key, data) or store.read(key) == data
