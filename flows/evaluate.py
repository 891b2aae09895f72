"""Evaluation as a flow: held-out prompts answered with the weights of one checkpoint, as a run of its own."""

from __future__ import annotations

from prefect import flow

from flows.run_flow import carry_out, run_name
from forge_core.config import RunConfig
from tasks.evaluation import evaluate
from tasks.learn import publish
from tasks.prepare import build_model, restore_parent
from tasks.run import ActiveRun


@flow(name="evaluate", flow_run_name=run_name, persist_result=False)
async def evaluate_checkpoint(config: RunConfig, store: str, run_id: str | None = None) -> None:
    """Evaluate the checkpoint that a config says; what the log has of it is not done again.

    A checkpoint never changes, and its digest is held against what the generators serve: the score is that of those
    weights, whatever the other run has trained since.

    Args:
        config: everything that decides what the run does, `evaluate_only` and the parent among it.
        store: URI of the store that keeps it and the other run.
        run_id: its name in the store; the flow run's id unless given, so that a retry of the flow run goes on with it.
    """
    await carry_out(_stages, config, store, run_id)


async def _stages(run: ActiveRun) -> None:
    await build_model()
    await restore_parent()
    await publish(run.ledger.base_step)
    await evaluate("final", policy_version=run.ledger.base_step)
