"""A replay as a flow: past runs' episodes through the normal trainer, without generating anything."""

from __future__ import annotations

from prefect import flow

from flows.run_flow import begin, carry_out, run_name
from forge_core.config import RunConfig
from forge_core.replay import plan_replay, read_sources
from tasks.checkpoints import checkpoint, is_checkpoint_due, last_checkpoint
from tasks.learn import train
from tasks.prepare import build_model
from tasks.replay import recall
from tasks.run import ActiveRun


@flow(name="replay", flow_run_name=run_name, persist_result=False)
async def replay_run(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Train a run on what its config says to replay; one that has begun goes on where its log ends.

    Args:
        config: everything that decides what the run does, `replay` among it.
        store: URI of the store that keeps it and the past runs.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    await carry_out(_stages, config, store, run_id)


async def _stages(run: ActiveRun) -> None:
    replay = run.config.replay
    assert replay is not None, "launched as a replay"
    plan = plan_replay(run.store, replay, read_sources(run.store, replay))
    await build_model()
    await begin(run)
    for planned in plan[run.ledger.last_step : run.config.steps]:
        while run.ledger.current_step < planned.step:
            await train((await recall(planned),))
        if is_checkpoint_due(run, planned.step):
            await checkpoint(planned.step)
    await last_checkpoint(run.ledger.current_step)
