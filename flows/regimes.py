"""The regimes: three compositions of the same stages."""

from __future__ import annotations

from tasks import segments
from tasks.collect import buffer, generate, score
from tasks.learn import checkpoint, is_checkpoint_due, publish, train
from tasks.references import Round, Scored, Segment
from tasks.run import ActiveRun
from tasks.together import together


async def sync_rounds(run: ActiveRun) -> None:
    """On-policy: each step trains on what the weights before it have generated."""
    for step in range(1, run.config.steps + 1):
        this = Round(number=step, first_step=step, last_step=step, policy_version=step - 1)
        scored = await _collect(this)
        batches = await buffer(scored)
        await train(batches)
        await publish(step)
        if is_checkpoint_due(run, step):
            await checkpoint(step)


async def hybrid_rounds(run: ActiveRun) -> None:
    """Rounds of several steps: each is trained on while the next is collected with the weights before it."""
    rounds = plan_rounds(run.config.steps, run.config.steps_per_round)
    if not rounds:
        return
    scored = await _collect(rounds[0])
    for this, following in zip(rounds, [*rounds[1:], None], strict=True):
        batches = await buffer(scored)
        if following is None:
            await train(batches)
        else:
            _, scored = await together(train(batches), _collect(following))
        await publish(this.last_step)
        if is_checkpoint_due(run, this.last_step):
            await checkpoint(this.last_step)


async def async_segments(run: ActiveRun) -> None:
    """All stages at the same time: weights change under running requests, and admission bounds their age."""
    size = run.config.segment_steps
    for first in range(1, run.config.steps + 1, size):
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


def plan_rounds(steps: int, size: int) -> list[Round]:
    """What is collected while a round trains is of the weights that were published before that round."""
    firsts = list(range(1, steps + 1, size))
    return [
        Round(
            number=number,
            first_step=first,
            last_step=min(first + size - 1, steps),
            policy_version=max(0, first - 1 - size),
        )
        for number, first in enumerate(firsts, start=1)
    ]
