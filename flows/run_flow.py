"""What all flows of runs share: their name, how a run begins or goes on, and what is shown of it in the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from prefect.runtime import flow_run

from flows.artifacts import show_results, shown_progress
from flows.html_report.data import read_run
from flows.html_report.page import keep_report
from flows.run_events import telling_events
from flows.s3_block import use_s3_block
from forge_core.config import RunConfig
from storage.objects import open_store
from storage.resume import is_finished
from tasks.checkpoints import checkpoint
from tasks.collect import known_batches
from tasks.learn import publish, train
from tasks.prepare import restore, restore_parent, warm_start
from tasks.run import ActiveRun, listening, open_run

logger = logging.getLogger(__name__)


def run_name() -> str:
    """The flow run's name: the run's id."""
    return str(flow_run.parameters.get("run_id") or flow_run.id)


async def carry_out(
    stages: Callable[[ActiveRun], Awaitable[None]],
    config: RunConfig,
    store_uri: str,
    run_id: str | None,
) -> None:
    """Open the run of the flow that calls, and have its stages done; then store report and artifacts.

    One that has finished is left as it is. Without a run id it is the flow run's, so that a retry of the flow run goes
    on with it. Raises what opening the run or its stages raise.
    """
    run_id = run_id or str(flow_run.id)
    # Whoever serves the flow has no command line before it.
    await asyncio.to_thread(use_s3_block, store_uri)
    store = open_store(store_uri)
    if is_finished(store, run_id):
        logger.info("run %s is finished already", run_id)
        return
    first_step = config.first_step if config.replay is None else 1
    async with shown_progress(run_id, first_step, config.steps) as progress:
        with (
            telling_events(run_id, store_uri, config.steps) as events,
            listening(progress, events),
        ):
            async with open_run(config, store_uri, run_id) as run:
                await stages(run)
    # The log says how the run stands; what else shows it is a view.
    try:
        told = read_run(store, run_id)
        keep_report(store, told)
        await show_results(store, told)
    except Exception as error:
        logger.warning("report or artifacts were not stored: %s", error)


async def begin(run: ActiveRun) -> None:
    """Bring trainer and generators, if there are any, to where the run begins or broke off.

    Steps that the log has and no checkpoint does are trained again from their episodes, before anything new is
    admitted; in the same order, so that they give the same weights.
    """
    if run.ledger.checkpoints:
        await restore()
        await train(known_batches(run))
        await _serve(run, run.ledger.current_step)
        return
    if run.config.parent_run_id is not None:
        await restore_parent()
    else:
        await warm_start()
    await _serve(run, run.ledger.base_step)
    await checkpoint(run.ledger.base_step)


async def _serve(run: ActiveRun, policy_version: int) -> None:
    if run.meshes.generators:
        await publish(policy_version)
