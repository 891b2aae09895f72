"""The stages of the async regime: each is one task per segment, and all of a segment's run at the same time.

A stage ends with its segment's last step. What is under way in the engines then goes on in the next.
"""

from __future__ import annotations

from forge_core.actors.messages import AdvanceReply
from forge_core.mesh import MeshCall
from tasks.calls import commit_scored
from tasks.checkpoints import checkpoint, is_checkpoint_due
from tasks.learn import put_weights, train_step
from tasks.pipeline import Part, Pipeline
from tasks.references import Segment
from tasks.run import current
from tasks.stage import stage
from tasks.together import together

_PARTS_AT_ONCE = 4
"""Parts that are scored at the same time: as many as a step has, where its groups finish evenly."""


def pipeline() -> Pipeline:
    """The pipeline of the current run, made when it is first asked for."""
    run = current()
    if not isinstance(run.pipeline, Pipeline):
        run.pipeline = Pipeline.of(run)
    return run.pipeline


@stage
async def generate(segment: Segment) -> None:
    """Keep every replica generating, under the newest weights, until all serve the segment's last step."""
    replicas = range(len(current().meshes.generators))
    await together(*(_generate_on(replica, segment.last_step) for replica in replicas))


async def _generate_on(replica: int, last_step: int) -> None:
    run, line = current(), pipeline()
    mesh = run.meshes.generators[replica]

    def is_over() -> bool:
        return replica not in line.requests and line.all_serve(last_step)

    while True:
        await line.until(lambda: line.has_lost(replica) or is_over() or line.has_work(replica))
        if line.has_lost(replica):
            await _bring_back(replica)
            continue
        if is_over():
            line.log()
            return
        try:
            answers: list[AdvanceReply] = await mesh.call(
                "advance",
                line.request(replica),
                timeout_seconds=run.config.timeouts.call_seconds,
            )
        except MeshCall:
            if not mesh.has_failed() or run.recovery is None:
                raise
        else:
            await line.answered(replica, answers[0])


async def _bring_back(replica: int) -> None:
    """Have a replica that has failed started again; what it was generating is begun again, elsewhere if that may be."""
    run, line = current(), pipeline()
    mesh, recovery = run.meshes.generators[replica], run.recovery
    assert recovery is not None
    if recovery.policy(mesh) == "route_around":
        await line.lose(replica)
    await recovery.revive(mesh)
    await line.take_back(replica)


@stage
async def score(segment: Segment) -> None:
    """Score and commit parts as they come, until the segment's last step is trained.

    Several at the same time, so that one on which a verifier is slow holds up no other.
    """
    under_way: list[Part] = []
    await together(*(_score(segment, under_way) for _ in range(_PARTS_AT_ONCE)))


async def _score(segment: Segment, under_way: list[Part]) -> None:
    run, line = current(), pipeline()

    def is_over() -> bool:
        return not line.parts and run.ledger.current_step >= segment.last_step

    while True:
        await line.until(lambda: is_over() or line.next_part(under_way) is not None)
        part = line.next_part(under_way)
        if part is None:
            return
        under_way.append(part)
        try:
            await commit_scored(run, part.round, part.replica, part.stored.part)
        finally:
            under_way.remove(part)
        await line.scored(part)


@stage
async def buffer(segment: Segment) -> None:
    """Choose each step's groups as soon as enough are ready. Idempotent by step."""
    line = pipeline()
    for step in segment.steps:
        if step not in line.batches:
            await line.until(lambda step=step: line.can_choose(step))  # type: ignore[misc]
            line.choose(step)
            await line.tell()


async def _train_step(step: int) -> None:
    """Train a step once it has its batch; choose another if that is given up."""
    run, line = current(), pipeline()
    await line.until(lambda: step in line.batches)
    if not line.is_given_up(step):
        await train_step(run, line.batches[step])
    if line.is_given_up(step):
        line.give_up(step)
        await line.tell()
        await line.until(lambda: line.can_choose(step))
        line.choose(step)
    await line.tell()


@stage
async def train(segment: Segment) -> None:
    """Train and publish step by step; the next begins while generators still fetch the weights of the one before.

    Idempotent by step. Raises BoundExceeded as the parts that it is made of do.
    """
    run, line = current(), pipeline()
    for step in segment.steps:
        if line.put is not None and line.put.manifest.policy_version >= step:
            continue  # an attempt before has come as far as that
        while step > run.ledger.current_step:
            await _train_step(step)
        # What is published replaces the version before, which no one may still be fetching.
        await line.until(lambda step=step: line.all_serve(step - 1))  # type: ignore[misc]
        await put_weights(run, step)
        await line.tell()
        if is_checkpoint_due(run, step):
            await checkpoint(step)
