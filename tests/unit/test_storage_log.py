"""The log: what is acknowledged counts, and one controller at a time holds a run."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import layout
from storage.facts import End, Entry, Fact, Retry, Sealed, Started, Step
from storage.log import Fenced, RunLog, read_entries, read_incarnations
from storage.objects import LocalStore
from storage.records import Controller, EntryPosition


def _claim(store: LocalStore) -> RunLog:
    return RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))


def _fact(number: int) -> Fact:
    return Retry(stage="train", attempt=number + 1, cause="test", seconds=0.5)


def _facts(store: LocalStore) -> list[Fact]:
    return [fact for entry in read_entries(store, "run") for fact in entry.facts]


def test_entries_are_read_back_as_they_were_appended(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = _claim(store)
    step = Step(
        step=1,
        group_ids=("run-00000001", "run-00000000"),
        score_set="run",
        weights_digest="d",
        policy_version=1,
        optimizer_updates=2,
        age_max=0,
        age_mean=0.0,
        metrics={"loss": 1, "gain": 1e-30},
        checkpoint=None,
    )
    appended = [log.append(Started(run_id="run", meshes=("trainer",))), log.append(step, _fact(0))]
    assert read_entries(store, "run") == appended
    assert [(entry.incarnation, entry.seq) for entry in appended] == [(0, 0), (0, 1)]
    assert store.keys("runs/run/log/") == [
        "runs/run/log/000000-00000000.json",
        "runs/run/log/000000-00000001.json",
    ]


def test_an_entry_has_one_encoding() -> None:
    entry = Entry(incarnation=0, seq=3, at=1, facts=(End(status="finished", reason=None),))
    assert entry.to_bytes() == (
        b'{"at":1.0,"facts":[{"kind":"end","reason":null,"status":"finished"}],'
        b'"incarnation":0,"schema_version":2,"seq":3}'
    )


def test_a_fact_is_refused_if_it_is_empty_open_or_not_finite() -> None:
    with pytest.raises(ValueError, match="facts"):
        Entry(incarnation=0, seq=0, at=0.0, facts=())
    with pytest.raises(ValueError, match="finite"):
        Retry(stage="train", attempt=1, cause="test", seconds=float("nan"))
    with pytest.raises(ValueError, match="surplus"):
        End.model_validate({"status": "finished", "reason": None, "surplus": 1})


def test_a_successor_names_the_last_entry_and_fences_the_controller_before(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    old = _claim(store)
    old.append(_fact(0))
    old.append(_fact(1))
    new = _claim(store)
    assert new.incarnation.previous_last == EntryPosition(incarnation=0, seq=1)
    for _ in range(2):
        with pytest.raises(Fenced, match="run/log/000000-00000002"):
            old.append(_fact(9))
    new.append(_fact(2))
    assert _facts(store) == [_fact(0), _fact(1), _fact(2)]


def test_every_acknowledged_entry_counts_while_a_successor_claims(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    old = _claim(store)

    def append_until_fenced() -> list[Entry]:
        acknowledged: list[Entry] = []
        with pytest.raises(Fenced):
            for number in range(2000):
                acknowledged.append(old.append(_fact(number)))
        return acknowledged

    with ThreadPoolExecutor(1) as pool:
        appending = pool.submit(append_until_fenced)
        while len(store.keys("runs/run/log/")) < 5:
            pass
        _claim(store)
        assert read_entries(store, "run") == appending.result()
    assert len(appending.result()) >= 4


def test_of_controllers_that_claim_at_once_only_the_newest_can_append(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    _claim(store).append(_fact(0))

    def claim_and_append(number: int) -> RunLog | None:
        try:
            return _claim(store)
        except Fenced:
            return None

    with ThreadPoolExecutor(8) as pool:
        logs = [log for log in pool.map(claim_and_append, range(8)) if log]
    incarnations = read_incarnations(store, "run")
    assert sorted(log.incarnation.incarnation for log in logs) == list(range(1, len(incarnations)))
    for log in logs:
        if log.incarnation == incarnations[-1]:
            log.append(_fact(1))
        else:
            with pytest.raises(Fenced):
                log.append(_fact(2))
    assert [fact for fact in _facts(store) if not isinstance(fact, Sealed)] == [_fact(0), _fact(1)]


def test_what_lies_beyond_the_named_last_entry_does_not_exist(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    _claim(store)
    new = _claim(store)
    assert new.incarnation.previous_last is None
    for seq in (1, 2):
        late = Entry(incarnation=0, seq=seq, at=0.0, facts=(_fact(9),))
        assert store.put_if_absent(layout.entry_key("run", 0, seq), late.to_bytes())
    new.append(_fact(0))
    assert _facts(store) == [_fact(0)]


def test_what_lies_beyond_a_gap_does_not_exist(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = _claim(store)
    for number in range(4):
        log.append(_fact(number))
    store.local_path(layout.entry_key("run", 0, 2)).unlink()
    assert _facts(store) == [_fact(0), _fact(1)]
    assert _claim(store).incarnation.previous_last == EntryPosition(incarnation=0, seq=1)
    assert _facts(store) == [_fact(0), _fact(1)]


def test_a_claim_that_died_after_its_seal_is_survived(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    old = _claim(store)
    old.append(_fact(0))
    seal = Entry(incarnation=0, seq=1, at=0.0, facts=(Sealed(host="host", pid=1),))
    store.put_if_absent(layout.entry_key("run", 0, 1), seal.to_bytes())
    with pytest.raises(Fenced):
        old.append(_fact(9))
    _claim(store).append(_fact(1))
    assert [fact for fact in _facts(store) if not isinstance(fact, Sealed)] == [_fact(0), _fact(1)]


class _ForgetfulStore(LocalStore):
    """A store that loses the answer to every write that succeeded."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        super().put_if_absent(key, data)
        return False


