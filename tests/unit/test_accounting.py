"""What a run held and moved: by the devices that its config gives each mesh, over all incarnations."""

from typing import Any

import pytest

from flows.accounting_rows import accounting_rows
from forge_core.settings import load_config
from storage import facts
from storage.accounting import account
from storage.facts import Entry, Interval
from storage.ledger import Ledger
from storage.records import Controller, EntryPosition, FileRef, Incarnation

ON_GPUS = [
    "generators.device=cuda",
    "generators.tensor_parallel=2",
    "generators.replicas=2",
    "trainer.device=cuda",
    "trainer.ranks=4",
]


def config(*overrides: str) -> dict[str, Any]:
    return load_config(preset="tiny", file=None, overrides=list(overrides)).model_dump(mode="json")


def incarnation(number: int) -> Incarnation:
    controller = Controller(
        host="h", pid=1, versions={}, git_commit=None, claimed_at=100.0 * number
    )
    last = None if number == 0 else EntryPosition(incarnation=number - 1, seq=0)
    return Incarnation(run_id="r", incarnation=number, previous_last=last, controller=controller)


def told(mesh: str, *intervals: tuple[str, float]) -> facts.Intervals:
    made, at = [], 0.0
    for kind, seconds in intervals:
        made.append(Interval.model_validate({"kind": kind, "start": at, "end": at + seconds}))
        at += seconds
    return facts.Intervals(mesh=mesh, intervals=tuple(made))


def fold(*of_incarnations: tuple[facts.Fact, ...]) -> Ledger:
    entries = [
        Entry(incarnation=number, seq=0, at=100.0 * number + 50, facts=told_then)
        for number, told_then in enumerate(of_incarnations)
    ]
    return Ledger.fold(entries, [incarnation(number) for number in range(len(entries))])


def test_gpus_count_by_process_and_all_incarnations_are_summed() -> None:
    ledger = fold(
        (
            told("generator-0", ("generate", 3.0), ("wait_slot", 1.0)),
            told("trainer", ("train", 2.0)),
        ),
        (told("generator-1", ("generate", 4.0)), told("verifier", ("score", 5.0))),
    )
    stages = account(config(*ON_GPUS), ledger)["stages"]
    assert stages["generate"]["device_seconds"] == 2 * (3.0 + 4.0)
    assert stages["wait"]["device_seconds"] == 2 * 1.0
    assert stages["train"]["device_seconds"] == 4 * 2.0
    assert stages["score"] == {"device_seconds": 0.0, "core_seconds": 5.0, "bytes": 0, "tokens": 0}


def test_cores_count_by_process_and_thread() -> None:
    chosen = config("generators.threads=3", "trainer.ranks=2", "trainer.threads=2")
    ledger = fold((told("generator-0", ("generate", 2.0)), told("trainer", ("train", 1.5))))
    total = account(chosen, ledger)["total"]
    assert (total["core_seconds"], total["device_seconds"]) == (3 * 2.0 + 2 * 2 * 1.5, 0.0)


def test_of_colocated_meshes_only_work_counts() -> None:
    ledger = fold((told("trainer", ("train", 2.0), ("wait_batch", 9.0)),))
    chosen = config("placement=colocated", "trainer.ranks=1", "trainer.threads=1")
    assert set(account(chosen, ledger)["stages"]) == {"train"}


def test_bytes_are_what_was_written_and_served() -> None:
    file = FileRef(key="k", sha256="s", bytes=70)
    ledger = fold(
        (
            facts.Checkpoint(step=0, key="c", weights_digest="d", files=(file, file)),
            facts.Published(
                policy_version=0, weights_digest="d", parity=None, bytes=11, seconds=1.0
            ),
            facts.Committed(
                round=0, commit="c", group_ids=(), episodes=2, score_set="run", bytes=13
            ),
        )
    )
    accounting = account(config("generators.replicas=2"), ledger)
    moved = {stage: held["bytes"] for stage, held in accounting["stages"].items()}
    assert moved == {"checkpoint": 140, "score": 13, "weights": 22}
    assert accounting["total"]["bytes"] == 175
    assert accounting["per_episode"] is None


@pytest.mark.parametrize("episodes", [0, 4])
def test_the_table_has_stages_then_all_then_an_episode(episodes: int) -> None:
    held = {"device_seconds": 0.0, "core_seconds": 12.5, "bytes": 4000, "tokens": 8}
    accounting = {
        "stages": {"generate": held},
        "total": held,
        "episodes": episodes,
        "per_episode": {unit: value / episodes for unit, value in held.items()}
        if episodes
        else None,
    }
    rows = accounting_rows({"accounting": accounting})
    assert rows[:2] == [
        ("generate", "-", "12.5", "4,000", "8"),
        ("in all", "-", "12.5", "4,000", "8"),
    ]
    assert rows[2:] == ([("per episode, of 4", "-", "3.12", "1,000", "2")] if episodes else [])
