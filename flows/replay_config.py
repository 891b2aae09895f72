"""The config of a replay: that of the first run, with what `forgeflow replay` is told over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.preflight import check_machine, find_model
from forge_core.config import RunConfig
from forge_core.replay import Source, plan_replay, read_source
from forge_core.settings import load_config, stored_config
from forge_core.user_code import check_reference
from storage import layout
from storage.objects import ObjectStore, check_writable, open_store
from storage.resume import find_checkpoint
from storage.runs import read_config

_GIVEN = {
    "reward": "a replay scores nothing: rescore the runs with it, and give the set as --scores",
    "generate_episode": "a replay generates nothing",
    "tools": "a replay generates nothing",
    "warm_start": "a replay begins with a checkpoint's weights",
    "model": "the model is that of the checkpoint: --from names another",
    "parent_run_id": "--from names the checkpoint",
    "parent_step": "--from names the checkpoint",
    "regime": "a replay has none",
    "max_policy_age": "groups of other runs have no age",
    "window": "a replay keeps the runs' order",
    "steps_per_round": "a replay has no rounds",
    "segment_steps": "a replay has no segments",
    "group_size": "groups are as they are stored",
    "groups_per_step": "steps have the groups of the runs' own steps",
    "train_rounds": "a replay takes whole runs",
    "collect": "a replay generates nothing",
    "evaluate_only": "a replay generates nothing",
    "warm_start_only": "a replay begins with a checkpoint's weights",
    "replay.scores": "--scores names them",
    "replay.epochs": "--epochs says how many",
    "replay.runs": "they are the command's arguments",
    "replay.log_ends": "they follow from the runs",
}
"""Keys that follow from what is replayed, and why."""


def replay_config(
    run_ids: Sequence[str],
    *,
    store: str,
    origin: str | None = None,
    scores: str = layout.RUN_SCORES,
    epochs: int = 1,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The config of a new run that trains on past runs' episodes from a checkpoint.

    Raises ValueError if a run or the checkpoint is not there, the runs do not fit together or to the weights, the
    scores do not cover them, or filters leave nothing.
    """
    _check_overrides(overrides)
    opened = open_store(store)
    sources = [read_source(opened, run_id) for run_id in run_ids]
    parent, step = _parent(opened, origin, sources[0])
    _check_fits(opened, sources, parent)
    base = _base(opened, sources, parent, step)
    base["replay"] |= {"scores": scores, "epochs": epochs}

    def load(steps: int) -> RunConfig:
        base["steps"] = steps
        return load_config(preset=None, file=None, overrides=list(overrides), base=base)

    # Filters first: how many steps there are follows from them.
    filtered = load(1).replay
    assert filtered is not None
    num_steps = len(plan_replay(opened, filtered, sources))
    config = load(num_steps)
    if not 1 <= config.steps <= num_steps:
        raise ValueError(
            f"steps {config.steps} is not within 1 and {num_steps}, which these runs, filters and epochs give: raise "
            "--epochs, or leave it out"
        )
    return config


def check_replay(config: RunConfig, store: str, run_id: str | None) -> None:
    """Refuse a replay that cannot work here. Raises ValueError."""
    check_writable(store)
    if run_id is not None and open_store(store).exists(layout.config_key(run_id)):
        raise ValueError(
            f"--run-id {run_id!r} exists in store {store!r}: go on with it by forgeflow resume {run_id}, or choose "
            "another"
        )
    for field, reference in config.user_code().items():
        check_reference(field, reference)
    check_machine(config, store, find_model(config))


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        for given, why in _GIVEN.items():
            if key == given or key.startswith(f"{given}."):
                raise ValueError(f"--set {override}: {why}; leave it out")


def _parent(store: ObjectStore, origin: str | None, first: Source) -> tuple[str, int]:
    """The run and step of the checkpoint with whose weights the replay begins."""
    if origin is None:
        step = find_checkpoint(store, first.run_id, first.ledger.base_step).step
        return first.run_id, step
    parent, _, step_text = origin.partition("@")
    if step_text and not step_text.isdigit():
        raise ValueError(f"--from {origin!r} names no step: write RUN@STEP, such as {parent}@10")
    kept = find_checkpoint(store, parent, int(step_text) if step_text else None)
    return parent, kept.step


def _check_fits(store: ObjectStore, sources: Sequence[Source], parent: str) -> None:
    """Refuse episodes of another model than the weights are of, and groups of several sizes."""
    weights = stored_config(store, parent)
    for source in sources:
        if _tokens_of(source.config) != _tokens_of(weights):
            raise ValueError(
                f"the episodes of run {source.run_id!r} are of another model than the weights of run {parent!r}: "
                "replay them from a checkpoint of their own model, by --from"
            )
        if source.config.group_size != sources[0].config.group_size:
            raise ValueError(
                f"groups of run {source.run_id!r} have {source.config.group_size} samples and those of run "
                f"{sources[0].run_id!r} {sources[0].config.group_size}: replay them apart"
            )


def _tokens_of(config: RunConfig) -> Any:
    """What decides what token ids mean."""
    return config.model.path or config.model.tiny


def _base(store: ObjectStore, sources: Sequence[Source], parent: str, step: int) -> dict[str, Any]:
    """The stored config of the first run, without what a replay does not do."""
    stored = read_config(store, sources[0].run_id)
    return {
        **stored,
        "regime": "sync",
        "max_policy_age": 0,
        "window": 1,
        "steps_per_round": 1,
        "groups_per_step": max(source.config.groups_per_step for source in sources),
        "reward": None,
        "generate_episode": None,
        "train_rounds": False,
        "collect": None,
        "evaluate_only": False,
        "warm_start_only": False,
        "warm_start": {**stored.get("warm_start", {}), "steps": 0},
        "parent_run_id": parent,
        "parent_step": step,
        "replay": {
            "runs": [source.run_id for source in sources],
            "log_ends": [source.log_end for source in sources],
        },
    }