def test_a_lost_answer_to_an_own_write_is_success(tmp_path: Path) -> None:
    store = _ForgetfulStore(tmp_path)
    log = _claim(store)
    log.append(_fact(0))
    log.append(_fact(1))
    assert _facts(store) == [_fact(0), _fact(1)]


class _WriteOnlyStore(LocalStore):
    """A store that can create objects and do nothing else."""

    def keys(self, prefix: str) -> list[str]:
        raise AssertionError(f"listed {prefix}")

    def read(self, key: str) -> bytes:
        raise AssertionError(f"read {key}")


def test_an_append_neither_lists_nor_reads_the_log(tmp_path: Path) -> None:
    log = RunLog(_WriteOnlyStore(tmp_path), _claim(LocalStore(tmp_path)).incarnation)
    assert [log.append(_fact(0)).seq, log.append(_fact(1)).seq] == [0, 1]


def test_threads_append_without_gaps(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = _claim(store)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(log.append, map(_fact, range(20))))
    entries = read_entries(store, "run")
    assert [entry.seq for entry in entries] == list(range(20))
    assert {fact.attempt for fact in _facts(store) if isinstance(fact, Retry)} == set(range(1, 21))


def test_an_unreadable_entry_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = _claim(store)
    log.append(_fact(0))
    key = layout.entry_key("run", 0, 1)
    store.put_if_absent(key, b'{"facts":')
    with pytest.raises(ValueError, match=key):
        read_entries(store, "run")
    store.replace(key, store.read(layout.entry_key("run", 0, 0)))
    with pytest.raises(ValueError, match=f"{key} holds entry 0 of incarnation 0"):
        read_entries(store, "run")


def test_reading_leaves_garbage_collection_as_it_was(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    log = _claim(store)
    log.append(_fact(0))
    read_entries(store, "run")
    assert gc.isenabled()
    store.put_if_absent(layout.entry_key("run", 0, 1), b'{"facts":')
    with pytest.raises(ValueError):
        read_entries(store, "run")
    assert gc.isenabled()
    gc.disable()
    try:
        read_incarnations(store, "run")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_missing_incarnation_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    _claim(store)
    _claim(store)
    store.local_path(layout.incarnation_key("run", 0)).unlink()
    with pytest.raises(ValueError, match="incarnation 0 of run run is missing"):
        read_incarnations(store, "run")


class BreaksOff(LocalStore):
    """Raises after its next write, or before it."""

    breaking = ""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        when, BreaksOff.breaking = BreaksOff.breaking, ""
        if when == "before":
            raise KeyboardInterrupt
        written = super().put_if_absent(key, data)
        if when == "after":
            raise OSError("the answer was lost")
        return written


def test_an_append_that_broke_off_counts_if_it_was_written(tmp_path: Path) -> None:
    store = BreaksOff(tmp_path)
    log = _claim(store)
    log.append(_fact(0))
    BreaksOff.breaking = "after"
    with pytest.raises(OSError, match="the answer was lost"):
        log.append(_fact(1))
    settled = log.settle()
    assert settled is not None and settled.facts == (_fact(1),)
    assert log.settle() is None
    BreaksOff.breaking = "before"
    with pytest.raises(KeyboardInterrupt):
        log.append(_fact(2))
    assert log.settle() is None
    BreaksOff.breaking = "after"
    with pytest.raises(OSError, match="the answer was lost"):
        log.append(_fact(3))
    log.append(_fact(4))  # settles by itself
    assert _facts(store) == [_fact(0), _fact(1), _fact(3), _fact(4)]
    _claim(store)
    with pytest.raises(Fenced):
        log.append(_fact(5))
    assert log.settle() is None
