"""Checkpoints: begun after a step, written while training goes on, pruned when newer ones stand.

    due ──▶ begun ──▶ being written ──▶ logged ──▶ pruned ──▶ files deleted
                          └─ failed: begun again, a few times

A checkpoint counts once the log has it, and what it replaces is deleted only then.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

from forge_core.actors.messages import CheckpointReply, CheckpointRequest
from storage import facts, layout
from storage.estimates import reference_step
from storage.ledger import Ledger
from storage.rounds import relied_on
from tasks.critic import keep_critic
from tasks.run import ActiveRun, current
from tasks.stage import TRANSIENT, stage
from tasks.turns import in_turn

logger = logging.getLogger(__name__)


def is_checkpoint_due(run: ActiveRun, step: int) -> bool:
    """Whether so many steps or seconds have passed since the last one as the config says."""
    every, every_seconds = run.config.checkpoint.every, run.config.checkpoint.every_seconds
    by_steps = bool(every) and step - run.kept_step >= every
    return by_steps or time.monotonic() - run.kept_at >= every_seconds


@stage
@in_turn("trainer")
async def checkpoint(step: int) -> None:
    """Begin to store all state after a step, once the one before is stored. Idempotent by step.

    That of the first and the last step is waited for.
    """
    run = current()
    await settle_checkpoint(run, wait=True)
    if step in run.ledger.checkpoints and step not in run.ledger.pruned:
        return
    await _begin(run, step)
    if step == run.ledger.base_step or step >= run.config.steps:
        await settle_checkpoint(run, wait=True)


@stage
@in_turn("trainer")
async def last_checkpoint(step: int) -> None:
    """The checkpoint that a run ends with. Idempotent by step."""
    await keep(current(), step)


async def keep(run: ActiveRun, step: int) -> None:
    """Have the checkpoint of the step that the trainer stands at in the log. Idempotent by step."""
    await settle_checkpoint(run, wait=True)
    if step not in run.ledger.checkpoints or step in run.ledger.pruned:
        await _begin(run, step)
        await settle_checkpoint(run, wait=True)


async def _begin(run: ActiveRun, step: int) -> None:
    request = CheckpointRequest(
        run_id=run.run_id, step=step, key=layout.checkpoint_folder(run.run_id, step)
    )
    critic = await keep_critic(run, request)
    answers: list[CheckpointReply] = await run.meshes.trainer.call(
        "begin_checkpoint", request, timeout_seconds=run.config.timeouts.stage_seconds
    )
    run.writing, run.writing_critic = answers[0], critic
    run.kept_step, run.kept_at = step, time.monotonic()
    run.append(run.intervals("trainer", answers[0].intervals))


async def settle_checkpoint(run: ActiveRun, *, wait: bool) -> None:
    """Log the checkpoint that is being written, if it is written by now, and prune those that it replaces.

    Raises what the writing raised, once it has been tried again as often as the config says.
    """
    lost = 0
    while (writing := run.writing) is not None:
        started = time.monotonic()
        try:
            answers: list[CheckpointReply] = await run.meshes.trainer.call(
                "finish_checkpoint",
                writing.step,
                writing.weights_digest,
                wait,
                timeout_seconds=run.config.timeouts.stage_seconds,
            )
        except TRANSIENT as error:
            lost += 1
            # What a dead trainer had taken is gone.
            if lost > run.config.retry.attempts or run.meshes.trainer.has_failed():
                raise
            cause = f"{type(error).__name__}: {error}"[:2000]
            seconds = time.monotonic() - started
            run.append(facts.Retry(stage="checkpoint", attempt=lost, cause=cause, seconds=seconds))
            await asyncio.sleep(run.config.retry.delay_seconds * 2 ** (lost - 1))
            await _begin_again(run, writing)
            continue
        reply = answers[0]
        if reply.key is None:
            return
        run.append(
            facts.Checkpoint(
                step=reply.step,
                key=reply.key,
                weights_digest=reply.weights_digest,
                files=reply.files,
                critic=run.writing_critic,
            ),
            run.intervals("trainer", reply.intervals),
        )
        run.writing = None
        await prune(run)


async def _begin_again(run: ActiveRun, writing: CheckpointReply) -> None:
    """Have what was taken written again; the trainer may have gone on since."""
    await run.meshes.trainer.call(
        "write_checkpoint_again",
        writing.step,
        timeout_seconds=run.config.timeouts.call_seconds,
    )


async def prune(run: ActiveRun) -> None:
    """Give up the checkpoints that the config keeps no longer: log it, then delete their files.

    Not those that other runs collect with. What a failing store leaves of them is found by garbage collection.
    """
    steps = superfluous(run)
    if steps and run.config.train_rounds:
        relied = relied_on(run.store, run.run_id, run.ledger.last_step)
        steps = () if relied is None else tuple(step for step in steps if step not in relied)
    if not steps:
        return
    run.append(facts.Pruned(steps=steps))
    for step in steps:
        kept = run.ledger.checkpoints[step]
        for file in (*kept.files, *kept.critic):
            try:
                await asyncio.to_thread(run.store.delete, file.key)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", file.key, error)


def superfluous(run: ActiveRun) -> tuple[int, ...]:
    """Steps whose checkpoints are neither the first, nor the last, nor the reference's, nor kept by the config."""
    config, ledger = run.config.checkpoint, run.ledger
    if config.keep_last == 0:
        return ()
    standing = sorted(ledger.checkpoints.keys() - ledger.pruned)
    kept = {ledger.base_step, *standing[-config.keep_last :]}
    kept.add(
        reference_step(
            ledger.current_step + 1,
            base_step=ledger.base_step,
            refresh_steps=run.config.algorithm.kl.refresh_steps,
        )
    )
    if config.keep_every:
        kept |= {step for step in standing if step % config.keep_every == 0}
    if config.keep_best and (best := best_checkpoint(ledger, standing)) is not None:
        kept.add(best)
    return tuple(step for step in standing if step not in kept)


def best_checkpoint(ledger: Ledger, standing: list[int]) -> int | None:
    """The one whose steps since the checkpoint before it had the highest mean reward; None without rewards."""
    rewards: dict[int, float] = {}
    all_steps = sorted(ledger.checkpoints)
    for step in standing:
        before = max((each for each in all_steps if each < step), default=ledger.base_step)
        of_steps = [
            ledger.steps[number].metrics["reward"]
            for number in range(before + 1, step + 1)
            if number in ledger.steps and "reward" in ledger.steps[number].metrics
        ]
        if of_steps:
            rewards[step] = math.fsum(of_steps) / len(of_steps)
    return max(rewards, key=lambda step: (rewards[step], step), default=None)
