"""A step: train on a batch, and publish the weights."""

from __future__ import annotations

import logging
import math

import numpy as np

from forge_core.actors.messages import (
    CriticReply,
    LoadReply,
    PublishReply,
    TrainReply,
    TrainRequest,
)
from storage import facts
from tasks.calls import Overtaken, load_on_all
from tasks.checkpoints import settle_checkpoint
from tasks.critic import teach_critic, unteach_critic
from tasks.estimates import with_estimates
from tasks.references import StepBatch
from tasks.run import ActiveRun, current
from tasks.stage import stage
from tasks.turns import in_turn, turn

logger = logging.getLogger(__name__)

_REPLICAS_SECONDS = 30.0
"""Shortest time between two facts that tell what each mesh did."""


class BoundExceeded(RuntimeError):
    """A bound of the config that the run promised to keep is broken; trying again would not mend it."""


@stage
@in_turn("trainer")
async def train(batches: tuple[StepBatch, ...]) -> None:
    """Train steps. Idempotent by step: one that the trainer has behind it is not trained again."""
    run = current()
    for batch in batches:
        if batch.step > run.ledger.current_step and not await train_step(run, batch):
            return


async def train_step(run: ActiveRun, batch: StepBatch) -> bool:
    """Train one step and log it; whether it was completed.

    It is not with a loss or gradient that is not finite: then the weights are what they were, its groups are dropped,
    and the step needs another batch.

    The trainer answers again for the step it completed last. A step that is trained again after a crash and gives
    other weights than before is recorded as a fork. Raises BoundExceeded if, on-policy, the trainer's logprobs differ
    from the recorded ones, and after too many losses in a row that are not finite.
    """
    async with run.ending.during_a_step():
        return await _train_step(run, batch)


async def _train_step(run: ActiveRun, batch: StepBatch) -> bool:
    if run.ledger.nonfinite[batch.step] and run.ledger.batches.get(batch.step) != batch.group_ids:
        return False  # given up by an attempt before
    request = await with_estimates(run, train_request(run, batch))
    # First: what it learns can be undone, and a trainer's step cannot.
    critic = await teach_critic(run, request)
    if critic is not None and critic.nonfinite is not None:
        _give_up_batch(run, batch, critic)
        return False
    reply: TrainReply = (
        await run.meshes.trainer.call(
            "train", request, timeout_seconds=run.config.timeouts.stage_seconds
        )
    )[0]
    if reply.nonfinite is not None:
        await unteach_critic(run, batch.step)
        run.append(run.intervals("trainer", reply.intervals))
        _give_up_batch(run, batch, reply)
        return False
    _check_on_policy(run, reply)
    told = {**batch.metrics, **(critic.metrics if critic else {}), **reply.metrics}
    metrics = {name: value for name, value in told.items() if math.isfinite(value)}
    metrics["train/seconds"] = reply.seconds
    metrics |= run.turns.figures() if run.turns is not None else {}
    new: list[facts.Fact] = []
    before = run.ledger.steps.get(batch.step)
    if before is not None and before.weights_digest != reply.weights_digest:
        new.append(facts.Diverged(step=batch.step, reason="trained again, it gave other weights"))
    run.append(
        run.intervals("trainer", reply.intervals),
        *new,
        facts.Step(
            step=batch.step,
            group_ids=batch.group_ids,
            score_set=batch.score_set,
            weights_digest=reply.weights_digest,
            policy_version=batch.step,
            optimizer_updates=reply.optimizer_updates,
            age_max=reply.age_max,
            age_mean=reply.age_mean,
            metrics=metrics,
            checkpoint=None,
        ),
        *run.replicas(every_seconds=_REPLICAS_SECONDS),
    )
    await settle_checkpoint(run, wait=False)
    return True


def train_request(run: ActiveRun, batch: StepBatch) -> TrainRequest:
    """What trainer and critic are asked to learn from, but for what is estimated of it."""
    return TrainRequest(
        run_id=run.run_id,
        step=batch.step,
        commits=batch.commits,
        group_ids=batch.group_ids,
        advantages=None if batch.advantages is None else tuple(batch.advantages.items()),
        score_set=batch.score_set,
        weights=batch.weights,
        is_collected=run.config.train_rounds,
    )


def _give_up_batch(run: ActiveRun, batch: StepBatch, reply: TrainReply | CriticReply) -> None:
    """Drop groups whose loss or gradient was not finite; raise BoundExceeded after too many batches in a row."""
    told = f"step {batch.step}: {reply.nonfinite}; nothing was updated, and the batch is kept as {reply.batch_key}"
    if batch.step in run.ledger.steps:
        raise BoundExceeded(f"{told}; before, this step was trained with the same groups")
    if batch.step in run.ledger.buffered:
        # Other batches may have been drawn since from what this one left in the buffer.
        raise BoundExceeded(f"{told}; with buffer.policy {run.config.buffer.policy!r} the run ends")
    groups = run.ledger.groups
    run.append(
        facts.Dropped(
            # A replay may have trained on them in an earlier epoch.
            group_ids=tuple(group for group in batch.group_ids if not groups[group].steps),
            reason="nonfinite",
            step=batch.step,
            cause=reply.nonfinite,
            batch=reply.batch_key,
        ),
    )
    logger.warning("run %s: %s", run.run_id, told)
    most = run.config.algorithm.max_nonfinite
    if run.ledger.nonfinite_in_a_row >= most:
        raise BoundExceeded(f"{told}; that is algorithm.max_nonfinite {most} in a row")


