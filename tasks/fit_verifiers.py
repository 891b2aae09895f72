"""Fitting an ensemble of verifiers to a run's stored episodes: three tasks, without a mesh.

Nothing is written to the run's own log: an ensemble stands for itself in the store.
"""

from __future__ import annotations

import asyncio

from forge_core.ensembles.stored import FitRequest, ScoredEpisodes, fit_stored, read_scored
from storage.ensembles import Ensemble, store_ensemble
from storage.objects import open_store
from storage.records import Controller
from tasks.provenance import git_commit, versions
from tasks.store_task import store_task


async def _read(store: str, request: FitRequest) -> ScoredEpisodes:
    return await asyncio.to_thread(read_scored, open_store(store), request)


async def _fit(request: FitRequest, scored: ScoredEpisodes) -> Ensemble:
    controller = Controller.this_process(versions=versions(), git_commit=git_commit())
    return await asyncio.to_thread(fit_stored, request, scored, controller)


async def _store(store: str, fitted: Ensemble) -> Ensemble:
    return await asyncio.to_thread(store_ensemble, open_store(store), fitted)


read_stored_scores = store_task(_read, "read-scores")
"""A task that reads the scores that are asked for. Raises ValueError if any is missing."""
fit_verifiers = store_task(_fit, "fit-verifiers", retries=0)
"""A task that fits the ensemble. Raises ValueError if the scores do not do."""
keep_ensemble = store_task(_store, "keep-ensemble")
"""A task that stores it as the next version of its name. Idempotent by what it was fitted on."""
