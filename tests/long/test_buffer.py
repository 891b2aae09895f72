"""A run that learns from data of one's own first, and then from fresh groups and replayed ones, on the real stack."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from harness import Start, assert_verified

MIXTURE = {
    "new": {"policy": "fresh", "fraction": 0.5},
    "success": {"policy": "fifo", "fraction": 0.25, "min_reward": 0.25},
    "hard": {"policy": "prioritised", "fraction": 0.25},
}


def _pairs(folder: Path) -> Path:
    """Numbers to sort as the tiny preset asks for them, with their answers."""
    draw = random.Random(0)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(3000):
            digits, direction = draw.choices(range(10), k=4), draw.choice("ad")
            ordered = sorted(digits, reverse=direction == "d")
            row = {
                "prompt": "".join(map(str, digits)) + f"{direction}=",
                "completion": "[" + ",".join(map(str, ordered)) + "]",
            }
            file.write(json.dumps(row) + "\n")
    return path


def test_data_of_ones_own_and_then_a_mixture(start_run: Start, tmp_path: Path) -> None:
    finished = start_run(
        "mixed",
        "--preset=tiny",
        "--regime=async",
        *(
            f"--set={each}"
            for each in (
                "steps=4",
                "groups_per_step=16",
                "warm_start.steps=40",
                "warm_start.validate_every=20",
                f"warm_start.data={_pairs(tmp_path)}",
                "warm_start.validation_fraction=0.1",
                "evaluation.num_prompts=20",
                "buffer.policy=hybrid",
                "buffer.max_uses=2",
                f"buffer.sources={json.dumps(MIXTURE)}",
            )
        ),
    )()
    assert finished.code == 0, finished.errors
    (warm,) = finished.facts("warm_started")
    losses = {each["step"]: each["loss"] for each in warm["validations"]}
    assert list(losses) == [0, 20, 40]
    assert losses[warm["best_step"]] == min(losses.values()) < losses[0] - 1.0
    batches = finished.facts("batched")
    assert [len(batch["group_ids"]) for batch in batches] == [len(b["uses"]) for b in batches]
    sources = Counter(use["source"] for batch in batches for use in batch["uses"])
    assert sources["fresh"] > 0 and sources["success"] > 0 and sources["hard"] > 0
    weights = [use["weight"] for batch in batches for use in batch["uses"]]
    assert min(weights) < 1.0 == max(weights)
    uses = Counter(group for step in finished.facts("step") for group in step["group_ids"])
    assert max(uses.values()) == 2
    groups = finished.summary["groups"]
    assert groups["reused"] == sum(count == 2 for count in uses.values()) > 0
    assert groups["pending"] == 0
    assert finished.summary["age"]["max"] <= 2
    steps = finished.facts("step")
    assert steps[-1]["metrics"]["buffer/frac_reused"] > 0.0
    assert_verified("mixed", Path(finished.store))
