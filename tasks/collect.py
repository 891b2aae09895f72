"""A round of episodes: generate, score, and choose what to train on."""

from __future__ import annotations

from collections.abc import Iterable

from forge_core.actors.messages import DrawnPrompt, GenerateRequest, StoredPart
from forge_core.environments.base import level_of
from storage import facts, layout
from tasks.batches import choose_batch
from tasks.calls import commit_scored, not_dropped, on_replicas
from tasks.learn import level
from tasks.levels import drawn_prompt
from tasks.references import Generation, Round, Scored, StepBatch
from tasks.refill import drawn_for, may_fill_up
from tasks.run import ActiveRun, current
from tasks.stage import attempt, stage
from tasks.turns import turn


@stage
async def generate(round: Round) -> Generation:
    """Draw the prompts of a round's steps and sample them on all replicas, with the weights that they serve.

    Idempotent by round: what the log has of it is not generated again; draws and seeds follow from the round, and one
    that lost a replica is redone whole.
    """
    run = current()
    config = run.config
    drawn = draw(run, round.ordinals(config.groups_per_step))
    unknown = [d for d in drawn if d.group_id not in run.ledger.groups]
    if unknown:
        step = None if round.spare_draws is None else round.last_step
        run.append(admitted(round.number, unknown, step))
    if not run.ledger.generated_in.get(round.number):
        await _sample(run, round, drawn)
    parts = run.ledger.generated_in.get(round.number, [])
    return Generation(
        round=round,
        parts=tuple(fact.part for fact in parts),
        replicas=tuple(fact.replica for fact in parts),
        tokens_per_second=run.tokens_per_second.pop(round.number, 0.0),
    )


async def _sample(run: ActiveRun, round: Round, drawn: list[DrawnPrompt]) -> None:
    async with turn(run, "generators"):
        await level(run)
        requests = _requests(run, round, drawn)
        replies = await on_replicas(
            run, "generate", requests, timeout_seconds=run.config.timeouts.stage_seconds
        )
    new: list[facts.Fact] = []
    stored: list[StoredPart] = []
    for replica, reply in zip(requests, replies, strict=True):
        if reply.stored is not None:
            stored.append(reply.stored)
            new.append(generated(round.number, replica, reply.stored))
        if dropped := not_dropped(run, reply.too_long):
            new.append(facts.Dropped(group_ids=dropped, reason="prompt_too_long", step=None))
    # At once: a round of which the log has a part is a round that it has whole.
    if new:
        run.append(*new)
    seconds = max((part.seconds for part in stored), default=0.0)
    tokens = sum(part.response_tokens for part in stored)
    run.tokens_per_second[round.number] = tokens / seconds if seconds else 0.0


def _requests(run: ActiveRun, round: Round, drawn: list[DrawnPrompt]) -> dict[int, GenerateRequest]:
    """What each replica samples of a round."""
    replicas = run.config.generators.replicas
    return {
        replica: GenerateRequest(
            run_id=run.run_id,
            key_prefix=layout.generated_prefix(run.run_id, layout.part_name(round.number, replica)),
            prompts=tuple(drawn[replica::replicas]),
            num_samples=run.config.group_size,
            policy_version=run.ledger.served_version,
            attempt=attempt(),
        )
        for replica in range(replicas)
    }


@stage
async def score(generation: Generation) -> Scored:
    """Score a round's parts and commit them. Idempotent by round and replica: the first commit counts."""
    run = current()
    for replica, part in zip(generation.replicas, generation.parts, strict=True):
        await commit_scored(run, generation.round.number, replica, part)
    return Scored(round=generation.round, tokens_per_second=generation.tokens_per_second)


@stage
async def buffer(scored: Scored) -> tuple[StepBatch, ...]:
    """Share a round's groups out to its steps, in the order of their draws, up to one that is to be filled up first.

    Idempotent by step.
    """
    run = current()
    batches = []
    for step in scored.round.steps:
        chosen = choose_batch(
            run,
            step,
            drawn_for(run, step),
            tokens_per_second=scored.tokens_per_second,
            may_be_short=not may_fill_up(run, step),
        )
        if chosen is None:
            break
        batches.append(chosen)
    return tuple(batches)


@stage
async def batch(scored: Scored, advantages: dict[str, float]) -> StepBatch:
    """The batch of a round's one step, with the advantages that were chosen for its episodes.

    Idempotent by step: what the log has of it counts, its advantages too.
    """
    run = current()
    step = scored.round.last_step
    groups = [
        group_id
        for fact in run.ledger.committed_in.get(scored.round.number, ())
        for group_id in fact.group_ids
    ]
    known = run.ledger.advantages.get(step)
    chosen = choose_batch(
        run,
        step,
        sorted(groups),
        tokens_per_second=scored.tokens_per_second,
        advantages=advantages if known is None else known,
    )
    assert chosen is not None, "it may be short"
    return chosen


def known_batches(run: ActiveRun) -> tuple[StepBatch, ...]:
    """The batches of the steps that the log has completed and the trainer has before it again, in order."""
    return logged_batches(run, range(run.ledger.current_step + 1, run.ledger.last_step + 1))


def logged_batches(run: ActiveRun, steps: range) -> tuple[StepBatch, ...]:
    """The batches of steps that the log has completed, in order."""
    ledger = run.ledger
    known = (
        choose_batch(
            run,
            step,
            ledger.considered(step),
            tokens_per_second=ledger.steps[step].metrics.get("generate/tokens_per_second", 0.0),
            advantages=ledger.advantages.get(step),
        )
        for step in steps
    )
    return tuple(batch for batch in known if batch is not None)


def draw(run: ActiveRun, ordinals: Iterable[int]) -> list[DrawnPrompt]:
    """The run's draws with these ordinals."""
    return [
        DrawnPrompt(
            draw=ordinal,
            group_id=layout.group_id(run.run_id, ordinal),
            prompt=drawn_prompt(run, ordinal),
        )
        for ordinal in ordinals
    ]


def admitted(round: int, drawn: list[DrawnPrompt], step: int | None = None) -> facts.Admitted:
    """The fact that draws are let in, where they are spare ones for a step."""
    return facts.Admitted(
        round=round,
        step=step,
        draws=tuple(
            facts.Draw(
                draw=d.draw,
                group_id=d.group_id,
                prompt_id=d.prompt.prompt_id,
                environment=d.prompt.environment,
                index=d.prompt.index,
                level=level_of(d.prompt),
            )
            for d in drawn
        ),
    )


def generated(round: int, replica: int, stored: StoredPart) -> facts.Generated:
    """The fact that a replica has stored a part."""
    return facts.Generated(
        round=round,
        replica=replica,
        part=stored.part,
        group_ids=stored.group_ids,
        policy_version_min=stored.policy_version_min,
        policy_version_max=stored.policy_version_max,
        prompt_tokens=stored.prompt_tokens,
        response_tokens=stored.response_tokens,
    )
