"""Calls that several stages make. Each logs the intervals that came with its answers at once, so that none is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging

from forge_core.actors.messages import (
    GenerateReply,
    GenerateRequest,
    LoadReply,
    ScoreReply,
    ScoreRequest,
)
from forge_core.mesh import Mesh, MeshCall
from storage import facts, layout
from storage.groups import GroupState
from storage.records import PartRef
from tasks.run import ActiveRun

logger = logging.getLogger(__name__)

_SCORING_ATTEMPTS = 3
"""Times that the verifier may fail while it scores a part."""


class Overtaken(MeshCall):
    """The weights that a request is for are nowhere any more, for the weight store failed and has newer ones now."""


async def on_replicas(
    run: ActiveRun,
    endpoint: str,
    requests: dict[int, GenerateRequest],
    *,
    timeout_seconds: float,
) -> list[GenerateReply]:
    """Have each replica do its request, all at once; replies in the order of `requests`.

    A replica that fails meanwhile costs its own request alone, which another replica or its successor does from the
    begin: requests are seeded and each is alone in its engine, so that whoever does one gives the same tokens. Waits
    for all of them, whoever fails: a retry would meet replicas that still work. Raises the first failure, which is
    Overtaken where a replica came back with newer weights: `level` them before the next attempt.
    """
    answers = await asyncio.gather(
        *(
            _on_replica(run, replica, endpoint, request, timeout_seconds)
            for replica, request in requests.items()
        ),
        return_exceptions=True,
    )
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if failures:
        raise failures[0]
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _on_replica(
    run: ActiveRun, replica: int, endpoint: str, request: GenerateRequest, timeout_seconds: float
) -> GenerateReply:
    load = tokens_of(run, len(request.prompts) * request.num_samples)
    while True:
        mesh = await _serving(run, replica, request.policy_version)
        try:
            answers: list[GenerateReply] = await mesh.call(
                endpoint, request, timeout_seconds=timeout_seconds, load=load
            )
        except MeshCall:
            if not mesh.has_failed() or run.recovery is None:
                raise
            run.recovery.begin(mesh)
            request = dataclasses.replace(request, attempt=request.attempt + 1)
            continue
        run.append(run.intervals(mesh.name, answers[0].intervals))
        if answers[0].stored is not None:
            mesh.produce(answers[0].stored.response_tokens)
        return answers[0]


def tokens_of(run: ActiveRun, num_episodes: int) -> float:
    """Response tokens that so many episodes may take, by which a replica's load is counted."""
    return float(num_episodes * run.config.sampling.max_tokens)


async def _serving(run: ActiveRun, replica: int, version: int) -> Mesh:
    """The replica, or the one that stands in for it if the config has others do so; waits while there is none.

    Raises Overtaken if the replica was started again and serves newer weights than the request is for.
    """
    meshes, recovery = run.meshes.generators, run.recovery
    mesh = meshes[replica]
    if mesh.has_failed() and recovery is not None:
        recovery.refuse(mesh)
        if recovery.policy(mesh) == "route_around":
            others = [
                other
                for index, other in enumerate(meshes)
                if not other.has_failed() and _version(run, index) in (None, version)
            ]
            if others:
                return min(others, key=lambda other: other.load)
        await _revived(run, mesh)
    serves = _version(run, replica)
    if serves is not None and serves > version:
        raise Overtaken(f"{mesh.name} was started again with version {serves} instead of {version}")
    return mesh


def _version(run: ActiveRun, replica: int) -> int | None:
    """What a replica serves; None if it was not told to load anything."""
    loaded = run.loads.get(replica)
    return None if loaded is None else loaded.policy_version


async def _revived(run: ActiveRun, mesh: Mesh) -> None:
    """Wait until a generator serves again. Raises MeshCall if that takes longer than a start may."""
    assert run.recovery is not None
    seconds = run.config.timeouts.startup_seconds
    try:
        async with asyncio.timeout(seconds):
            await run.recovery.revive(mesh)
    except TimeoutError:
        raise MeshCall(f"mesh {mesh.name} did not serve again within {seconds:g} s") from None


async def load_on_all(run: ActiveRun) -> list[LoadReply]:
    """Have every generator load the newest weights. One that has failed loads them before it serves again.

    If others can stand in for it, it is not waited for. Raises what loading raised, once all others are done.
    """
    run.loads.clear()
    answers = await asyncio.gather(
        *(_load(run, replica) for replica in range(len(run.meshes.generators))),
        return_exceptions=True,
    )
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if failures:
        raise failures[0]
    if not run.loads:
        await _revived(run, run.meshes.generators[0])
    return [run.loads[replica] for replica in sorted(run.loads)]


async def _load(run: ActiveRun, replica: int) -> None:
    mesh, recovery = run.meshes.generators[replica], run.recovery
    assert run.put is not None
    if not mesh.has_failed():
        try:
            answers: list[LoadReply] = await mesh.call(
                "load_version",
                run.put.manifest,
                run.probe,
                timeout_seconds=run.config.timeouts.call_seconds,
            )
        except MeshCall:
            if not mesh.has_failed() or recovery is None:
                raise
            recovery.begin(mesh)
        else:
            run.append(run.intervals(mesh.name, answers[0].intervals))
            run.loads[replica] = answers[0]
            return
    if recovery is not None and recovery.policy(mesh) != "route_around":
        await _revived(run, mesh)


async def score_part(run: ActiveRun, request: ScoreRequest) -> ScoreReply:
    """Have the verifier score a part."""
    answers: list[ScoreReply] = await run.meshes.verifier.call(
        "score", request, timeout_seconds=run.config.scoring_seconds(request.part.rows)
    )
    run.append(run.intervals("verifier", answers[0].intervals))
    run.meshes.verifier.produce(answers[0].num_episodes)
    return answers[0]


async def commit_scored(run: ActiveRun, round: int, replica: int, part: PartRef) -> None:
    """Score a generated part and commit it. Idempotent by round and replica: the first commit counts.

    A part in whose scoring the verifier failed again and again may be what kills it: its groups are dropped as failed.
    """
    name = layout.part_name(round, replica)
    groups = _groups_of(run, round, replica)
    if layout.commit_key(run.run_id, name) in run.ledger.commits or (
        groups and not not_dropped(run, groups)
    ):
        return
    try:
        reply = await score_part(run, ScoreRequest(run_id=run.run_id, part=part, commit=name))
    except MeshCall as error:
        run.scorings_lost[name] += run.meshes.verifier.has_failed()
        if run.scorings_lost[name] < _SCORING_ATTEMPTS:
            raise
        logger.error("%s: dropped as failed, for %s", name, error)
        dropped = not_dropped(run, groups)
        run.append(facts.Dropped(group_ids=dropped, reason="failed", step=None))
        return
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
                bytes=reply.part.bytes,
            )
        )


def _groups_of(run: ActiveRun, round: int, replica: int) -> tuple[str, ...]:
    """The groups of a part, as the log tells them."""
    parts = run.ledger.generated_in.get(round, [])
    return next((fact.group_ids for fact in parts if fact.replica == replica), ())


def not_dropped(run: ActiveRun, group_ids: tuple[str, ...]) -> tuple[str, ...]:
    """Those that the log has not dropped yet: an attempt before may have."""
    return tuple(g for g in group_ids if run.ledger.groups[g].state != GroupState.DROPPED)
