"""What scores stored episodes again: how it is named, and the set of scores that comes of it."""

from __future__ import annotations

import ast
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_core.config import EnvironmentConfig, RunConfig
from forge_core.ensembles.posterior import used_verifiers
from forge_core.ensembles.reference import find_ensemble, is_ensemble
from forge_core.ensembles.reward import check_source
from forge_core.environments import load_environment
from forge_core.registration import VERIFIERS, registered
from forge_core.settings import load_config, read_config_file, stored_config
from forge_core.user_code import check_reference
from storage import layout
from storage.annotations import ScoreSet, open_set
from storage.objects import ObjectStore
from storage.records import Commit, Controller, FileRef, read_record
from storage.resume import read_ledger

ENVIRONMENT = "environment"
"""Names the scorer of the environment that a run's prompts came from."""
RUN = "run"
"""Names what the run itself was scored with."""
COMPOSED = "composition"
"""What the scorer of several verifiers is called."""
_FIELD = "--verifier"
_COMPOSITIONS = (".toml", ".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """What scores, as a verifier process is told."""

    config: RunConfig
    """The run's config, with this scorer in it."""
    name: str
    """Name of the environment or of the function, or that several make up the score."""
    source: Path | None
    """The file that defines it, if it is the user's."""
    sources: dict[str, Path] = field(default_factory=dict)
    """Files of the user's that define verifiers of a composition, by the fields that name those."""

    @property
    def composition(self) -> dict[str, Any] | None:
        """The sections that say how several verifiers make up the score; None if one scores alone."""
        if not self.config.verifiers:
            return None
        told: dict[str, Any] = self.config.model_dump(mode="json", include={"verifiers", "scoring"})
        # These decide what scoring costs, and no score.
        for name in ("workers", "attempts", "cache_entries"):
            del told["scoring"][name]
        return told


def resolve_scorer(verifier: str, config: RunConfig, store: ObjectStore) -> Scorer:
    """The scorer that `verifier` names.

    That is `environment`, a task by its name, `path/file.py:name`, `module:name` or the registered name of an
    environment's class or of a reward function, `ensemble:NAME@VERSION` of an ensemble in the store, a file
    `path/file.toml` of sections `verifiers` and `scoring`, or `run` for what the run itself was scored with. An
    environment that is not the run's own has its default parameters. Raises ValueError if there is none, or the file of
    an ensemble's verifier has changed.
    """
    own = config.environment
    if verifier == RUN and config.verifiers:
        return _composed(config, store)
    if verifier == RUN:
        return resolve_scorer(config.reward or ENVIRONMENT, config, store)
    if verifier.endswith(_COMPOSITIONS):
        return _composed(_with_composition(verifier, config), store)
    if is_ensemble(verifier):
        _check_ensemble(_FIELD, verifier, store)
        scoring: dict[str, Any] = {"reward": verifier, "verifiers": {}}
        return Scorer(config=config.model_copy(update=scoring), name=verifier, source=None)
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


def _with_composition(path: str, config: RunConfig) -> RunConfig:
    """The config with the verifiers and the scoring of a file. Raises ValueError if that holds anything else."""
    told = read_config_file(path, field=_FIELD)
    if unknown := sorted(told.keys() - {"verifiers", "scoring"}):
        raise ValueError(
            f"{_FIELD} {path!r} has {unknown[0]!r}, which scores nothing: leave only verifiers and scoring in it"
        )
    if not told.get("verifiers"):
        raise ValueError(
            f"{_FIELD} {path!r} has no verifiers: write a table [verifiers.NAME] with a kind for each"
        )
    plain: dict[str, Any] = {"reward": None, "verifiers": {}, "scoring": {}}
    base = {**config.model_dump(mode="json"), **plain}
    return load_config(preset=None, file=path, overrides=[], base=base)


def _composed(config: RunConfig, store: ObjectStore) -> Scorer:
    for place, reference in config.ensembles().items():
        _check_ensemble(place, reference, store)
    code = {
        field: reference
        for field, reference in config.user_code().items()
        if field.startswith("verifiers.")
    }
    sources = {field: check_reference(field, reference) for field, reference in code.items()}
    return Scorer(config=config, name=COMPOSED, source=None, sources=sources)


def _check_ensemble(place: str, reference: str, store: ObjectStore) -> None:
    for each in used_verifiers(find_ensemble(place, reference, store)):
        check_source(each)


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
    kept: dict[str, bytes] = {}

    def keep(path: Path) -> FileRef:
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        key = layout.score_set_source_key(run_id, name, sha256, path.name)
        kept[key] = data
        return FileRef(key=key, sha256=sha256, bytes=len(data))

    environment = scorer.config.environment.as_scorer()
    kinds = {each.kind for each in scorer.config.verifiers.values()}
    is_asked = "environment" in kinds if kinds else scorer.config.reward is None
    opened = open_set(
        store,
        ScoreSet(
            run_id=run_id,
            name=name,
            verifier=verifier,
            scorer=scorer.name,
            environment=environment if is_asked else None,
            source=None if scorer.source is None else keep(scorer.source),
            composition=scorer.composition,
            sources=tuple(keep(path) for _, path in sorted(scorer.sources.items())),
            controller=controller,
            created_at=time.time(),
        ),
    )
    for key, data in kept.items():
        store.put_if_absent(key, data)
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
