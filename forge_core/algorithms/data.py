"""A step's episodes, read from the store and made into sequences with advantages.

Shapes: N groups, G samples a group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from forge_core.actors.messages import TrainRequest
from forge_core.algorithms.advantages import estimated_advantages, overlong_penalty
from forge_core.algorithms.batch import Figure, Sequence
from forge_core.algorithms.divergence import lost_rewards
from forge_core.algorithms.estimates import read_estimates
from forge_core.algorithms.gae import final_rewards, padded, with_advantages
from forge_core.algorithms.metrics import Mean, Metrics
from forge_core.config import KLConfig, RunConfig
from storage.annotations import read_scores
from storage.layout import RUN_SCORES
from storage.objects import ObjectStore
from storage.parts import read_committed, read_file
from storage.records import Commit, FileRef, read_record

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
    bare = [_sequence(row) for group in groups for row in group]
    bare = _with_figures(store, bare, "reference_logprobs", request.reference_logprobs)
    bare = _with_figures(store, bare, "values", request.values)
    rewards_NG = torch.tensor([[row["reward"] for row in group] for group in groups]).double()
    told: Metrics = {}
    if request.advantages is not None:
        sequences = _with_given(bare, groups, dict(request.advantages))
    else:
        sequences, told = _with_advantages(bare, rewards_NG, config)
    if request.weights is not None:
        sequences = _weighed(sequences, request.weights)
    age_max, age_mean = _ages(request, groups)
    return Batch(
        sequences=sequences,
        age_max=age_max,
        age_mean=age_mean,
        metrics={**_episode_metrics(groups, rewards_NG), **_figures(told)},
    )


def load_sequences(store: ObjectStore, request: TrainRequest) -> list[Sequence]:
    """The sequences of a request in the order of its batch, without advantages. Raises as `load_batch` does."""
    return [_sequence(row) for group in _read_groups(store, request) for row in group]


def _sequence(row: dict[str, Any]) -> Sequence:
    return Sequence(
        token_ids=row["prompt_token_ids"] + row["response_token_ids"],
        num_prompt_tokens=len(row["prompt_token_ids"]),
        mask=row["mask"],
        sampled_logprobs=row["logprobs"],
    )


def _with_figures(
    store: ObjectStore, sequences: list[Sequence], name: Figure, file: FileRef | None
) -> list[Sequence]:
    """The sequences with what a file tells of their tokens. Raises ValueError if it is of others, or damaged."""
    if file is None:
        return sequences
    lengths = (len(sequence.mask) for sequence in sequences)
    figures = read_estimates(read_file(store, file), lengths)
    return [
        dataclasses.replace(sequence, figures={**sequence.figures, name: of_tokens})
        for sequence, of_tokens in zip(sequences, figures, strict=True)
    ]


def _with_given(
    sequences: list[Sequence], groups: list[list[dict[str, Any]]], given: dict[str, float]
) -> list[Sequence]:
    """With the advantages of a loop of the user's."""
    rows = (row for group in groups for row in group)
    return [
        dataclasses.replace(sequence, advantage=given.get(row["episode_id"], 0.0))
        for sequence, row in zip(sequences, rows, strict=True)
    ]


def _weighed(sequences: list[Sequence], weights: tuple[float, ...]) -> list[Sequence]:
    """With the advantages of each group times its weight.

    The losses are linear in positive multiples of the advantage, so that this weighs a group's share of them.
    """
    size = len(sequences) // len(weights)
    return [
        dataclasses.replace(sequence, advantage=sequence.advantage * weights[place // size])
        for place, sequence in enumerate(sequences)
    ]


def _with_advantages(
    sequences: list[Sequence], rewards_NG: torch.Tensor, config: RunConfig
) -> tuple[list[Sequence], Metrics]:
    """With the algorithm's, of rewards less what overlong and diverging responses lose."""
    algorithm = config.algorithm
    lengths = torch.tensor([len(sequence.mask) for sequence in sequences])
    lost_NG, penalised = overlong_penalty(
        lengths.view_as(rewards_NG),
        max_tokens=config.sampling.max_tokens,
        overlong_tokens=algorithm.overlong_tokens,
        penalty=algorithm.overlong_penalty,
    )
    lost_BT, diverged = _lost_to_divergence(sequences, algorithm.kl)
    rewards_NG = rewards_NG + lost_NG
    if algorithm.loss == "ppo":
        masks = [sequence.mask for sequence in sequences]
        rewards_BT = final_rewards(rewards_NG.flatten().tolist(), masks) + lost_BT
        found, told = with_advantages(sequences, rewards_BT, algorithm)
    else:
        rewards_NG = rewards_NG + lost_BT.sum(dim=1).view_as(rewards_NG)
        advantages_NG, told = estimated_advantages(rewards_NG, algorithm)
        found = [
            dataclasses.replace(sequence, advantage=float(advantage))
            for sequence, advantage in zip(sequences, advantages_NG.flatten(), strict=True)
        ]
    return found, {**penalised, **diverged, **told}


def _lost_to_divergence(
    sequences: list[Sequence], config: KLConfig
) -> tuple[torch.Tensor, Metrics]:
    """What each token's reward loses for its divergence from the reference, where that is part of the reward."""
    mask_BT = padded([[float(each) for each in s.mask] for s in sequences]).bool()
    if config.place != "reward" or config.coefficient == 0.0:
        return torch.zeros_like(mask_BT, dtype=torch.float64), {}
    return lost_rewards(
        padded([s.sampled_logprobs for s in sequences]),
        padded([s.figures["reference_logprobs"] for s in sequences]),
        mask_BT,
        config,
    )


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
