"""Proof that a single core is enough: generators and trainer take turns on it, and on the memory."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kill_matrix import ROOT
from storage.objects import open_store
from storage.verify import verify

# What the tests have is taken from there; their folder is no package.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "stack")]

REGIMES = ("sync", "hybrid")
ALLOWED_BYTES = int(2.8 * 2**30)
"""More than both hold in turns, and less than both hold at their largest."""
_CORE = "0"
_RUN_SECONDS = 3000.0


def prove_colocated() -> tuple[bool, dict[str, Any]]:
    """The tiny preset, seed 0, bound to one core, with a cache of 1 GiB; its processes are watched from outside."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {regime: _run(Path(folder), regime) for regime in REGIMES}
    return all(run["met"] for run in runs.values()), {"allowed_bytes": ALLOWED_BYTES, "runs": runs}


def _run(folder: Path, regime: str) -> dict[str, Any]:
    from watched_run import watch_run

    share = ALLOWED_BYTES / psutil.virtual_memory().total
    watched = watch_run(
        folder, regime, "--regime", regime,
        "--set", "placement=colocated", "--set", f"memory_fraction={share}",
        "--set", "generators.threads=1", "--set", "trainer.ranks=1",
        "--set", "generators.kv_cache_gib=1.0",
        prefix=("taskset", "-c", _CORE), environment=dict(os.environ), seconds=_RUN_SECONDS,
    )  # fmt: skip
    finished = watched.finished
    if finished.code != 0:
        raise RuntimeError(f"{regime}: {finished.errors[-2000:]}")
    alone = {mesh: watched.largest_alone(mesh) for mesh in watched.cores}
    metrics = [fact["metrics"] for fact in finished.facts("step")]
    figures = {
        "eval": finished.summary["eval"],
        "steps": finished.summary["steps"],
        "seconds": finished.summary["seconds"],
        "largest_together_bytes": watched.largest_bytes,
        "largest_alone_bytes": alone,
        "looks": len(watched.samples),
        "cores": {mesh: sorted(cores) for mesh, cores in watched.cores.items()},
        "turns": sum(step["turns/number"] for step in metrics),
        "largest_held_share": max(step["turns/held_share"] for step in metrics),
        "problems": [each.sentence for each in verify(open_store(str(folder)), regime).problems],
    }
    figures["met"] = (
        figures["eval"]["initial"] <= 0.4
        and figures["eval"]["final"] >= 0.8
        and watched.largest_bytes <= ALLOWED_BYTES < sum(alone.values())
        and all(cores == [(int(_CORE),)] for cores in figures["cores"].values())
        and finished.summary["seconds"]["overlap"]["both"] == 0.0
        and not figures["problems"]
    )
    print(f"{regime}: {figures}", flush=True)
    return figures


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {"colocated": prove_colocated}
