"""Post-training as a flow: a supervised warm start, then what its regime makes of
generate, score, buffer, train and publish.

Annotations are evaluated: Prefect pickles a flow that it serves, and then reads its parameters from them.
"""

import logging

from prefect import flow
from prefect.runtime import flow_run

from flows.html_report.page import write_report
from flows.loop import chosen_loop, drive
from flows.regimes import REGIMES
from flows.results import table_artifact
from forge_core.config import RunConfig
from storage.objects import open_store
from storage.resume import is_finished
from tasks.checkpoints import checkpoint, last_checkpoint
from tasks.collect import known_batches
from tasks.evaluation import evaluate
from tasks.learn import publish, train
from tasks.prepare import build_model, restore, restore_parent, warm_start
from tasks.run import ActiveRun, open_run

logger = logging.getLogger(__name__)


def _run_name() -> str:
    """The flow run's name: the run's id."""
    return str(flow_run.parameters.get("run_id") or flow_run.id)


@flow(name="post-train", flow_run_name=_run_name, persist_result=False)
async def post_train(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Run a config to its end; a run that has begun goes on where its log ends, one that has finished is left as it is.

    Args:
        config: everything that decides what the run does.
        store: URI of the store that keeps it.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    run_id = run_id or str(flow_run.id)
    if is_finished(open_store(store), run_id):
        logger.info("run %s is finished already", run_id)
        return
    async with open_run(config, store, run_id) as run:
        await build_model()
        await begin(run)
        await evaluate("initial", policy_version=run.ledger.base_step)
        if (loop := chosen_loop()) is not None:
            await drive(run, loop)
        else:
            await REGIMES[config.regime](run)
        last = run.ledger.current_step
        await evaluate("final", policy_version=last)
        await last_checkpoint(last)
    # The run is finished and its log says so; what else shows it is a view.
    try:
        write_report(open_store(store), run_id)
        await table_artifact(store, run_id)
    except Exception as error:
        logger.warning("report or table artifact were not stored: %s", error)


async def begin(run: ActiveRun) -> None:
    """Bring trainer and generators to where the run begins or broke off.

    Steps that the log has and no checkpoint does are trained again from their episodes, before anything new is
    admitted; in the same order, so that they give the same weights.
    """
    if run.ledger.checkpoints:
        await restore()
        await train(known_batches(run))
        await publish(run.ledger.current_step)
        return
    if run.config.parent_run_id is not None:
        await restore_parent()
    else:
        await warm_start()
    await publish(run.ledger.base_step)
    await checkpoint(run.ledger.base_step)
