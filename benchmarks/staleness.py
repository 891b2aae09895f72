"""What stale data costs, and what importance weights give back: `python -m benchmarks.staleness`.

The tiny preset learns on-policy, and from groups that are four versions old on average: rounds of three steps in
hybrid, so that ages run from 3 to 5. From the stale ones it learns

    corrected     by the ratio against the logprobs that were recorded at sampling, as the losses have it
    decoupled     around the proximal policy, with truncated importance weights
    uncorrected   around the proximal policy without weights, as if it had sampled them

All runs answer the same 2,000 held-out prompts, so that the difference of two means is the mean of paired differences;
its interval is over seeds. A whole run of it takes hours: `--seeds 0 --variants corrected --steps 12` runs a part, and
writes no figure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.learning_runs import Learned, draw_curves, mean_and_interval
from benchmarks.prove import run_preset
from benchmarks.record import write_record

FIGURE = Path(__file__).parents[1] / "docs" / "algorithms" / "staleness.svg"
MOST_BEHIND = 0.03
NUM_PROMPTS = 2000
STEPS = 48
SEEDS = (0, 1, 2, 3, 4)
_STALE = ("--regime", "hybrid", "--set", "steps_per_round=3", "--set", "max_policy_age=5")
_PROXIMAL = ("--set", "algorithm.correction.anchor=proximal")
VARIANTS: dict[str, tuple[str, ...]] = {
    "on-policy": ("--regime", "sync", "--set", "trainer.ranks=1"),
    "corrected": _STALE,
    "decoupled": (*_STALE, *_PROXIMAL),
    "uncorrected": (*_STALE, *_PROXIMAL, "--set", "algorithm.correction.weights=none"),
}


def main() -> int:
    """Run the variants, record them and draw the figure; 1 unless what is corrected is near on-policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    is_whole = (chosen.seeds, chosen.variants, chosen.steps) == ([*SEEDS], [*VARIANTS], STEPS)
    runs = _run(chosen.seeds, chosen.variants, chosen.steps)
    result: dict[str, Any] = {
        "steps": chosen.steps,
        "num_prompts": NUM_PROMPTS,
        "runs": {name: [each.figures() for each in of_name] for name, of_name in runs.items()},
        "behind_on_policy": _behind(runs),
    }
    is_met = is_whole and _is_met(result["behind_on_policy"])
    command = " ".join(["python -m benchmarks.staleness", *sys.argv[1:]])
    path = write_record("staleness", command, {"met": is_met, **result})
    if is_whole:
        draw_curves(runs, FIGURE, "Learning from groups four versions old")
    print(f"{result['behind_on_policy']}; recorded in {path}")
    return 0 if is_met else 1


def _run(seeds: list[int], variants: list[str], steps: int) -> dict[str, list[Learned]]:
    runs: dict[str, list[Learned]] = {name: [] for name in variants}
    common = ("--set", f"steps={steps}", "--set", f"evaluation.num_prompts={NUM_PROMPTS}")
    with tempfile.TemporaryDirectory() as store:
        for seed in seeds:
            for name in variants:
                summary = run_preset(store, *common, "--set", f"seed={seed}", *VARIANTS[name])
                runs[name].append(Learned.of(store, summary))
                learned = runs[name][-1]
                print(
                    f"{name}, seed {seed}: {learned.final:.3f}, age {learned.age_mean:.2f}",
                    flush=True,
                )
    return runs


def _behind(runs: dict[str, list[Learned]]) -> dict[str, Any]:
    """By variant, how far it ends behind on-policy with the same seed: mean, and half its 95 % interval."""
    found: dict[str, Any] = {}
    for name in runs.keys() - {"on-policy"} if "on-policy" in runs else ():
        pairs = zip(runs["on-policy"], runs[name], strict=True)
        mean, half = mean_and_interval([ours.final - stale.final for ours, stale in pairs])
        found[name] = {"mean": mean, "half_interval": half}
    return found


def _is_met(behind: dict[str, Any]) -> bool:
    """What is corrected is near on-policy by its whole interval, and what is not is outside of it."""

    def most(name: str) -> float:
        return float(behind[name]["mean"] + behind[name]["half_interval"])

    least = behind["uncorrected"]["mean"] - behind["uncorrected"]["half_interval"]
    return max(most("corrected"), most("decoupled")) <= MOST_BEHIND < least


if __name__ == "__main__":
    sys.exit(main())
