"""Before the first round: the model, and supervised training on right answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

from forge_core.actors.messages import WarmStartReply
from storage import facts, layout
from tasks.run import ActiveRun, current
from tasks.stage import stage

_HUB = "hf://"


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
            path.removeprefix(_HUB),
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja"],
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
