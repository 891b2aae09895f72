"""What models beside the trainer say of a step's batch before it is trained on, and how one of them learns with it.

    batch ─┬─▶ reference: the weights of a checkpoint, taken now if need be ─▶ logprobs ─┐
           └─▶ critic, as it stands after the step before ─▶ values ────────────────────┴─▶ critic learns ─▶ train

Both are files that the log tells of. A batch that it has them of is trained on with those again, so that what came of
it comes of it again.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from forge_core.actors.messages import (
    EstimateReply,
    ReferenceRequest,
    RestoreRequest,
    TrainRequest,
)
from forge_core.mesh import Mesh
from storage import facts
from storage.estimates import reference_step
from tasks.checkpoints import keep
from tasks.critic import begin_critic
from tasks.run import ActiveRun


async def with_estimates(run: ActiveRun, request: TrainRequest) -> TrainRequest:
    """The request with what reference and critic, as far as the run has them, say of its batch. Idempotent by step.

    Raises ValueError if a checkpoint that they need is damaged.
    """
    if not request.group_ids:
        return request
    known = run.ledger.estimates.get(request.step, {})
    if run.meshes.opened_reference is not None:
        told = known.get("reference_logprobs") or await _ask_reference(run, request)
        request = dataclasses.replace(request, reference_logprobs=told.file)
    if run.meshes.opened_critic is not None:
        await begin_critic(run)
        told = known.get("values") or await _tell(
            run, run.meshes.critic, "values", request, request, weights_step=request.step - 1
        )
        request = dataclasses.replace(request, values=told.file)
    return request


async def _ask_reference(run: ActiveRun, request: TrainRequest) -> facts.Estimated:
    step = reference_step(
        request.step,
        base_step=run.ledger.base_step,
        refresh_steps=run.config.algorithm.kl.refresh_steps,
    )
    if step == run.ledger.current_step:
        await keep(run, step)
    kept = run.ledger.checkpoints[step]
    weights = RestoreRequest(
        key=kept.key, files=kept.files, weights_digest=kept.weights_digest, step=step
    )
    asked = ReferenceRequest(batch=request, weights=weights)
    mesh = run.meshes.reference
    return await _tell(run, mesh, "reference_logprobs", request, asked, weights_step=step)


async def _tell(
    run: ActiveRun,
    mesh: Mesh,
    what: Literal["reference_logprobs", "values"],
    batch: TrainRequest,
    asked: TrainRequest | ReferenceRequest,
    *,
    weights_step: int,
) -> facts.Estimated:
    """Ask a mesh for its figures of a batch, and log where they are."""
    answers: list[EstimateReply] = await mesh.call(
        "estimate", asked, timeout_seconds=run.config.timeouts.stage_seconds
    )
    told = facts.Estimated(
        step=batch.step, what=what, weights_step=weights_step, file=answers[0].file
    )
    run.append(run.intervals(mesh.name, answers[0].intervals), told)
    return told
