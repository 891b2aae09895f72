"""Scoring a past run's episodes again, as a flow over a verifier alone."""

from __future__ import annotations

import asyncio

from prefect import flow

from flows.s3_block import use_s3_block
from storage.annotations import Covered
from tasks.rescore import open_rescoring, rescore


@flow(name="rescore", flow_run_name="{run_id}-{name}", persist_result=False)
async def rescore_run(store: str, run_id: str, name: str, verifier: str) -> tuple[Covered, int]:
    """Make a set of scores of all that the run's log counts, or finish one; what it came to, and how many are new.

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
        for commits in rescoring.batches():
            num_new += await rescore(commits)
        return rescoring.complete(), num_new
