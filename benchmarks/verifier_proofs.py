"""Proof that a verifier that is slow now and then does not slow down generation."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")
NUM_PAIRS, NUM_STEPS, FIRST_STEP = 3, 40, 5
MOST_SLOWER = 0.05
# Rewards that differ within a group whatever the model can do; the slow one sleeps on one prompt in fifty.
FUNCTIONS = """
import hashlib, time

def _digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

def quick(prompts, completions, **columns):
    return [float(_digest(p + c) % 2) for p, c in zip(prompts, completions)]

def slow(prompts, completions, **columns):
    if _digest(prompts[0]) % 50 == 0:
        time.sleep(2.0)
    return quick(prompts, completions)
"""


def prove_slow_verifier() -> tuple[bool, dict[str, Any]]:
    """Async runs with the one and the other in turns: response tokens a second, from a step early on to the last."""
    rates: dict[str, list[float]] = {"quick": [], "slow": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rewards.py"
        file.write_text(FUNCTIONS)
        for pair in range(NUM_PAIRS):
            for name, found in rates.items():
                found.append(_rate(Path(folder) / "store", f"{name}-{pair}", f"{file}:{name}"))
                print(name, found[-1], flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    slower = 1.0 - medians["slow"] / medians["quick"]
    return slower <= MOST_SLOWER, {
        "tokens_per_second": rates,
        "medians": medians,
        "slower": slower,
    }


def _rate(store: Path, run_id: str, reward: str) -> float:
    command = [
        FORGEFLOW, "run", "--preset", "tiny", "--regime", "async", "--store", str(store), "--run-id", run_id,
        "--set", f"reward={reward}", "--set", f"steps={NUM_STEPS}", "--set", "max_policy_age=8",
        "--set", "warm_start.steps=10", "--set", "evaluation.num_prompts=20",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    log = store / "runs" / run_id / "log"
    entries = [json.loads(path.read_bytes()) for path in sorted(log.iterdir())]
    told = [(entry["at"], fact) for entry in entries for fact in entry["facts"]]
    steps = {fact["step"]: at for at, fact in told if fact["kind"] == "step"}
    begin, end = steps[FIRST_STEP], steps[NUM_STEPS]
    tokens = sum(
        fact["response_tokens"]
        for at, fact in told
        if fact["kind"] == "generated" and begin < at <= end
    )
    return tokens / (end - begin)


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {
    "slow-verifier": prove_slow_verifier
}
