"""Steps of a replay: groups of past runs are let in, and chosen from, as they are needed."""

from __future__ import annotations

from forge_core.replay import PlannedStep
from storage import facts
from tasks.batches import choose_batch
from tasks.references import StepBatch
from tasks.run import ActiveRun, current
from tasks.stage import stage


@stage
async def recall(planned: PlannedStep) -> StepBatch:
    """Let the groups of a planned step in, and choose what of them carries a signal.

    Idempotent by step: groups are let in once, and a batch that the log has is the batch. In a later epoch those that
    were dropped in the first are not considered again.
    """
    run = current()
    new = _unknown(run, planned)
    if new:
        run.append(*new)
    groups = [
        group_id
        for group_id in planned.group_ids
        if run.ledger.groups[group_id].reason is None
        or run.ledger.groups[group_id].dropped_at == planned.step
    ]
    chosen = choose_batch(
        run, planned.step, groups, tokens_per_second=0.0, advantages=planned.advantages
    )
    assert chosen is not None, "it may be short"
    return chosen


def _unknown(run: ActiveRun, planned: PlannedStep) -> list[facts.Fact]:
    """The facts that let in what the log does not have yet: all of a step, or nothing."""
    return [
        fact
        for fact in planned.replayed
        if any(draw.group_id not in run.ledger.groups for draw in fact.draws)
    ]
