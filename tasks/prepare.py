"""Before the first round: the model, and the weights that the run begins or goes on with."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence

from forge_core.actors.messages import RestoreReply, RestoreRequest, WarmStartReply
from forge_core.config import HUB_PREFIX
from forge_core.mesh import Mesh
from storage import facts
from storage.objects import ObjectNotFound
from storage.records import FileRef
from storage.resume import find_checkpoint
from tasks.critic import restore_critic
from tasks.run import ActiveRun, current
from tasks.stage import stage
from tasks.turns import Side, in_turn, turn

logger = logging.getLogger(__name__)

_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
kinds = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
print(snapshot_download(sys.argv[1], allow_patterns=kinds))
"""


@stage
async def build_model() -> None:
    """Make or find the model and load it everywhere.

    Idempotent: the tiny model's bytes follow from config and seed; an engine that stands is kept.
    """
    run = current()
    timeout = run.config.timeouts.startup_seconds
    if run.meshes.opened_verifier is not None:
        # First: a mistake in it is to be heard of before minutes are spent.
        await run.meshes.verifier.call("prepare", timeout_seconds=timeout)
    directory = await _model_directory(run)
    if run.config.model.path is None:
        await run.meshes.trainer.call("build_model", directory, timeout_seconds=timeout)
    run.model_directory = directory
    others = (run.meshes.opened_reference, run.meshes.opened_critic)
    beside = [mesh for mesh in others if mesh is not None]
    # Where they are colocated one after the other, the engines first: they look at what memory is free.
    await asyncio.gather(
        _load(run, "generators", run.meshes.generators),
        _load(run, "trainer", [run.meshes.trainer, *beside]),
    )
    if run.meshes.generators:
        answers = await run.meshes.trainer.call(
            "encode_probe", run.config.parity.probe_tokens, timeout_seconds=timeout
        )
        run.probe = answers[0]
    for mesh in run.meshes.watched:
        mesh.loaded.set()


async def _load(run: ActiveRun, side: Side, meshes: Sequence[Mesh]) -> None:
    timeout = run.config.timeouts.startup_seconds
    async with turn(run, side, weights=False):
        await asyncio.gather(
            *(mesh.call("load", run.model_directory, timeout_seconds=timeout) for mesh in meshes)
        )


async def _model_directory(run: ActiveRun) -> str:
    path = run.config.model.path
    if path is None:
        return str(run.folder / "model")
    if path.startswith(HUB_PREFIX):
        return await _download(path.removeprefix(HUB_PREFIX))
    return _expanded(path)


def _expanded(path: str) -> str:
    """The path with `~` resolved, as the checks before have read it."""
    return os.path.expanduser(path)


async def _download(repository: str) -> str:
    """Fetch a model from the hub; its folder, which is named after the commit.

    In a process of its own, for a thread could not be stopped. Raises OSError if it fails.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _DOWNLOAD, repository, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise OSError(
            f"model.path {HUB_PREFIX}{repository} could not be downloaded: see output.log"
        )
    return out.decode().strip().splitlines()[-1]


@stage
@in_turn("trainer")
async def warm_start() -> None:
    """Supervised training on reference answers or data of the user's; makes version 0.

    Idempotent: the trainer does it once.
    A run that broke off before its first checkpoint learns again; other weights than before are recorded as a fork.
    """
    await warm_start_trainer(current())


async def warm_start_trainer(run: ActiveRun) -> None:
    """As `warm_start`, within a stage."""
    reply: WarmStartReply = (
        await run.meshes.trainer.call(
            "warm_start", timeout_seconds=run.config.timeouts.stage_seconds
        )
    )[0]
    new: list[facts.Fact] = []
    if run.ledger.weights.get(0, reply.weights_digest) != reply.weights_digest:
        new.append(facts.Diverged(step=0, reason="the warm start gave other weights than before"))
    run.append(
        *new,
        facts.WarmStarted(
            steps=reply.steps,
            loss=reply.loss,
            validations=tuple(
                facts.Validation(step=step, loss=loss) for step, loss in reply.validations
            ),
            best_step=reply.best_step,
            weights_digest=reply.weights_digest,
            seconds=reply.seconds,
        ),
        run.intervals("trainer", reply.intervals),
    )


@stage
@in_turn("trainer")
async def restore() -> None:
    """Load the newest checkpoint of the run that is whole. Idempotent.

    One that is damaged is told of and the one before it taken: what comes after is trained again in any case. Raises
    ValueError if none is whole.
    """
    run = current()
    await restore_newest(run)
    await restore_critic(run, run.ledger.checkpoints[run.ledger.current_step])


async def restore_newest(run: ActiveRun) -> None:
    """As `restore`, within a stage."""
    candidates = sorted(run.ledger.checkpoints.keys() - run.ledger.pruned, reverse=True)
    for step in candidates:
        kept = run.ledger.checkpoints[step]
        started = time.monotonic()
        try:
            reply = await _restore(run, kept.key, kept.files, kept.weights_digest, step)
        except (ValueError, ObjectNotFound) as error:
            if step == candidates[-1]:
                raise
            lost = f"the checkpoint of step {step} cannot be used: {error}"
            logger.warning("run %s: %s", run.run_id, lost)
            seconds = time.monotonic() - started
            run.append(facts.Retry(stage="restore", attempt=1, cause=lost[:2000], seconds=seconds))
            continue
        run.append(
            facts.Restored(step=step, weights_digest=reply.weights_digest),
            run.intervals("trainer", reply.intervals),
        )
        run.kept_step, run.kept_at = step, time.monotonic()
        return


@stage
@in_turn("trainer")
async def restore_parent() -> None:
    """Load the checkpoint of another run that the config names, from which this one goes on. Idempotent.

    In a replay the run's own steps begin at 0. Raises ValueError if the other run has no such checkpoint, or it is
    damaged or of another model.
    """
    run = current()
    kept, base = await restore_from_parent(run)
    if kept.critic:
        await restore_critic(run, kept, step=base)


async def restore_from_parent(run: ActiveRun) -> tuple[facts.Checkpoint, int]:
    """As `restore_parent`, within a stage, for the trainer alone: the checkpoint, and what its step is called now."""
    parent, step = run.config.parent_run_id, run.config.parent_step
    assert parent is not None and step is not None
    kept = find_checkpoint(run.store, parent, step)
    base = 0 if run.config.replay is not None else step
    reply = await _restore(run, kept.key, kept.files, kept.weights_digest, base)
    run.append(
        facts.Forked(
            parent_run_id=parent,
            parent_step=step,
            step=base,
            checkpoint=kept.key,
            weights_digest=reply.weights_digest,
        ),
        run.intervals("trainer", reply.intervals),
    )
    return kept, base


async def _restore(
    run: ActiveRun, key: str, files: tuple[FileRef, ...], weights_digest: str, step: int
) -> RestoreReply:
    request = RestoreRequest(key=key, files=files, weights_digest=weights_digest, step=step)
    answers: list[RestoreReply] = await run.meshes.trainer.call(
        "restore", request, timeout_seconds=run.config.timeouts.stage_seconds
    )
    return answers[0]
