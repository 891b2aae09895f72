"""Fitting an ensemble of verifiers to a run's stored episodes: three tasks, without a mesh.

Nothing is written to the run's own log: an ensemble stands for itself in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.tasks import Task

from forge_core.ensembles.stored import FitRequest, ScoredEpisodes, fit_stored, read_scored
from storage.ensembles import Ensemble, store_ensemble
from storage.objects import open_store
from storage.records import Controller
from tasks.provenance import git_commit, versions

_ATTEMPTS = 3
_DELAYS_SECONDS = [1.0, 4.0, 16.0]


async def _read(store: str, request: FitRequest) -> ScoredEpisodes:
    return await asyncio.to_thread(read_scored, open_store(store), request)


async def _fit(request: FitRequest, scored: ScoredEpisodes) -> Ensemble:
    controller = Controller.this_process(versions=versions(), git_commit=git_commit())
    return await asyncio.to_thread(fit_stored, request, scored, controller)


async def _store(store: str, fitted: Ensemble) -> Ensemble:
    return await asyncio.to_thread(store_ensemble, open_store(store), fitted)


def _is_transient(_task: object, _task_run: object, state: object) -> bool:
    """Prefect's question after a failed attempt: a store that failed may mend itself, wrong input does not."""
    return isinstance(getattr(state, "data", None), OSError)


def _task(
    function: Callable[..., Coroutine[Any, Any, Any]], name: str, *, retries: int = 0
) -> Task[..., Any]:
    made: Task[..., Any] = Task(
        function,
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=retries,
        retry_delay_seconds=_DELAYS_SECONDS,
        retry_condition_fn=_is_transient,
    )
    return made


read_stored_scores = _task(_read, "read-scores", retries=_ATTEMPTS)
"""A task that reads the scores that are asked for. Raises ValueError if any is missing."""
fit_verifiers = _task(_fit, "fit-verifiers")
"""A task that fits the ensemble. Raises ValueError if the scores do not do."""
keep_ensemble = _task(_store, "keep-ensemble", retries=_ATTEMPTS)
"""A task that stores it as the next version of its name. Idempotent by what it was fitted on."""
