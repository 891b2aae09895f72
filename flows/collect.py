"""Collecting as a flow: one round for another run, sampled with that run's weights and handed over to it."""

from __future__ import annotations

from prefect import flow

from flows.run_flow import carry_out, run_name
from forge_core.config import RunConfig
from tasks.collect import generate, score
from tasks.learn import publish
from tasks.prepare import build_model, restore_parent
from tasks.references import Round
from tasks.rounds import hand_over
from tasks.run import ActiveRun


@flow(name="collect", flow_run_name=run_name, persist_result=False)
async def collect_round(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Collect the round that a config says; what the log has of it is not generated again.

    The trainer's mesh holds the other run's checkpoint and trains nothing: weights reach the engines as in any run,
    with their proofs.

    Args:
        config: everything that decides what the run does, `collect` among it.
        store: URI of the store that keeps it and the other run.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    await carry_out(_stages, config, store, run_id)


async def _stages(run: ActiveRun) -> None:
    collect = run.config.collect
    assert collect is not None, "launched to collect"
    this = Round(number=collect.round, first_step=collect.first_step, last_step=collect.last_step)
    await build_model()
    await restore_parent()
    await publish(run.ledger.base_step)
    await hand_over(await score(await generate(this)))
