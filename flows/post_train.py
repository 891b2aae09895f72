"""Post-training as a flow: a supervised warm start, then rounds of generate, score, buffer, train and publish."""

from __future__ import annotations

import logging
import time

from prefect import flow

from flows.results import table_artifact
from forge_core.config import RunConfig
from tasks.collect import buffer, generate, score
from tasks.evaluation import evaluate
from tasks.learn import checkpoint, publish, train
from tasks.prepare import build_model, warm_start
from tasks.run import ActiveRun, open_run

logger = logging.getLogger(__name__)


@flow(name="post-train", flow_run_name="{run_id}", persist_result=False)
async def post_train(config: RunConfig, store: str, run_id: str) -> None:
    """Run a config to its end.

    Args:
        config: everything that decides what the run does.
        store: URI of the store that keeps it.
        run_id: its name in the store; must be new.
    """
    async with open_run(config, store, run_id) as run:
        await build_model()
        await warm_start()
        await publish(0)
        await checkpoint(0)
        await evaluate("initial", policy_version=0)
        await sync_rounds(run)
        await evaluate("final", policy_version=config.steps)
        await checkpoint(config.steps)
    try:
        await table_artifact(store, run_id)
    except Exception as error:
        # The run is finished and its log says so; what Prefect shows of it is a view.
        logger.warning("the table artifact was not stored: %s", error)


async def sync_rounds(run: ActiveRun) -> None:
    """On-policy: each step trains on what the weights before it have generated."""
    every, every_seconds = run.config.checkpoint.every, run.config.checkpoint.every_seconds
    kept_step, kept_at = 0, time.monotonic()
    for step in range(1, run.config.steps + 1):
        generation = await generate(step)
        scored = await score(generation)
        batch = await buffer(step, scored)
        await train(batch, generation)
        await publish(step)
        if (every and step - kept_step >= every) or time.monotonic() - kept_at >= every_seconds:
            await checkpoint(step)
            kept_step, kept_at = step, time.monotonic()
