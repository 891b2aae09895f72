"""Environments and verifiers of installed packages, by the names that they are registered by."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.preflight import preflight
from forge_core.config import EnvironmentConfig, RunConfig
from forge_core.environments import Prompt, load_environment
from forge_core.registration import ENVIRONMENTS, registered_names
from forge_core.scorers import resolve_scorer
from forge_core.settings import load_config
from forge_core.verifiers import Response, make_panel
from storage.objects import LocalStore

MODULE = """
from forge_core.environments.base import Prompt, prompt_id

class Echo:
    name = "echo"

    def __init__(self, config, seed):
        self.word = config.params.get("word", "yes")

    def _prompt(self, number):
        text = f"say {self.word} {number}"
        return Prompt(prompt_id=prompt_id("echo", text, self.word), text=text, answer=self.word, target=self.word,
                      index=number, environment="echo", metadata={})

    def train_prompt(self, ordinal):
        return self._prompt(2 * ordinal)

    def test_prompts(self, num_prompts):
        return [self._prompt(2 * n + 1) for n in range(num_prompts)]

    def score(self, prompt, response):
        return float(response == prompt.answer)

def is_short(prompts, completions, **columns):
    return [float(len(text) < 4) for text in completions]
"""


def install(folder: Path, name: str, entry_points: str) -> None:
    """A distribution, as an installer leaves it: its metadata, and one module."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / f"{name}.py").write_text(MODULE)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(
        tmp_path / "site",
        "echo_package",
        "[forgeflow.environments]\necho = echo_package:Echo\nchain_sum = echo_package:Echo\n"
        "[forgeflow.verifiers]\nis_short = echo_package:is_short\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    # Another test's, at another place.
    monkeypatch.delitem(sys.modules, "echo_package", raising=False)
    # For the processes of functions.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    return tmp_path / "site"


def scores(config: dict[str, Any], prompt: Prompt, *texts: str) -> list[tuple[float, str]]:
    """Rewards, and the version of what scored first."""
    judge = make_panel(RunConfig.model_validate(config))
    try:
        given = judge(prompt, [Response(text=t, token_ids=()) for t in texts], policy_version=0)
    finally:
        judge.close()
    return [(each.reward, each.scores[0].version) for each in given]


def test_an_environment_is_found_by_its_name(installed: Path, tmp_path: Path) -> None:
    assert "echo" in registered_names(ENVIRONMENTS)
    section = {"name": "echo", "params": {"word": "no"}}
    environment = load_environment(EnvironmentConfig.model_validate(section), 0)
    prompt = environment.train_prompt(3)
    assert prompt.text == "say no 6"
    (right, version), (wrong, _) = scores({"environment": section}, prompt, "no", "yes")
    assert (right, wrong) == (1.0, 0.0) and version.startswith("sha256")
    # As a run's beginning sees it; the file is kept with the run.
    config = load_config(preset="tiny", file=None, overrides=["environment.name=echo"])
    assert config.user_code() == {"environment.name": "echo_package:Echo"}
    preflight(config, str(tmp_path / "store"))


def test_a_function_is_found_by_its_name_as_reward_and_as_verifier(installed: Path) -> None:
    prompt = load_environment(EnvironmentConfig(name="echo"), 0).train_prompt(0)
    verifiers = {"short": {"kind": "function", "params": {"reference": "is_short"}}}
    for config in ({"reward": "is_short"}, {"verifiers": verifiers}):
        assert [reward for reward, _ in scores(config, prompt, "yes", "maybe")] == [1.0, 0.0]
        assert list(RunConfig.model_validate(config).user_code().values()) == [
            "echo_package:is_short"
        ]


def test_a_stored_run_is_rescored_by_name(installed: Path, tmp_path: Path) -> None:
    scorer = resolve_scorer("is_short", RunConfig(), LocalStore(tmp_path))
    assert scorer.config.reward == "echo_package:is_short"
    assert scorer.source == installed / "echo_package.py"
    assert resolve_scorer("echo", RunConfig(), LocalStore(tmp_path)).name == "echo"


def test_names_that_are_not_clear_are_refused(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"'chain_sum' is built in, and .* echo_package:Echo"):
        load_environment(EnvironmentConfig(name="chain_sum"), 0)
    install(
        tmp_path / "more", "other_package", "[forgeflow.environments]\necho = other_package:Echo\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"'echo' is registered twice .*other_package:Echo by"):
        load_environment(EnvironmentConfig(name="echo"), 0)
    with pytest.raises(ValueError, match=r"'ecco' is no task .* the nearest are .*echo"):
        load_environment(EnvironmentConfig(name="ecco"), 0)
    with pytest.raises(ValueError, match=r"reward 'short' is neither .* register is_short in"):
        RunConfig.model_validate({"reward": "short"}).user_code()
