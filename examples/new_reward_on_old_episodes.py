"""Try a new reward without paying for generation again: score what a run has sampled, and train on that.

    python examples/new_reward_on_old_episodes.py

The run learns to sort four digits and is rewarded for lists that are right. The new reward gives credit for every
digit in its place, so groups that were dropped, since nothing in them was right, have something to teach. Arguments
are further overrides of the run, such as `steps=8`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def digits_in_place(
    prompts: list[str], completions: list[str], fields: list[dict[str, Any]], **columns: Any
) -> list[float]:
    """TRL's signature: the share of digits that stand where they should."""
    rewards = []
    for completion, task in zip(completions, fields, strict=True):
        wanted = [number[0] for number in task["sorted_numbers"]]
        given = [character for character in completion if character.isdigit()]
        rewards.append(sum(a == b for a, b in zip(given, wanted, strict=False)) / len(wanted))
    return rewards


def forgeflow(*arguments: str) -> dict[str, Any]:
    """What a command says with `--json`."""
    command = [sys.executable, "-m", "flows.cli", *arguments, "--json"]
    document: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )
    return document


if __name__ == "__main__":
    settings = [f"--set={override}" for override in ["steps=24", *sys.argv[1:]]]
    run = forgeflow("run", "--preset=tiny", *settings)
    verifier = f"{__file__}:digits_in_place"
    scores = forgeflow("rescore", run["run_id"], f"--verifier={verifier}", "--name=in-place")
    replay = forgeflow("replay", run["run_id"], "--scores=in-place")
    print(f"mean score of {scores['episodes']:,} episodes: {scores['mean']}")
    for name, summary in (("run", run), ("replay", replay)):
        groups, seconds = summary["groups"]["trained"], summary["seconds"]["total"]
        generated = summary["episodes"]["generated"]
        print(f"{name}: {generated:,} episodes generated, {groups} groups trained, {seconds:.0f} s")
