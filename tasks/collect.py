"""A round of episodes: generate, score, and choose what to train on."""

from __future__ import annotations

import numpy as np

from forge_core.actors.messages import DrawnPrompt, GenerateReply, GenerateRequest, ScoreRequest
from storage import facts, layout
from storage.parts import read_committed
from storage.records import Commit, read_record
from tasks.calls import on_replicas, score_part
from tasks.references import Generation, Scored, StepBatch
from tasks.run import ActiveRun, current
from tasks.stage import attempt, stage


@stage
async def generate(step: int) -> Generation:
    """Draw the step's prompts and sample them on all replicas.

    Idempotent by step: draws and seeds follow from it, and a round that lost a replica is redone whole.
    """
    run = current()
    config = run.config
    drawn = _draw(run, step)
    unknown = [d for d in drawn if d.group_id not in run.ledger.groups]
    if unknown:
        run.append(_admitted(step, unknown))
    requests = {
        replica: GenerateRequest(
            run_id=run.run_id,
            key_prefix=layout.generated_prefix(run.run_id, f"{step:06d}-{replica:03d}"),
            prompts=tuple(drawn[replica :: config.generators.replicas]),
            num_samples=config.group_size,
            policy_version=step - 1,
            attempt=attempt(),
        )
        for replica in range(config.generators.replicas)
    }
    replies = await on_replicas(
        run,
        "generate",
        {replica: (request,) for replica, request in requests.items()},
        GenerateReply,
        timeout_seconds=config.timeouts.stage_seconds,
    )
    by_replica = dict(zip(requests, replies, strict=True))
    new: list[facts.Fact] = []
    for replica, reply in by_replica.items():
        if reply.part is not None:
            new.append(_generated(step, replica, reply))
        if reply.too_long:
            new.append(facts.Dropped(group_ids=reply.too_long, reason="prompt_too_long", step=step))
    run.append(*new)
    kept = [(replica, reply.part) for replica, reply in by_replica.items() if reply.part]
    return Generation(
        round=step,
        parts=tuple(part for _, part in kept),
        replicas=tuple(replica for replica, _ in kept),
        response_tokens=sum(r.response_tokens for r in replies),
        seconds=max(r.seconds for r in replies),
    )


def _draw(run: ActiveRun, step: int) -> list[DrawnPrompt]:
    first = (step - 1) * run.config.groups_per_step
    return [
        DrawnPrompt(
            draw=draw,
            group_id=layout.group_id(run.run_id, draw),
            prompt=run.environment.train_prompt(draw),
        )
        for draw in range(first, first + run.config.groups_per_step)
    ]


def _admitted(step: int, drawn: list[DrawnPrompt]) -> facts.Admitted:
    return facts.Admitted(
        round=step,
        draws=tuple(
            facts.Draw(
                draw=d.draw,
                group_id=d.group_id,
                prompt_id=d.prompt.prompt_id,
                environment=d.prompt.environment,
                index=d.prompt.index,
            )
            for d in drawn
        ),
    )


def _generated(step: int, replica: int, reply: GenerateReply) -> facts.Generated:
    assert reply.part is not None
    return facts.Generated(
        round=step,
        replica=replica,
        part=reply.part,
        group_ids=reply.group_ids,
        policy_version_min=reply.policy_version_min,
        policy_version_max=reply.policy_version_max,
        prompt_tokens=reply.prompt_tokens,
        response_tokens=reply.response_tokens,
    )


@stage
async def score(generation: Generation) -> Scored:
    """Score a round's parts and commit them. Idempotent by round and replica: the first commit counts."""
    run = current()
    commits: list[str] = []
    for replica, part in zip(generation.replicas, generation.parts, strict=True):
        request = ScoreRequest(
            run_id=run.run_id, part=part, commit=f"{generation.round:06d}-{replica:03d}"
        )
        reply = await score_part(run, request)
        assert reply.commit is not None
        known = {fact.commit for fact in run.ledger.committed}
        if reply.commit not in known:
            run.append(
                facts.Committed(
                    round=generation.round,
                    commit=reply.commit,
                    group_ids=reply.group_ids,
                    episodes=reply.num_episodes,
                    score_set="run",
                )
            )
        commits.append(reply.commit)
    return Scored(round=generation.round, commits=tuple(commits))


@stage
async def buffer(step: int, scored: Scored) -> StepBatch:
    """Choose the step's groups, in the order of their draws; groups whose rewards are all equal are dropped.

    Idempotent by step: a batch that the log has is the batch.
    """
    run = current()
    commits = [read_record(run.store, key, Commit) for key in scored.commits]
    columns = ["group_id", "draw", "reward"]
    table = read_committed(run.store, run.run_id, columns=columns, commits=commits)
    rewards: dict[str, list[float]] = {}
    draws: dict[str, int] = {}
    for row in table.to_pylist():
        rewards.setdefault(row["group_id"], []).append(row["reward"])
        draws[row["group_id"]] = row["draw"]
    ordered = sorted(rewards, key=draws.__getitem__)
    # Exact equality: a spread of rounding errors is no signal, and a small true one is.
    flat = tuple(group_id for group_id in ordered if len(set(rewards[group_id])) == 1)
    kept = tuple(group_id for group_id in ordered if group_id not in set(flat))
    if step not in run.ledger.batches:
        new: list[facts.Fact] = [facts.Batched(step=step, group_ids=kept)]
        if flat:
            new.append(facts.Dropped(group_ids=flat, reason="no_signal", step=step))
        run.append(*new)
    return StepBatch(
        step=step,
        commits=scored.commits,
        group_ids=kept,
        metrics=_reward_metrics(list(rewards.values()), len(flat)),
    )


def _reward_metrics(groups: list[list[float]], num_flat: int) -> dict[str, float]:
    if not groups:
        return {}
    return {
        "reward": float(np.mean([np.mean(group) for group in groups])),
        "reward_std": float(np.mean([np.std(group, ddof=1) for group in groups])),
        "frac_reward_zero_std": num_flat / len(groups),
    }
