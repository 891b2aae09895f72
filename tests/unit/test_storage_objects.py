"""The object store: one winner per key, nothing half written, nothing outside the root."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import storage
from storage.objects import LocalStore, ObjectNotFound, check_writable, open_store


def _run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that can import `storage`."""
    root = Path(storage.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_of_eight_processes_exactly_one_creates_a_key(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        for number in range(10):
            key = f"race/{number}"
            attempts = [
                (data, pool.submit(store.put_if_absent, key, data))
                for data in (f"writer {writer}".encode() for writer in range(8))
            ]
            winners = [data for data, attempt in attempts if attempt.result()]
            assert winners == [store.read(key)]
    assert store.keys("") == [f"race/{number}" for number in range(10)]
    assert len(list((tmp_path / "store/race").iterdir())) == 10


def test_a_writer_that_is_killed_leaves_nothing_to_see(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from storage.objects import open_store\n"
        "os.link = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_store(sys.argv[1]).put_if_absent('folder/key', b'data')"
    )
    assert _run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    assert [path.name[:5] for path in (tmp_path / "folder").iterdir()] == [".tmp-"]
    store = open_store(str(tmp_path))
    assert store.keys("") == []
    assert not store.exists("folder/key")
    assert store.put_if_absent("folder/key", b"other")
    assert store.keys("folder/") == ["folder/key"]


def test_an_object_keeps_its_first_content_until_it_is_replaced(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a/b", b"first")
    assert not store.put_if_absent("a/b", b"second")
    assert store.read("a/b") == b"first"
    store.replace("a/b", b"third")
    assert store.read("a/b") == b"third"
    assert store.local_path("a/b").read_bytes() == b"third"


def test_keys_are_those_with_the_prefix_and_folders_those_below_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("runs/b/log/2", "runs/b/log/1", "runs/a", "runs/a-b/x", "other"):
        store.put_if_absent(key, b"")
    assert store.keys("runs/b/") == ["runs/b/log/1", "runs/b/log/2"]
    assert store.keys("runs/a") == ["runs/a", "runs/a-b/x"]
    assert store.keys("runs/b/log/1") == ["runs/b/log/1"]
    assert store.keys("nowhere/") == []
    assert store.folders("runs/") == ["a-b", "b"]
    assert store.folders("") == ["runs"]
    assert store.folders("nowhere/") == []


@pytest.mark.parametrize("key", ["missing", "folder", "folder/object/below"])
def test_what_is_no_object_is_not_found(tmp_path: Path, key: str) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("folder/object", b"")
    assert not store.exists(key)
    with pytest.raises(ObjectNotFound, match=key):
        store.read(key)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../../b", "a//b", "./a", "a/", ".tmp-a", "\0"]
)
def test_a_key_cannot_lead_out_of_the_store_or_hide(tmp_path: Path, key: str) -> None:
    store = LocalStore(tmp_path / "store")
    with pytest.raises(ValueError, match="is not a key"):
        store.put_if_absent(key, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gs://bucket/folder", "file:///tmp", "memory://", ""])
def test_a_uri_that_is_no_local_path_is_refused_by_name(uri: str) -> None:
    with pytest.raises(ValueError, match=r"is not a local path and not on S3: name") as error:
        open_store(uri)
    assert repr(uri) in str(error.value)


def test_a_store_is_found_again_by_its_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("store").uri == str(tmp_path / "store")
    assert open_store(open_store("store").uri) == open_store("./store")


def test_checking_a_store_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(str(tmp_path))
    check_writable(str(tmp_path / "not/yet/there"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "link", "/proc/store", "/proc/self/fd"])
def test_a_store_that_cannot_be_written_is_refused_by_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    uri = str(tmp_path / place)
    with pytest.raises(ValueError, match=r"cannot be written .*: name a directory") as error:
        check_writable(uri)
    assert repr(uri) in str(error.value)


def test_the_light_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, storage.summary, storage.runs, storage.log\n"
        "print({'pyarrow', 'numpy', 'torch', 'prefect', 'forge_core'} & sys.modules.keys())"
    )
    assert _run_python(code).stdout == "set()\n"
