"""Before the first round: the model, and supervised training on right answers."""

from __future__ import annotations

import asyncio
import os
import sys

from forge_core.actors.messages import WarmStartReply
from forge_core.config import HUB_PREFIX
from storage import facts, layout
from tasks.run import ActiveRun, current
from tasks.stage import stage

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
    # First: a mistake in it is to be heard of before minutes are spent.
    await run.meshes.verifier.call("prepare", timeout_seconds=timeout)
    directory = await _model_directory(run)
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


async def _model_directory(run: ActiveRun) -> str:
    path = run.config.model.path
    if path is None:
        return str(run.store.local_path(f"{layout.run_folder(run.run_id)}model"))
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
