"""The critic of a run beside its trainer: begun, taught, kept and brought back step by step with it.

Whoever gives up a step's batch after the critic has learned it has that undone. A run without a critic passes through
here untouched.
"""

from __future__ import annotations

from forge_core.actors.messages import (
    CheckpointRequest,
    CriticReply,
    CriticRestoreRequest,
    RestoreRequest,
    TrainRequest,
)
from forge_core.timeline import Interval
from storage import facts
from storage.records import FileRef
from tasks.run import ActiveRun


async def begin_critic(run: ActiveRun) -> None:
    """Have a critic that has not begun begin with the run's first checkpoint. Idempotent."""
    if not run.critic_stands:
        await restore_critic(run, run.ledger.checkpoints[run.ledger.base_step])


async def restore_critic(
    run: ActiveRun, kept: facts.Checkpoint, *, step: int | None = None
) -> None:
    """Have the critic, if there is one, stand where a checkpoint was taken, which is called `step` from now on.

    Raises ObjectNotFound, and ValueError if a file is damaged or does not fit the model.
    """
    if run.meshes.opened_critic is None:
        return
    policy = RestoreRequest(
        key=kept.key,
        files=kept.files,
        weights_digest=kept.weights_digest,
        step=kept.step if step is None else step,
    )
    answers: list[tuple[Interval, ...]] = await run.meshes.critic.call(
        "restore",
        CriticRestoreRequest(policy=policy, files=kept.critic),
        timeout_seconds=run.config.timeouts.stage_seconds,
    )
    run.append(run.intervals("critic", answers[0]))
    run.critic_stands = True


async def teach_critic(run: ActiveRun, request: TrainRequest) -> CriticReply | None:
    """Have the critic, if there is one, learn a step. Idempotent by step."""
    if run.meshes.opened_critic is None:
        return None
    await begin_critic(run)
    answers: list[CriticReply] = await run.meshes.critic.call(
        "train", request, timeout_seconds=run.config.timeouts.stage_seconds
    )
    if answers[0].intervals:
        run.append(run.intervals("critic", answers[0].intervals))
    return answers[0]


async def unteach_critic(run: ActiveRun, step: int) -> None:
    """Have the critic, if there is one, be what it was before a step. Idempotent."""
    if run.meshes.opened_critic is not None:
        await run.meshes.critic.call("undo", step, timeout_seconds=run.config.timeouts.call_seconds)


async def keep_critic(run: ActiveRun, request: CheckpointRequest) -> tuple[FileRef, ...]:
    """Store the critic's part of a checkpoint; of one that has not begun there is none. Safe to repeat."""
    if run.meshes.opened_critic is None or not run.critic_stands:
        return ()
    answers: list[tuple[FileRef, ...]] = await run.meshes.critic.call(
        "checkpoint", request, timeout_seconds=run.config.timeouts.stage_seconds
    )
    return answers[0]
