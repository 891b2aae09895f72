"""Training as a flow of its own: rounds that other runs have collected, one after another, as far as they are there.

round k is collected ──▶ taken in ──▶ its steps ──▶ checkpoint: the version that the round after next is sampled with
"""

from __future__ import annotations

from prefect import flow

from flows.regimes import plan_rounds
from flows.run_flow import begin, carry_out, run_name
from forge_core.config import RunConfig
from tasks.checkpoints import checkpoint, last_checkpoint
from tasks.learn import train
from tasks.prepare import build_model
from tasks.rounds import take_in
from tasks.run import ActiveRun


@flow(name="train-rounds", flow_run_name=run_name, persist_result=False)
async def train_collected(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Train on all rounds that are collected by now; with steps left the run is then paused.

    Args:
        config: everything that decides what the run does, `train_rounds` among it.
        store: URI of the store that keeps it and the runs that collect.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    await carry_out(_stages, config, store, run_id)


async def _stages(run: ActiveRun) -> None:
    await build_model()
    await begin(run)
    for this in plan_rounds(run.config, run.ledger.current_step):
        if not await take_in(this):
            break
        while run.ledger.current_step < this.last_step:
            await train(await take_in(this))
        await checkpoint(this.last_step)
    await last_checkpoint(run.ledger.current_step)
