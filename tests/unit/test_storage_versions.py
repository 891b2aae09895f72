"""Records of older versions stay readable; those of newer ones are refused in one sentence that says how to mend it."""

import json
import os
from pathlib import Path

import made_run
import pytest

from storage import layout
from storage.facts import Entry, Step
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import LocalStore
from storage.records import Commit, Incarnation, read_record
from storage.verify import verify

# A run of one step as version 1 of the log told it, bytes as they were written.
VERSION_1 = {
    "runs/old/config.json": (
        b'{"group_size": 2, "groups_per_step": 1, "max_policy_age": 0, "regime": "sync"}'
    ),
    "runs/old/incarnations/000000.json": (
        b'{"controller":{"claimed_at":1790000000.0,"git_commit":null,"host":"host","pid":7,'
        b'"versions":{"torch":"2.13.0"}},"incarnation":0,"previous_last":null,"run_id":"old",'
        b'"schema_version":1}'
    ),
    "runs/old/log/000000-00000000.json": (
        b'{"at":1790000001.0,"facts":[{"kind":"started","meshes":["trainer"],"run_id":"old",'
        b'"sources":[]}],"incarnation":0,"schema_version":1,"seq":0}'
    ),
    "runs/old/log/000000-00000001.json": (
        b'{"at":1790000002.0,"facts":[{"kind":"warm_started","loss":0.5,"seconds":1.0,"steps":3,'
        b'"weights_digest":"w0"},{"intervals":[{"end":1790000002.0,"kind":"startup",'
        b'"start":1790000000.0}],"kind":"intervals","mesh":"trainer"}],"incarnation":0,'
        b'"schema_version":1,"seq":1}'
    ),
    "runs/old/log/000000-00000002.json": (
        b'{"at":1790000003.0,"facts":[{"draws":[{"draw":0,"environment":"sums",'
        b'"group_id":"old-00000000","index":4,"prompt_id":"p"}],"kind":"admitted","round":1}],'
        b'"incarnation":0,"schema_version":1,"seq":2}'
    ),
    "runs/old/log/000000-00000003.json": (
        b'{"at":1790000004.0,"facts":[{"group_ids":["old-00000000"],"kind":"dropped",'
        b'"reason":"prompt_too_long","step":null}],"incarnation":0,"schema_version":1,"seq":3}'
    ),
    "runs/old/log/000000-00000004.json": (
        b'{"at":1790000005.0,"facts":[{"advantages":null,"group_ids":[],"kind":"batched","step":1}'
        b',{"age_max":0,"age_mean":0.0,"checkpoint":null,"group_ids":[],"kind":"step","metrics":'
        b'{"loss":0.25},"optimizer_updates":0,"policy_version":1,"score_set":"run","step":1,'
        b'"weights_digest":"w1"},{"bytes":10,"kind":"published","parity":{"entropy":1.5,'
        b'"max":1e-05,"mean":1e-06,"tokens":8},"policy_version":1,"seconds":0.5,'
        b'"weights_digest":"w1"}],"incarnation":0,"schema_version":1,"seq":4}'
    ),
    "runs/old/log/000000-00000005.json": (
        b'{"at":1790000006.0,"facts":[{"attempt":1,"cause":"MeshCall","kind":"retry","seconds":'
        b'0.25,"stage":"train"},{"kind":"end","reason":"disk full","status":"failed"}],'
        b'"incarnation":0,"schema_version":1,"seq":5}'
    ),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


def test_a_log_of_version_1_stays_readable(store: LocalStore) -> None:
    for key, data in VERSION_1.items():
        store.put_if_absent(key, data)
    entries = read_entries(store, "old")
    assert [entry.schema_version for entry in entries] == [1] * 6
    ledger = Ledger.fold(entries, read_incarnations(store, "old"))
    assert (ledger.status, ledger.last_step, ledger.dropped) == (
        "failed",
        1,
        {"prompt_too_long": 1},
    )
    assert isinstance(ledger.steps[1], Step)
    assert verify(store, "old").problems == []


@pytest.mark.parametrize(
    ("key", "record_type", "form", "known"),
    [
        (layout.entry_key("run", 0, 0), Entry, "log", 2),
        (layout.incarnation_key("run", 0), Incarnation, "incarnation", 1),
        (layout.commit_key("run", "round-000000"), Commit, "commit", 1),
    ],
)
def test_a_newer_version_is_refused(
    store: LocalStore,
    key: str,
    record_type: type[Entry | Incarnation | Commit],
    form: str,
    known: int,
) -> None:
    run = made_run.finished(store)
    newer = {"schema_version": known + 1, "something": "else"}
    store.replace(key, json.dumps(newer).encode())
    sentence = (
        f"{key} was written by a newer Forgeflow ({form} version {known + 1}; this one reads up to {known}): "
        "upgrade, or use the one that wrote it"
    )
    with pytest.raises(ValueError) as refusal:
        read_record(store, key, record_type)
    assert str(refusal.value) == sentence
    assert sentence in " | ".join(each.sentence for each in verify(store, run.run_id).problems)


@pytest.mark.parametrize("stated", [True, "3", None, 2.5, 0, -1])
def test_what_states_no_version_is_not_taken_for_newer(store: LocalStore, stated: object) -> None:
    store.put_if_absent("entry", json.dumps({"schema_version": stated}).encode())
    with pytest.raises(ValueError, match="entry is no valid Entry: "):
        read_record(store, "entry", Entry)


@pytest.mark.parametrize("data", [b"", b"[3]", b"3", b"{", b"\x80\x04.", b"[" * 100_000])
def test_what_is_no_record_is_not_taken_for_newer(store: LocalStore, data: bytes) -> None:
    store.put_if_absent("entry", data)
    with pytest.raises(ValueError, match="entry is no valid Entry: "):
        read_record(store, "entry", Entry)
