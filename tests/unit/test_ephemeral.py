"""What a run starts beside itself."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from flows.ephemeral import keep_empty_database, take_empty_database


def _tables(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [name for (name,) in database.execute("select name from sqlite_master")]


def test_a_server_begins_with_the_tables_of_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = tmp_path / "1" / "prefect.db", tmp_path / "2" / "prefect.db"
    take_empty_database(first)
    assert not first.exists()
    with contextlib.closing(sqlite3.connect(first)) as database:
        # As a server leaves it while it runs: what it wrote last is in a file beside.
        database.execute("pragma journal_mode=wal")
        database.execute("create table flow_run (id)")
        keep_empty_database(first)
    take_empty_database(second)
    assert _tables(second) == ["flow_run"]
    assert len(list((tmp_path / "cache" / "forgeflow").iterdir())) == 1


def test_a_database_that_cannot_be_kept_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    database = tmp_path / "prefect.db"
    database.write_bytes(b"")
    keep_empty_database(database)
    take_empty_database(tmp_path / "home" / "prefect.db")
    assert not (tmp_path / "home" / "prefect.db").exists()
