"""The trainer as the controller calls it, on one rank in this process, under each way of computing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from forge_core.actors import trainer as module
from forge_core.actors.messages import TrainRequest
from forge_core.config import TinyModelConfig
from forge_core.model import build_tiny_model
from storage import layout

SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, context_length=128
)
PROBE = ((40, 41, 42, 43, 44, 45, 46), (50, 51, 52), (60, 61, 62, 63, 64))


def call(actor: Any, endpoint: str, *arguments: Any) -> Any:
    """What an endpoint's own function answers."""
    return asyncio.run(getattr(type(actor), endpoint)._method(actor, *arguments))


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({}, 0.0),
        ({"packing": False}, 1e-3),
        ({"logprob_chunk_tokens": 3, "activation_checkpointing": True}, 1e-3),
        ({"precision": "bf16_autocast"}, 0.1),
    ],
)
def test_it_loads_warms_up_trains_and_scores_the_probe(
    past_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    apart: float,
) -> None:
    monkeypatch.setattr(module, "current_rank", lambda: SimpleNamespace(rank=0))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    build_tiny_model(SHAPE, 0, tmp_path / "model")
    warm_start = {"steps": 2, "batch_size": 8}
    scores = []
    for number, trainer in enumerate(({}, settings)):
        run = past_run(f"r{number}", trainer={"ranks": 1, **trainer}, warm_start=warm_start)
        run.round(1, (0, 1))
        actor = module.Trainer(
            run.config, run.store.uri, str(tmp_path / f"meet-{number}"), time.time()
        )
        try:
            call(actor, "load", str(tmp_path / "model"))
            warm = call(actor, "warm_start")
            commit = layout.commit_key(run.run_id, layout.part_name(1, 0))
            request = TrainRequest(
                run_id=run.run_id, step=1, commits=(commit,), group_ids=run.groups((0, 1))
            )
            told = call(actor, "train", request)
            logprobs, entropy = actor._score(PROBE)
        finally:
            dist.destroy_process_group()
        assert (warm.steps, told.optimizer_updates, told.nonfinite) == (2, 1, None)
        assert [len(row) for row in logprobs] == [len(ids) - 1 for ids in PROBE]
        scores.append([entropy, warm.loss, *[each for row in logprobs for each in row]])
    assert scores[1] == pytest.approx(scores[0], abs=apart or 1e-12)
