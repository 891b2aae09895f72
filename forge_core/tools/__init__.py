"""Tools that a policy calls in the middle of an episode.

base        what a tool is, and all tools of a run
calculator  arithmetic
python      programs, in the sandbox
episode     an episode of several turns, with its budgets
making      from a config and an environment to their tools
"""

from __future__ import annotations

from forge_core.tools.base import Tool, Toolbox, ToolError
from forge_core.tools.episode import tool_episode

__all__ = ["Tool", "ToolError", "Toolbox", "tool_episode"]
