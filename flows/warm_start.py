"""A warm start as a flow: supervised training alone, whose checkpoint of step 0 other runs go on from.

Annotations are evaluated: Prefect pickles a flow that it serves, and then reads its parameters from them.
"""

from prefect import flow

from flows.run_flow import begin, carry_out, run_name
from forge_core.config import RunConfig
from tasks.prepare import build_model
from tasks.run import ActiveRun


@flow(name="warm-start", flow_run_name=run_name, persist_result=False)
async def warm_start_run(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Train on reference answers or data of the user's, and keep the checkpoint; one that has it is left as it is.

    Args:
        config: everything that decides what the run does, `warm_start_only` among it.
        store: URI of the store that keeps it.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    await carry_out(_stages, config, store, run_id)


async def _stages(run: ActiveRun) -> None:
    await build_model()
    await begin(run)
