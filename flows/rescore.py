"""Scoring a past run's episodes again, as a flow over a verifier alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prefect import flow

from flows.s3_block import use_s3_block
from storage.annotations import Covered
from tasks.rescore import open_rescoring, prepare_verifier, rescore


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """What came of a flow run."""

    covered: Covered
    """The set of scores, whole."""
    num_new: int
    """Episodes that had no score in it before."""
    mended: tuple[str, ...]
    """What failed on the way and was mended, a sentence each."""


@flow(name="rescore", flow_run_name="{run_id}-{name}", persist_result=False)
async def rescore_run(store: str, run_id: str, name: str, verifier: str) -> Rescored:
    """Make a set of scores of all that the run's log counts, or finish one.

    Args:
        store: URI of the store that keeps the run.
        run_id: the run.
        name: what the set is called.
        verifier: what scores.
    """
    # Whoever serves the flow has no command line before it.
    await asyncio.to_thread(use_s3_block, store)
    num_new = 0
    async with open_rescoring(store, run_id, name, verifier) as rescoring:
        await prepare_verifier()
        for commits in rescoring.batches():
            num_new += await rescore(commits)
        covered = rescoring.complete()
    return Rescored(covered=covered, num_new=num_new, mended=tuple(rescoring.mended))
