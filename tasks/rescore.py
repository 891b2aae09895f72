"""Scoring a run's stored episodes again: a verifier, and one stage for a few commits at a time.

Nothing is written to the run's own log, which may be held by somebody else: a set of scores stands beside the run.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from forge_core.config import RunConfig
from forge_core.mesh import Mesh
from forge_core.meshes import open_meshes
from forge_core.scorers import begin_set, counted_commits
from storage import layout
from storage.annotations import Covered, ScoreSet, complete_set
from storage.objects import ObjectStore, open_store
from storage.records import Commit, Controller
from tasks.interrupts import cancelled_by
from tasks.provenance import git_commit, versions
from tasks.stage import TRANSIENT

_BATCH_EPISODES = 8192
"""Episodes of one task run at most, unless a commit has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescoring:
    """One set of scores that is being made."""

    store: ObjectStore
    """Where run and scores are kept."""
    scores: ScoreSet
    """The set."""
    config: RunConfig
    """The run's config, with what scores in it."""
    commits: tuple[Commit, ...]
    """All commits of the run, in the order of its log."""
    verifier: Mesh
    """What scores them."""

    def batches(self) -> list[tuple[str, ...]]:
        """Keys of the commit records, in shares of one task run each."""
        batches: list[list[str]] = []
        room = 0
        for commit in self.commits:
            if commit.rows > room or not batches:
                batches.append([])
                room = _BATCH_EPISODES
            batches[-1].append(layout.commit_key(commit.run_id, commit.key))
            room -= commit.rows
        return [tuple(batch) for batch in batches]

    def complete(self) -> Covered:
        """Say that all commits are scored. Raises ValueError if one is not."""
        return complete_set(self.store, self.scores.run_id, self.scores.name, self.commits)


_current: ContextVar[Rescoring] = ContextVar("forgeflow_rescoring")


@asynccontextmanager
async def open_rescoring(
    store_uri: str, run_id: str, name: str, verifier: str
) -> AsyncIterator[Rescoring]:
    """Open the verifier for a set of scores. Raises ValueError as `begin_set` does."""
    store = open_store(store_uri)
    controller = Controller.this_process(versions=versions(), git_commit=git_commit())
    scores, config = begin_set(store, run_id, name, verifier, controller)
    with tempfile.TemporaryDirectory(prefix="forgeflow-rescore-") as folder:
        async with (
            cancelled_by(signal.SIGTERM),
            open_meshes(
                config, store_uri, Path(folder), time.time(), roles=frozenset({"verifier"})
            ) as meshes,
        ):
            await meshes.verifier.call("prepare", timeout_seconds=config.timeouts.startup_seconds)
            rescoring = Rescoring(
                store=store,
                scores=scores,
                config=config,
                commits=tuple(counted_commits(store, run_id)),
                verifier=meshes.verifier,
            )
            token = _current.set(rescoring)
            try:
                yield rescoring
            finally:
                _current.reset(token)


async def rescore(commits: tuple[str, ...]) -> int:
    """Score the episodes of some commits by their keys; how many were not scored before.

    A Prefect task run, tried again as the run's config says when it fails of something transient. Idempotent by set
    and commit: the first scores stand.
    """
    retry = _current.get().config.retry
    delays = [
        retry.delay_seconds * 2**lost * random.uniform(0.5, 1.5) for lost in range(retry.attempts)
    ]
    configured: Any = _task.with_options(retries=retry.attempts, retry_delay_seconds=delays)
    num_new: int = await configured(commits)
    return num_new


async def _rescore(commits: tuple[str, ...]) -> int:
    rescoring = _current.get()
    timeouts, rows = rescoring.config.timeouts, {c.key: c.rows for c in rescoring.commits}
    num_new = 0
    for key in commits:
        deadline = timeouts.stage_seconds
        if rescoring.config.reward is not None:
            # One prompt after another, each of which has a deadline of its own that names the function.
            name = key.rpartition("/")[2].removesuffix(".json")
            deadline = max(deadline, rows[name] * timeouts.reward_seconds)
        answers = await rescoring.verifier.call(
            "rescore", key, rescoring.scores.name, timeout_seconds=deadline
        )
        num_new += answers[0]
    return num_new


def _is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, TRANSIENT)


_task: Any = Task(
    _rescore,
    name="rescore",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_is_transient,
)
