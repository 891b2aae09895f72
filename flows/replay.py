"""A replay as a flow: past runs' episodes through the normal trainer, without generating anything."""

from __future__ import annotations

import logging

from prefect import flow
from prefect.runtime import flow_run

from flows.html_report.page import write_report
from flows.results import table_artifact
from forge_core.config import RunConfig
from forge_core.replay import plan_replay, read_sources
from storage.objects import open_store
from storage.resume import is_finished
from tasks.checkpoints import checkpoint, is_checkpoint_due, last_checkpoint
from tasks.collect import known_batches
from tasks.learn import train
from tasks.prepare import build_model, restore, restore_parent
from tasks.replay import recall
from tasks.run import ActiveRun, open_run

logger = logging.getLogger(__name__)


def _run_name() -> str:
    """The flow run's name: the run's id."""
    return str(flow_run.parameters.get("run_id") or flow_run.id)


@flow(name="replay", flow_run_name=_run_name, persist_result=False)
async def replay_run(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Train a run on what its config says to replay; one that has begun goes on where its log ends.

    Args:
        config: everything that decides what the run does, `replay` among it.
        store: URI of the store that keeps it and the past runs.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    run_id = run_id or str(flow_run.id)
    opened = open_store(store)
    if is_finished(opened, run_id):
        logger.info("run %s is finished already", run_id)
        return
    assert config.replay is not None, "launched as a replay"
    plan = plan_replay(opened, config.replay, read_sources(opened, config.replay))
    async with open_run(config, store, run_id) as run:
        await build_model()
        await _begin(run)
        for planned in plan[run.ledger.last_step : config.steps]:
            await train((await recall(planned),))
            if is_checkpoint_due(run, planned.step):
                await checkpoint(planned.step)
        await last_checkpoint(run.ledger.current_step)
    # The run is finished and its log says so; what else shows it is a view.
    try:
        write_report(opened, run_id)
        await table_artifact(store, run_id)
    except Exception as error:
        logger.warning("report or table artifact were not stored: %s", error)


async def _begin(run: ActiveRun) -> None:
    """Bring the trainer to where the run begins or broke off; steps that no checkpoint has are trained again."""
    if run.ledger.checkpoints:
        await restore()
        await train(known_batches(run))
        return
    await restore_parent()
    await checkpoint(0)
