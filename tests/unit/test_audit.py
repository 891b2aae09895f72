"""The independent audit agrees with `verify` on sound runs, and finds faults on its own."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audit as audit_module
import made_episodes
import made_run
import pytest
from audit import audit
from made_episodes import table
from made_run import MadeRun

from storage import facts, layout
from storage.compaction import compact, plan_compaction
from storage.objects import LocalStore
from storage.parts import read_commits


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


def test_sound_runs_add_up(store: LocalStore) -> None:
    other = made_run.finished(store)
    told = audit(store.root, "run")
    assert {**told, "bytes": None} == {
        "status": "finished",
        "incarnations": 2,
        "facts": 21,
        "drawn": 5,
        "trained": 4,
        "dropped": {"no_signal": 1},
        "pending": 0,
        "steps": 2,
        "retrained": 0,
        "age_max": 1,
        "weights_digest": made_episodes.weights_digest(2),
        "bytes": None,
    }
    made_run.resumed(store, "again")
    told = audit(store.root, "again")
    assert (told["retrained"], told["steps"], told["trained"]) == (2, 3, 5)
    made_run.forked(store, other)
    assert audit(store.root, "fork")["steps"] == 3
    made_run.replaying(store, other)
    told = audit(store.root, "replay")
    assert (told["trained"], told["age_max"]) == (2, None)


def test_a_run_that_goes_on_may_have_pending_draws(store: LocalStore) -> None:
    run = made_run.finished(store, end=False)
    run.admit(2, [5])
    assert audit(store.root, "run")["pending"] == 1
    run.end()
    with pytest.raises(AssertionError, match="run-00000005 was forgotten"):
        audit(store.root, "run")


class _Bucket:
    """What s3fs does of what the audit asks."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, path: str) -> list[str]:
        assert path.startswith("bucket/forge/")
        folder = self.root / path.removeprefix("bucket/forge/")
        return [
            f"bucket/forge/{p.relative_to(self.root)}" for p in folder.rglob("*") if p.is_file()
        ]

    def cat_file(self, path: str) -> bytes:
        return (self.root / path.removeprefix("bucket/forge/")).read_bytes()


def test_a_bucket_is_audited_as_a_folder_is(store: LocalStore) -> None:
    made_run.finished(store)
    bucket = _Bucket(store.root)
    assert audit(bucket, "run", root="/bucket/forge/") == audit(store.root, "run")


def test_parts_that_were_compacted_are_found(store: LocalStore) -> None:
    run = made_run.finished(store)
    assert compact(store, plan_compaction(store, "run", read_commits(store, "run"), whole=True))
    for number in (0, 1):
        run.part(number).unlink()
    assert audit(store.root, "run")["age_max"] == 1


def test_it_runs_alone(store: LocalStore) -> None:
    made_run.finished(store)
    command = [sys.executable, audit_module.__file__, store.uri, "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=store.root)
    assert '"status": "finished"' in done.stdout, done.stderr


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(audit_module.__file__).read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {*sys.stdlib_module_names, "pyarrow"}


def _remove(key: Callable[[MadeRun], str]) -> Callable[[MadeRun], object]:
    return lambda run: run.store.local_path(key(run)).unlink()


def _sources(run: MadeRun) -> str:
    (key,) = run.store.keys("runs/run/source/")
    return key


def _last_of_first(run: MadeRun) -> str:
    return run.find("checkpoint", 1)[0]


def _swap(entries: list[list[Any]]) -> None:
    entries[2], entries[4] = entries[4], entries[2]


def _stale_claim(run: MadeRun) -> None:
    claim = layout.incarnation_key("run", 1)
    run.edit(claim, lambda told: told.update(previous_last={"incarnation": 0, "seq": 2}))


def _old_token(run: MadeRun) -> None:
    run.round(2, [5], table([5], [2, 0]))
    run.train(3, [5], age=2)


FAULTS: dict[str, tuple[Callable[[MadeRun], object], str]] = {
    "part removed": (lambda run: run.part(0).unlink(), "is gone"),
    "part truncated": (lambda run: run.part(0).write_bytes(b"PAR1"), "has 4 bytes of"),
    "source altered": (
        lambda run: run.store.replace(_sources(run), b"def reward(): ,,,"),
        "another SHA-256",
    ),
    "commit removed": (_remove(lambda run: run.commit_key(1)), "round-000001.json is gone"),
    "commit altered": (
        lambda run: run.edit(run.commit_key(1), lambda told: told["group_ids"].reverse()),
        "has other groups",
    ),
    "entry missing": (_remove(lambda run: run.find("committed", 1)[0]), "is missing"),
    "named entry missing": (_remove(_last_of_first), "is missing"),
    "entries cut off": (_stale_claim, "is no seal"),
    "claim missing": (_remove(lambda _: layout.incarnation_key("run", 0)), "claim 0 is one of"),
    "newest claim missing": (_remove(lambda _: layout.incarnation_key("run", 1)), "nobody claimed"),
    "entries reordered": (
        lambda run: run.rewrite_log(_swap),
        "was committed and never admitted",
    ),
    "entry doubled": (
        lambda run: run.rewrite_log(lambda entries: entries.insert(5, entries[4])),
        "was committed twice",
    ),
    "group generated again": (
        lambda run: run.log.append(run.generate(9, table([2], [1, 1]))),
        "run-00000002 was generated again after its commit",
    ),
    "group trained twice": (lambda run: run.train(3, [3]), "run-00000003 was trained on 2 times"),
    "group trained and dropped": (lambda run: run.drop(3, "stale"), "trained on and dropped"),
    "step skipped": (lambda run: run.train(4, []), "step 4 came after step 2"),
    "step again": (lambda run: run.train(2, [2, 3]), "step 2 came after step 2"),
    "too old": (_old_token, "step 3 trained on run-00000005 at age 2"),
    "checkpoint file removed": (
        _remove(lambda _: f"{layout.checkpoint_folder('run', 2)}config.json"),
        "config.json is gone",
    ),
    "first checkpoint pruned": (
        lambda run: (run.log.append(facts.Pruned(steps=(0,))), run.end()),
        "step 0 has no checkpoint",
    ),
    "entry of another run": (
        lambda run: run.edit_fact("started", 1, run_id="other"),
        "was written for run other",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_finds_faults_on_its_own(store: LocalStore, fault: str) -> None:
    run = made_run.finished(store, end=False)
    assert audit(store.root, "run")
    plant, words = FAULTS[fault]
    plant(run)
    with pytest.raises(AssertionError, match=words):
        audit(store.root, "run")


def test_it_finds_what_was_not_trained_again(store: LocalStore) -> None:
    run = made_run.resumed(store)
    run.rewrite_log(lambda entries: entries.pop(3))
    with pytest.raises(AssertionError, match=r"before steps \{2\} were trained again"):
        audit(store.root, "run")


def test_it_finds_other_groups_of_a_step_that_was_trained_again(store: LocalStore) -> None:
    run = made_run.resumed(store)
    run.edit_fact("step", 2, group_ids=["run-00000002", "run-00000003"])
    with pytest.raises(AssertionError, match="step 1 was trained again on other groups"):
        audit(store.root, "run")


def test_it_lets_a_zombie_write_beyond_the_seal(store: LocalStore) -> None:
    made_run.finished(store)
    beyond = layout.entry_key("run", 0, len(store.keys(layout.entry_prefix("run", 0))))
    store.put_if_absent(beyond, b"anything")
    assert audit(store.root, "run")["status"] == "finished"
