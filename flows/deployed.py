"""The flows as they are deployed: their parameters are forms, of which each makes the config of the flow beside it.

Annotations are evaluated: Prefect reads the parameters of what it deploys from them, and their descriptions from the
docstrings.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows import collect as collecting
from flows import evaluate as evaluating
from flows import experiment as experimenting
from flows import fit_verifiers as fitting
from flows import post_train as training
from flows import replay as replaying
from flows import rescore as rescoring
from flows import train_rounds as rounds
from flows import warm_start as warming
from flows.forms import EvaluationForm, ReplayForm, RoundsForm, TrainingForm, WarmStartForm
from flows.preflight import check_config, check_machine
from flows.replay_config import check_replay, replay_config
from flows.resume import config_from
from flows.run_flow import run_name
from flows.s3_block import use_s3_block
from forge_core.config import RunConfig
from forge_core.config.promotion import PromotionConfig
from forge_core.guardian import die_with_parent
from forge_core.rounds import NotYet, claim_round
from forge_core.settings import stored_config
from storage import layout
from storage.objects import check_writable, open_store
from storage.promotions import candidate_run
from storage.resume import newest_with_checkpoint

logger = logging.getLogger(__name__)

Text = Annotated[str, Field(min_length=1)]
STORE = "./forge-store"


@flow(name="post-train", flow_run_name=run_name, persist_result=False)
async def post_train(
    settings: TrainingForm = TrainingForm(),  # noqa: B008
    store: Text = STORE,
    run_id: str | None = None,
) -> None:
    """Post-train a model: warm start, then generate, score, train and publish, again and again.

    Args:
        settings: What is trained.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
        run_id: Name of the run; one that has begun goes on with its own settings. Empty: the flow run's id.
    """
    run_id = run_id or str(flow_run.id)
    config = await _config(store, run_id, settings.config)
    await training.post_train.fn(config, store, run_id)


def _experiment_name() -> str:
    return str(flow_run.parameters.get("experiment_id") or flow_run.id)


@flow(name="experiment", flow_run_name=_experiment_name, persist_result=False)
async def experiment(
    settings: TrainingForm = TrainingForm(),  # noqa: B008
    promotion: PromotionConfig = PromotionConfig(),  # noqa: B008
    store: Text = STORE,
    experiment_id: str | None = None,
) -> None:
    """Train a checkpoint, hold it against the one that was promoted last, and promote it if it is better.

    Args:
        settings: What is trained.
        promotion: What the checkpoint is held against, and how much better it must be.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
        experiment_id: Name of the experiment. Empty: the flow run's id.
    """
    experiment_id = experiment_id or str(flow_run.id)
    config = await _config(store, candidate_run(experiment_id), settings.config)
    await experimenting.experiment.fn(config, store, experiment_id, promotion)


@flow(name="warm-start", flow_run_name=run_name, persist_result=False)
async def warm_start(
    settings: WarmStartForm = WarmStartForm(),  # noqa: B008
    store: Text = STORE,
    run_id: str | None = None,
) -> None:
    """Train on right answers alone; a run that names its checkpoint RUN@0 goes on from it.

    Args:
        settings: What is trained.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
        run_id: Name of the run; one that has begun goes on with its own settings. Empty: the flow run's id.
    """
    run_id = run_id or str(flow_run.id)
    config = await _config(store, run_id, settings.config)
    await warming.warm_start_run.fn(config, store, run_id)


@flow(name="train-rounds", flow_run_name=run_name, persist_result=False)
async def train_rounds(
    settings: RoundsForm = RoundsForm(),  # noqa: B008
    store: Text = STORE,
    run_id: Text = "rounds",
) -> None:
    """Train a run on all rounds that are collected by now; begin it if it is new.

    Args:
        settings: What is trained.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
        run_id: Name of the run; one that has begun goes on with its own settings.
    """
    config = await _config(store, run_id, settings.config)
    await rounds.train_collected.fn(config, store, run_id)


def _collecting_run() -> str:
    """Id of the run that collects, and name of its flow run: it tells for which run, and stays in a retry."""
    return f"{flow_run.parameters['run']}-by-{flow_run.id}"


@flow(name="collect", flow_run_name=_collecting_run, persist_result=False)
async def collect(run: Text = "rounds", store: Text = STORE) -> None:
    """Collect the next round of a run that trains on rounds, with its newest weights.

    With nothing to collect the flow run ends well all the same, for it may be one of a schedule's.

    Args:
        run: Name of the run that trains on the round.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
    """
    run_id = _collecting_run()

    def claimed() -> RunConfig:
        made = claim_round(open_store(store), run, run_id)
        if made is None:
            raise NotYet(f"all rounds of run {run} are collected, or being collected")
        return made[1]

    try:
        config = await _config(store, run_id, claimed)
    except NotYet as reason:
        logger.info("nothing was collected: %s", reason)
        return
    await collecting.collect_round.fn(config, store, run_id)


@flow(name="evaluate", flow_run_name=run_name, persist_result=False)
async def evaluate(
    settings: EvaluationForm = EvaluationForm(),  # noqa: B008
    store: Text = STORE,
    run_id: str | None = None,
) -> None:
    """Answer held-out prompts with the weights of one checkpoint, which stays the same when the flow run is retried.

    Args:
        settings: Which checkpoint, and how.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
        run_id: Name of the run; one that has begun goes on with its own settings. Empty: the flow run's id.
    """
    run_id = run_id or str(flow_run.id)

    def pinned() -> RunConfig:
        origin = settings.checkpoint
        if origin == "newest":
            origin = newest_with_checkpoint(open_store(store))
        return config_from(
            origin,
            file=None,
            overrides=settings.all_overrides(),
            store=store,
            given={"evaluate_only": True},
        )

    config = await _config(store, run_id, pinned)
    await evaluating.evaluate_checkpoint.fn(config, store, run_id)


@flow(name="replay", flow_run_name=run_name, persist_result=False)
async def replay(settings: ReplayForm, store: Text = STORE, run_id: str | None = None) -> None:
    """Train a new run on the episodes of past runs; nothing is generated.

    Args:
        settings: Which episodes, and by which scores.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
        run_id: Name of the run; one that has begun goes on with its own settings. Empty: the flow run's id.
    """
    run_id = run_id or str(flow_run.id)

    def replayed() -> RunConfig:
        return replay_config(
            settings.runs,
            store=store,
            origin=settings.checkpoint,
            scores=settings.scores,
            epochs=settings.epochs,
            overrides=settings.overrides,
        )

    config = await _config(store, run_id, replayed, check=_check_replay)
    await replaying.replay_run.fn(config, store, run_id)


@flow(name="rescore", flow_run_name="{run_id}-{name}", persist_result=False)
async def rescore(
    run_id: Text, name: Text, verifier: Text = "environment", store: Text = STORE
) -> None:
    """Score the episodes of a past run again; the new scores stand beside the old.

    Args:
        run_id: Name of the past run.
        name: What the set of scores is called.
        verifier: environment, a task, ensemble:NAME@VERSION, or path/file.py:name of a function or class of your own.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
    """
    _die_with_worker()
    await rescoring.rescore_run.fn(store, run_id, name, verifier)


@flow(name="fit-verifiers", flow_run_name="{run_id}-{name}", persist_result=False)
async def fit_verifiers(
    run_id: Text,
    scores: Annotated[list[str], Field(min_length=1)],
    name: Text,
    labels: str | None = None,
    labelled_prompts: Annotated[int, Field(ge=0)] = 0,
    class_balance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None,
    store: Text = STORE,
) -> None:
    """Make one verifier of many weak ones, from their scores of a past run's episodes.

    Args:
        run_id: Name of the past run.
        scores: Names of sets of scores, one a verifier.
        name: What the ensemble is called.
        labels: Set of scores that are the truth, or run for the run's own. Empty: none.
        labelled_prompts: Prompts whose labels the fit may know.
        class_balance: Share of right samples, within 0 and 1. Empty: estimated.
        store: Where runs are kept: a folder or s3://BUCKET/PREFIX.
    """
    _die_with_worker()
    await fitting.fit_run_verifiers.fn(
        store, run_id, scores, name, labels, labelled_prompts, class_balance
    )


def _die_with_worker() -> None:
    """Have the kernel end this process when the worker dies that started it: nobody could cancel it any more."""
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        die_with_parent()


def _check(config: RunConfig, store_uri: str) -> None:
    check_machine(config, store_uri, check_config(config, store_uri))


def _check_replay(config: RunConfig, store_uri: str) -> None:
    check_replay(config, store_uri, None)


async def _config(
    store_uri: str,
    run_id: str,
    make: Callable[[], RunConfig],
    check: Callable[[RunConfig, str], None] = _check,
) -> RunConfig:
    """The config that a run has, if it has begun; else the one that a form makes, checked as the command line does.

    Raises ValueError, which ends the flow run with a sentence before anything is started.
    """

    _die_with_worker()

    def find() -> RunConfig:
        # Whoever serves the flow has no command line before it.
        use_s3_block(store_uri)
        check_writable(store_uri)
        layout.check_run_id(run_id)
        store = open_store(store_uri)
        if store.exists(layout.config_key(run_id)):
            logger.info("run %s goes on with the settings that it began with", run_id)
            return stored_config(store, run_id)
        config = make()
        check(config, store_uri)
        return config

    return await asyncio.to_thread(find)
