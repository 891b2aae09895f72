"""What a run held and moved, stage by stage and per episode: a fold of its log over all incarnations.

Devices and cores are counted as held, not as used: a mesh of two processes of three threads that is in one interval for
ten seconds has held sixty core-seconds, whether it worked or waited. Of colocated meshes only work counts, for while
one waits the other has the device.
"""

import math
from collections.abc import Mapping
from typing import Any

from storage.ledger import Ledger

_LIGHT = {"device": "cpu", "processes": 1, "threads": 1}
"""A mesh that is given one core, such as the verifier."""


def account(config: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Device-seconds (of GPUs), core-seconds, bytes and tokens: by stage, in all, and per generated episode.

    Per trained episode where the run generated none; `per_episode` is None without either. What a stage did not move or
    nobody measured is 0.
    """
    stages: dict[str, dict[str, float]] = {}
    is_colocated = config.get("placement") == "colocated"
    for mesh, intervals in ledger.meshes.items():
        held = _held(mesh, config)
        unit = "core_seconds" if held["device"] == "cpu" else "device_seconds"
        each = held["processes"] * (held["threads"] if held["device"] == "cpu" else 1)
        lengths: dict[str, list[float]] = {}
        for interval in intervals:
            lengths.setdefault(interval.kind, []).append(interval.end - interval.start)
        for kind, seconds in lengths.items():
            stage = "wait" if kind.startswith("wait_") else kind
            if is_colocated and stage == "wait":
                continue
            _add(stages, stage, unit, each * math.fsum(seconds))
    for stage, unit, amount in _moved(config, ledger):
        _add(stages, stage, unit, amount)
    total: dict[str, float] = {
        unit: (math.fsum if unit.endswith("seconds") else sum)(
            stage[unit] for stage in stages.values()
        )
        for unit in ("device_seconds", "core_seconds", "bytes", "tokens")
    }
    groups = ledger.groups.values()
    episodes = sum(fact.part.rows for fact in ledger.generated) or sum(
        group.num_episodes for group in groups if group.steps
    )
    return {
        "stages": dict(sorted(stages.items())),
        "total": total,
        "episodes": episodes,
        "per_episode": {unit: value / episodes for unit, value in total.items()}
        if episodes
        else None,
    }


def _add(stages: dict[str, dict[str, float]], stage: str, unit: str, amount: float) -> None:
    empty = {"device_seconds": 0.0, "core_seconds": 0.0, "bytes": 0, "tokens": 0}
    held = stages.setdefault(stage, empty)
    held[unit] += amount


def _moved(config: Mapping[str, Any], ledger: Ledger) -> list[tuple[str, str, int]]:
    """Bytes and tokens: what each stage wrote to the store or brought to the generators, and sampled or read."""
    replicas = config.get("generators", {}).get("replicas", 1)
    generated = sum(fact.part.bytes for fact in ledger.generated)
    sampled = sum(fact.prompt_tokens + fact.response_tokens for fact in ledger.generated)
    scored = sum(fact.bytes or 0 for fact in ledger.committed)
    evaluated = sum(part.bytes for fact in ledger.evaluated.values() for part in fact.parts)
    served = sum(fact.bytes for fact in ledger.published) * replicas
    kept = sum(file.bytes for fact in ledger.checkpoints.values() for file in fact.files)
    trained = sum(int(step.metrics.get("num_tokens", 0)) for step in ledger.trained)
    moved = [
        ("generate", "bytes", generated),
        ("generate", "tokens", sampled),
        ("score", "bytes", scored),
        ("evaluate", "bytes", evaluated),
        ("weights", "bytes", served),
        ("checkpoint", "bytes", kept),
        ("train", "tokens", trained),
    ]
    return [each for each in moved if each[2]]


def _held(mesh: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a mesh has of devices, by its name."""
    generators, trainer = config.get("generators", {}), config.get("trainer", {})
    if mesh.startswith("generator-"):
        section, processes = generators, generators.get("tensor_parallel", 1)
    elif mesh == "trainer":
        section, processes = trainer, trainer.get("ranks", 1)
    elif mesh in ("reference", "critic"):
        section, processes = trainer, 1
    else:
        return _LIGHT
    return {
        "device": section.get("device", "cpu"),
        "processes": processes,
        "threads": section.get("threads", 1),
    }
