"""Calls that several stages make. Each logs the intervals that came with its answers at once, so that none is lost."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TypeVar

from forge_core.actors.messages import GenerateReply, LoadReply, ScoreReply, ScoreRequest
from storage import facts, layout
from storage.records import PartRef
from tasks.run import ActiveRun

R = TypeVar("R", GenerateReply, LoadReply)


async def on_replicas(
    run: ActiveRun,
    endpoint: str,
    arguments: dict[int, tuple[object, ...]],
    reply_type: type[R],
    *,
    timeout_seconds: float,
) -> list[R]:
    """Call an endpoint of each named replica, all at once; answers in the order of `arguments`.

    Waits for all of them, whoever fails: a retry would meet replicas that still work. Raises the first failure.
    """
    answers = await asyncio.gather(
        *(
            run.meshes.generators[replica].call(endpoint, *given, timeout_seconds=timeout_seconds)
            for replica, given in arguments.items()
        ),
        return_exceptions=True,
    )
    replies: dict[int, R] = {}
    failures = []
    for replica, answer in zip(arguments, answers, strict=True):
        if isinstance(answer, BaseException):
            failures.append(answer)
        else:
            replies[replica] = answer[0]
    if replies:
        run.append(
            *(
                run.intervals(run.meshes.generators[replica].name, reply.intervals)
                for replica, reply in replies.items()
            )
        )
    if failures:
        raise failures[0]
    return list(replies.values())


async def score_part(run: ActiveRun, request: ScoreRequest) -> ScoreReply:
    """Have the verifier score a part."""
    timeouts = run.config.timeouts
    deadline = timeouts.stage_seconds
    if run.config.reward is not None:
        # One prompt after another, each of which has a deadline of its own that names the function.
        deadline = max(deadline, request.part.rows * timeouts.reward_seconds)
    answers: list[ScoreReply] = await run.meshes.verifier.call(
        "score", request, timeout_seconds=deadline
    )
    run.append(run.intervals("verifier", answers[0].intervals))
    return answers[0]


async def commit_scored(run: ActiveRun, round: int, replica: int, part: PartRef) -> None:
    """Score a generated part and commit it. Idempotent by round and replica: the first commit counts."""
    name = layout.part_name(round, replica)
    if layout.commit_key(run.run_id, name) in run.ledger.commits:
        return
    reply = await score_part(run, ScoreRequest(run_id=run.run_id, part=part, commit=name))
    assert reply.commit is not None
    # Looked up again: the entry may have been written although its writing failed.
    if reply.commit not in run.ledger.commits:
        run.append(
            facts.Committed(
                round=round,
                commit=reply.commit,
                group_ids=reply.group_ids,
                episodes=reply.num_episodes,
                score_set="run",
                sha256=hashlib.sha256(run.store.read(reply.commit)).hexdigest(),
            )
        )