def _check_on_policy(run: ActiveRun, reply: TrainReply) -> None:
    """Recorded logprobs are those of the weights in training when no version lies between them.

    This sees what the probe cannot: tokens that were sampled over a stale prefix cache, or a shifted mask.
    """
    gap = reply.metrics.get("sampling/sampling_logp_difference/max")
    if gap is not None and reply.age_max == 0 and not gap <= run.config.parity.max_max:
        raise BoundExceeded(
            f"step {reply.step}: logprobs recorded at sampling differ from the trainer's by {gap:.3g} nats, above "
            f"parity.max_max {run.config.parity.max_max:g}; generation and training do not agree on the policy"
        )


@stage
async def publish(policy_version: int) -> None:
    """Send the trainer's weights to every generator, and see that they arrived.

    Idempotent by version. Raises ValueError if a generator received other bytes, BoundExceeded if the probe's logprobs
    are too far apart or too certain to show it.
    """
    run = current()
    async with turn(run, "trainer"):
        put = await put_weights(run, policy_version)
    async with turn(run, "generators", weights=False):
        await _have_served(run, put)


async def level(run: ActiveRun) -> None:
    """Publish the newest weights if a generator serves them that are not those that were published last.

    In hybrid, a weight store that was filled anew in the middle of a round has newer ones than the round began with,
    and so has each generator that is started again thereafter.
    """
    served = {loaded.policy_version for loaded in run.loads.values()}
    if run.put is not None and not served <= {run.ledger.served_version}:
        await _have_served(run, run.put)


async def _have_served(run: ActiveRun, put: PublishReply) -> None:
    loaded = await load_on_all(run)
    if {reply.policy_version for reply in loaded} != {put.manifest.policy_version}:
        raise Overtaken(
            f"version {put.manifest.policy_version} was replaced while generators loaded it"
        )
    if run.turns is not None:
        run.turns.loaded()
    published = published_fact(put, loaded)
    run.append(published)
    check_parity(run, published)


async def put_weights(run: ActiveRun, policy_version: int) -> PublishReply:
    """Have the trainer put its weights where the generators fetch them; safe to repeat.

    Raises BoundExceeded if they are of another version.
    """
    put = await put_newest(run)
    if put.manifest.policy_version != policy_version:
        raise BoundExceeded(
            f"the trainer published version {put.manifest.policy_version} instead of {policy_version}"
        )
    return put


async def put_newest(run: ActiveRun, *, forget: bool = True) -> PublishReply:
    """Have the trainer put its weights, of whatever version; forget those that were put before, unless told not to."""
    answers: list[PublishReply] = await run.meshes.trainer.call(
        "publish",
        run.probe,
        run.meshes.store_name,
        tuple(run.replaced) if forget else (),
        timeout_seconds=run.config.timeouts.call_seconds,
    )
    put = run.put = answers[0]
    run.replaced = [put.manifest] if forget else [*run.replaced, put.manifest]
    run.append(run.intervals("trainer", put.intervals))
    return put


def published_fact(put: PublishReply, loaded: list[LoadReply]) -> facts.Published:
    """The fact that every generator serves the version, and how far it is from the trainer's.

    Raises BoundExceeded if a logprob of the probe is not finite.
    """
    return facts.Published(
        policy_version=put.manifest.policy_version,
        weights_digest=put.manifest.digest,
        parity=_parity(put.manifest.policy_version, put, loaded),
        bytes=put.manifest.total_bytes,
        seconds=put.seconds + max(reply.seconds for reply in loaded),
    )


def _parity(policy_version: int, put: PublishReply, loaded: list[LoadReply]) -> facts.Parity:
    ours = np.concatenate([np.asarray(row) for row in put.probe_logprobs])
    gaps = np.stack(
        [
            np.abs(np.concatenate([np.asarray(row) for row in reply.probe_logprobs]) - ours)
            for reply in loaded
        ]
    )
    if not (np.isfinite(gaps).all() and math.isfinite(put.probe_entropy)):
        raise BoundExceeded(
            f"version {policy_version} gives the probe logprobs that are not finite"
        )
    return facts.Parity(
        # Of the replica that is furthest off: others must not make up for it.
        mean=float(gaps.mean(axis=1).max()),
        max=float(gaps.max()),
        tokens=int(ours.size),
        entropy=put.probe_entropy,
    )


def check_parity(run: ActiveRun, published: facts.Published) -> None:
    """Raise BoundExceeded if the probe's logprobs are too far apart.

    A policy that has become too certain for the probe to show much is warned of, once: it may have learned all there is
    to learn, and the digest has shown that its weights arrived.
    """
    bound, parity, policy_version = run.config.parity, published.parity, published.policy_version
    assert parity is not None
    if not (parity.mean <= bound.max_mean and parity.max <= bound.max_max):
        raise BoundExceeded(
            f"version {policy_version}: trainer and generator differ on the probe by {parity.mean:.3g} (mean) and "
            f"{parity.max:.3g} (max) nats, above parity.max_mean {bound.max_mean:g} or max_max {bound.max_max:g}"
        )
    if parity.entropy < bound.min_entropy and not _was_certain(run, policy_version):
        logger.warning(
            "run %s: version %d: the probe's mean entropy is %.3g nats, below parity.min_entropy %g: too certain to "
            "show much of a difference between trainer and generator",
            run.run_id, policy_version, parity.entropy, bound.min_entropy,
        )  # fmt: skip


def _was_certain(run: ActiveRun, policy_version: int) -> bool:
    """Whether the version before was too certain already."""
    before = [each for each in run.ledger.published[-2:] if each.policy_version < policy_version]
    parity = before[-1].parity if before else None
    return parity is not None and parity.entropy < run.config.parity.min_entropy
