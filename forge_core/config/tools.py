"""Tools that the policy may call, and what an episode with them may use."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from forge_core.config.base import Section


class ToolConfig(Section):
    """One tool."""

    kind: Literal["calculator", "python", "function"]
    """`calculator` for arithmetic; `python` for programs, in the sandbox; `function` for one of your own."""
    reference: str | None = None
    """The function, `(text) -> str`, as `path/file.py:name` or `module:name`; for kind `function`, and only there."""
    opens: str | None = None
    """What begins a call; none: `<name>`."""
    closes: str | None = None
    """What ends a call, and with it the policy's turn; none: `</name>`."""
    cost: float = Field(0.0, ge=0.0)
    """Taken off the reward for each call."""
    seconds: float = Field(20.0, gt=0.0)
    """Longest time of a call: a program that takes longer is ended and the policy told so; a function that does ends
    the run."""
    cpu_seconds: float = Field(5.0, gt=0.0)
    """Processor time of a program; for kind `python`."""
    memory_mib: int = Field(512, ge=64)
    """Memory of a program, in MiB; for kind `python`."""

    @model_validator(mode="after")
    def _has_a_function(self) -> ToolConfig:
        if (self.kind == "function") != (self.reference is not None):
            mend = (
                "name it as path/file.py:name"
                if self.kind == "function"
                else "leave it out, or set kind to function"
            )
            raise ValueError(f"reference {self.reference!r} does not go with {self.kind}: {mend}")
        for field in ("opens", "closes"):
            if getattr(self, field) == "":
                raise ValueError(f"{field} '' marks nothing: give a text, or leave it out")
        return self


class EpisodeConfig(Section):
    """What an episode with tools may use, and how results look in it. Without tools none of it counts."""

    max_turns: int = Field(4, ge=1)
    """Most turns of the policy; the call at the end of the last one is not answered."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Longest response of all turns and results together, in tokens; none: what the context has room for. One turn has
    at most `sampling.max_tokens`."""
    max_result_tokens: int = Field(256, ge=1)
    """Longest result of a call, in tokens, without its marks; what is longer is cut, and ends in `...`."""
    result_opens: str = "<result>"
    """What begins a tool's result."""
    result_closes: str = "</result>"
    """What ends it. It stands nowhere else in a result: what comes after the last one is the answer that is scored."""

    @model_validator(mode="after")
    def _marks_results(self) -> EpisodeConfig:
        if not self.result_closes:
            raise ValueError("result_closes '' marks nothing: give a text, or leave it out")
        return self


def check_tools(tools: dict[str, ToolConfig]) -> None:
    """Raise ValueError, whose sentence begins with the field, unless calls can be told apart."""
    for name in tools:
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ValueError(f"tools.{name}: name it with letters, digits, underscores and hyphens")
        if name == "policy":
            raise ValueError(
                "tools.policy: so the policy's own turns are called; give it another name"
            )
    opens = Counter(tool.opens or f"<{name}>" for name, tool in tools.items())
    mark, number = opens.most_common(1)[0] if opens else ("", 0)
    if number > 1:
        raise ValueError(f"tools: {number} of them have opens {mark!r}; give each its own")
