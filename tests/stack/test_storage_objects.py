"""The object stores, each by the same tests: one winner per key, nothing half written, nothing outside the store."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from many_writers import RUN_ID, commit_all, names, put, writers

import storage
from storage import layout, s3_upload
from storage.objects import (
    LocalStore,
    ObjectNotFound,
    ObjectStore,
    check_writable,
    open_store,
)
from storage.records import Commit

NewUri = Callable[[], str]


@pytest.fixture(params=["local", "s3"])
def new_uri(request: pytest.FixtureRequest, tmp_path: Path) -> NewUri:
    """Gives URIs of stores that nobody has used."""
    if request.param == "local":
        return lambda: str(tmp_path / f"store{time.monotonic_ns()}")
    request.getfixturevalue("s3_store_uri")
    server = request.getfixturevalue("s3_server")
    return server.new_uri


@pytest.fixture
def store(new_uri: NewUri) -> ObjectStore:
    return open_store(new_uri())


def _run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that can import `storage`."""
    root = Path(storage.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def eight() -> Iterator[ProcessPoolExecutor]:
    """Eight processes, which are slow to start."""
    with writers(8) as pool:
        yield pool


def _aws() -> dict[str, str]:
    """What the eight, which are older than a test, must learn of its environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def test_of_eight_processes_exactly_one_creates_a_key(
    eight: ProcessPoolExecutor, store: ObjectStore
) -> None:
    for number in range(4):
        key = f"race/{number}"
        attempts = [
            (data, eight.submit(put, store.uri, _aws(), key, data))
            for data in (f"writer {writer}".encode() for writer in range(8))
        ]
        winners = [data for data, attempt in attempts if attempt.result()]
        assert winners == [store.read(key)]
    assert store.keys("") == [f"race/{number}" for number in range(4)]
    folder = store.local_path("race/")
    assert folder is None or len(list(folder.iterdir())) == 4


def test_eight_processes_commit_every_key_exactly_once(
    eight: ProcessPoolExecutor, new_uri: NewUri
) -> None:
    uri, num_commits = new_uri(), 200
    works = [eight.submit(commit_all, uri, _aws(), writer, num_commits) for writer in range(8)]
    acknowledged = [commit for work in works for commit in work.result()]
    store = open_store(uri)
    expected = sorted({name for writer in range(8) for name in names(writer, num_commits)})
    keys = store.keys(layout.commits_folder(RUN_ID))
    assert keys == [layout.commit_key(RUN_ID, name) for name in expected]
    stored = [Commit.model_validate_json(data, strict=True) for data in store.read_many(keys)]
    assert [commit.key for commit in stored] == expected
    by_name = {commit.key: commit for commit in stored}
    # Every writer was told of what stands, of its own or of whoever was first.
    assert len(acknowledged) == 8 * num_commits
    assert all(commit == by_name[commit.key] for commit in acknowledged)
    parts = store.read_many([commit.part.key for commit in stored])
    for commit, data in zip(stored, parts, strict=True):
        assert hashlib.sha256(data).hexdigest() == commit.part.sha256


def test_a_writer_that_is_killed_leaves_nothing_to_see(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from storage.objects import open_store\n"
        "os.link = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "open_store(sys.argv[1]).put_if_absent('folder/key', b'data')"
    )
    assert _run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    assert [path.name[:5] for path in (tmp_path / "folder").iterdir()] == [".tmp-"]
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder/probe").write_bytes(b"of a check under way")
    store = open_store(str(tmp_path))
    assert store.keys("") == []
    assert store.listing("") == []
    assert store.folders("") == ["folder"]
    assert not store.exists("folder/key")
    assert store.put_if_absent("folder/key", b"other")
    assert store.keys("folder/") == ["folder/key"]


def test_an_object_keeps_its_first_content_until_it_is_replaced(store: ObjectStore) -> None:
    assert store.put_if_absent("a/b", b"first")
    assert not store.put_if_absent("a/b", b"second")
    assert store.read("a/b") == b"first"
    store.replace("a/b", b"third")
    assert store.read("a/b") == b"third"
    path = store.local_path("a/b")
    assert path is None or path.read_bytes() == b"third"


def test_a_deleted_object_is_gone_and_may_be_created_again(store: ObjectStore) -> None:
    store.put_if_absent("a/b", b"first")
    store.put_if_absent("a/c", b"stays")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("nowhere/at/all")
    store.delete("a")  # A folder is no object.
    assert not store.exists("a/b")
    assert store.keys("") == ["a/c"]
    assert store.put_if_absent("a/b", b"second")
    assert store.read("a/b") == b"second"


def test_keys_are_those_with_the_prefix_and_folders_those_below_it(store: ObjectStore) -> None:
    for key in ("runs/b/log/2", "runs/b/log/1", "runs/a", "runs/a-b/x", "other"):
        store.put_if_absent(key, b"")
    assert store.keys("runs/b/") == ["runs/b/log/1", "runs/b/log/2"]
    assert store.keys("runs/a") == ["runs/a", "runs/a-b/x"]
    assert store.keys("runs/b/log/1") == ["runs/b/log/1"]
    assert store.keys("nowhere/") == []
    assert store.folders("runs/") == ["a-b", "b"]
    assert store.folders("") == ["runs"]
    assert store.folders("nowhere/") == []


def test_a_listing_tells_size_and_time(store: ObjectStore) -> None:
    before = time.time()
    for number in (2, 0, 1):
        store.put_if_absent(f"a/{number}", bytes(number))
    infos = store.listing("a/")
    assert [(info.key, info.bytes) for info in infos] == [("a/0", 0), ("a/1", 1), ("a/2", 2)]
    # Servers give whole seconds.
    assert all(before - 1 <= info.modified_at <= time.time() + 1 for info in infos)
    assert store.listing("nowhere/") == []


def test_many_are_read_in_order_and_the_first_missing_is_named(store: ObjectStore) -> None:
    keys = [f"many/{number}" for number in range(40)]
    for key in keys:
        store.put_if_absent(key, key.encode())
    wanted = [*reversed(keys), keys[0]]
    assert store.read_many(wanted) == [key.encode() for key in wanted]
    assert store.read_many([]) == []
    with pytest.raises(ObjectNotFound, match=r"'many/b'"):
        store.read_many([keys[0], "many/b", keys[1], "many/a"])


@pytest.mark.parametrize("num_bytes", [0, 1000, 12 * 2**20])
def test_a_file_is_stored_whole_and_keeps_apart_from_the_original(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(s3_upload, "WHOLE_BYTES", 6 * 2**20)
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * 2**20)  # The least that S3 allows.
    path, data = tmp_path / "file", os.urandom(num_bytes)
    path.write_bytes(data)
    assert store.put_file_if_absent("big/file", path)
    assert not store.put_file_if_absent("big/file", path)
    with path.open("r+b") as file:
        file.write(b"changed")
    path.with_name("other").write_bytes(b"other")
    assert not store.put_file_if_absent("big/file", path.with_name("other"))
    assert store.read("big/file") == data
    assert [info.bytes for info in store.listing("big/")] == [num_bytes]


def test_a_big_file_is_never_in_memory_as_a_whole(new_uri: NewUri, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(120 * 2**20)
    code = (
        "import re, sys; from pathlib import Path; from storage.objects import open_store\n"
        "from storage import s3_upload; s3_upload.PART_BYTES = 5 * 2**20\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "store = open_store(sys.argv[1]); store.put_if_absent('first', b''); before = peak()\n"
        "assert store.put_file_if_absent('file', Path(sys.argv[2]))\n"
        "print(peak() - before)"
    )
    uri = new_uri()
    done = _run_python(code, uri, str(path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 1024
    assert [info.bytes for info in open_store(uri).listing("file")] == [120 * 2**20]


@pytest.mark.parametrize("key", ["missing", "folder", "folder/object/below"])
def test_what_is_no_object_is_not_found(store: ObjectStore, key: str) -> None:
    store.put_if_absent("folder/object", b"")
    assert store.exists("folder/object")
    assert not store.exists(key)
    with pytest.raises(ObjectNotFound, match=key):
        store.read(key)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../../b", "a//b", "./a", "a/", ".tmp-a", "\0"]
)
def test_a_key_cannot_lead_out_of_the_store_or_hide(store: ObjectStore, key: str) -> None:
    for use in (store.read, store.exists, store.delete):
        with pytest.raises(ValueError, match="is not a key"):
            use(key)
    for write in (store.put_if_absent, store.replace):
        with pytest.raises(ValueError, match="is not a key"):
            write(key, b"")
    assert store.keys("") == []


def test_a_prefix_cannot_lead_out_of_the_store(store: ObjectStore) -> None:
    for look in (store.keys, store.listing, store.folders):
        with pytest.raises(ValueError, match="is not a key"):
            look("../")


def test_stores_do_not_see_each_other(new_uri: NewUri) -> None:
    uri = new_uri()
    first, second = open_store(uri), open_store(f"{uri}0")
    for store, data in ((first, b"first"), (second, b"second")):
        assert store.put_if_absent("runs/r/config.json", data)
    assert first.keys("") == second.keys("") == ["runs/r/config.json"]
    assert (first.read("runs/r/config.json"), second.read("runs/r/config.json")) == (
        b"first",
        b"second",
    )


def test_a_store_is_found_again_by_its_uri_and_in_another_process(new_uri: NewUri) -> None:
    store = open_store(new_uri())
    store.put_if_absent("a", b"data")
    assert open_store(store.uri) == store == open_store(f"{store.uri}/")
    assert pickle.loads(pickle.dumps(store)) == store
    code = "import sys; from storage.objects import open_store; print(open_store(sys.argv[1]).read('a'))"
    assert _run_python(code, store.uri).stdout == "b'data'\n"


def test_checking_a_store_leaves_nothing_behind(new_uri: NewUri, tmp_path: Path) -> None:
    uri = new_uri()
    for each in (uri, f"{uri}/not/yet/there"):
        check_writable(each)
        assert open_store(each).listing("") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gs://bucket/folder", "file:///tmp", "memory://", ""])
def test_a_uri_of_another_kind_is_refused_by_name(uri: str) -> None:
    with pytest.raises(ValueError, match=r"is not a local path and not on S3: name") as error:
        open_store(uri)
    assert repr(uri) in str(error.value)


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("store").uri == str(tmp_path / "store")
    assert open_store("./store") == LocalStore(tmp_path / "store")


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
        "import sys, storage.summary, storage.runs, storage.log; from storage.objects import open_store\n"
        "open_store('forge-store')\n"
        "print({'pyarrow', 'numpy', 'torch', 'prefect', 'forge_core', 's3fs'} & sys.modules.keys())"
    )
    assert _run_python(code).stdout == "set()\n"
