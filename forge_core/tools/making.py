"""From a config, and an environment of the user's, to their tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_core.config import RunConfig
from forge_core.config.tools import ToolConfig
from forge_core.environments import Environment, load_environment
from forge_core.tools.base import Tool, Toolbox
from forge_core.tools.calculator import calculate
from forge_core.tools.python import python_tool
from forge_core.user_code import load_object

_SANDBOX_SECONDS = 60.0
"""What the sandbox takes at most beside its program: it ends that itself."""


def own_environment(config: RunConfig) -> Environment | None:
    """The config's environment if it is a class of the user's, which may have tools or episodes of its own."""
    if "environment.name" not in config.user_code():
        return None
    return load_environment(config.environment, config.seed)


def make_toolbox(config: RunConfig, environment: Environment | None) -> Toolbox | None:
    """The tools of a config and of an environment of the user's; None if there are none.

    An environment has them as `tools`, by their names: functions of one text, or `Tool`s. Raises ValueError for
    something else, and for a name or a mark that two of them have.
    """
    of_config = [_configured(name, each) for name, each in config.tools.items()]
    given: Any = getattr(environment, "tools", {})
    if not isinstance(given, Mapping):
        raise ValueError(
            f"environment.name {config.environment.name!r} has tools that are a {type(given).__name__}: make them a "
            "dict of functions by their names"
        )
    tools = (*of_config, *(_given(config, name, each) for name, each in given.items()))
    for what in ("name", "opens"):
        values = [getattr(tool, what) for tool in tools]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(
                f"tools {', '.join(tool.name for tool in tools)}: two of them have the {what} {twice[0]!r}; give each "
                "its own"
            )
    return Toolbox(tools=tools, episode=config.episode) if tools else None


def _configured(name: str, config: ToolConfig) -> Tool:
    seconds = config.seconds
    run: Any = calculate
    if config.kind == "python":
        run = python_tool(
            seconds=seconds,
            cpu_seconds=config.cpu_seconds,
            memory_bytes=config.memory_mib * 2**20,
        )
        seconds += _SANDBOX_SECONDS
    elif config.reference is not None:
        run = load_object(f"tools.{name}.reference", config.reference)
    return Tool(
        name=name,
        run=run,
        opens=config.opens or f"<{name}>",
        closes=config.closes or f"</{name}>",
        cost=config.cost,
        seconds=seconds,
        is_quick=config.kind == "calculator",
    )


def _given(config: RunConfig, name: Any, given: Any) -> Tool:
    if isinstance(given, Tool):
        return given
    if not isinstance(name, str) or not name or name == "policy" or not callable(given):
        raise ValueError(
            f"environment.name {config.environment.name!r} has the tool {name!r}: {given!r}; give functions by names "
            "other than policy"
        )
    return Tool(name=name, run=given, opens=f"<{name}>", closes=f"</{name}>")
