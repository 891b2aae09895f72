"""Calls that several stages make."""

from __future__ import annotations

import asyncio
from typing import Any

from forge_core.actors.messages import ScoreReply, ScoreRequest
from tasks.run import ActiveRun


async def on_replicas(run: ActiveRun, endpoint: str, requests: list[tuple[int, Any]]) -> list[Any]:
    """Ask each named replica for one thing, all at once; answers in the order of the requests."""
    timeout = run.config.timeouts.stage_seconds
    answers = await asyncio.gather(
        *(
            run.meshes.generators[replica].call(endpoint, request, timeout_seconds=timeout)
            for replica, request in requests
        )
    )
    return [answer[0] for answer in answers]


async def score_part(run: ActiveRun, request: ScoreRequest) -> ScoreReply:
    """Have the verifier score a part."""
    answers: list[ScoreReply] = await run.meshes.verifier.call(
        "score", request, timeout_seconds=run.config.timeouts.stage_seconds
    )
    return answers[0]
