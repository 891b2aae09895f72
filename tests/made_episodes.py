"""Episodes, weights and draws of runs that were never run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from storage import facts, layout
from storage.episodes import SCHEMA
from storage.records import FileRef

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
        owner, prompt = f"{run_id}-{evaluation}", "held-out" if held_out else "p"
    rows = [
        {
            "episode_id": layout.episode_id(layout.group_id(owner, draw), sample),
            "run_id": run_id,
            "group_id": layout.group_id(owner, draw),
            "draw": draw,
            "sample": sample,
            "environment": "sums",
            "prompt_id": f"{prompt}-{draw}",
            "prompt": "1+1=",
            "answer": "2",
            "metadata": "{}",
            "response": "2",
            "prompt_token_ids": [5, 6],
            "response_token_ids": [7] * len(versions),
            "logprobs": [-0.5] * len(versions),
            "mask": [True] * len(versions),
            "token_policy_versions": list(versions),
            "turns": [],
            "finish_reason": "stop",
            "reward": 0.1 * draw + (0 if draw in set(flat) else sample),
            "scores": [],
            "seed": 1000 * draw + sample,
            "attempts": 1,
            "generate_seconds": 0.5,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        }
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
    total = hashlib.sha256()
    for name in sorted([*tensors, *TIED]):
        tensor = tensors[TIED.get(name, name)]
        head = f"{name}|{tensor.dtype}|{tensor.shape}|".encode()
        total.update(hashlib.sha256(head + tensor.tobytes()).digest())
    return total.hexdigest()


def file_of(key: str, data: bytes) -> FileRef:
    """What the log would say of a file."""
    return FileRef(key=key, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def draw_of(run_id: str, number: int) -> facts.Draw:
    """A draw that `table` makes episodes of."""
    return facts.Draw(
        draw=number,
        group_id=layout.group_id(run_id, number),
        prompt_id=f"p-{number}",
        environment="sums",
        index=number,
    )
