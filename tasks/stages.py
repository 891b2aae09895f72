"""The stages of a run.

```
build_model ─▶ warm_start ─▶ publish(0) ─▶ evaluate ─┐
   ┌─────────────────────────────────────────────────┘
   └▶ generate ─▶ score ─▶ buffer ─▶ train ─▶ publish ─▶ (next step) … ─▶ evaluate
```
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from forge_core.actors.messages import (
    CheckpointReply,
    DrawnPrompt,
    GenerateReply,
    GenerateRequest,
    LoadReply,
    PublishReply,
    ScoreReply,
    ScoreRequest,
    TrainReply,
    TrainRequest,
    WarmStartReply,
)
from forge_core.meshes import Mesh
from storage import facts, layout
from storage.parts import read_committed
from storage.records import Commit, read_record
from tasks.references import Generation, Scored, StepBatch, Trained
from tasks.run import ActiveRun, current
from tasks.stage import stage

_HUB = "hf://"


class BoundExceeded(RuntimeError):
    """A bound of the config that the run promised to keep is broken; trying again would not mend it."""


@stage
async def build_model() -> str:
    """Make or find the model and load it everywhere; returns its directory.

    Idempotent: the tiny model's bytes follow from config and seed; loading replaces what was loaded.
    """
    run = current()
    timeout = run.config.timeouts.startup_seconds
    directory = await asyncio.to_thread(_model_directory, run)
    if run.config.model.path is None:
        await run.meshes.trainer.call("build_model", directory, timeout_seconds=timeout)
    loading = [*run.meshes.generators, run.meshes.trainer]
    await asyncio.gather(
        *(mesh.call("load", directory, timeout_seconds=timeout) for mesh in loading)
    )
    answers = await run.meshes.trainer.call(
        "encode_probe", run.config.parity.probe_tokens, timeout_seconds=timeout
    )
    run.probe = answers[0]
    return directory


def _model_directory(run: ActiveRun) -> str:
    path = run.config.model.path
    if path is None:
        return str(run.store.local_path(f"{layout.run_folder(run.run_id)}model"))
    if path.startswith(_HUB):
        # Deferred: only a config that names a hub id needs it.
        from huggingface_hub import snapshot_download

        return snapshot_download(
            path.removeprefix(_HUB), allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja"]
        )
    return str(Path(path).resolve())


@stage
async def warm_start() -> None:
    """Supervised training on reference answers; makes version 0. Idempotent: the trainer does it once."""
    run = current()
    reply: WarmStartReply = (
        await run.meshes.trainer.call(
            "warm_start", timeout_seconds=run.config.timeouts.stage_seconds
        )
    )[0]
    run.append(
        facts.WarmStarted(
            steps=reply.steps,
            loss=reply.loss,
            weights_digest=reply.weights_digest,
            seconds=reply.seconds,
        ),
        run.intervals("trainer", reply.intervals),
    )


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
    requests = [
        (
            replica,
            GenerateRequest(
                run_id=run.run_id,
                key_prefix=layout.generated_prefix(run.run_id, f"{step:06d}-{replica:03d}"),
                prompts=tuple(drawn[replica :: config.generators.replicas]),
                num_samples=config.group_size,
                policy_version=step - 1,
            ),
        )
        for replica in range(config.generators.replicas)
    ]
    replies: list[GenerateReply] = await _on_replicas(run, "generate", requests)
    new: list[facts.Fact] = []
    for (replica, _), reply in zip(requests, replies, strict=True):
        new.append(run.intervals(f"generator-{replica}", reply.intervals))
        if reply.part is not None:
            new.append(_generated(step, replica, reply))
        if reply.too_long:
            new.append(
                facts.Dropped(group_ids=reply.too_long, reason="prompt_too_long", step=step)
            )
    run.append(*new)
    kept = [(replica, r) for (replica, _), r in zip(requests, replies, strict=True) if r.part]
    return Generation(
        round=step,
        parts=tuple(r.part for _, r in kept if r.part),
        replicas=tuple(replica for replica, _ in kept),
        response_tokens=sum(r.response_tokens for r in replies),
        seconds=max(r.seconds for r in replies),
    )


async def _on_replicas(run: ActiveRun, endpoint: str, requests: list[tuple[int, Any]]) -> list[Any]:
    timeout = run.config.timeouts.stage_seconds
    answers = await asyncio.gather(
        *(
            run.meshes.generators[replica].call(endpoint, request, timeout_seconds=timeout)
            for replica, request in requests
        )
    )
    return [answer[0] for answer in answers]


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
    num_episodes = 0
    for replica, part in zip(generation.replicas, generation.parts, strict=True):
        request = ScoreRequest(
            run_id=run.run_id, part=part, commit=f"{generation.round:06d}-{replica:03d}"
        )
        reply = await _score(run, request)
        assert reply.commit is not None
        known = {fact.commit for fact in run.ledger.committed}
        new: list[facts.Fact] = [run.intervals("verifier", reply.intervals)]
        if reply.commit not in known:
            new.append(
                facts.Committed(
                    round=generation.round,
                    commit=reply.commit,
                    group_ids=reply.group_ids,
                    episodes=reply.num_episodes,
                    score_set="run",
                )
            )
        run.append(*new)
        commits.append(reply.commit)
        num_episodes += reply.num_episodes
    return Scored(round=generation.round, commits=tuple(commits), num_episodes=num_episodes)


async def _score(run: ActiveRun, request: ScoreRequest) -> ScoreReply:
    answers: list[ScoreReply] = await run.meshes.verifier.call(
        "score", request, timeout_seconds=run.config.timeouts.stage_seconds
    )
    return answers[0]


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


@stage
async def train(batch: StepBatch, generation: Generation) -> Trained:
    """Train one step and log it.

    Idempotent by step: the trainer answers again for the step it completed last, and a step that the log has is not
    logged twice. Raises BoundExceeded if, on-policy, the trainer's logprobs differ from the recorded ones.
    """
    run = current()
    request = TrainRequest(
        run_id=run.run_id, step=batch.step, commits=batch.commits, group_ids=batch.group_ids
    )
    reply: TrainReply = (
        await run.meshes.trainer.call(
            "train", request, timeout_seconds=run.config.timeouts.stage_seconds
        )
    )[0]
    _check_on_policy(run, reply)
    metrics = {**batch.metrics, **reply.metrics}
    if generation.seconds > 0:
        metrics["generate/tokens_per_second"] = generation.response_tokens / generation.seconds
    metrics["train/seconds"] = reply.seconds
    new: list[facts.Fact] = [run.intervals("trainer", reply.intervals)]
    if batch.step not in run.ledger.steps:
        new.append(
            facts.Step(
                step=batch.step,
                group_ids=batch.group_ids,
                score_set="run",
                weights_digest=reply.weights_digest,
                policy_version=batch.step,
                optimizer_updates=reply.optimizer_updates,
                age_max=reply.age_max,
                age_mean=reply.age_mean,
                metrics=metrics,
                checkpoint=None,
            )
        )
    run.append(*new)
    return Trained(step=batch.step, weights_digest=reply.weights_digest)


def _check_on_policy(run: ActiveRun, reply: TrainReply) -> None:
    """Recorded logprobs are those of the weights in training when no version lies between them.

    This sees what the probe cannot: tokens that were sampled over a stale prefix cache, or a shifted mask.
    """
    gap = reply.metrics.get("sampling/sampling_logp_difference/max")
    if gap is not None and reply.age_max == 0 and gap > run.config.parity.max_max:
        raise BoundExceeded(
            f"step {reply.step}: logprobs recorded at sampling differ from the trainer's by {gap:.3g} nats, above "
            f"parity.max_max {run.config.parity.max_max:g}; generation and training do not agree on the policy"
        )


@stage
async def publish(policy_version: int) -> None:
    """Send the trainer's weights to every generator, and see that they arrived.

    Idempotent by version. Raises BoundExceeded if a digest differs or the probe's logprobs are too far apart.
    """
    run = current()
    timeout = run.config.timeouts.call_seconds
    put: PublishReply = (
        await run.meshes.trainer.call("publish", run.probe, timeout_seconds=timeout)
    )[0]
    if put.manifest.policy_version != policy_version:
        raise BoundExceeded(
            f"the trainer published version {put.manifest.policy_version} instead of {policy_version}"
        )
    answers = await asyncio.gather(
        *(
            mesh.call("load_version", put.manifest, run.probe, timeout_seconds=timeout)
            for mesh in run.meshes.generators
        )
    )
    loaded: list[LoadReply] = [answer[0] for answer in answers]
    for mesh, reply in zip(run.meshes.generators, loaded, strict=True):
        if reply.digest != put.manifest.digest:
            raise BoundExceeded(
                f"{mesh.name} received other bytes of version {policy_version} than the trainer sent"
            )
    parity = _parity(put, loaded)
    seconds = max(
        i.end - i.start for r in (put, *loaded) for i in r.intervals if i.kind == "weights"
    )
    run.append(
        facts.Published(
            policy_version=policy_version,
            weights_digest=put.manifest.digest,
            parity=parity,
            bytes=put.manifest.total_bytes,
            seconds=seconds,
        ),
        run.intervals("trainer", put.intervals),
        *(
            run.intervals(mesh.name, reply.intervals)
            for mesh, reply in zip(run.meshes.generators, loaded, strict=True)
        ),
    )
    _check_parity(run, policy_version, parity)


def _parity(put: PublishReply, loaded: list[LoadReply]) -> facts.Parity:
    ours = np.concatenate([np.asarray(row) for row in put.probe_logprobs])
    gaps = np.stack(
        [
            np.abs(np.concatenate([np.asarray(row) for row in reply.probe_logprobs]) - ours)
            for reply in loaded
        ]
    )
    return facts.Parity(
        mean=float(gaps.mean()),
        max=float(gaps.max()),
        tokens=int(ours.size),
        entropy=put.probe_entropy,
    )


def _check_parity(run: ActiveRun, policy_version: int, parity: facts.Parity) -> None:
    bound = run.config.parity
    if not (parity.mean <= bound.max_mean and parity.max <= bound.max_max):
        raise BoundExceeded(
            f"version {policy_version}: trainer and generator differ on the probe by {parity.mean:.3g} (mean) and "
            f"{parity.max:.3g} (max) nats, above parity.max_mean {bound.max_mean:g} or max_max {bound.max_max:g}"
        )
    if not parity.entropy >= bound.min_entropy:
        raise BoundExceeded(
            f"version {policy_version}: the probe's mean entropy is {parity.entropy:.3g} nats, below "
            f"parity.min_entropy {bound.min_entropy:g}: too certain to show a difference"
        )


@stage
async def evaluate(name: str, policy_version: int) -> None:
    """Answer the held-out prompts, once sampled as in training with fixed seeds and once greedily, and score them.

    Idempotent by name: a second evaluation of one name replaces the first.
    """
    run = current()
    prompts = run.environment.test_prompts(run.config.evaluation.num_prompts)
    drawn = [
        DrawnPrompt(draw=i, group_id=f"{run.run_id}-{name}-{i:08d}", prompt=prompt)
        for i, prompt in enumerate(prompts)
    ]
    requests = [
        (
            replica,
            GenerateRequest(
                run_id=run.run_id,
                key_prefix=layout.generated_prefix(run.run_id, f"{name}-{replica:03d}"),
                prompts=tuple(drawn[replica :: run.config.generators.replicas]),
                num_samples=2,
                num_greedy=1,
                policy_version=policy_version,
            ),
        )
        for replica in range(min(run.config.generators.replicas, len(drawn)))
    ]
    replies: list[GenerateReply] = await _on_replicas(run, "evaluate", requests)
    new: list[facts.Fact] = [
        run.intervals(f"generator-{replica}", reply.intervals)
        for (replica, _), reply in zip(requests, replies, strict=True)
    ]
    scored: list[ScoreReply] = []
    for (replica, _), reply in zip(requests, replies, strict=True):
        if reply.too_long or reply.part is None:
            raise ValueError(
                f"sampling.max_tokens {run.config.sampling.max_tokens} leaves no room for held-out prompts such as "
                f"{(reply.too_long or ('?',))[0]}; lower it or shorten environment.prompt_template"
            )
        prefix = layout.evaluation_prefix(run.run_id, f"{name}-{replica:03d}")
        request = ScoreRequest(run_id=run.run_id, part=reply.part, key_prefix=prefix)
        scored.append(await _score(run, request))
    new += [run.intervals("verifier", reply.intervals) for reply in scored]
    sampled, greedy = (sum(r.reward_by_sample[i] for r in scored) / len(drawn) for i in (0, 1))
    run.append(
        facts.Evaluated(
            name=name,
            policy_version=policy_version,
            sampled=sampled,
            greedy=greedy,
            num_prompts=len(drawn),
            parts=tuple(reply.part for reply in scored),
        ),
        *new,
    )


@stage
async def checkpoint(step: int) -> str:
    """Store all state after a step; returns the folder's key. Idempotent by step: it counts once the log has it."""
    run = current()
    key = layout.checkpoint_folder(run.run_id, step)
    if step in run.ledger.checkpoints:
        return key
    trainer: Mesh = run.meshes.trainer
    answers: list[CheckpointReply] = await trainer.call(
        "write_checkpoint", key, timeout_seconds=run.config.timeouts.stage_seconds
    )
    reply = answers[0]
    run.append(
        facts.Checkpoint(
            step=step, key=key, weights_digest=reply.weights_digest, files=reply.files
        ),
        run.intervals("trainer", reply.intervals),
    )
    return key
