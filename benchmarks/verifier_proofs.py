"""Proof that a verifier that is slow now and then does not slow down generation."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")
NUM_PAIRS, NUM_STEPS, FIRST_STEP = 4, 30, 5
MOST_SLOWER = 0.05
# Rewards that differ within a group whatever the model can do; the slow one sleeps on one prompt in fifty and notes it.
FUNCTIONS = """
import hashlib, time
from pathlib import Path

def _digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

def quick(prompts, completions, **columns):
    return [float(_digest(p + c) % 2) for p, c in zip(prompts, completions)]

def slow(prompts, completions, **columns):
    if _digest(prompts[0]) % 50 == 0:
        time.sleep(2.0)
        with Path(__file__).with_name("sleeps").open("a") as sleeps:
            sleeps.write(f"{time.time()}\\n")
    return quick(prompts, completions)
"""


def prove_slow_verifier() -> tuple[bool, dict[str, Any]]:
    """Async runs with the one and the other in turns: response tokens a second, from a step early on to the last.

    What else the machine does changes slowly, so that the two runs of a pair, one right after the other, are compared
    with each other alone, and which of them is first changes. What counts is the median over the pairs.
    """
    pairs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rewards.py"
        file.write_text(FUNCTIONS)
        for pair in range(NUM_PAIRS):
            found: dict[str, float] = {}
            for name in ("quick", "slow") if pair % 2 == 0 else ("slow", "quick"):
                (Path(folder) / "sleeps").write_text("")
                rate, begin, end = _rate(Path(folder) / "store", f"{name}-{pair}", f"{file}:{name}")
                found[name] = rate
                if name == "slow":
                    slept = map(float, (Path(folder) / "sleeps").read_text().split())
                    found["sleeps"] = sum(begin < at <= end for at in slept)
                    found["seconds"] = end - begin
            found["slower"] = 1.0 - found["slow"] / found["quick"]
            pairs.append(found)
            print(time.strftime("%H:%M:%S"), found, flush=True)
    slower = statistics.median(pair["slower"] for pair in pairs)
    slept_enough = all(pair["sleeps"] > 0 for pair in pairs)
    return slept_enough and slower <= MOST_SLOWER, {
        "pairs": pairs,
        "slower": slower,
        "allowed": MOST_SLOWER,
    }


def _rate(store: Path, run_id: str, reward: str) -> tuple[float, float, float]:
    """Response tokens a second of one run, and when what is measured begins and ends, in seconds since the epoch."""
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
    return tokens / (end - begin), begin, end


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {
    "slow-verifier": prove_slow_verifier
}
