"""Proof that a run outlives its processes: each kind of them killed in mid-step, in each regime."""

from __future__ import annotations

import hashlib
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kill_matrix import ROOT, weights_bytes
from storage.objects import open_store
from storage.resume import read_ledger
from storage.verify import verify

# What the tests have is taken from there; their folder is no package.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "stack")]

REGIMES = ("sync", "async", "hybrid")
"""By seed."""
FAILURES: dict[str, tuple[str, ...]] = {
    "one generator": ("generator-1",),
    "all generators": ("generator-0", "generator-1"),
    "a trainer rank": ("trainer",),
    "the weight store": ("weights",),
    "the reward actor": ("verifier",),
}
"""Meshes of each of which one process is killed."""
NUM_PROMPTS = 2000
_RUN_SECONDS = 900.0
_T_95 = {2: 4.303, 1: 12.706}
"""Student's t for a two-sided 95 % interval, by degrees of freedom."""


def prove_failures() -> tuple[bool, dict[str, Any]]:
    """Every run ends by itself and is sound, its report tells the failure, and its end is that of the unharmed runs.

    Scores are compared prompt by prompt with those of the unharmed run of the same seed and regime; the interval is
    over seeds. In sync and hybrid the weights are the same to the byte, which is more, so that only async differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        unharmed = [_run(folder, "unharmed", (), seed) for seed in range(len(REGIMES))]
        harmed = {
            name: [_run(folder, name, meshes, seed) for seed in range(len(REGIMES))]
            for name, meshes in FAILURES.items()
        }
    kinds: dict[str, Any] = {}
    for name, runs in harmed.items():
        differences = [
            statistics.fmean(a - b for a, b in zip(run["scores"], whole["scores"], strict=True))
            for run, whole in zip(runs, unharmed, strict=True)
        ]
        mean, half = _interval(differences)
        kinds[name] = {
            "eval_final_difference": {"mean": mean, "half_width_95": half, "by_seed": differences},
            "runs": [{k: v for k, v in run.items() if k != "scores"} for run in runs],
        }
    all_runs = [*unharmed, *(run for runs in harmed.values() for run in runs)]
    # There tokens follow from ids alone, whoever samples them when; in async weights change under way.
    equal = {
        regime: len({run["weights"] for run in all_runs if run["regime"] == regime}) == 1
        for regime in ("sync", "hybrid")
    }
    result: dict[str, Any] = {
        "prompts": NUM_PROMPTS,
        "unharmed": [{k: v for k, v in run.items() if k != "scores"} for run in unharmed],
        "failures": kinds,
        "weights_equal_to_the_byte": equal,
        "problems": [problem for run in all_runs for problem in run["problems"]],
    }
    is_met = (
        not result["problems"]
        and all(equal.values())
        and all(
            abs(kind["eval_final_difference"]["mean"])
            <= kind["eval_final_difference"]["half_width_95"]
            or not any(kind["eval_final_difference"]["by_seed"])
            for kind in kinds.values()
        )
    )
    return is_met, result


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), _T_95[len(values) - 1] * spread


def _run(folder: str, name: str, meshes: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One run, of whose meshes a process each is killed at a seeded moment of a seeded step."""
    from audits import audit_store
    from sufferer import Sufferer

    regime = REGIMES[seed]
    run_id = f"{name.replace(' ', '-')}-{seed}"
    chance = random.Random(run_id)
    after, delay = chance.randint(5, 30), chance.uniform(0.0, 1.5)
    run = Sufferer(
        Path(folder), run_id, "--regime", regime, "--set", f"seed={seed}",
        "--set", "generators.replicas=2", "--set", "generators.threads=1", "--set", "trainer.ranks=2",
        "--set", f"evaluation.num_prompts={NUM_PROMPTS}",
        seconds=_RUN_SECONDS,
    )  # fmt: skip
    try:
        if meshes:
            run.until("step", after)
            victims = [run.processes(mesh)[0] for mesh in meshes]
            time.sleep(delay)
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
        finished = run.finish()
    finally:
        run.end()
    store = open_store(folder)
    problems = [f"exit {finished.code}"] if finished.code else []
    problems += [each.sentence for each in verify(store, run_id).problems]
    try:
        audit_store(folder, run_id)
    except AssertionError as error:
        problems.append(f"audit: {error}")
    told = [failure.mesh for failure in read_ledger(store, run_id).failures]
    report = store.read(f"runs/{run_id}/report.html").decode()
    problems += [f"{mesh} is not told of" for mesh in meshes if f"<td>{mesh}</td>" not in report]
    if sorted(told) != sorted(meshes):
        problems.append(f"failures of {told} were told where {list(meshes)} were killed")
    described = {
        "regime": regime,
        "killed_after_step": after if meshes else None,
        "seconds": finished.summary["seconds"]["total"],
        "eval_final": finished.summary["eval"]["final"],
        "failures": [
            {"mesh": f["mesh"], "seconds": round(f["seconds"], 2)} for f in finished.facts("failed")
        ],
        "retries": finished.summary["retries"],
        "problems": [f"{run_id}: {problem}" for problem in problems],
    }
    print(described, flush=True)
    return {
        **described,
        "scores": _scores(folder, run_id),
        "weights": hashlib.sha256(weights_bytes(store, run_id)).hexdigest(),
    }


def _scores(folder: str, run_id: str) -> list[float]:
    """Scores of the final evaluation's sampled answers, by prompt."""
    from storage.parts import read_part

    store = open_store(folder)
    evaluated = read_ledger(store, run_id).evaluated["final"]
    rows = [row for part in evaluated.parts for row in read_part(store, part).to_pylist()]
    sampled = {row["draw"]: row["reward"] for row in rows if row["sample"] == 0}
    return [sampled[draw] for draw in sorted(sampled)]


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {"failures": prove_failures}
