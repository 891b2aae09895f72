"""Post-training as a flow: a supervised warm start, then rounds of generate, score, buffer, train and publish."""

from __future__ import annotations

import time

from prefect import flow

from flows.results import table_artifact
from forge_core.config import RunConfig
from tasks import stages
from tasks.run import ActiveRun, open_run


@flow(name="post-train", persist_result=False)
async def post_train(config: RunConfig, store: str, run_id: str) -> None:
    """Run a config to its end.

    Args:
        config: everything that decides what the run does.
        store: URI of the store that keeps it.
        run_id: its name in the store; must be new.
    """
    async with open_run(config, store, run_id) as run:
        await stages.build_model()
        await stages.warm_start()
        await stages.publish(0)
        await stages.checkpoint(0)
        await stages.evaluate("initial", policy_version=0)
        await sync_rounds(run)
        await stages.evaluate("final", policy_version=config.steps)
        await stages.checkpoint(config.steps)
    await table_artifact(store, run_id)


async def sync_rounds(run: ActiveRun) -> None:
    """On-policy: each step trains on what the weights before it have generated."""
    every, every_seconds = run.config.checkpoint.every, run.config.checkpoint.every_seconds
    kept_step, kept_at = 0, time.monotonic()
    for step in range(1, run.config.steps + 1):
        generation = await stages.generate(step)
        scored = await stages.score(generation)
        batch = await stages.buffer(step, scored)
        await stages.train(batch, generation)
        await stages.publish(step)
        if (every and step - kept_step >= every) or time.monotonic() - kept_at >= every_seconds:
            await stages.checkpoint(step)
            kept_step, kept_at = step, time.monotonic()
