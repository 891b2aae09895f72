"""Environments: where prompts come from and how responses are scored.

`load_environment` resolves `environment.name`: a reasoning-gym task, `question_answer` for a file of questions,
`mixture` for several of them, or a class of the user's, by its reference or by the name that an installed package has
registered it by.
"""

from __future__ import annotations

from forge_core.config import EnvironmentConfig
from forge_core.config.episodes import MIXTURE
from forge_core.environments import question_answer
from forge_core.environments.base import Environment, Prompt
from forge_core.environments.mixture import MixtureEnvironment
from forge_core.registration import ENVIRONMENTS, environment_class
from forge_core.user_code import load_object

__all__ = ["Environment", "Prompt", "load_environment"]


def load_environment(config: EnvironmentConfig, seed: int) -> Environment:
    """The environment that a config names; `seed` orders its training prompts and nothing else.

    Raises ValueError if the name does not resolve or the parameters or template are not accepted.
    """
    if config.name == MIXTURE:
        tasks = {name: _load_task(config, name, seed) for name in config.tasks}
        return MixtureEnvironment(config, seed, tasks)
    reference = environment_class("environment.name", config.name)
    if config.curriculum.levels:
        if reference is not None or config.name == question_answer.NAME:
            raise ValueError(
                f"environment.curriculum lays parameters of reasoning-gym over each other, and {config.name!r} is none "
                "of its tasks: leave it out"
            )
        # Deferred: reasoning-gym takes about a second to import.
        from forge_core.environments.curriculum import CurriculumEnvironment

        return CurriculumEnvironment(config, seed)
    if reference is None:
        if config.name == question_answer.NAME:
            return question_answer.QuestionAnswerEnvironment(config, seed)
        # Deferred, as above.
        from forge_core.environments.reasoning_gym import ReasoningGymEnvironment

        return ReasoningGymEnvironment(config, seed)
    if ":" not in config.name:
        _check_free(config.name, reference)
    factory = load_object("environment.name", reference)
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


def _load_task(config: EnvironmentConfig, name: str, seed: int) -> Environment:
    try:
        task = load_environment(config.of_task(name), seed)
        for what in ("tools", "generate_episode"):
            if hasattr(task, what):
                raise ValueError(
                    f"environment.name {config.of_task(name).name!r} has {what} of its own, which in a mixture count "
                    "for no prompt: name the tools in the config, or take the class by itself"
                )
        return task
    except ValueError as error:
        told = str(error).replace("environment.", f"environment.tasks.{name}.", 1)
        raise ValueError(told) from error


def _check_free(name: str, reference: str) -> None:
    """Refuse a registered name that something else has as well: which is meant nobody could tell."""
    # Deferred, as above.
    from reasoning_gym.factory import DATASETS

    if name in (question_answer.NAME, MIXTURE) or name in DATASETS:
        raise ValueError(
            f"environment.name {name!r} is built in, and an installed package has registered {reference} by it in "
            f"{ENVIRONMENTS}: write {reference!r} if you mean that one, or take the package away"
        )
