"""Deleting runs whole, and which of them are due.

    tombstone ──▶ episodes, log, checkpoints, … ──▶ config      then only the tombstone remains

Once the tombstone is written the run does not exist, whatever is left of it. Cut short, the deletion is
finished by the next one.
"""

import time
from typing import Any

from storage import layout
from storage.garbage import Limits, read_sound_log
from storage.objects import ObjectInfo, ObjectNotFound, ObjectStore
from storage.promotions import promoted_runs
from storage.rounds import read_claims
from storage.runs import read_config
from storage.tombstones import Tombstone, is_deleted, objects_of, stored_runs

_DAY_SECONDS = 86400


def deletable(store: ObjectStore, run_id: str, limits: Limits) -> list[ObjectInfo]:
    """Everything that deleting the run removes.

    Raises ValueError if there is no such run, another one was made from it, it made a promoted checkpoint, or it may
    be going on.
    """
    if not is_deleted(store, run_id):
        read_config(store, run_id)
        if (line := promoted_runs(store).get(run_id)) is not None:
            raise ValueError(
                f"run {run_id!r} cannot be deleted, for it made the newest promoted checkpoint of line {line}: "
                "promote another first"
            )
        heirs = children(store).get(run_id, set())
        if heirs:
            raise ValueError(
                f"run {run_id!r} cannot be deleted, for {', '.join(sorted(heirs))} came from it: delete that first"
            )
        _refuse_running(store, run_id, limits)
    return objects_of(store, run_id)


def _refuse_running(store: ObjectStore, run_id: str, limits: Limits) -> None:
    try:
        ledger, _ = read_sound_log(store, run_id)
    except (ValueError, ObjectNotFound):
        return  # Nobody can go on from such a log, and deleting it is the way out.
    if limits.spare(ledger):
        controller = ledger.incarnations[-1].controller
        raise ValueError(
            f"run {run_id!r} is running, as far as its log tells, in process {controller.pid} on {controller.host}: "
            "cancel it first"
        )


def delete_run(store: ObjectStore, run_id: str) -> list[ObjectInfo]:
    """Delete a run for good, whatever was made from it; what was deleted. Safe to repeat and to interrupt.

    Raises OSError if the store fails.
    """
    tombstone = Tombstone(run_id=run_id, deleted_at=time.time())
    store.put_if_absent(layout.deleted_key(run_id), tombstone.to_bytes())
    config_key = layout.config_key(run_id)
    infos = sorted(objects_of(store, run_id), key=lambda info: info.key == config_key)
    for info in infos:
        store.delete(info.key)
    return infos


def children(store: ObjectStore) -> dict[str, set[str]]:
    """By run, the runs that were made from it: forks, and those that replay or were handed its episodes.

    A run whose config is unreadable may have been made from any other.
    """
    found: dict[str, set[str]] = {}
    runs = [
        run_id
        for run_id in stored_runs(store)
        if store.exists(layout.config_key(run_id)) and not is_deleted(store, run_id)
    ]
    for run_id in runs:
        try:
            parents = _parents(store, run_id, read_config(store, run_id))
        except ValueError:
            parents = set(runs) - {run_id}
        for parent in parents:
            found.setdefault(parent, set()).add(run_id)
    return found


def _parents(store: ObjectStore, run_id: str, config: dict[str, Any]) -> set[str]:
    """Runs that a run relies on: those that its config refers to, and those that collect for it.

    The latter, and those that evaluate it, rely on it only until they are done, so that it can be deleted before them.
    """
    if config.get("train_rounds"):
        collecting = {claim.run_id for claim in read_claims(store, run_id)}
    else:
        collecting = set()
    if config.get("collect") or config.get("evaluate_only"):
        return collecting
    replayed = (config.get("replay") or {}).get("runs") or []
    named = {config.get("parent_run_id"), *replayed, *collecting}
    return {str(each).partition("@")[0] for each in named if each is not None}


def expired(
    store: ObjectStore, days: float, *, now: float | None = None
) -> tuple[list[str], dict[str, set[str]]]:
    """Runs that ended more than so many days ago, children before parents; and those that are kept for children.

    A run with a child that has not expired is kept, and so is one that made a line's newest promoted checkpoint. Runs
    with unreadable logs are not looked into.
    """
    before = (time.time() if now is None else now) - days * _DAY_SECONDS
    old = {run_id for run_id in stored_runs(store) if _ended_before(store, run_id, before)}
    old -= promoted_runs(store).keys()
    heirs = children(store)
    order: list[str] = []
    while free := [each for each in sorted(old) if not heirs.get(each, set()) - set(order)]:
        order += free
        old -= set(free)
    return order, {run_id: heirs[run_id] - set(order) for run_id in sorted(old)}


def _ended_before(store: ObjectStore, run_id: str, before: float) -> bool:
    if is_deleted(store, run_id) or not store.exists(layout.config_key(run_id)):
        return False
    try:
        ledger, _ = read_sound_log(store, run_id)
    except (ValueError, ObjectNotFound):
        return False
    return ledger.status != "running" and max(ledger.last_at.values()) < before
