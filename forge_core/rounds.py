"""Collect and train apart: which round a new run collects, with which weights, and what its config is.

A is `max_policy_age`. Round k is trained on by the steps a to b. With version v of the trainer run its groups have an
age of at most b - 1 - v when they are trained on, and a round is claimed only once that is A or less.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from forge_core.config import RunConfig
from forge_core.settings import stored_config
from storage import layout
from storage.objects import ObjectStore
from storage.resume import read_ledger
from storage.rounds import Claim, read_claims, round_steps
from storage.runs import store_config
from storage.tombstones import is_deleted


class NotYet(RuntimeError):
    """A round cannot be collected before more is trained."""


def claim_round(
    store: ObjectStore, trainer_run_id: str, run_id: str | None = None
) -> tuple[str, RunConfig] | None:
    """Claim the next round of a trainer run; the run that collects it and its config, which is stored.

    None if all of its rounds are claimed. Of two at once each gets another round. Raises NotYet if its groups would
    grow too old, and ValueError if there is no such trainer run, or the collecting run exists.
    """
    trainer = trainer_config(store, trainer_run_id)
    if run_id is not None:
        layout.check_run_id(run_id)
    while True:
        claims = read_claims(store, trainer_run_id)
        for claim in claims:
            # One that was lost between claim and config: only so can its run be resumed.
            if not is_deleted(store, claim.run_id):
                collect_config(store, trainer, claim)
        number = len(claims) + 1
        if not (steps := _steps(trainer, number)):
            return None
        _check_age(store, trainer, trainer_run_id, number, steps)
        claim = _claim(trainer, trainer_run_id, number, steps, run_id)
        if store.exists(layout.config_key(claim.run_id)) or is_deleted(store, claim.run_id):
            raise ValueError(f"run {claim.run_id!r} exists: choose another by --run-id")
        key, data = layout.round_key(trainer_run_id, number), claim.to_bytes()
        # Equal bytes are a write of this process whose answer was lost.
        if store.put_if_absent(key, data) or store.read(key) == data:
            return claim.run_id, collect_config(store, trainer, claim)


def trainer_config(store: ObjectStore, run_id: str) -> RunConfig:
    """The config of a trainer run. Raises ValueError if there is no such run, or it is of another kind."""
    config = stored_config(store, run_id)
    if not config.train_rounds:
        raise ValueError(
            f"run {run_id!r} generates for itself: name one that was begun by forgeflow train-rounds"
        )
    return config


def collect_config(store: ObjectStore, trainer: RunConfig, claim: Claim) -> RunConfig:
    """The stored config of the run that collects a claimed round; stored now, if it is not yet.

    The version is the trainer run's newest: that of the claim or a later one, so that ages are as small. Raises
    ValueError if that run exists with another config.
    """
    if not store.exists(layout.config_key(claim.run_id)):
        try:
            store_config(store, claim.run_id, _new_config(store, trainer, claim))
        except ValueError:
            # Somebody else has chosen the version in this moment.
            if not store.exists(layout.config_key(claim.run_id)):
                raise
    config = stored_config(store, claim.run_id)
    is_of_claim = config.collect is not None and config.collect.round == claim.round
    if not is_of_claim or config.parent_run_id != claim.trainer_run_id:
        raise ValueError(
            f"run {claim.run_id!r} claimed round {claim.round} of run {claim.trainer_run_id!r}, and its config is of "
            "something else"
        )
    return config


def round_config(
    trainer: RunConfig, trainer_run_id: str, number: int, policy_version: int
) -> RunConfig:
    """The config of a run that collects a round of a trainer run with a version of its weights."""
    steps = _steps(trainer, number)
    return RunConfig.model_validate(
        {
            **trainer.model_dump(mode="json"),
            "train_rounds": False,
            "evaluate_only": False,
            "parent_run_id": trainer_run_id,
            "parent_step": policy_version,
            "collect": {"round": number, "first_step": steps[0], "last_step": steps[-1]},
        }
    )


def newest_version(store: ObjectStore, run_id: str) -> int:
    """Version of a run's newest checkpoint. Raises NotYet if it has none."""
    ledger = read_ledger(store, run_id)
    kept = ledger.checkpoints.keys() - ledger.pruned
    if not kept:
        raise NotYet(
            f"run {run_id!r} has no checkpoint yet to collect with: wait for it, or forgeflow resume {run_id}"
        )
    return max(kept)


def _check_age(
    store: ObjectStore, trainer: RunConfig, run_id: str, number: int, steps: range
) -> None:
    version = newest_version(store, run_id)
    age = steps[-1] - 1 - version
    if age > trainer.max_policy_age:
        raise NotYet(
            f"round {number} of run {run_id} would be trained on at age {age}, and max_policy_age is "
            f"{trainer.max_policy_age}: its newest version is {version}, so first forgeflow train-rounds {run_id}"
        )


def _new_config(store: ObjectStore, trainer: RunConfig, claim: Claim) -> dict[str, Any]:
    version = newest_version(store, claim.trainer_run_id)
    config = round_config(trainer, claim.trainer_run_id, claim.round, version)
    return config.model_dump(mode="json")


def _steps(trainer: RunConfig, number: int) -> range:
    return round_steps(
        number,
        after_step=trainer.parent_step or 0,
        steps_per_round=trainer.steps_per_round,
        steps=trainer.steps,
    )


def _claim(
    trainer: RunConfig, trainer_run_id: str, number: int, steps: range, run_id: str | None
) -> Claim:
    return Claim(
        trainer_run_id=trainer_run_id,
        round=number,
        run_id=run_id or f"{trainer_run_id}-round-{number:06d}",
        first_draw=(steps[0] - 1) * trainer.groups_per_step,
        count=len(steps) * trainer.groups_per_step,
        host=socket.gethostname(),
        pid=os.getpid(),
        claimed_at=time.time(),
    )
