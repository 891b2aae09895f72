"""Rounds that are collected by one run and trained on by another: handed over there, taken in here."""

from __future__ import annotations

from storage import facts, layout
from storage.groups import GroupState
from storage.rounds import collected, read_claims, waits_for
from tasks.batches import choose_batch
from tasks.references import Round, Scored, StepBatch
from tasks.run import ActiveRun, current
from tasks.stage import stage


@stage
async def hand_over(scored: Scored) -> None:
    """Give the round's committed groups to the run that it was collected for. Idempotent: given once."""
    run = current()
    assert run.config.parent_run_id is not None, "launched to collect for a run"
    groups = tuple(
        group_id
        for fact in run.ledger.committed_in.get(scored.round.number, ())
        for group_id in fact.group_ids
        if run.ledger.groups[group_id].state == GroupState.COMMITTED
    )
    if groups:
        run.append(facts.HandedOver(group_ids=groups, to_run=run.config.parent_run_id))


@stage
async def take_in(round: Round) -> tuple[StepBatch, ...]:
    """Let a collected round in and share its groups out to its steps, in the order of their draws.

    Empty if it is not collected yet; the run is then paused with the reason. Idempotent by round and step: groups are
    let in once, all of them at once, and a batch that the log has is the batch.
    """
    run = current()
    run.paused = waits_for(run.store, run.run_id, round.number)
    if run.paused is not None:
        return ()
    claim = {each.round: each for each in read_claims(run.store, run.run_id)}[round.number]
    replayed = collected(run.store, claim, group_size=run.config.group_size) or ()
    new = [fact for fact in replayed if fact.draws[0].group_id not in run.ledger.groups]
    if new:
        run.append(*new)
    chosen = (
        choose_batch(run, step, _groups_of(run, claim.run_id, step), tokens_per_second=0.0)
        for step in round.steps
    )
    return tuple(batch for batch in chosen if batch is not None)


def _groups_of(run: ActiveRun, collecting_run_id: str, step: int) -> list[str]:
    """The step's groups that were let in; the others were dropped where they were collected."""
    size = run.config.groups_per_step
    draws = range((step - 1) * size, step * size)
    groups = (layout.group_id(collecting_run_id, ordinal) for ordinal in draws)
    return [group_id for group_id in groups if group_id in run.ledger.groups]
