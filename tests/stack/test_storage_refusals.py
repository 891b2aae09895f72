"""Stores on S3 that may not or cannot be used: one sentence, before a run or in its midst."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from failing_stores import BRIEF, QUICK, all_uses, assert_sentence, claim, retries
from many_writers import RUN_ID
from s3_proxy import Behaviour, Exchange, FaultyProxy, ignore_condition, refuse
from s3_server import READER, WRITER

from storage.contract import StoreError
from storage.facts import Started
from storage.log import read_entries
from storage.objects import check_writable, open_store
from storage.s3 import S3Store


@pytest.fixture
def store(s3_proxy: FaultyProxy, s3_store_uri: str) -> S3Store:
    return replace(S3Store.from_uri(s3_store_uri), patience=QUICK)


@pytest.fixture
def hasty(store: S3Store) -> S3Store:
    """The same, which soon gives up."""
    return replace(store, patience=BRIEF)


def _profile(path: Path, credentials: tuple[str, str]) -> None:
    key, secret = credentials
    path.write_text(f"[runs]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_proxy: FaultyProxy) -> Path:
    """A file of credentials that the environment names instead of holding them."""
    path = tmp_path / "credentials"
    _profile(path, WRITER)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "runs")
    return path


@pytest.mark.parametrize(
    "refusal", [refuse(400, "ExpiredToken"), refuse(403, "InvalidAccessKeyId")]
)
def test_credentials_that_expire_in_mid_run_are_read_anew(
    refusal: Behaviour,
    profile: Path,
    store: S3Store,
    s3_proxy: FaultyProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _profile(profile, READER)
    assert store.keys("") == []

    def renew(exchange: Exchange) -> None:
        _profile(profile, WRITER)
        refusal(exchange)

    s3_proxy.plan(renew, method="PUT")
    assert store.put_if_absent("a", b"data")  # The old ones had no right to.
    assert len(retries(caplog)) == 1
    assert not any(secret in caplog.text for secret in (*WRITER, *READER))


def test_credentials_that_stay_expired_are_one_sentence(
    profile: Path, store: S3Store, s3_proxy: FaultyProxy
) -> None:
    log = claim(store)
    entry = log.append(Started(run_id=RUN_ID, meshes=()))
    s3_proxy.plan(*[refuse(400, "ExpiredToken")] * 100, method="PUT")
    with pytest.raises(StoreError) as error:
        log.append(Started(run_id=RUN_ID, meshes=("trainer",)))
    assert_sentence(
        error.value, f"credentials of store {store.uri!r} have expired", "renew", "resume RUN"
    )
    assert s3_proxy.num_planned > 90
    s3_proxy.recover()
    assert read_entries(store, RUN_ID) == [entry]
    assert log.settle() is None


def test_a_missing_bucket_is_no_missing_object(s3_store_uri: str) -> None:
    uri = "s3://no-such-bucket/store"
    for use in all_uses(open_store(uri)):
        with pytest.raises(StoreError) as error:
            use()
        # The server tells only who may make buckets that one is missing, if it is to be written to.
        assert "NoSuchBucket" in str(error.value) or "AccessDenied" in str(error.value)
        assert_sentence(error.value, repr(uri))
    with pytest.raises(ValueError, match=f"store '{uri}' could not write "):
        check_writable(uri)


def test_a_bucket_that_goes_missing_in_mid_run_is_told(
    hasty: S3Store, s3_proxy: FaultyProxy
) -> None:
    gone = refuse(404, "NoSuchBucket")
    for method in ("GET", "PUT", "DELETE"):
        s3_proxy.plan(*[gone] * 8, method=method)
    for use in all_uses(hasty):
        with pytest.raises(StoreError, match=r"NoSuchBucket.*: create the bucket"):
            use()


def test_denied_access_is_told_with_the_rights_to_give(
    hasty: S3Store, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty.put_if_absent("a", b"data")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    assert hasty.read("a") == b"data"
    sentence = r"\(403 AccessDenied.*: give the credentials the rights that docs/s3.md lists"
    for use in (lambda: hasty.put_if_absent("b", b""), lambda: hasty.delete("a")):
        with pytest.raises(StoreError, match=sentence):
            use()
    with pytest.raises(ValueError, match=sentence):
        hasty.probe()
    for method in ("GET", "GET", "GET"):
        s3_proxy.plan(refuse(403, "AccessDenied"), method=method)
    for look in (lambda: hasty.read("a"), lambda: hasty.exists("a"), lambda: hasty.keys("")):
        with pytest.raises(StoreError, match=sentence):
            look()


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_server_that_ignores_conditions_is_refused(
    method: str, store: S3Store, s3_proxy: FaultyProxy
) -> None:
    s3_proxy.always = lambda exchange: (
        ignore_condition(exchange)
        if exchange.handler.command == method
        else exchange.relay(exchange.forward())
    )
    with pytest.raises(ValueError, match=r"ignores If-None-Match.*: use a server that") as error:
        store.probe()
    assert repr(store.uri) in str(error.value)
    assert store.keys("") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "have expired or are refused .*: renew them"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "have expired or are refused .*: renew them"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "could not write .*AWS_ENDPOINT_URL is right"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, r"\(Invalid endpoint: nowhere\): correct AWS_ENDPOINT_URL"),
        ({"AWS_PROFILE": "none"}, r"have expired or are refused .*profile \(none\).*: renew them"),
    ],
)  # fmt: skip
def test_a_store_that_cannot_be_used_is_refused_before_a_run(
    change: dict[str, str], sentence: str, hasty: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence) as error:
        hasty.probe()
    assert_sentence(error.value, repr(hasty.uri))
