"""Collecting as a flow: one round for another run, sampled with that run's weights and handed over to it."""

from __future__ import annotations

import logging

from prefect import flow
from prefect.runtime import flow_run

from flows.html_report.page import write_report
from flows.results import table_artifact
from forge_core.config import RunConfig
from storage.objects import open_store
from storage.resume import is_finished
from tasks.collect import generate, score
from tasks.learn import publish
from tasks.prepare import build_model, restore_parent
from tasks.references import Round
from tasks.rounds import hand_over
from tasks.run import open_run

logger = logging.getLogger(__name__)


def _run_name() -> str:
    """The flow run's name: the run's id."""
    return str(flow_run.parameters.get("run_id") or flow_run.id)


@flow(name="collect", flow_run_name=_run_name, persist_result=False)
async def collect_round(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Collect the round that a config says; what the log has of it is not generated again.

    The trainer's mesh holds the other run's checkpoint and trains nothing: weights reach the engines as in any run,
    with their proofs.

    Args:
        config: everything that decides what the run does, `collect` among it.
        store: URI of the store that keeps it and the other run.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    run_id = run_id or str(flow_run.id)
    if is_finished(open_store(store), run_id):
        logger.info("run %s is finished already", run_id)
        return
    assert config.collect is not None, "launched to collect"
    this = Round(
        number=config.collect.round,
        first_step=config.collect.first_step,
        last_step=config.collect.last_step,
    )
    async with open_run(config, store, run_id) as run:
        await build_model()
        await restore_parent()
        await publish(run.ledger.base_step)
        await hand_over(await score(await generate(this)))
    # The run is finished and its log says so; what else shows it is a view.
    try:
        write_report(open_store(store), run_id)
        await table_artifact(store, run_id)
    except Exception as error:
        logger.warning("report or table artifact were not stored: %s", error)
