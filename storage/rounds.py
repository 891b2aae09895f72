"""Rounds that are collected by runs of their own and trained on by another: who collects which.

    claimed, put-if-absent ──▶ config of the collecting run ──▶ its log ──▶ finished: the trainer may take it in

The claim comes first and the version is chosen after it. So a trainer that sees a claim without a config prunes
nothing, and one that saw no claim keeps its newest checkpoint, which is the one that will be chosen.
"""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from storage import facts, layout
from storage.groups import GroupState
from storage.ledger import Ledger
from storage.objects import ObjectStore
from storage.records import Record, read_records
from storage.resume import read_ledger
from storage.runs import read_config
from storage.tombstones import is_deleted


class Claim(Record):
    """The record that gives a round of a trainer run to one collecting run."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    trainer_run_id: str
    """Run that will train on the round."""
    round: PositiveInt
    """Number of the round, from 1."""
    run_id: str
    """Run that collects it."""
    first_draw: NonNegativeInt
    """Ordinal of its first draw."""
    count: PositiveInt
    """Number of its draws."""
    host: str
    """Host of the process that claimed it."""
    pid: int
    """Id of that process."""
    claimed_at: float
    """Unix seconds."""


def round_steps(number: int, *, after_step: int, steps_per_round: int, steps: int) -> range:
    """The steps that train on a round, from 1, of a run whose steps begin after `after_step`; none past its end."""
    first = after_step + (number - 1) * steps_per_round + 1
    return range(first, min(first + steps_per_round, steps + 1))


def read_claims(store: ObjectStore, trainer_run_id: str) -> list[Claim]:
    """All claims to rounds of a run, in their order. Raises ValueError if one is unreadable."""
    return read_records(store, store.keys(layout.rounds_folder(trainer_run_id)), Claim)


def collected(
    store: ObjectStore, claim: Claim, *, group_size: int
) -> tuple[facts.Replayed, ...] | None:
    """The facts that let a claimed round in; None while its run has not finished.

    Raises ValueError if that run is gone or its log unreadable.
    """
    if not store.exists(layout.config_key(claim.run_id)) and not is_deleted(store, claim.run_id):
        return None
    ledger = read_ledger(store, claim.run_id)
    if ledger.status != "finished":
        return None
    return tuple(
        facts.Replayed(
            run_id=claim.run_id,
            commit=commit,
            draws=draws,
            group_size=group_size,
            score_set=layout.RUN_SCORES,
        )
        for commit in ledger.commits
        if (draws := _handed_over(ledger, commit))
    )


def _handed_over(ledger: Ledger, commit: str) -> tuple[facts.Draw, ...]:
    return tuple(
        group.draw
        for group in ledger.groups.values()
        if group.commit == commit
        and group.state == GroupState.HANDED_OVER
        and group.draw is not None
    )


def waits_for(store: ObjectStore, trainer_run_id: str, number: int) -> str | None:
    """Why a round cannot be trained on yet, in one sentence; None if it can."""
    claims = {claim.round: claim for claim in read_claims(store, trainer_run_id)}
    claim = claims.get(number)
    if claim is None:
        return f"round {number} is not collected: forgeflow collect {trainer_run_id}"
    if not store.exists(layout.config_key(claim.run_id)):
        return (
            f"round {number} was claimed by run {claim.run_id}, which did not begin: forgeflow collect "
            f"{trainer_run_id} makes it ready to be resumed"
        )
    status = read_ledger(store, claim.run_id).status
    if status == "finished":
        return None
    return (
        f"round {number} is being collected by run {claim.run_id}, whose status is {status}: if its process is gone, "
        f"forgeflow resume {claim.run_id}"
    )


def relied_on(store: ObjectStore, trainer_run_id: str, last_step: int) -> set[int] | None:
    """Versions that runs collect with whose rounds lie after a step; None while one has not chosen its version yet."""
    versions = set()
    for claim in read_claims(store, trainer_run_id):
        if is_deleted(store, claim.run_id):
            continue
        if not store.exists(layout.config_key(claim.run_id)):
            return None
        config = read_config(store, claim.run_id)
        if config["collect"]["last_step"] > last_step:
            versions.add(int(config["parent_step"]))
    return versions
