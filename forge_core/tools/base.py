"""What a tool is, and the tools of a run: how calls and results look in an episode's text."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from forge_core.config.tools import EpisodeConfig

ToolFunction = Callable[[str], str | Awaitable[str]]
"""From the text of a call to its result."""


class ToolError(Exception):
    """The call was no good: the policy is told why, as the call's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool."""

    name: str
    """Who speaks in the turns that hold its results."""
    run: ToolFunction
    """Takes what stands between the marks of a call and gives the result. Raises ToolError with a sentence for the
    policy, OSError for what was the machine's fault and is tried again; anything else ends the run."""
    opens: str
    """What begins a call."""
    closes: str
    """What ends it."""
    cost: float = 0.0
    """Taken off the reward for each call."""
    seconds: float = 20.0
    """Longest time of a call."""
    is_quick: bool = False
    """Whether it is called without a thread of its own: it takes no time worth the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """All tools of a run."""

    tools: tuple[Tool, ...]
    """At least one; the marks that open their calls are all different."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Budgets, and the marks of results."""

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a turn: each mark that closes a call."""
        return tuple(dict.fromkeys(tool.closes for tool in self.tools))

    def find_call(self, text: str, stopped_at: str) -> tuple[Tool, str]:
        """The tool that a turn calls, and with what: the call that was opened last before the turn stopped.

        Raises ToolError if none that ends so was opened.
        """
        before = text.rpartition(stopped_at)[0]
        opened = [
            (before.rfind(tool.opens), tool) for tool in self.tools if tool.closes == stopped_at
        ]
        start, tool = max(opened, key=lambda pair: pair[0])
        if start < 0:
            raise ToolError(f"no call was opened that {stopped_at} could close")
        return tool, before[start + len(tool.opens) :]

    def quoted(self, result: str) -> str:
        """A result between its marks; the closing one is taken out of it, so that it tells where results end."""
        closes = self.episode.result_closes
        while closes in result:
            result = result.replace(closes, "")
        return f"{self.episode.result_opens}{result}{closes}"

    def answer(self, response: str) -> str:
        """What is scored of a response: what the policy wrote after the last result."""
        return response.rpartition(self.episode.result_closes)[2]

    def costs(self, roles: Iterable[str]) -> float:
        """What the calls of an episode cost, by the roles of its turns."""
        of_tool = {tool.name: tool.cost for tool in self.tools}
        return math.fsum(of_tool.get(role, 0.0) for role in roles)

    def split(self, text: str) -> list[tuple[bool, str]]:
        """A right answer that shows calls, in pieces: whether the policy is to write it, and the text.

        Results are what stands between a call's end and the next mark that closes a result.
        """
        closes = "|".join(re.escape(stop) for stop in sorted(self.stops, key=len, reverse=True))
        opens, ends = map(re.escape, (self.episode.result_opens, self.episode.result_closes))
        pieces: list[tuple[bool, str]] = []
        start = 0
        for found in re.finditer(f"(?:{closes})({opens}.*?{ends})", text, flags=re.DOTALL):
            pieces += [(True, text[start : found.start(1)]), (False, found[1])]
            start = found.end()
        return [piece for piece in [*pieces, (True, text[start:])] if piece[1]]
