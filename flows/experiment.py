"""An experiment as a flow: the unit of what is tried again and again, on a schedule or by hand.

warm start ─▶ post-train ─▶ evaluate ─▶ evaluate what was promoted last ─▶ compare ─▶ promote or not, with the reason
└──────── run <id>-candidate ────────┘  └─ run <id>-against-<number> ───┘

Annotations are evaluated: Prefect pickles a flow that it serves, and then reads its parameters from them.
"""

import asyncio

from prefect import flow
from prefect.artifacts import acreate_markdown_artifact
from prefect.runtime import flow_run

from flows.decision import decision_markdown
from flows.evaluate import evaluate_checkpoint
from flows.post_train import post_train
from flows.s3_block import use_s3_block
from forge_core.config import RunConfig
from forge_core.config.promotion import PromotionConfig
from storage.objects import open_store
from storage.promotions import Decision, against_run, candidate_run
from tasks.promotion import against_config, decide_promotion, plan_experiment, read_standing


def _name() -> str:
    """The flow run's name: the experiment's id."""
    return str(flow_run.parameters.get("experiment_id") or flow_run.id)


@flow(name="experiment", flow_run_name=_name, persist_result=False)
async def experiment(
    config: RunConfig,
    store: str,
    experiment_id: str | None = None,
    promotion: PromotionConfig = PromotionConfig(),  # noqa: B008
) -> Decision:
    """Train a checkpoint, hold it against the one that was promoted last, and promote it if it is better.

    Whatever was done of it already is not done again, and there is one decision however often it is begun.

    Args:
        config: what the run that makes the checkpoint does, its warm start and evaluation among it.
        store: URI of the store that keeps runs and decisions.
        experiment_id: its name in the store; the flow run's id unless given, so that a retry goes on with it.
        promotion: what the checkpoint is held against.
    """
    experiment_id = experiment_id or str(flow_run.id)
    # Whoever serves the flow has no command line before it.
    await asyncio.to_thread(use_s3_block, store)
    config, promotion = await plan_experiment(store, experiment_id, config, promotion)
    await post_train(config, store, candidate_run(experiment_id))
    while (standing := await read_standing(store, experiment_id, promotion.line)).own is None:
        if (promoted := standing.promoted) is not None:
            other = against_config(open_store(store), config, promoted)
            await evaluate_checkpoint(other, store, against_run(experiment_id, promoted.number))
        await decide_promotion(store, experiment_id, promotion, standing)
    decision: Decision = standing.own
    await acreate_markdown_artifact(
        key="forgeflow-decision", markdown=decision_markdown(decision), description=decision.reason
    )
    return decision
