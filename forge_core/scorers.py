"""What scores stored episodes again: how it is named, and the set of scores that comes of it."""

from __future__ import annotations

import ast
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_core.config import EnvironmentConfig, RunConfig
from forge_core.ensembles.posterior import used_verifiers
from forge_core.ensembles.reference import find_ensemble, is_ensemble
from forge_core.ensembles.reward import check_source
from forge_core.environments import load_environment
from forge_core.registration import VERIFIERS, registered
from forge_core.settings import stored_config
from forge_core.user_code import check_reference
from storage import layout
from storage.annotations import ScoreSet, open_set
from storage.objects import ObjectStore
from storage.records import Commit, Controller, FileRef, read_record
from storage.resume import read_ledger

ENVIRONMENT = "environment"
"""Names the scorer of the environment that a run's prompts came from."""
_FIELD = "--verifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """What scores, as a verifier process is told."""

    config: RunConfig
    """The run's config, with this scorer in it."""
    name: str
    """Name of the environment or of the function."""
    source: Path | None
    """The file that defines it, if it is the user's."""


def resolve_scorer(verifier: str, config: RunConfig, store: ObjectStore) -> Scorer:
    """The scorer that `verifier` names.

    That is `environment`, a task by its name, `path/file.py:name`, `module:name` or the registered name of an
    environment's class or of a reward function, or `ensemble:NAME@VERSION` of an ensemble in the store. An environment
    that is not the run's own has its default parameters. Raises ValueError if there is none, or the file of an
    ensemble's verifier has changed.
    """
    own = config.environment
    if is_ensemble(verifier):
        ensemble = find_ensemble(_FIELD, verifier, store)
        for each in used_verifiers(ensemble):
            check_source(each)
        scoring: dict[str, Any] = {"reward": ensemble.reference, "verifiers": {}}
        return Scorer(
            config=config.model_copy(update=scoring), name=ensemble.reference, source=None
        )
    if verifier == ENVIRONMENT:
        verifier = own.name
    elif ":" not in verifier and verifier != own.name:
        verifier = registered(_FIELD, VERIFIERS, verifier) or verifier
    source = check_reference(_FIELD, verifier) if ":" in verifier else None
    name = verifier.rpartition(":")[2]
    if source is not None and not _defines_class(source, name):
        return Scorer(
            config=config.model_copy(update={"reward": verifier, "verifiers": {}}),
            name=name,
            source=source,
        )
    environment = own if verifier == own.name else EnvironmentConfig(name=verifier)
    try:
        load_environment(environment, config.seed)
    except ValueError as error:
        raise ValueError(str(error).replace("environment.name", _FIELD)) from error
    scoring = {"reward": None, "verifiers": {}, "environment": environment}
    return Scorer(config=config.model_copy(update=scoring), name=name, source=source)


def begin_set(
    store: ObjectStore, run_id: str, name: str, verifier: str, controller: Controller
) -> tuple[ScoreSet, RunConfig]:
    """Begin the set of scores that a verifier gives a run, or go on with it; and the config of what scores.

    The user's file is kept with the set. Raises ValueError if the run has nothing to score, nothing has the verifier's
    name, or the set's name is not usable or taken by another verifier's scores.
    """
    config = stored_config(store, run_id)
    layout.check_score_set(name)
    counted_commits(store, run_id)
    scorer = resolve_scorer(verifier, config, store)
    source = None
    if scorer.source is not None:
        data = scorer.source.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        key = layout.score_set_source_key(run_id, name, sha256, scorer.source.name)
        source = FileRef(key=key, sha256=sha256, bytes=len(data))
    environment = scorer.config.environment.model_dump(mode="json")
    opened = open_set(
        store,
        ScoreSet(
            run_id=run_id,
            name=name,
            verifier=verifier,
            scorer=scorer.name,
            environment=environment if scorer.config.reward is None else None,
            source=source,
            controller=controller,
            created_at=time.time(),
        ),
    )
    if source is not None:
        store.put_if_absent(source.key, data)
    return opened, scorer.config


def counted_commits(store: ObjectStore, run_id: str) -> list[Commit]:
    """The commits that the run's log counts, in its order.

    Raises ValueError if the run does not exist or has generated nothing that counts.
    """
    commits = [read_record(store, key, Commit) for key in read_ledger(store, run_id).commits]
    if not commits:
        raise ValueError(f"run {run_id!r} has no episodes of its own that its log counts")
    return commits


def _defines_class(path: Path, name: str) -> bool:
    tree = ast.parse(path.read_bytes())
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)
