"""Garbage collection takes what nothing refers to, and nothing else; deleted runs are gone whole or not at all."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored_run import StoredRun, table_of

from storage import facts, layout
from storage.annotations import ScoreSet, open_set, read_scores, write_scores
from storage.compaction import compact, plan_compaction
from storage.deleting import children, deletable, delete_run, expired
from storage.garbage import Limits
from storage.gc import delete_garbage, find_garbage, sizes
from storage.log import RunLog
from storage.objects import LocalStore
from storage.parts import read_part, write_part
from storage.places import Compaction
from storage.records import Commit, Controller, FileRef
from storage.snapshots import take_snapshot
from storage.tombstones import is_deleted, objects_of

HOUR = 3600.0
NOW = Limits(before=time.time() + HOUR)
"""Nothing is left alone for its age."""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def run(store: LocalStore) -> StoredRun:
    """A run with three commits, two checkpoints, an evaluation and a source file, that has not ended."""
    run = StoredRun(store)
    for number in range(3):
        run.commit([2 * number, 2 * number + 1])
    run.checkpoint(0)
    run.train(1, [0, 1])
    run.train(2, [2, 3])
    run.checkpoint(2)
    part = write_part(store, layout.evaluation_prefix("run", "initial"), table_of("run", [90]))
    source = FileRef(key=layout.source_key("run", "a" * 64, "r.py"), sha256="a" * 64, bytes=3)
    store.put_if_absent(source.key, b"abc")
    run.log.append(
        facts.Started(
            run_id="run",
            meshes=(),
            sources=(facts.Source(field="reward", reference="r.py:f", file=source),),
        ),
        facts.Evaluated(
            name="initial", policy_version=0, sampled=0.0, greedy=0.0, num_prompts=1, parts=(part,)
        ),
    )
    return run


def _found(store: LocalStore, limits: Limits = NOW) -> dict[str, list[str]]:
    """Keys of the garbage by kind, without the folders that they lie in."""
    found: dict[str, list[str]] = {}
    for each in find_garbage(store, limits).garbage:
        found.setdefault(each.kind, []).append(each.key.rpartition("/")[2])
    return found


def _plant_every_kind(run: StoredRun) -> dict[str, str]:
    """End the run, and leave garbage of every kind but compacted parts; the kinds by key."""
    store = run.store
    commit, generated = run.unlogged_commit([70])
    stray = write_part(store, layout.episodes_prefix("run", "000009-000"), table_of("run", [80]))
    pruned = run.checkpoint(1)
    run.log.append(facts.Pruned(steps=(1,)))
    run.end()
    files = {
        layout.commit_key("run", commit.key): "uncounted commits",
        commit.part.key: "uncounted parts",
        stray.key: "uncounted parts",
        generated.part.key: "generated parts",
        pruned.key: "checkpoint files",
        f"{layout.checkpoint_folder('run', 2)[:-1]}.1/model": "checkpoint files",
        layout.source_key("run", "b" * 64, "r.py"): "source files",
        "episodes/compacted/run/000000-lost-000.parquet": "uncounted parts",
    }
    for key in files:
        store.put_if_absent(key, b"garbage")
    hidden = store.local_path(layout.log_folder("run")) / ".tmp-1234"
    hidden.write_bytes(b"half")
    return {**files, hidden.relative_to(store.local_path("x").parent).as_posix(): "temporary files"}


def test_a_sound_run_has_no_garbage(run: StoredRun) -> None:
    found = find_garbage(run.store, NOW)
    assert (found.garbage, found.spared) == ([], {})
    run.end()
    before = run.store.keys("")
    assert delete_garbage(run.store, NOW).garbage == []
    assert run.store.keys("") == before


def test_garbage_of_every_kind_is_found_and_only_that_is_deleted(run: StoredRun) -> None:
    before, episodes = run.store.keys(""), take_snapshot(run.store, ["run"]).table()
    planted = _plant_every_kind(run)
    log = [key for key in run.store.keys(layout.log_folder("run")) if key not in before]
    found = find_garbage(run.store, NOW)
    assert {each.key: each.kind for each in found.garbage} == planted
    assert found.spared == {}
    assert sizes(found.garbage)["source files"] == {"objects": 1, "bytes": 7}
    assert run.store.keys("") == sorted([*before, *log, *(k for k in planted if ".tmp-" not in k)])
    deleted = delete_garbage(run.store, NOW)
    assert {each.key: each.kind for each in deleted.garbage} == planted
    assert run.store.keys("") == sorted([*before, *log])
    assert not [*run.store.root.rglob(".tmp-*")]
    assert take_snapshot(run.store, ["run"]).table().equals(episodes)
    assert delete_garbage(run.store, NOW).garbage == []


def test_what_is_younger_than_the_bound_is_left_alone(run: StoredRun) -> None:
    planted = _plant_every_kind(run)
    limits = Limits(before=time.time() - HOUR)
    assert find_garbage(run.store, limits).garbage == []
    assert delete_garbage(run.store, limits).garbage == []
    # An old part that a young commit names, whose log entry may still come.
    [(part, _), *_] = [each for each in planted.items() if each[1] == "uncounted parts"]
    for key in (part, next(key for key in planted if key.endswith(".tmp-1234"))):
        os.utime(run.store.root / key, (1, 1))
    assert _found(run.store, limits) == {"temporary files": [".tmp-1234"]}
    [commit] = [key for key, kind in planted.items() if kind == "uncounted commits"]
    os.utime(run.store.root / commit, (1, 1))
    assert [each.key for each in delete_garbage(run.store, limits).garbage][:2] == [commit, part]


@pytest.mark.parametrize("status", ["failed", "cancelled", None])
def test_a_commit_that_a_resumed_run_may_take_up_is_kept(
    run: StoredRun, status: facts.Status | None
) -> None:
    commit, _ = run.unlogged_commit([70])
    stray = write_part(
        run.store, layout.episodes_prefix("run", "000009-000"), table_of("run", [80])
    )
    if status is not None:
        run.end(status)
    found = _found(run.store)
    assert found.keys() == {"uncounted parts", "generated parts"}
    assert found["uncounted parts"] == [stray.key.rpartition("/")[2]]
    delete_garbage(run.store, NOW)
    read_part(run.store, commit.part)


def _lose_an_entry(run: StoredRun) -> None:
    run.store.local_path(layout.entry_key("run", 0, 2)).unlink()


def _spoil_an_entry(run: StoredRun) -> None:
    run.store.replace(layout.entry_key("run", 0, 2), b"{")


def _lose_the_only_claim(run: StoredRun) -> None:
    run.store.local_path(layout.incarnation_key("run", 0)).unlink()


def _lose_the_last_claim(run: StoredRun) -> None:
    controller = Controller.this_process(versions={}, git_commit=None)
    RunLog.claim(run.store, "run", controller).append(facts.Pruned(steps=()))
    run.store.local_path(layout.incarnation_key("run", 1)).unlink()


def _lose_a_commit(run: StoredRun) -> None:
    run.store.local_path(layout.commit_key("run", "000001-000")).unlink()


def _spoil_a_commit(run: StoredRun) -> None:
    run.store.replace(layout.commit_key("run", "000001-000"), b"\x80\x04.")


def _spoil_a_compaction(run: StoredRun) -> None:
    run.store.replace(layout.compaction_key("run", 0), b"\x80\x04.")


def _spoil_the_config(run: StoredRun) -> None:
    run.store.replace(layout.config_key("run"), b"[]")


def _lose_the_config(run: StoredRun) -> None:
    run.store.local_path(layout.config_key("run")).unlink()


def _contradict(run: StoredRun) -> None:
    controller = Controller.this_process(versions={}, git_commit=None)
    RunLog.claim(run.store, "run", controller).append(
        facts.Dropped(group_ids=("nobody",), reason="stale", step=None)
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_lose_an_entry, "000000-00000002.json is missing"),
        (_spoil_an_entry, "000000-00000002.json is no valid Entry"),
        (_lose_the_only_claim, "never begun"),
        (_lose_the_last_claim, "000001-00000000.json is of an incarnation whose claim is gone"),
        (_lose_a_commit, "000001-000.json is gone, and the log counts it"),
        (_spoil_a_commit, "000001-000.json is no valid Commit"),
        (_spoil_a_compaction, "000000.json is no valid Compaction"),
        (_spoil_the_config, "config.json holds list"),
        (_lose_the_config, "has no run 'run'"),
        (_contradict, "group nobody was dropped and never admitted"),
    ],
)
def test_a_run_that_cannot_be_understood_is_left_alone(
    run: StoredRun, spoil: Callable[[StoredRun], None], reason: str
) -> None:
    _plant_every_kind(run)
    other = StoredRun(run.store, "other")
    other.commit([1])
    stray = write_part(
        run.store, layout.episodes_prefix("other", "000009-000"), table_of("other", [80])
    )
    spoil(run)
    found = delete_garbage(run.store, NOW)
    assert [each.key for each in found.garbage if each.kind != "temporary files"] == [stray.key]
    assert list(found.spared) == ["run"]
    assert reason in found.spared["run"]


def test_a_run_that_may_be_going_on_is_left_alone(run: StoredRun) -> None:
    stray = write_part(
        run.store, layout.episodes_prefix("run", "000009-000"), table_of("run", [80])
    )
    for key in run.store.keys(""):
        os.utime(run.store.root / key, (1, 1))
    for limits in (
        Limits(before=time.time() - HOUR),
        Limits(before=NOW.before, is_alive=lambda newest: newest.incarnation == 0),
    ):
        found = delete_garbage(run.store, limits)
        assert (found.garbage, found.spared) == ([], {"run": "by its log it is running"})
    run.end("failed")
    found = delete_garbage(run.store, Limits(before=time.time() - HOUR))
    assert [each.key for each in found.garbage] == [stray.key]


def test_a_run_that_is_resumed_meanwhile_is_left_alone(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = _plant_every_kind(run)
    monkeypatch.setattr("storage.gc._DELETIONS", 1)
    delete = LocalStore.delete

    def resuming(self: LocalStore, key: str) -> None:
        delete(self, key)
        controller = Controller.this_process(versions={}, git_commit=None)
        RunLog.claim(self, "run", controller)

    monkeypatch.setattr(LocalStore, "delete", resuming)
    found = delete_garbage(run.store, NOW)
    assert len([each for each in found.garbage if each.kind != "temporary files"]) == 1
    assert found.spared == {"run": "it was resumed meanwhile"}
    assert sum(run.store.exists(key) for key in planted if ".tmp-" not in key) == len(planted) - 2


def _score(run: StoredRun, commit: Commit) -> None:
    """What a verifier does of a set of scores named `new`."""
    controller = Controller.this_process(versions={}, git_commit=None)
    wanted = ScoreSet(
        run_id="run", name="new", verifier="v", scorer="v", environment={}, source=None,
        controller=controller, created_at=0.0,
    )  # fmt: skip
    open_set(run.store, wanted)
    ids = read_part(run.store, commit.part)["episode_id"].to_pylist()
    write_scores(run.store, commit, "new", ids, [1.0] * len(ids), [{}] * len(ids), reward_mean=0.0)


def test_scores_of_an_attempt_that_died_go_and_neither_reader_nor_scorer_notices(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = take_snapshot(run.store, ["run"]).commits
    run.end()
    _score(run, first)
    scores = read_scores(run.store, first, "new")
    record, put = layout.scores_key("run", "new", second.key), LocalStore.put_if_absent

    def dying(self: LocalStore, key: str, data: bytes) -> bool:
        if key == record:
            raise OSError("gone")
        return put(self, key, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(LocalStore, "put_if_absent", dying)
        _score(run, second)
    [stray] = find_garbage(run.store, NOW).garbage
    assert stray.kind == "uncounted scores"
    limits = Limits(before=time.time() - HOUR)
    assert find_garbage(run.store, limits).garbage == []
    os.utime(run.store.root / stray.key, (1, 1))

    def collecting(self: LocalStore, key: str, data: bytes) -> bool:
        if key == record:
            assert delete_garbage(run.store, limits).garbage == [stray]
        return put(self, key, data)

    # Right between the part of an attempt that goes on and its record.
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", collecting)
        _score(run, second)
    assert read_scores(run.store, second, "new").keys() == {
        f"run-{group:08d}-{sample:03d}" for group in (2, 3) for sample in range(2)
    }
    assert read_scores(run.store, first, "new") == scores
    assert delete_garbage(run.store, NOW).garbage == []


def test_copies_of_code_that_no_set_of_scores_names_go(run: StoredRun) -> None:
    run.end()
    _score(run, take_snapshot(run.store, ["run"]).commits[0])
    copy = layout.score_set_source_key("run", "new", "a" * 64, "r.py")
    run.store.put_if_absent(copy, b"abc")
    assert _found(run.store) == {"source files": [copy.rpartition("/")[2]]}


def _compacted(run: StoredRun) -> Compaction:
    commits = take_snapshot(run.store, [run.run_id]).commits
    plan = plan_compaction(run.store, run.run_id, commits, whole=True)
    compaction = compact(run.store, plan)
    assert compaction is not None
    return compaction


def test_parts_go_once_a_compaction_holds_their_rows(run: StoredRun) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    before = snapshot.table()
    first = _compacted(run)
    parts = sorted(commit.part.key for commit in snapshot.commits)
    assert sorted(each.key for each in find_garbage(run.store, NOW).garbage) == parts
    assert find_garbage(run.store, Limits(before=time.time() - HOUR)).garbage == []
    assert {each.kind for each in delete_garbage(run.store, NOW).garbage} == {"compacted parts"}
    assert not any(map(run.store.exists, parts))
    assert snapshot.table().equals(before)
    run.commit([8])
    second = _compacted(run)
    gone = [each.key for each in delete_garbage(run.store, NOW).garbage]
    assert gone == [take_snapshot(run.store, ["run"]).commits[3].part.key, first.parts[0].key]
    assert run.store.keys(layout.compacted_folder("run")) == [second.parts[0].key]
    assert snapshot.table().equals(before)
    assert delete_garbage(run.store, NOW).garbage == []


@pytest.mark.parametrize("fault", ["gone", "damaged", "moved", "of others"])
def test_no_part_goes_for_a_compaction_that_does_not_hold_its_rows(
    run: StoredRun, fault: str
) -> None:
    compaction = _compacted(run)
    part = compaction.parts[0]
    if fault == "gone":
        run.store.local_path(part.key).unlink()
    elif fault == "damaged":
        run.store.replace(part.key, run.store.read(part.key)[:-1] + b"x")
    else:
        change = {"offset": 0} if fault == "moved" else {"sha256": "0" * 64}
        commits = tuple(each.model_copy(update=change) for each in compaction.commits)
        altered = compaction.model_copy(update={"commits": commits})
        run.store.replace(layout.compaction_key("run", 0), altered.to_bytes())
    found = delete_garbage(run.store, NOW)
    assert found.garbage == []
    # Of compacted rows that are no commit's, nothing would be deleted to begin with.
    assert (fault == "of others") == (part.key not in found.spared.get("run", ""))
    assert all(
        run.store.exists(each.part.key) for each in take_snapshot(run.store, ["run"]).commits
    )


def test_a_run_is_deleted_whole_and_another_not_at_all(run: StoredRun) -> None:
    other = StoredRun(run.store, "other")
    other.commit([1])
    run.store.put_if_absent("episodes/annotations/run/new/set.json", b"{}")
    run.end()
    others = [info.key for info in objects_of(run.store, "other")]
    due = sorted(info.key for info in deletable(run.store, "run", NOW))
    assert due == sorted(set(run.store.keys("")) - set(others))
    assert sorted(info.key for info in delete_run(run.store, "run")) == due
    assert run.store.keys("") == sorted([*others, layout.deleted_key("run")])
    assert is_deleted(run.store, "run")
    with pytest.raises(ValueError, match="run 'run' was deleted"):
        take_snapshot(run.store, ["run"])
    assert deletable(run.store, "run", NOW) == delete_run(run.store, "run") == []
    assert find_garbage(run.store, NOW).garbage == []


def test_a_deletion_that_is_cut_short_is_finished_by_the_next(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.end()
    num_objects = len(run.store.keys(""))
    delete = LocalStore.delete
    left = [0]

    def dying(self: LocalStore, key: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(self, key)

    monkeypatch.setattr(LocalStore, "delete", dying)
    for deletions in (0, 5, num_objects - 6):
        left[0] = deletions
        with pytest.raises(KeyboardInterrupt):
            delete_run(run.store, "run")
        assert is_deleted(run.store, "run")
        assert run.store.exists(layout.config_key("run")), "the config goes last"
    [rest] = find_garbage(run.store, NOW).garbage
    assert (rest.kind, rest.key) == ("files of deleted runs", layout.config_key("run"))
    left[0] = 1
    delete_garbage(run.store, NOW)
    assert run.store.keys("") == [layout.deleted_key("run")]


def test_a_run_that_others_came_from_is_not_deleted(run: StoredRun) -> None:
    run.end()
    StoredRun(run.store, "fork", parent_run_id="run", parent_step=2).end()
    StoredRun(run.store, "replay", replay={"runs": ["other", "run"]}).end()
    StoredRun(run.store, "stranger", parent_run_id=None, replay=None).end()
    assert children(run.store) == {"run": {"fork", "replay"}, "other": {"replay"}}
    with pytest.raises(ValueError, match="'run' cannot be deleted, for fork, replay came from it"):
        deletable(run.store, "run", NOW)
    delete_run(run.store, "replay")
    with pytest.raises(ValueError, match="for fork came from it"):
        deletable(run.store, "run", NOW)
    delete_run(run.store, "fork")
    assert deletable(run.store, "run", NOW)
    run.store.replace(layout.config_key("stranger"), b"{")
    with pytest.raises(ValueError, match="for stranger came from it"):
        deletable(run.store, "run", NOW)


def test_only_runs_that_exist_and_have_ended_are_deleted(run: StoredRun) -> None:
    with pytest.raises(ValueError, match="has no run 'none'"):
        deletable(run.store, "none", NOW)
    limits = Limits(before=time.time() - HOUR)
    with pytest.raises(ValueError, match=r"'run' is running.*in process 4194303 on .*: cancel it"):
        deletable(run.store, "run", limits)
    assert deletable(run.store, "run", NOW)
    run.end("cancelled")
    assert deletable(run.store, "run", limits)


def test_runs_expire_by_their_end_children_first(store: LocalStore) -> None:
    for run_id, parent in (
        ("a", None),
        ("b", "a"),
        ("c", "b"),
        ("d", None),
        ("e", "d"),
        ("f", None),
    ):
        made = StoredRun(store, run_id, parent_run_id=parent)
        if run_id != "e":
            made.end("failed" if run_id == "a" else "finished")
    _age(store, "f", days=1)
    later = time.time() + 10.5 * 86400
    assert expired(store, 10, now=later) == (["c", "f", "b", "a"], {"d": {"e"}})
    assert expired(store, 11, now=later) == (["f"], {})
    assert expired(store, 12, now=later) == ([], {})
    store.replace(layout.entry_key("c", 0, 1), b"{")
    assert expired(store, 10, now=later) == (["f"], {"a": {"b"}, "b": {"c"}, "d": {"e"}})


def _age(store: LocalStore, run_id: str, *, days: float) -> None:
    """Make a run's log that much older."""
    for key in store.keys(layout.log_folder(run_id)):
        entry: dict[str, Any] = json.loads(store.read(key))
        entry["at"] -= days * 86400
        store.replace(key, json.dumps(entry).encode())
