"""What tools mean for the score of a stored episode: which text is scored, and what its calls cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from forge_core.config import RunConfig
from forge_core.tools.base import Toolbox
from forge_core.tools.making import make_toolbox, own_environment
from forge_core.verifiers.panel import Score, Scored

COSTS = "tools"
"""Name under which an episode keeps what its calls cost, among its scores."""
_VERSION = "1"


class ToolScoring:
    """Without tools, nothing is changed."""

    def __init__(self, toolbox: Toolbox | None) -> None:
        self._toolbox = toolbox
        self._has_costs = toolbox is not None and any(tool.cost for tool in toolbox.tools)

    @classmethod
    def of(cls, config: RunConfig) -> ToolScoring:
        """That of a config. Raises what `make_toolbox` raises."""
        return cls(make_toolbox(config, own_environment(config)))

    def shown(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows as those that score see them: of the response, what the policy wrote after the last result."""
        if self._toolbox is None:
            return list(rows)
        return [{**row, "response": self._toolbox.answer(row["response"])} for row in rows]

    def charged(self, rows: Sequence[dict[str, Any]], scored: Sequence[Scored]) -> list[Scored]:
        """The same less the cost of the calls, which is kept as a score of its own."""
        if self._toolbox is None or not self._has_costs:
            return list(scored)
        charged = []
        for row, each in zip(rows, scored, strict=True):
            cost = self._toolbox.costs(turn["role"] for turn in row["turns"])
            score = Score(name=COSTS, value=-cost, version=_VERSION, seconds=0.0)
            charged.append(
                dataclasses.replace(each, reward=each.reward - cost, scores=(*each.scores, score))
            )
        return charged
