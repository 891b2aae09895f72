"""Stores on S3: how they are named and found, and that nothing secret leaves the environment."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

import pytest
from s3_server import BUCKET, REGION, WRITER, S3Server

from storage import s3
from storage.objects import open_store
from storage.s3 import S3Store
from storage.workspace import keep_folder, open_folder


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://my.bucket-1/a/b c/", "my.bucket-1", "a/b c"),
        ("S3://bucket/a", "bucket", "a"),
    ],
)
def test_a_uri_names_a_bucket_and_a_prefix(uri: str, bucket: str, prefix: str) -> None:
    store = open_store(uri)
    assert store == S3Store(bucket, prefix)
    assert open_store(store.uri) == store
    assert store.local_path("runs/r/model/") is None


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3:///a", "s3://UPPER/a", "s3://x/a", "s3://bucket/../a", "s3://bucket//a",
     "s3://bucket/a/./b", "s3://bucket/.tmp-a", "s3://bucket/\0", "s3://b?versionId=1/a"],
)  # fmt: skip
def test_a_uri_that_names_none_is_refused_in_one_sentence(uri: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not at s3://BUCKET/PREFIX \(.*\): correct it"
    ) as error:
        open_store(uri)
    assert repr(uri) in str(error.value)


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="holds no credentials") as error:
        open_store("s3://key:secret@bucket/a")
    assert "secret" not in str(error.value)


def test_opening_a_store_touches_no_network(
    s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        listener.settimeout(0)
        store = open_store(s3_store_uri)
        assert store.uri == s3_store_uri
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_endpoint_and_credentials_may_be_a_profiles(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3_server.environment():
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config"
    path.write_text(
        f"[profile runs]\naws_access_key_id = {WRITER[0]}\naws_secret_access_key = {WRITER[1]}\n"
        f"endpoint_url = {s3_server.endpoint}\nregion = {REGION}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "runs")
    store = open_store(s3_server.new_uri())
    assert store.put_if_absent("a", b"data")
    assert store.read("a") == b"data"


def test_the_region_is_the_one_that_all_tools_of_aws_read(
    s3_store_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with caplog.at_level(logging.DEBUG, "botocore"):
        open_store(s3_store_uri).exists("a")
    assert "eu-central-1/s3/aws4_request" in caplog.text


def test_nothing_secret_is_logged(s3_store_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        store = open_store(s3_store_uri)
        store.put_if_absent("a", b"data")
        store.probe()
    assert WRITER[1] not in caplog.text
    assert WRITER[1] not in repr(store) + store.uri
    ours = [record for record in caplog.records if record.name.startswith("storage")]
    assert ours == []  # A healthy store is not worth a line.


def test_a_long_listing_comes_whole(s3_store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PAGE_KEYS", 3)
    store = open_store(s3_store_uri)
    keys = sorted(f"{folder}/{number}" for folder in "abcdefgh" for number in range(2))
    for key in keys:
        store.put_if_absent(key, b"")
    assert store.keys("") == keys
    assert store.folders("") == list("abcdefgh")


def test_a_bucket_may_be_a_store_and_hold_markers_of_folders(s3_store_uri: str) -> None:
    whole = open_store(f"s3://{BUCKET}")
    assert isinstance(whole, S3Store)
    prefix = s3_store_uri.removeprefix(f"s3://{BUCKET}/")
    assert whole.put_if_absent(f"{prefix}/runs/a", b"data")
    marker = {"Bucket": BUCKET, "Key": f"{prefix}/folder/"}
    whole.requests.run(
        whole.requests.call("mark", lambda files: files._call_s3("put_object", **marker))
    )
    store = open_store(s3_store_uri)
    assert store.read("runs/a") == b"data"
    assert store.keys("") == ["runs/a"]
    assert whole.keys(f"{prefix}/") == [f"{prefix}/runs/a"]


def test_what_a_run_printed_stays_when_it_goes_on(
    s3_store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_store_uri)
    for machine in ("one", "another"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / machine))
        folder, output = open_folder(store, "r")
        with output.open("a") as file:
            file.write(f"on {machine}\n")
        keep_folder(store, "r", folder)
        assert not folder.exists()
    assert store.read("runs/r/output.log") == b"on one\non another\n"


def test_threads_share_a_store(s3_store_uri: str) -> None:
    store = open_store(s3_store_uri)
    won = []

    def write(number: int) -> None:
        for key in range(2):
            if store.put_if_absent(f"race/{key}", str(number).encode()):
                won.append((f"race/{key}", str(number).encode()))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [(key, store.read(key)) for key in store.keys("")]
    assert len(won) == 2
