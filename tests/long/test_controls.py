"""Controls: what must not learn does not, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import Finished, Start

CONSTANT = """
from forge_core.environments.reasoning_gym import ReasoningGymEnvironment

class Constant(ReasoningGymEnvironment):
    def __init__(self, config, seed):
        task = {"name": "number_sorting", "prompt_template": "{original_numbers:,}="}
        super().__init__(config.model_copy(update=task), seed)

    def score(self, prompt, response):
        return 0.5
"""

SMALL = [
    "--preset", "tiny", "--set", "warm_start.steps=6", "--set", "warm_start.batch_size=32",
    "--set", "evaluation.num_prompts=40",
    "--set", "groups_per_step=8", "--set", "trainer.ranks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def controls(
    start_run: Start,
    llama_started: Callable[[], Finished],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Callable[[], Finished]]:
    """All at once, and beside the other model's run: much of a start is one process waiting for another."""
    user_code = tmp_path_factory.mktemp("user") / "constant.py"
    user_code.write_text(CONSTANT)
    # A task with partial scores, so that a model that knows little has signal all the same.
    partial = ["--set", "environment.name=spell_backward"]
    return {
        "frozen": start_run(
            "frozen", *SMALL, *partial, "--set", "steps=2", "--set", "optimizer.learning_rate=0.0"
        ),
        "constant": start_run(
            "constant",
            *SMALL,
            "--set",
            "steps=2",
            "--set",
            f"environment.name={user_code}:Constant",
        ),
        "no-steps": start_run("no-steps", *SMALL, *partial, "--set", "steps=0"),
    }


def _digests(run: Finished) -> list[str]:
    return [fact["weights_digest"] for fact in run.facts("published")]


def test_another_task_by_its_name_alone(controls: dict[str, Callable[[], Finished]]) -> None:
    """Its groups are trained on, not dropped."""
    run = controls["frozen"]()
    assert run.code == 0, run.errors
    assert run.summary["groups"]["trained"] > run.summary["groups"]["admitted"] / 2
    drawn = [draw["environment"] for fact in run.facts("admitted") for draw in fact["draws"]]
    assert set(drawn) == {"spell_backward"}


def test_learning_rate_zero_leaves_the_weights_equal(
    controls: dict[str, Callable[[], Finished]],
) -> None:
    run = controls["frozen"]()
    assert run.code == 0, run.errors
    assert run.summary["groups"]["trained"] > 0
    assert run.summary["optimizer_updates"] >= 2
    assert len(_digests(run)) == 3
    assert len(set(_digests(run))) == 1
    assert run.summary["eval"]["final"] == run.summary["eval"]["initial"]


def test_a_constant_reward_trains_on_nothing(controls: dict[str, Callable[[], Finished]]) -> None:
    run = controls["constant"]()
    assert run.code == 0, run.errors
    assert run.summary["groups"]["trained"] == 0
    assert run.summary["groups"]["dropped"] == {"no_signal": 16}
    assert run.summary["optimizer_updates"] == 0
    assert len(set(_digests(run))) == 1
    assert run.summary["eval"]["initial"] == run.summary["eval"]["final"] == 0.5


def test_no_steps_change_nothing(controls: dict[str, Callable[[], Finished]]) -> None:
    run = controls["no-steps"]()
    assert run.code == 0, run.errors
    evaluation = run.summary["eval"]
    assert run.summary["steps"] == 0
    assert evaluation["final"] == evaluation["initial"] > 0
    assert evaluation["greedy_final"] == evaluation["greedy_initial"]
