"""Fitting an ensemble of verifiers to a past run's episodes, as a flow without a mesh."""

from __future__ import annotations

import asyncio

from prefect import flow

from flows.s3_block import use_s3_block
from forge_core.ensembles.stored import FitRequest
from storage.ensembles import Ensemble
from tasks.fit_verifiers import fit_verifiers, keep_ensemble, read_stored_scores


@flow(name="fit-verifiers", flow_run_name="{run_id}-{name}", persist_result=False)
async def fit_run_verifiers(
    store: str,
    run_id: str,
    scores: list[str],
    name: str,
    labels: str | None = None,
    labelled_prompts: int = 0,
    class_balance: float | None = None,
) -> Ensemble:
    """Fit an ensemble to sets of scores of all that the run's log counts, and store it as a version of its name.

    Args:
        store: URI of the store that keeps the run.
        run_id: the run.
        scores: names of sets of scores, one a verifier.
        name: what the ensemble is called.
        labels: set of scores that are labels, or `run` for the run's own rewards.
        labelled_prompts: prompts whose labels the fit knows.
        class_balance: share of right samples, where it is known.
    """
    # Whoever serves the flow has no command line before it.
    await asyncio.to_thread(use_s3_block, store)
    request = FitRequest(
        run_id=run_id,
        scores=tuple(scores),
        name=name,
        labels=labels,
        labelled_prompts=labelled_prompts,
        class_balance=class_balance,
    )
    scored = await read_stored_scores(store, request)
    fitted = await fit_verifiers(request, scored)
    kept: Ensemble = await keep_ensemble(store, fitted)
    return kept
