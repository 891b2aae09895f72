"""Post-training as a flow: a supervised warm start, then what its regime makes of
generate, score, buffer, train and publish.

Annotations are evaluated: Prefect pickles a flow that it serves, and then reads its parameters from them.
"""

from prefect import flow

from flows.loop import chosen_loop, drive
from flows.regimes import REGIMES
from flows.run_flow import begin, carry_out, run_name
from forge_core.config import RunConfig
from tasks.checkpoints import last_checkpoint
from tasks.evaluation import evaluate
from tasks.prepare import build_model
from tasks.run import ActiveRun


@flow(name="post-train", flow_run_name=run_name, persist_result=False)
async def post_train(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Run a config to its end; a run that has begun goes on where its log ends, one that has finished is left as it is.

    Args:
        config: everything that decides what the run does.
        store: URI of the store that keeps it.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    await carry_out(_stages, config, store, run_id)


async def _stages(run: ActiveRun) -> None:
    await build_model()
    await begin(run)
    await evaluate("initial", policy_version=run.ledger.base_step)
    if (loop := chosen_loop()) is not None:
        await drive(run, loop)
    else:
        await REGIMES[run.config.regime](run)
    last = run.ledger.current_step
    await evaluate("final", policy_version=last)
    await last_checkpoint(last)
