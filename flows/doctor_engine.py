"""What `doctor` starts: the smallest run there is, which shows that trainer and engine agree on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from flows.doctor_checks import Finding
from forge_core.placement.hosts import this_machine
from forge_core.settings import load_config

_NAME = "engine"
_SECONDS = 600
_CHOSEN = ("steps=0", "warm_start.steps=0", "evaluation.num_prompts=2", "trainer.ranks=1")
"""Of the tiny preset: a model is made and published, which scores the probe on both sides, and nothing is trained."""
_ON_GPUS = ("generators.device=cuda", "trainer.device=cuda")


def examine_engine() -> Finding:
    """Run the tiny model through trainer, weight store and engine, and tell how far their logprobs are apart."""
    chosen = list(_CHOSEN)
    if gpus := this_machine().gpus:
        chosen += _ON_GPUS
        chosen += ["placement=colocated"] if len(gpus) == 1 else []
    with tempfile.TemporaryDirectory(prefix="forgeflow-doctor-") as store:
        options = [part for each in chosen for part in ("--set", each)]
        command = [sys.executable, "-m", "flows.cli", "run", "--preset", "tiny", *options]
        environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
        try:
            done = subprocess.run(
                [*command, "--store", store, "--json"],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return _bad(
                f"did not serve within {_SECONDS} s", "forgeflow run --preset tiny --verbose"
            )
        try:
            summary: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return _bad(f"did not start: {lines[-1]}", "forgeflow run --preset tiny --verbose")
    return judge_parity(summary)


def judge_parity(summary: dict[str, Any]) -> Finding:
    """What the summary of that run says of the engine."""
    bounds = load_config(preset="tiny", file=None, overrides=[]).parity
    parity = summary.get("parity") or {"max": None}
    if parity["max"] is None:
        why = str(summary.get("reason") or summary.get("status"))[:500]
        return _bad(f"did not serve: {why}", "forgeflow run --preset tiny --verbose")
    gap = f"its logprobs and the trainer's differ by {parity['max']:.2g} nats at most"
    if parity["max"] > bounds.max_max or parity["mean"] > bounds.max_mean:
        told = f"{gap}, and {bounds.max_max:g} are allowed"
        return _bad(told, "install the versions of torch and vllm that were tested together")
    if summary.get("status") != "finished":
        return _bad(f"{gap}, but the run is {summary.get('status')}", "forgeflow run --preset tiny")
    return Finding(name=_NAME, good=True, told=gap)


def _bad(told: str, mend: str) -> Finding:
    if mend.startswith("forgeflow"):
        mend = f"see what `{mend}` says"
    return Finding(name=_NAME, good=False, told=told, mend=mend)
