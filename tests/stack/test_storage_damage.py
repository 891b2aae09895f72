"""Damaged objects, and disks that fail: told in one sentence, and never taken for a missing object."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failing_stores import all_uses, assert_sentence
from many_writers import RUN_ID, episodes

import storage
from storage.contract import StoreError
from storage.objects import LocalStore, ObjectNotFound, ObjectStore, open_store
from storage.parts import commit_part, read_commits, read_part


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return open_store(request.getfixturevalue("s3_store_uri"))


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_part_is_told(any_store: ObjectStore, kept: int) -> None:
    commit = commit_part(any_store, RUN_ID, "name", episodes(seed=1))
    any_store.replace(commit.part.key, any_store.read(commit.part.key)[:kept])
    with pytest.raises(ValueError, match=rf"{commit.part.key} has \d+ bytes and was written with"):
        read_part(any_store, commit.part)
    any_store.delete(commit.part.key)
    with pytest.raises(ObjectNotFound, match=commit.part.key):
        read_part(any_store, commit.part)


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"\xff\xfe", b"null"])
def test_an_unreadable_commit_is_told_and_never_taken_for_none(
    any_store: ObjectStore, data: bytes
) -> None:
    commit_part(any_store, RUN_ID, "good", episodes(seed=1))
    commit_part(any_store, RUN_ID, "bad", episodes(seed=2))
    any_store.replace(f"episodes/commits/{RUN_ID}/bad.json", data)
    for use in (
        lambda: read_commits(any_store, RUN_ID),
        lambda: commit_part(any_store, RUN_ID, "bad", episodes(seed=2)),
    ):
        with pytest.raises(ValueError, match=r"bad.json is no valid Commit: "):
            use()


def _on_disk(program: str, folder: Path) -> dict[str, Any]:
    """What a program told that has `fill`, `freeze` and a store in the folder to itself."""
    root = Path(storage.__file__).parents[1]
    start = (
        "import json, os, sys; from pathlib import Path\n"
        "from small_disk import fill, freeze\n"
        "from storage.objects import *\n"
        "folder = Path(sys.argv[1]); store = LocalStore(folder)\n"
        "def failure(use, *arguments):\n"
        "    try: use(*arguments)\n"
        "    except StoreError as error: return [error.errno, str(error)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + program, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_full_disk_is_told_and_left_no_fuller(tmp_path: Path) -> None:
    told = _on_disk(
        "number = fill(folder, 65536)\n"
        "big = folder.parent / 'big'; big.write_bytes(bytes(60000))\n"
        "acknowledged = {f'log/{n}': b'x' * 5000 for n in range(3)}\n"
        "for key, data in acknowledged.items(): assert store.put_if_absent(key, data)\n"
        "failures = [failure(store.put_if_absent, 'log/3', bytes(70000)),\n"
        "            failure(store.replace, 'log/0', bytes(70000)),\n"
        "            failure(store.replace, 'run.json', bytes(70000))]\n"
        "big.write_bytes(bytes(70000)) if number == 27 else None\n"
        "failures.append(failure(store.put_file_if_absent, 'log/3', big) or "
        "failure(store.put_if_absent, 'log/4', bytes(70000)))\n"
        "kept = all(store.read(key) == data for key, data in acknowledged.items())\n"
        "print(json.dumps(dict(number=number, failures=failures, kept=kept,\n"
        "    files=sorted(str(path.relative_to(folder)) for path in folder.rglob('*')),\n"
        "    smaller=store.put_if_absent('log/3', b'fits'))))",
        tmp_path,
    )
    assert told["number"] in (errno.ENOSPC, errno.EFBIG)
    for failure in told["failures"]:
        number, sentence = failure
        assert number == told["number"]
        assert (
            f"store {str(tmp_path)!r} could not write 'log/" in sentence or "run.json" in sentence
        )
        assert os.strerror(number) in sentence
        assert "another disk" in sentence
    assert told["kept"]
    assert told["files"] == ["log", "log/0", "log/1", "log/2"]
    assert told["smaller"]


def test_a_folder_that_turns_read_only_is_told_and_still_read(tmp_path: Path) -> None:
    told = _on_disk(
        "assert store.put_if_absent('log/0', b'acknowledged')\n"
        "number = freeze(folder)\n"
        "refused = None\n"
        "try: store.probe()\n"
        "except ValueError as error: refused = str(error)\n"
        "print(json.dumps(dict(number=number, refused=refused, failures=[\n"
        "    failure(store.put_if_absent, 'log/1', b''), failure(store.put_if_absent, 'new/1', b''),\n"
        "    failure(store.replace, 'log/0', b''), failure(store.delete, 'log/0')],\n"
        "    kept=[store.read('log/0').decode(), store.keys('')])))",
        tmp_path,
    )
    assert told["number"] in (errno.EROFS, errno.EACCES)
    for failure in told["failures"]:
        number, sentence = failure
        assert number == told["number"]
        assert f"store {str(tmp_path)!r} could not " in sentence
        assert os.strerror(number) in sentence
        assert "that can be written" in sentence
    assert "cannot be written (" in told["refused"]
    assert told["kept"] == ["acknowledged", ["log/0"]]


def test_what_cannot_be_looked_at_is_not_taken_for_empty(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / ("x" * 300))  # Longer than a name can be.
    for use in all_uses(store):
        with pytest.raises(StoreError) as error:
            use()
        assert error.value.errno == errno.ENAMETOOLONG


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StoreError("store 'a' is full", errno.ENOSPC)))
    assert isinstance(error, StoreError)
    assert (str(error), error.errno) == ("store 'a' is full", errno.ENOSPC)


def test_an_unreadable_disk_is_no_missing_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "bad").symlink_to("/proc/self/mem")  # Its first bytes cannot be read.
    with pytest.raises(StoreError) as error:
        store.read("bad")
    assert error.value.errno == errno.EIO
    assert_sentence(error.value, f"store {str(tmp_path)!r} could not read 'bad' (")
