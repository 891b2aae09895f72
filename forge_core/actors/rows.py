"""Episodes as rows of the table that is stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from forge_core.actors.messages import DrawnPrompt
from forge_core.rollout import Episode
from storage import layout


def group_rows(
    run_id: str,
    drawn: DrawnPrompt,
    episodes: Sequence[Episode],
    *,
    attempt: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A group's unscored rows, sample by sample; `seconds` is what generating them took.

    `attempt` counts those of the request that the group was part of.
    """
    now = datetime.now(UTC)
    prompt = drawn.prompt
    return [
        {
            "episode_id": layout.episode_id(drawn.group_id, sample),
            "run_id": run_id,
            "group_id": drawn.group_id,
            "draw": drawn.draw,
            "sample": sample,
            "environment": prompt.environment,
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "answer": prompt.answer,
            "metadata": json.dumps({"index": prompt.index, **prompt.metadata}, sort_keys=True),
            "response": episode.response,
            "prompt_token_ids": episode.prompt_token_ids,
            "response_token_ids": episode.response_token_ids,
            "logprobs": episode.logprobs,
            "mask": episode.mask,
            "token_policy_versions": episode.token_policy_versions,
            "turns": [{"role": t.role, "start": t.start, "end": t.end} for t in episode.turns],
            "finish_reason": episode.finish_reason,
            "reward": None,
            "scores": None,
            "scored_by": None,
            "seed": episode.seed,
            "attempts": drawn.attempt + attempt - 1,
            "generate_seconds": seconds,
            "created_at": now,
        }
        for sample, episode in enumerate(episodes)
    ]
