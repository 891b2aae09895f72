"""What other runs and later incarnations need to know of a run before they go on from it."""

from storage import layout
from storage.facts import Checkpoint
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import ObjectStore
from storage.runs import list_runs, read_config


def read_ledger(store: ObjectStore, run_id: str) -> Ledger:
    """The ledger of a run.

    Raises ValueError if the store has no such run or its log is unreadable.
    """
    read_config(store, run_id)
    return Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))


def find_checkpoint(store: ObjectStore, run_id: str, step: int | None) -> Checkpoint:
    """The checkpoint of a run's step, or of its newest that has one.

    Raises ValueError, naming the steps that have one, if this has none.
    """
    ledger = read_ledger(store, run_id)
    kept = sorted(ledger.checkpoints.keys() - ledger.pruned)
    if not kept:
        raise ValueError(f"run {run_id!r} has no checkpoint yet: resume it first")
    if step is None:
        step = kept[-1]
    if step not in kept:
        steps = ", ".join(map(str, kept))
        raise ValueError(f"run {run_id!r} has no checkpoint of step {step}: take one of {steps}")
    return ledger.checkpoints[step]


def is_finished(store: ObjectStore, run_id: str) -> bool:
    """Whether the store has the run and its log says that it finished.

    Raises ValueError if its log is unreadable.
    """
    if not store.exists(layout.config_key(run_id)):
        return False
    return read_ledger(store, run_id).status == "finished"


def newest_with_checkpoint(store: ObjectStore) -> str:
    """The run that was begun last of those that have a checkpoint. Raises ValueError if the store has none."""
    begun = []
    for run_id in list_runs(store):
        if incarnations := read_incarnations(store, run_id):
            begun.append((incarnations[0].controller.claimed_at, run_id))
    for _, run_id in sorted(begun, reverse=True):
        ledger = read_ledger(store, run_id)
        if ledger.checkpoints.keys() - ledger.pruned:
            return run_id
    raise ValueError(f"store {store.uri} has no run with a checkpoint: train one first")
