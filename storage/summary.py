"""run.json: the results of a run, as a fold of its log and its stored config."""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from storage import layout
from storage.accounting import account
from storage.facts import Interval
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import ObjectStore
from storage.overlap import overlap_seconds
from storage.runs import read_config

ADDED_LATER = frozenset({"accounting"})
"""What run.json did not have from the first version of this code on: it may lack them."""


def run_summary(store: ObjectStore, run_id: str) -> dict[str, Any]:
    """The content of run.json.

    Raises ValueError if the run does not exist or its log is unreadable.
    """
    config = read_config(store, run_id)
    ledger = Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))
    return summarize(run_id, config, ledger)


def write_run_json(store: ObjectStore, run_id: str) -> dict[str, Any]:
    """Bring run.json up to date with the log and return its content."""
    summary = run_summary(store, run_id)
    store.replace(
        layout.run_json_key(run_id), json.dumps(summary, indent=2, allow_nan=False).encode()
    )
    return summary


def summarize(run_id: str, config: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """The content of run.json for a ledger. Figures that were never measured are None.

    Without an end in the log the status is 'running': whether the process lives, the log cannot
    know. Steps and updates count what stands, and a step that was trained again once; tokens and
    generated episodes count all that was generated. Groups and trained episodes count once, however
    often used.
    """
    first = ledger.incarnations[0].controller if ledger.incarnations else None
    newest = ledger.incarnations[-1].controller if ledger.incarnations else None
    ended = ledger.status != "running"
    groups = ledger.groups.values()
    return {
        "run_id": run_id,
        "parent_run_id": config.get("parent_run_id"),
        "lineage": _lineage(ledger),
        "regime": config.get("regime"),
        "status": ledger.status,
        "started_at": _iso(first.claimed_at) if first else None,
        "finished_at": _iso(ledger.last_at[len(ledger.incarnations) - 1]) if ended else None,
        "config": config,
        "sources": [
            {"field": s.field, "reference": s.reference, "key": s.file.key, "sha256": s.file.sha256}
            for s in ledger.sources
        ],
        "versions": newest.versions if newest else {},
        "git_commit": newest.git_commit if newest else None,
        "bitwise": _is_bitwise(config, ledger),
        "incarnations": len(ledger.incarnations),
        "retrained_steps": len(ledger.trained) - len(ledger.steps),
        "steps": ledger.last_step,
        "policy_version": ledger.current_step,
        "optimizer_updates": sum(step.optimizer_updates for step in ledger.steps.values()),
        "eval": _evaluations(ledger),
        "groups": {
            "admitted": sum(group.draw is not None for group in groups),
            "trained": sum(bool(group.steps) for group in groups),
            "reused": sum(len(group.steps) > 1 for group in groups),
            "pending": len(ledger.pending),
            **_handed_over(ledger),
            "dropped": dict(sorted(ledger.dropped.items())),
        },
        "episodes": {
            "generated": sum(fact.part.rows for fact in ledger.generated),
            "trained": sum(group.num_episodes for group in groups if group.steps),
        },
        "tokens": {
            "prompt": sum(fact.prompt_tokens for fact in ledger.generated),
            "response": sum(fact.response_tokens for fact in ledger.generated),
        },
        "age": _ages(ledger),
        "parity": _parity(ledger),
        "retries": len(ledger.retries),
        "failures": len(ledger.failures),
        "seconds": _seconds(ledger),
        "accounting": account(config, ledger),
    }


def _handed_over(ledger: Ledger) -> dict[str, int]:
    """Number of groups that another run trains on, in a run that collects for one."""
    number = sum(group.to_run is not None for group in ledger.groups.values())
    return {"handed_over": number} if number else {}


def _is_bitwise(config: dict[str, Any], ledger: Ledger) -> bool:
    """Whether the run can be reproduced to the last bit.

    That is: it is sync, nothing diverged, and all incarnations had the same code and versions. Tools that take their
    time, all but the calculator, answer between other steps of the engine each time.
    """
    controllers = [incarnation.controller for incarnation in ledger.incarnations]
    return (
        config.get("regime") == "sync"
        and not ledger.diverged
        and not ledger.forked_steps
        and all(tool["kind"] == "calculator" for tool in config.get("tools", {}).values())
        and all(each.versions == controllers[0].versions for each in controllers)
        and all(each.git_commit == controllers[0].git_commit for each in controllers)
    )


def _lineage(ledger: Ledger) -> dict[str, Any]:
    """What the run was made from: the checkpoint that it goes on from, and groups of other runs by score set."""
    forked = ledger.forked
    replayed: dict[str, dict[str, int]] = {}
    for fact in ledger.replayed:
        sets = replayed.setdefault(fact.run_id, {})
        sets[fact.score_set] = sets.get(fact.score_set, 0) + len(fact.draws)
    return {
        "checkpoint": None
        if forked is None
        else {
            "run_id": forked.parent_run_id,
            "step": forked.parent_step,
            "key": forked.checkpoint,
        },
        "replayed_groups": replayed,
    }


def _evaluations(ledger: Ledger) -> dict[str, float | int | None]:
    initial, final = ledger.evaluated.get("initial"), ledger.evaluated.get("final")
    newest = next(reversed(ledger.evaluated.values()), None)
    return {
        "initial": initial.sampled if initial else None,
        "final": final.sampled if final else None,
        "greedy_initial": initial.greedy if initial else None,
        "greedy_final": final.greedy if final else None,
        "num_prompts": newest.num_prompts if newest else None,
    }


def _ages(ledger: Ledger) -> dict[str, float | int | None]:
    """Largest age, and mean age of the groups of all steps that stand."""
    ages = [
        (step.age_max, step.age_mean, len(step.group_ids))
        for step in ledger.steps.values()
        if step.age_max is not None and step.age_mean is not None
    ]
    num_groups = sum(count for *_, count in ages)
    if not num_groups:
        return {"max": None, "mean": None}
    total = math.fsum(mean * count for _, mean, count in ages)
    return {"max": max(largest for largest, *_ in ages), "mean": total / num_groups}


def _parity(ledger: Ledger) -> dict[str, float | None]:
    """Mean over the publishes of their mean difference, all weighing the same, and the largest."""
    parities = [fact.parity for fact in ledger.published if fact.parity is not None]
    if not parities:
        return {"mean": None, "max": None}
    mean = math.fsum(parity.mean for parity in parities) / len(parities)
    return {"mean": mean, "max": max(parity.max for parity in parities)}


def _seconds(ledger: Ledger) -> dict[str, Any]:
    """Where the time went.

    Of each mesh: seconds by kind; `lost`, what it did before it or its controller died and could not tell any more; and
    what is neither down, lost nor in an interval.
    """
    total, down = ledger.total_seconds, ledger.down_seconds
    meshes = {}
    for mesh, intervals in sorted(ledger.meshes.items()):
        kinds = sorted({interval.kind for interval in intervals})
        seconds: dict[str, float] = {
            kind: math.fsum(each.end - each.start for each in intervals if each.kind == kind)
            for kind in kinds
        }
        covered = math.fsum(each.end - each.start for each in intervals)
        lost = _lost_seconds(ledger, intervals) + _lost_with_processes(ledger, mesh, intervals)
        if lost:
            seconds["lost"] = lost
        meshes[mesh] = {**seconds, "unaccounted": max(0.0, total - down - lost - covered)}
    return {
        "total": total,
        "down": down,
        "overlap": overlap_seconds(ledger),
        "meshes": meshes,
    }


def _lost_seconds(ledger: Ledger, intervals: Sequence[Interval]) -> float:
    """What a mesh did, in incarnations that did not end in order, between what it told last and their last entry."""
    lost = []
    claims = [incarnation.controller.claimed_at for incarnation in ledger.incarnations]
    for number, claimed_at in enumerate(claims):
        if number in ledger.ended or number == len(claims) - 1:
            continue
        told = [i.end for i in intervals if claimed_at <= i.end <= claims[number + 1]]
        lost.append(max(0.0, ledger.last_seen(number) - max(told, default=claimed_at)))
    return math.fsum(lost)


def _lost_with_processes(ledger: Ledger, mesh: str, intervals: Sequence[Interval]) -> float:
    """What a mesh did between what it told last and the begin of the processes that took its place, if any did."""
    lost = []
    for fact in ledger.failures:
        if fact.mesh == mesh:
            until = fact.failed_at + fact.seconds if fact.started_at is None else fact.started_at
            lost.append(until - max((i.end for i in intervals if i.end <= until), default=until))
    return math.fsum(lost)


def _iso(unix_seconds: float) -> str:
    """ISO 8601 in UTC."""
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="microseconds")
