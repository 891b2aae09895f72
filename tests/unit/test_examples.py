"""What stands under examples/ works as its docstring says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forge_core.environments import load_environment
from forge_core.settings import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_task_is_an_environment_that_splits_and_scores() -> None:
    name = f"environment.name={EXAMPLES / 'own_task.py'}:LargestDigit"
    config = load_config(preset="tiny", file=None, overrides=[name])
    environment = load_environment(config.environment, seed=1)
    held_out = environment.test_prompts(300)
    assert len({prompt.text for prompt in held_out}) == 300
    trained = [environment.train_prompt(ordinal) for ordinal in range(300)]
    assert not {prompt.text for prompt in trained} & {prompt.text for prompt in held_out}
    assert trained[7] == load_environment(config.environment, seed=1).train_prompt(7)
    assert trained[7] != load_environment(config.environment, seed=2).train_prompt(7)
    for prompt in trained:
        assert environment.score(prompt, prompt.target) == 1.0
        assert environment.score(prompt, str(int(prompt.answer) - 1)) == 0.0


@pytest.mark.parametrize("name", ["own_loop.py", "own_reward_and_loss.py"])
def test_examples_are_short_and_touch_no_private_name(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < 60
    private = re.compile(r"(?<![A-Za-z0-9_])_[a-z]\w*")
    code = [line for line in text.splitlines() if "__future__" not in line]
    assert not [found for line in code for found in private.findall(line)]
    modules = re.findall(r"^\s*from ([\w.]+) import", text, flags=re.MULTILINE)
    assert {
        m for m in modules if m.split(".")[0] in ("flows", "tasks", "forge_core", "storage")
    } <= {
        "flows",
        "flows.loop",
    }
