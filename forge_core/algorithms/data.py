"""A step's episodes, read from the store and made into sequences with advantages.

Shapes: N groups, G samples a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from forge_core.actors.messages import TrainRequest
from forge_core.algorithms.advantages import estimated_advantages, overlong_penalty
from forge_core.algorithms.batch import Sequence
from forge_core.algorithms.metrics import Mean, Metrics
from forge_core.config import RunConfig
from storage.annotations import read_scores
from storage.layout import RUN_SCORES
from storage.objects import ObjectStore
from storage.parts import read_committed
from storage.records import Commit, read_record

_COLUMNS = [
    "episode_id",
    "run_id",
    "group_id",
    "sample",
    "prompt_token_ids",
    "response_token_ids",
    "logprobs",
    "mask",
    "token_policy_versions",
    "reward",
    "finish_reason",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's episodes in the order of its groups."""

    sequences: list[Sequence]
    """With advantages."""
    age_max: int | None
    """Largest age of a group, in versions; 0 for an empty batch, None for groups of other runs."""
    age_mean: float | None
    """Mean age over groups; None for groups of other runs."""
    metrics: dict[str, float]
    """What the episodes say without a model."""


def load_batch(store: ObjectStore, request: TrainRequest, config: RunConfig) -> Batch:
    """Read the groups of a request from their commits.

    Raises ValueError if a group is missing, has another number of samples than the first, or lacks a score.
    """
    groups = _read_groups(store, request)
    if not groups:
        return Batch(sequences=[], age_max=0, age_mean=0.0, metrics={})
    rewards_NG = torch.tensor([[row["reward"] for row in group] for group in groups]).double()
    advantages_NG, told = _advantages(request, groups, rewards_NG, config)
    if request.weights is not None:
        # The losses are linear in positive multiples of the advantage, so that this weighs a group's share of them.
        advantages_NG = (
            advantages_NG * torch.tensor(request.weights, dtype=advantages_NG.dtype)[:, None]
        )
    sequences = [
        Sequence(
            token_ids=row["prompt_token_ids"] + row["response_token_ids"],
            num_prompt_tokens=len(row["prompt_token_ids"]),
            mask=row["mask"],
            sampled_logprobs=row["logprobs"],
            advantage=float(advantages_NG[n, g]),
        )
        for n, group in enumerate(groups)
        for g, row in enumerate(group)
    ]
    age_max, age_mean = _ages(request, groups)
    return Batch(
        sequences=sequences,
        age_max=age_max,
        age_mean=age_mean,
        metrics={**_episode_metrics(groups, rewards_NG), **_figures(told)},
    )


def _advantages(
    request: TrainRequest,
    groups: list[list[dict[str, Any]]],
    rewards_NG: torch.Tensor,
    config: RunConfig,
) -> tuple[torch.Tensor, Metrics]:
    """Those of a loop of the user's, or the algorithm's of rewards less what overlong responses lose."""
    if request.advantages is not None:
        given = dict(request.advantages)
        chosen = [[given.get(row["episode_id"], 0.0) for row in group] for group in groups]
        return torch.tensor(chosen), {}
    lost_NG, penalised = overlong_penalty(
        torch.tensor([[len(row["response_token_ids"]) for row in group] for group in groups]),
        max_tokens=config.sampling.max_tokens,
        overlong_tokens=config.algorithm.overlong_tokens,
        penalty=config.algorithm.overlong_penalty,
    )
    advantages_NG, told = estimated_advantages(rewards_NG + lost_NG, config.algorithm)
    return advantages_NG, {**penalised, **told}


def _figures(metrics: Metrics) -> dict[str, float]:
    """Every rank has read the whole batch, so that its means are the step's."""
    means = {name: metric for name, metric in metrics.items() if isinstance(metric, Mean)}
    return {name: mean.total / mean.count for name, mean in means.items()}


def _read_groups(store: ObjectStore, request: TrainRequest) -> list[list[dict[str, Any]]]:
    """The rows of each group of a request, by sample."""
    commits = [read_record(store, key, Commit) for key in request.commits]
    rows = read_committed(
        store, request.run_id, columns=_COLUMNS, commits=commits, group_ids=request.group_ids
    ).to_pylist()
    if len({*request.commits}) < len(request.commits) or len({*request.group_ids}) < len(
        request.group_ids
    ):
        raise ValueError(f"step {request.step}: a commit or group is named twice")
    by_group: dict[str, list[dict[str, Any]]] = {group_id: [] for group_id in request.group_ids}
    if request.score_set != RUN_SCORES:
        _score(store, request, commits, rows)
    for row in rows:
        by_group[row["group_id"]].append(row)
    groups = [sorted(group, key=lambda row: row["sample"]) for group in by_group.values()]
    sizes = {len(group) for group in groups}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"step {request.step}: its groups have {sorted(sizes)} samples")
    return groups


def _score(
    store: ObjectStore, request: TrainRequest, commits: list[Commit], rows: list[dict[str, Any]]
) -> None:
    """Put the scores of a set in the place of the rewards."""
    scores: dict[str, float] = {}
    for commit in commits:
        scores.update(read_scores(store, commit, request.score_set))
    for row in rows:
        if row["episode_id"] not in scores:
            raise ValueError(
                f"step {request.step}: scores {request.score_set!r} lack episode {row['episode_id']} of group "
                f"{row['group_id']}"
            )
        row["reward"] = scores[row["episode_id"]]


def _ages(
    request: TrainRequest, groups: list[list[dict[str, Any]]]
) -> tuple[int | None, float | None]:
    """Largest and mean age. The versions of another run's tokens say nothing about this one's, unless it collects."""
    if not request.is_collected and any(
        row["run_id"] != request.run_id for group in groups for row in group
    ):
        return None, None
    ages = [request.step - 1 - min(_oldest(row) for row in group) for group in groups]
    return max(ages), sum(ages) / len(ages)


def _oldest(row: dict[str, Any]) -> int:
    versions = zip(row["token_policy_versions"], row["mask"], strict=True)
    return min(version for version, is_ours in versions if is_ours)


def _episode_metrics(
    groups: list[list[dict[str, Any]]], rewards_NG: torch.Tensor
) -> dict[str, float]:
    rows = [row for group in groups for row in group]
    lengths = [len(row["response_token_ids"]) for row in rows]
    truncated = sum(row["finish_reason"] == "length" for row in rows)
    ended = [len(row["response_token_ids"]) for row in rows if row["finish_reason"] != "length"]
    terminated = (
        {
            "completions/mean_terminated_length": sum(ended) / len(ended),
            "completions/min_terminated_length": float(min(ended)),
            "completions/max_terminated_length": float(max(ended)),
        }
        if ended
        else {}
    )
    return {
        "num_tokens": float(sum(lengths) + sum(len(row["prompt_token_ids"]) for row in rows)),
        **terminated,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": truncated / len(rows),
        "trained_reward": float(rewards_NG.mean()),
        "trained_reward_std": float(rewards_NG.std(dim=1).mean()),
    }
