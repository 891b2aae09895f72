"""Training as a flow of its own: rounds that other runs have collected, one after another, as far as they are there.

round k is collected ──▶ taken in ──▶ its steps ──▶ checkpoint: the version that the round after next is sampled with
"""

from __future__ import annotations

import logging

from prefect import flow
from prefect.runtime import flow_run

from flows.html_report.page import write_report
from flows.regimes import plan_rounds
from flows.results import table_artifact
from forge_core.config import RunConfig
from storage.objects import open_store
from storage.resume import is_finished
from tasks.checkpoints import checkpoint, last_checkpoint
from tasks.collect import known_batches
from tasks.learn import train
from tasks.prepare import build_model, restore, restore_parent, warm_start
from tasks.rounds import take_in
from tasks.run import ActiveRun, open_run

logger = logging.getLogger(__name__)


def _run_name() -> str:
    """The flow run's name: the run's id."""
    return str(flow_run.parameters.get("run_id") or flow_run.id)


@flow(name="train-rounds", flow_run_name=_run_name, persist_result=False)
async def train_collected(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Train on all rounds that are collected by now; with steps left the run is then paused.

    Args:
        config: everything that decides what the run does, `train_rounds` among it.
        store: URI of the store that keeps it and the runs that collect.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    run_id = run_id or str(flow_run.id)
    if is_finished(open_store(store), run_id):
        logger.info("run %s is finished already", run_id)
        return
    async with open_run(config, store, run_id) as run:
        await build_model()
        await _begin(run)
        for this in plan_rounds(config, run.ledger.current_step):
            if not (batches := await take_in(this)):
                break
            await train(batches)
            await checkpoint(this.last_step)
        await last_checkpoint(run.ledger.current_step)
    # The log says how the run stands; what else shows it is a view.
    try:
        write_report(open_store(store), run_id)
        await table_artifact(store, run_id)
    except Exception as error:
        logger.warning("report or table artifact were not stored: %s", error)


async def _begin(run: ActiveRun) -> None:
    """Bring the trainer to where the run begins or broke off; steps that no checkpoint has are trained again."""
    if run.ledger.checkpoints:
        await restore()
        await train(known_batches(run))
        return
    if run.config.parent_run_id is not None:
        await restore_parent()
    else:
        await warm_start()
    await checkpoint(run.ledger.base_step)
