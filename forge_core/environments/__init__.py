"""Environments: where prompts come from and how responses are scored.

`load_environment` resolves `environment.name`: a reasoning-gym task, `question_answer` for a file of questions, or
a class of the user's.
"""

from __future__ import annotations

from forge_core.config import EnvironmentConfig
from forge_core.environments import question_answer
from forge_core.environments.base import Environment, Prompt
from forge_core.user_code import load_object

__all__ = ["Environment", "Prompt", "load_environment"]


def load_environment(config: EnvironmentConfig, seed: int) -> Environment:
    """The environment that a config names; `seed` orders its training prompts and nothing else.

    Raises ValueError if the name does not resolve or the parameters or template are not accepted.
    """
    if config.name == question_answer.NAME:
        return question_answer.QuestionAnswerEnvironment(config, seed)
    if ":" not in config.name:
        # Deferred: reasoning-gym takes about a second to import.
        from forge_core.environments.reasoning_gym import ReasoningGymEnvironment

        return ReasoningGymEnvironment(config, seed)
    factory = load_object("environment.name", config.name)
    try:
        environment = factory(config, seed)
    except TypeError as error:
        raise ValueError(
            f"environment.name {config.name!r} cannot be made from a config and a seed: {error}"
        ) from error
    if not isinstance(environment, Environment):
        raise ValueError(
            f"environment.name {config.name!r} is no environment: it needs name, train_prompt(), "
            "test_prompts() and score()"
        )
    return environment
