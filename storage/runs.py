"""Which runs a store holds, and the config that each was started with."""

import json
from typing import Any

from storage import layout
from storage.objects import ObjectNotFound, ObjectStore
from storage.tombstones import is_deleted, refuse_deleted

_MISSING = object()


def list_runs(store: ObjectStore) -> list[str]:
    """Sorted ids of all runs that have a config and are not deleted."""
    return [
        run_id
        for run_id in store.folders(layout.RUNS)
        if store.exists(layout.config_key(run_id)) and not is_deleted(store, run_id)
    ]


def store_config(store: ObjectStore, run_id: str, config: dict[str, Any]) -> bool:
    """Fix the run's config for good; False if the same config stands there already.

    Raises ValueError if the run exists with another config, naming the keys that differ, or is deleted.
    """
    refuse_deleted(store, run_id)
    data = json.dumps(config, sort_keys=True, indent=2, allow_nan=False).encode()
    if store.put_if_absent(layout.config_key(run_id), data):
        return True
    stored, given = read_config(store, run_id), json.loads(data)
    if stored != given:
        keys = ", ".join(_differing_keys(stored, given))
        raise ValueError(
            f"run {run_id!r} exists with another config ({keys} differ): choose another run id"
        )
    return False


def read_config(store: ObjectStore, run_id: str) -> dict[str, Any]:
    """The run's stored config.

    Raises ValueError if the store has no such run, it is deleted, or the config is unreadable.
    """
    refuse_deleted(store, run_id)
    key = layout.config_key(run_id)
    try:
        config = json.loads(store.read(key))
    except ObjectNotFound:
        raise ValueError(
            f"store {store.uri} has no run {run_id!r}: name one of those that it lists"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{key} holds {type(config).__name__} where a JSON object is due")
    return config


def _differing_keys(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Sorted dotted keys of the values in which two nested configs differ."""
    keys: list[str] = []
    for name in sorted(left.keys() | right.keys()):
        mine, other = left.get(name, _MISSING), right.get(name, _MISSING)
        if isinstance(mine, dict) and isinstance(other, dict):
            keys += _differing_keys(mine, other, f"{prefix}{name}.")
        elif mine != other:
            keys.append(prefix + name)
    return keys
