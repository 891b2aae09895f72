"""The regimes: three compositions of the same stages."""

from __future__ import annotations

from forge_core.config import RunConfig
from tasks import segments
from tasks.checkpoints import checkpoint, is_checkpoint_due
from tasks.collect import buffer, generate, score
from tasks.learn import publish, train
from tasks.references import Round, Scored, Segment, StepBatch
from tasks.refill import spare_round
from tasks.run import ActiveRun
from tasks.together import together


async def sync_rounds(run: ActiveRun) -> None:
    """On-policy: each step trains on what the weights before it have generated."""
    for step in range(run.ledger.current_step + 1, run.config.steps + 1):
        scored = await _collect(Round(number=step, first_step=step, last_step=step))
        await _train(run, scored)
        await publish(step)
        if is_checkpoint_due(run, step):
            await checkpoint(step)


async def hybrid_rounds(run: ActiveRun) -> None:
    """Rounds of several steps: each is trained on while the next is collected with the weights before it."""
    rounds = plan_rounds(run.config, run.ledger.current_step)
    if not rounds:
        return
    scored = await _collect(rounds[0])
    for this, following in zip(rounds, [*rounds[1:], None], strict=True):
        batches = await _filled_up(run, scored)
        collected = scored
        if following is None:
            await train(batches)
        else:
            _, collected = await together(train(batches), _collect(following))
        # What was given up is drawn anew once the generators have time.
        await _train(run, scored)
        scored = collected
        await publish(this.last_step)
        if is_checkpoint_due(run, this.last_step):
            await checkpoint(this.last_step)


async def async_segments(run: ActiveRun) -> None:
    """All stages at the same time: weights change under running requests, and admission bounds their age."""
    size = run.config.segment_steps
    for first in range(run.ledger.current_step + 1, run.config.steps + 1, size):
        segment = Segment(first_step=first, last_step=min(first + size - 1, run.config.steps))
        await together(
            segments.generate(segment),
            segments.score(segment),
            segments.buffer(segment),
            segments.train(segment),
        )


REGIMES = {"sync": sync_rounds, "async": async_segments, "hybrid": hybrid_rounds}


async def _collect(this: Round) -> Scored:
    return await score(await generate(this))


async def _filled_up(run: ActiveRun, scored: Scored) -> tuple[StepBatch, ...]:
    """The batches of a round's steps; one that lacks groups is filled up with spare draws, as the config allows."""
    while len(batches := await buffer(scored)) < len(scored.round.steps):
        await _collect(spare_round(run, scored.round.steps[len(batches)]))
    return batches


async def _train(run: ActiveRun, scored: Scored) -> None:
    """Train a round's steps; one whose batch was given up gets another."""
    while run.ledger.current_step < scored.round.last_step:
        await train(await _filled_up(run, scored))


def plan_rounds(config: RunConfig, after_step: int) -> list[Round]:
    """The rounds of a run that are not trained to their end after a step."""
    size = config.steps_per_round
    rounds = [
        Round(number=number, first_step=first, last_step=min(first + size - 1, config.steps))
        for number, first in enumerate(range(config.first_step, config.steps + 1, size), start=1)
    ]
    return [round for round in rounds if round.last_step > after_step]
