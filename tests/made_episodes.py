"""Episodes and weights of runs that were never run, and what logs would say of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from storage import facts, layout
from storage.episodes import SCHEMA, Figures
from storage.records import Commit, FileRef, PartRef

GROUP_SIZE = 2
CONFIG: dict[str, Any] = {
    "regime": "async",
    "group_size": GROUP_SIZE,
    "groups_per_step": 2,
    "max_policy_age": 1,
    "steps": 4,
    "environment": {"name": "sums"},
    "model": {"path": None},
}


def episode(
    draw: int, sample: int, run_id: str = "run", *, owner: str | None = None, **columns: Any
) -> dict[str, Any]:
    """A sample of a draw, with one token unless `columns` say otherwise; in the groups of `owner`, or of the run."""
    group_id = layout.group_id(owner or run_id, draw)
    return {
        "episode_id": layout.episode_id(group_id, sample),
        "run_id": run_id,
        "group_id": group_id,
        "draw": draw,
        "sample": sample,
        "environment": "sums",
        "prompt_id": f"p{draw}",
        "prompt": "1+1=",
        "answer": "2",
        "metadata": "{}",
        "response": "2",
        "prompt_token_ids": [5, 6],
        "response_token_ids": [7],
        "logprobs": [-0.5],
        "mask": [True],
        "token_policy_versions": [0],
        "turns": [],
        "finish_reason": "stop",
        "reward": float(sample),
        "scores": [],
        "scored_by": [],
        "seed": 17,
        "attempts": 1,
        "generate_seconds": 0.5,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        **columns,
    }


def table(
    draws: Iterable[int],
    versions: Sequence[int],
    *,
    run_id: str = "run",
    evaluation: str | None = None,
    flat: Iterable[int] = (),
    held_out: bool = True,
) -> pa.Table:
    """Two episodes for each draw, whose tokens are of these policy versions; the rewards of `flat` draws are equal."""
    owner, prompt = run_id, "p"
    if evaluation is not None:
        owner, prompt = f"{run_id}-{evaluation}", "held-out-" if held_out else "p"
    rows = [
        episode(
            draw,
            sample,
            run_id,
            owner=owner,
            prompt_id=f"{prompt}{draw}",
            response_token_ids=[7] * len(versions),
            logprobs=[-0.5] * len(versions),
            mask=[True] * len(versions),
            token_policy_versions=list(versions),
            reward=0.1 * draw + (0 if draw in set(flat) else sample),
            seed=1000 * draw + sample,
        )
        for draw in draws
        for sample in range(GROUP_SIZE)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def weights(step: int, salt: int = 0) -> dict[str, np.ndarray]:
    """Two tensors, one of which is stored once and has two names."""
    return {
        "embed": np.arange(6, dtype=np.float32).reshape(2, 3) + step + 1000 * salt,
        "norm": np.full(3, step, np.float16),
    }


TIED = {"lm_head": "embed"}


def weights_digest(step: int, salt: int = 0) -> str:
    """Their digest, as the trainer would log it."""
    tensors = weights(step, salt)
    told = {name: tensors[TIED.get(name, name)] for name in (*tensors, *TIED)}
    lines = sorted(
        f"{name}|{tensor.dtype}|{tensor.shape}|{xxhash.xxh3_128(tensor.tobytes()).hexdigest()}\n"
        for name, tensor in told.items()
    )
    return "xxh3-" + xxhash.xxh3_128("".join(lines).encode()).hexdigest()


def file_of(key: str, data: bytes) -> FileRef:
    """What the log would say of a file."""
    return FileRef(key=key, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def draw_of(run_id: str, number: int, environment: str = "sums") -> facts.Draw:
    """A draw that `episode` and `table` make episodes of."""
    return facts.Draw(
        draw=number,
        group_id=layout.group_id(run_id, number),
        prompt_id=f"p{number}",
        environment=environment,
        index=number,
    )


def generated(number: int, part: PartRef, episodes: pa.Table) -> facts.Generated:
    """What the log would say of a part that is not scored yet, of a round."""
    figures = Figures.of(episodes)
    return facts.Generated(
        round=number,
        replica=0,
        part=part,
        group_ids=figures.group_ids,
        policy_version_min=figures.policy_version_min,
        policy_version_max=figures.policy_version_max,
        prompt_tokens=figures.prompt_tokens,
        response_tokens=figures.response_tokens,
    )


def committed(number: int, commit: Commit) -> facts.Committed:
    """What the log would say of a commit, of a round."""
    return facts.Committed(
        round=number,
        commit=layout.commit_key(commit.run_id, commit.key),
        group_ids=commit.group_ids,
        episodes=commit.rows,
        score_set="run",
        bytes=commit.part.bytes,
    )


def stepped(
    step: int,
    group_ids: tuple[str, ...],
    digest: str,
    *,
    age: int | None = 0,
    **metrics: float,
) -> facts.Step:
    """What the log would say of a step whose groups are all of one age."""
    return facts.Step(
        step=step,
        group_ids=group_ids,
        score_set="run",
        weights_digest=digest,
        policy_version=step,
        optimizer_updates=1,
        age_max=age,
        age_mean=None if age is None else float(age),
        metrics=metrics,
        checkpoint=None,
    )
