"""Proof that calling a tool is learned where it pays, and left off where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.objects import open_store
from storage.parts import read_commits, read_committed

ROOT = Path(__file__).parents[1]
FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")
SEEDS = (0, 1, 2)
NUM_COMMITS = 4
"""Steps, the first and the last ones, whose episodes are looked at."""
LEAST_GAIN, LEAST_WHERE_IT_PAYS, MOST_WHERE_NOT = 0.2, 0.9, 0.25


def prove_tools() -> tuple[bool, dict[str, Any]]:
    """The task of examples/own_tools.py: products, which the model cannot work out, and sums of digits, which it can.

    By kind, the share of episodes that call in the first steps and in the last, and evaluations before and after.
    """
    seeds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as store:
        for seed in SEEDS:
            seeds[str(seed)] = _learned(store, seed)
            print(seed, json.dumps(seeds[str(seed)]), flush=True)
    is_met = all(
        each["eval"]["final"] - each["eval"]["initial"] >= LEAST_GAIN
        and each["last"]["*"]["calls"] >= LEAST_WHERE_IT_PAYS
        and each["last"]["+"]["calls"] <= MOST_WHERE_NOT
        and each["verified"]
        for each in seeds.values()
    )
    return is_met, {"seeds": seeds}


def _learned(store: str, seed: int) -> dict[str, Any]:
    run_id, started = f"tools-{seed}", time.monotonic()
    command = [
        FORGEFLOW, "run", "--preset", "tiny", "--config", "examples/own_tools.toml", "--store", store,
        "--run-id", run_id, "--set", f"seed={seed}", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=1800
    )
    summary = json.loads(done.stdout)
    verify = [FORGEFLOW, "verify", run_id, "--store", store]
    return {
        "eval": summary["eval"],
        "wall_seconds": time.monotonic() - started,
        "first": _by_kind(store, run_id, slice(NUM_COMMITS)),
        "last": _by_kind(store, run_id, slice(-NUM_COMMITS, None)),
        "verified": subprocess.run(verify, stdout=subprocess.DEVNULL, timeout=300).returncode == 0,
    }


def _by_kind(store: str, run_id: str, steps: slice) -> dict[str, dict[str, float]]:
    """By the sign of the task, shares of episodes that call and that are truncated, and the mean reward."""
    opened = open_store(store)
    commits = sorted(read_commits(opened, run_id), key=lambda c: c.policy_version_min)[steps]
    columns = ["prompt", "turns", "reward", "finish_reason"]
    rows = read_committed(opened, run_id, columns=columns, commits=commits).to_pylist()
    figures = {}
    for sign in "+*":
        of_kind = [row for row in rows if sign in row["prompt"]]
        count = len(of_kind)
        calls = sum(any(turn["role"] == "calculator" for turn in row["turns"]) for row in of_kind)
        figures[sign] = {
            "episodes": count,
            "calls": calls / count,
            "truncated": sum(row["finish_reason"] == "length" for row in of_kind) / count,
            "reward": sum(row["reward"] for row in of_kind) / count,
        }
    return figures


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {"tools": prove_tools}
