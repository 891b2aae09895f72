"""An algorithm of your own: expert iteration (Anthony et al. 2017), which imitates the answers that were right.

    python examples/own_loop.py

Each round samples answers, keeps the shortest right one of every prompt, and learns it as if it had been taught.
Arguments are further overrides, such as `steps=8`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from flows import run

if TYPE_CHECKING:
    from torch import Tensor

    from flows.loop import Loop, ScoredEpisode


def imitate(logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Supervised: the negative logprob of every token of an answer that was kept."""
    return -advantages[:, None] * logprobs


def best_answers(episodes: list[ScoredEpisode]) -> dict[str, float]:
    """Weight 1 for one right answer of each prompt that has any."""
    best: dict[str, ScoredEpisode] = {}
    for episode in episodes:
        if episode.reward == 1.0:
            known = best.setdefault(episode.group_id, episode)
            if len(episode.response) < len(known.response):
                best[episode.group_id] = episode
    return {episode.episode_id: 1.0 for episode in best.values()}


async def expert_iteration(loop: Loop) -> None:
    """What takes the regime's place."""
    for _ in range(loop.config.steps):
        episodes = await loop.collect()
        await loop.train(best_answers(episodes))
        await loop.publish()


if __name__ == "__main__":
    summary = run(
        preset="tiny",
        loss=imitate,
        loop=expert_iteration,
        overrides=["steps=24", *sys.argv[1:]],
    )
    print(f"score {summary['eval']['initial']:.3f} -> {summary['eval']['final']:.3f}")
