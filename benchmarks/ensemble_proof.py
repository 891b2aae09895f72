"""The proof that the tiny preset learns from an ensemble of weak verifiers alone, by what a person would type."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import weak_verifiers

FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")
SEEDS = (0, 1, 2)
LEAST_FINAL = 0.75
COLLECTED, ENSEMBLE = "collected", "weak"
COLLECTING = ("steps=4", "optimizer.learning_rate=0", "evaluation.num_prompts=20", "seed=100")
"""What the episodes are sampled with that the ensemble is fitted to: the warm-started policy, which stays as it is."""
LEARNING = ("reward=ensemble:weak@1", "evaluation.scorer=environment")
"""Training sees the ensemble alone; held-out answers get the environment's true score."""


def prove_ensemble() -> tuple[bool, dict[str, Any]]:
    """One ensemble, fitted without a label to a run's episodes, and a run of each seed that trains on it."""
    with tempfile.TemporaryDirectory() as store:
        fitted = fit(store)
        runs = [learn(store, seed) for seed in SEEDS]
    is_met = all(run["eval"]["final"] >= LEAST_FINAL for run in runs)
    finals = [run["eval"]["final"] for run in runs]
    return is_met, {
        "least_final": LEAST_FINAL,
        "mean_final": statistics.fmean(finals),
        "settings": LEARNING,
        "ensemble": fitted,
        "runs": runs,
    }


def fit(store: str) -> dict[str, Any]:
    """Collect episodes, have each weak verifier score them, and fit. Labels are for the report alone."""
    _forgeflow(store, "run", "--preset", "tiny", "--run-id", COLLECTED, *_set(COLLECTING))
    for name in weak_verifiers.NAMES:
        verifier = f"{weak_verifiers.__file__}:{name}"
        _forgeflow(store, "rescore", COLLECTED, "--verifier", verifier, "--name", name)
    scores = [option for name in weak_verifiers.NAMES for option in ("--scores", name)]
    fitted = _forgeflow(
        store, "fit-verifiers", COLLECTED, *scores, "--name", ENSEMBLE, "--labels", "run"
    )
    assert fitted["labels"]["prompts_fitted"] == 0
    rates = {
        each["name"]: {key: each[key] for key in ("use", "estimated", "labelled")}
        for each in fitted["verifiers"]
    }
    told = ("num_samples", "class_balance", "expected_pick_rate", "report", "warnings")
    return {
        "verifiers": rates,
        "units": [unit["verifiers"] for unit in fitted["units"]],
        **{key: fitted[key] for key in told},
    }


def learn(store: str, seed: int) -> dict[str, Any]:
    """Train on the ensemble's probabilities."""
    settings = _set((*LEARNING, f"seed={seed}"))
    summary = _forgeflow(store, "run", "--preset", "tiny", "--run-id", f"seed-{seed}", *settings)
    print(f"seed {seed}: {summary['eval']}", flush=True)
    return {"seed": seed, "eval": summary["eval"], "groups": summary["groups"]}


def _set(settings: tuple[str, ...]) -> list[str]:
    return [option for setting in settings for option in ("--set", setting)]


def _forgeflow(store: str, *arguments: str) -> dict[str, Any]:
    command = [FORGEFLOW, *arguments, "--store", store, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {"ensemble": prove_ensemble}
