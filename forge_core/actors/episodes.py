"""Which function makes a run's episodes: one of the user's, one with tools, or one question and one answer."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from forge_core.config import RunConfig
from forge_core.environments import Prompt
from forge_core.rollout import (
    Episode,
    Policy,
    custom_generate_episode,
    generate_episode,
    own_episode,
)
from forge_core.tools import tool_episode
from forge_core.tools.making import make_toolbox, own_environment

EpisodeMaker = Callable[..., Awaitable[Episode]]
"""`async (policy, prompt, *, seed) -> Episode`."""


def episode_maker(config: RunConfig) -> EpisodeMaker:
    """That of a config: its `generate_episode`, the environment's, one with the run's tools, or one turn.

    Raises ValueError if code of the user's does not resolve, or is something else than is due.
    """
    seconds = config.timeouts.episode_seconds
    if config.generate_episode is not None:
        custom = custom_generate_episode(config.generate_episode, timeout_seconds=seconds)
        return _of_text(custom)
    environment = own_environment(config)
    if (function := getattr(environment, "generate_episode", None)) is not None:
        return _of_environment(config.environment.name, function, seconds)
    if (toolbox := make_toolbox(config, environment)) is None:
        return _of_text(generate_episode)

    async def with_tools(policy: Policy, prompt: Prompt, *, seed: int) -> Episode:
        return await tool_episode(policy, prompt.text, seed=seed, toolbox=toolbox)

    return with_tools


def _of_text(function: Callable[..., Awaitable[Episode]]) -> EpisodeMaker:
    async def make(policy: Policy, prompt: Prompt, *, seed: int) -> Episode:
        return await function(policy, prompt.text, seed=seed)

    return make


def _of_environment(name: str, function: Any, seconds: float) -> EpisodeMaker:
    if not inspect.iscoroutinefunction(function):
        raise ValueError(
            f"environment.name {name!r} has a generate_episode that is not async: write `async def "
            "generate_episode(self, policy, prompt, *, seed)`"
        )

    async def make(policy: Policy, prompt: Prompt, *, seed: int) -> Episode:
        return await own_episode(
            f"generate_episode of environment {name!r}",
            function(policy, prompt, seed=seed),
            prompt.text,
            timeout_seconds=seconds,
        )

    return make
