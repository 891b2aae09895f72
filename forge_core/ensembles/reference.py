"""How an ensemble is named where a verifier or a reward is: `ensemble:NAME@VERSION`."""

from __future__ import annotations

from forge_core.config import ENSEMBLE_PREFIX
from storage.ensembles import Ensemble, newest_version, read_ensemble
from storage.layout import check_ensemble
from storage.objects import ObjectStore


def is_ensemble(reference: str | None) -> bool:
    """Whether a reward or verifier is named that is an ensemble."""
    return reference is not None and reference.startswith(ENSEMBLE_PREFIX)


def find_ensemble(field: str, reference: str, store: ObjectStore) -> Ensemble:
    """The ensemble that is named. Raises ValueError, naming the field, if the store has none of it."""
    name, at, version = reference.removeprefix(ENSEMBLE_PREFIX).partition("@")
    check_ensemble(name)
    if not at:
        newest = newest_version(store, name)
        if newest is not None:
            raise ValueError(
                f"{field} {reference!r} names no version, and another may be fitted meanwhile: write "
                f"{reference}@{newest} for the newest"
            )
        version = "1"  # refused below, with what there is
    if not version.isdecimal() or int(version) < 1:
        raise ValueError(
            f"{field} {reference!r} is no ensemble: write {ENSEMBLE_PREFIX}NAME@VERSION, where VERSION is a number"
        )
    return read_ensemble(store, name, int(version))
