"""Which flow carries out a config."""

from __future__ import annotations

from typing import Any

from flows.collect import collect_round
from flows.evaluate import evaluate_checkpoint
from flows.post_train import post_train
from flows.replay import replay_run
from flows.train_rounds import train_collected
from flows.warm_start import warm_start_run
from forge_core.config import Kind, RunConfig

_FLOWS: dict[Kind, Any] = {
    "post_train": post_train,
    "warm_start": warm_start_run,
    "replay": replay_run,
    "collect": collect_round,
    "evaluate": evaluate_checkpoint,
    "train_rounds": train_collected,
}


def flow_of(config: RunConfig) -> Any:
    """The flow of a config's kind; it takes config, store and run id."""
    return _FLOWS[config.kind]
