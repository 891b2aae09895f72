"""Post-training as a flow: a supervised warm start, then what its regime makes of
generate, score, buffer, train and publish."""

from __future__ import annotations

import logging

from prefect import flow

from flows.html_report.page import write_report
from flows.loop import drive, own_loop
from flows.regimes import REGIMES
from flows.results import table_artifact
from forge_core.config import RunConfig
from storage.objects import open_store
from tasks.evaluation import evaluate
from tasks.learn import checkpoint, publish
from tasks.prepare import build_model, warm_start
from tasks.run import open_run

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
        if (loop := own_loop.get()) is not None:
            await drive(run, loop)
        else:
            await REGIMES[config.regime](run)
        last = run.ledger.current_step
        await evaluate("final", policy_version=last)
        await checkpoint(last)
    # The run is finished and its log says so; what else shows it is a view.
    try:
        write_report(open_store(store), run_id)
        await table_artifact(store, run_id)
    except Exception as error:
        logger.warning("report or table artifact were not stored: %s", error)
