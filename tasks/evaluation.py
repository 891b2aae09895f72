"""Evaluation on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from forge_core.actors.messages import (
    DrawnPrompt,
    GenerateRequest,
    ScoreReply,
    ScoreRequest,
)
from forge_core.quality.estimates import RIGHT_ABOVE, pass_at_k, powers_of_two
from storage import facts, layout
from tasks.calls import on_replicas, score_part
from tasks.run import current
from tasks.stage import attempt, stage
from tasks.turns import turn


@stage
async def evaluate(name: str, policy_version: int) -> None:
    """Answer the held-out prompts, sampled as in training with fixed seeds and once greedily, and score them.

    Idempotent by name and version. A second evaluation of one name with another version replaces the first.
    """
    run = current()
    known = run.ledger.evaluated.get(name)
    if known is not None and known.policy_version == policy_version:
        return
    num_samples = run.config.evaluation.num_samples
    prompts = run.environment.test_prompts(run.config.evaluation.num_prompts)
    drawn = [
        DrawnPrompt(draw=i, group_id=f"{run.run_id}-{name}-{i:08d}", prompt=prompt)
        for i, prompt in enumerate(prompts)
    ]
    requests = {
        replica: GenerateRequest(
            run_id=run.run_id,
            key_prefix=layout.generated_prefix(run.run_id, f"{name}-{replica:03d}"),
            prompts=tuple(drawn[replica :: run.config.generators.replicas]),
            num_samples=num_samples + 1,
            num_greedy=1,
            policy_version=policy_version,
            attempt=attempt(),
        )
        for replica in range(min(run.config.generators.replicas, len(drawn)))
    }
    async with turn(run, "generators"):
        replies = await on_replicas(
            run,
            "evaluate",
            requests,
            timeout_seconds=run.config.timeouts.stage_seconds,
        )
    scored: list[ScoreReply] = []
    for replica, reply in zip(requests, replies, strict=True):
        if reply.too_long or reply.stored is None:
            raise ValueError(
                f"sampling.max_tokens {run.config.sampling.max_tokens} leaves no room for held-out prompts such as "
                f"{reply.too_long[0]}; lower it or shorten environment.prompt_template"
            )
        prefix = layout.evaluation_prefix(run.run_id, f"{name}-{replica:03d}")
        request = ScoreRequest(run_id=run.run_id, part=reply.stored.part, key_prefix=prefix)
        scored.append(await score_part(run, request))
    run.append(told(name, policy_version, scored, num_samples))


def told(
    name: str, policy_version: int, scored: Sequence[ScoreReply], num_samples: int
) -> facts.Evaluated:
    """What rewards come to, where each prompt has `num_samples` samples and, after them, the greedy one."""
    rows = [row for reply in scored for row in reply.rewards]
    *sampled, greedy = (sum(of_sample) / len(rows) for of_sample in zip(*rows, strict=True))
    num_right = [sum(reward > RIGHT_ABOVE for reward in row[:num_samples]) for row in rows]
    passed = {
        k: sum(pass_at_k(num_samples, c, k) for c in num_right) / len(rows)
        for k in powers_of_two(num_samples)
    }
    return facts.Evaluated(
        name=name,
        policy_version=policy_version,
        sampled=sum(sampled) / num_samples,
        greedy=greedy,
        num_prompts=len(rows),
        num_samples=num_samples,
        pass_at=tuple(facts.PassAt(k=k, probability=each) for k, each in passed.items()),
        parts=tuple(reply.part for reply in scored),
    )
