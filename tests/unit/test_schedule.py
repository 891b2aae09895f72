"""Learning rates by step."""

from typing import Any

import pytest

from forge_core.algorithms.schedule import learning_rate
from forge_core.config import OptimizerConfig


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # Of 9 steps with 2 of warm-up, at a peak of 0.8: hand-computed with cos(pi/4) = sqrt(1/2) and cos(pi/2) = 0.
        ({"schedule": "constant"}, {1: 0.4, 2: 0.8, 5: 0.8, 9: 0.8, 30: 0.8}),
        (
            {"schedule": "linear", "final_learning_rate_fraction": 0.2},
            {1: 0.4, 2: 0.8 * 0.9, 3: 0.8 * 0.8, 5: 0.8 * 0.6, 9: 0.16, 30: 0.16},
        ),
        (
            {"schedule": "cosine", "final_learning_rate_fraction": 0.0},
            {1: 0.4, 3: 0.4 * (1 + 0.5**0.5), 5: 0.4, 7: 0.4 * (1 - 0.5**0.5), 9: 0.0, 30: 0.0},
        ),
        (
            {"schedule": "cosine", "final_learning_rate_fraction": 0.5},
            {1: 0.4, 3: 0.4 + 0.2 * (1 + 0.5**0.5), 5: 0.6, 9: 0.4},
        ),
    ],
)
def test_schedules_are_those_computed_by_hand(
    schedule: dict[str, Any], rates: dict[int, float]
) -> None:
    settings = OptimizerConfig.model_validate({"learning_rate": 0.8, "warmup_steps": 2, **schedule})
    found = {step: learning_rate(settings, step, 9) for step in rates}
    assert found == pytest.approx(rates, abs=1e-15)
    assert learning_rate(settings.model_copy(update={"warmup_steps": 0}), 1, 1) == 0.8


def test_without_a_word_the_rate_is_constant_to_the_bit() -> None:
    settings = OptimizerConfig(warmup_steps=0)
    assert {learning_rate(settings, step, 7) for step in range(1, 9)} == {settings.learning_rate}


def test_a_schedule_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule is 'constant': set schedule to 'linear'"):
        OptimizerConfig(schedule="constant", final_learning_rate_fraction=0.5)
    with pytest.raises(ValueError, match="'cosine' falls nowhere"):
        OptimizerConfig(schedule="cosine")
