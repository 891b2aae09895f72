"""Scoring a run's stored episodes again: a verifier, and one stage for a few commits at a time.

Nothing is written to the run's own log, which may be held by somebody else: a set of scores stands beside the run.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from forge_core.config import RunConfig
from forge_core.mesh import Mesh
from forge_core.meshes import Meshes, open_meshes
from forge_core.scorers import begin_set, counted_commits
from storage import facts, layout
from storage.annotations import Covered, ScoreSet, complete_set
from storage.objects import ObjectStore, open_store
from storage.records import Commit, Controller
from tasks.interrupts import cancelled_by
from tasks.provenance import git_commit, versions
from tasks.recovery import Recovery, guarded
from tasks.stage import stage_of

logger = logging.getLogger(__name__)

_BATCH_EPISODES = 8192
"""Episodes of one task run at most, unless a commit has more."""


@dataclass(kw_only=True)
class Rescoring:
    """One set of scores that is being made."""

    run_id: str
    """Whose episodes are scored."""
    store: ObjectStore
    """Where run and scores are kept."""
    scores: ScoreSet
    """The set."""
    config: RunConfig
    """The run's config, with what scores in it."""
    commits: tuple[Commit, ...]
    """All commits of the run, in the order of its log."""
    meshes: Meshes
    """A verifier alone, which scores them."""
    recovery: Recovery | None = None
    """What brings the verifier back if it fails."""
    mended: list[str] = field(default_factory=list)
    """What failed and was mended, a sentence each."""

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

    @property
    def continued_by(self) -> str:
        """The command that goes on with it once it has ended."""
        return "the same command"

    async def prepare(self, mesh: Mesh) -> None:
        """Have a verifier import what it scores with.

        Raises RewardError if that fails, and MeshCall if the verifier does.
        """
        await mesh.call("prepare", timeout_seconds=self.config.timeouts.startup_seconds)
        mesh.loaded.set()

    def settle(self) -> None:
        """There is nothing to settle: a set of scores has no log."""

    def append(self, *new: facts.Fact) -> None:
        """Note what failed; the run's own log may be held by somebody else."""
        for fact in new:
            match fact:
                case facts.Failed(started_at=float()):
                    told = f"{fact.mesh} failed ({fact.cause}) and scored again after {fact.seconds:.0f} s"
                case facts.Retry():
                    told = f"stage {fact.stage} was tried again after attempt {fact.attempt} ({fact.cause})"
                case _:
                    # Not mended: the error that ends the command says so.
                    continue
            self.mended.append(told)
            logger.warning("scores %s of run %s: %s", self.scores.name, self.run_id, told)

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
            rescoring = Rescoring(
                run_id=run_id,
                store=store,
                scores=scores,
                config=config,
                commits=tuple(counted_commits(store, run_id)),
                meshes=meshes,
            )
            token = _current.set(rescoring)
            try:
                async with guarded(rescoring):
                    yield rescoring
            finally:
                _current.reset(token)


async def _prepare_verifier() -> None:
    rescoring = _current.get()
    await rescoring.prepare(rescoring.meshes.verifier)


async def _rescore(commits: tuple[str, ...]) -> int:
    rescoring = _current.get()
    rows = {commit.key: commit.rows for commit in rescoring.commits}
    num_new = 0
    for key in commits:
        deadline = rescoring.config.scoring_seconds(
            rows[key.rpartition("/")[2].removesuffix(".json")]
        )
        answers = await rescoring.meshes.verifier.call(
            "rescore", key, rescoring.scores.name, timeout_seconds=deadline
        )
        num_new += answers[0]
    return num_new


prepare_verifier = stage_of(_current.get, _prepare_verifier, name="prepare-verifier")
"""A stage that has the verifier import what it scores with. Idempotent. Raises RewardError if that fails."""
rescore = stage_of(_current.get, _rescore, name="rescore")
"""A stage that scores the episodes of some commits by their keys, and tells how many were not scored before.

Idempotent by set and commit: the first scores stand.
"""
