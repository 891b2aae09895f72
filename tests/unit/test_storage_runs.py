"""Configs are fixed for good, and runs are known by them."""

from pathlib import Path

import pytest

from storage.objects import LocalStore
from storage.runs import list_runs, read_config, store_config


def test_a_config_is_stored_once_and_read_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    config = {"seed": 1, "model": {"path": "m"}, "rates": [1e-6]}
    assert store_config(store, "b", config)
    assert not store_config(store, "b", config)
    assert store_config(store, "a", {})
    store.put_if_absent("runs/no-config/log/x", b"")
    assert read_config(store, "b") == config
    assert list_runs(store) == ["a", "b"]


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store_config(store, "a", {"seed": 1, "model": {"path": "m", "kind": "k"}})
    with pytest.raises(ValueError, match=r"'a' exists with another config .*model.path, steps"):
        store_config(store, "a", {"seed": 1, "model": {"path": "n", "kind": "k"}, "steps": 2})
    assert read_config(store, "a")["seed"] == 1


def test_an_unknown_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no run 'absent'"):
        read_config(LocalStore(tmp_path), "absent")


@pytest.mark.parametrize("run_id", ["", "../a", "a/b", "-a", "ä", "a" * 101])
def test_a_run_id_that_is_no_folder_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ValueError, match=r"run id .* is not usable"):
        store_config(LocalStore(tmp_path), run_id, {})
    assert list(tmp_path.iterdir()) == []
