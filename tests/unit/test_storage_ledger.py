"""The fold of a log, held against figures worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_episodes import draw_of

from storage import facts, layout
from storage.facts import Entry, Fact, Interval
from storage.groups import GroupState
from storage.ledger import Ledger
from storage.log import RunLog
from storage.objects import LocalStore
from storage.records import Controller, EntryPosition, Incarnation, PartRef
from storage.runs import store_config
from storage.summary import summarize, write_run_json

CONFIG = {"regime": "sync", "parent_run_id": "elder", "steps": 2}


def _incarnation(
    number: int, claimed_at: float, last: int | None, version: str = "1"
) -> Incarnation:
    return Incarnation(
        run_id="run",
        incarnation=number,
        previous_last=None if last is None else EntryPosition(incarnation=number - 1, seq=last),
        controller=Controller(
            host="h",
            pid=number,
            versions={"torch": version},
            git_commit="c0ffee",
            claimed_at=claimed_at,
        ),
    )


def _entry(incarnation: int, seq: int, at: float, *new: Fact) -> Entry:
    return Entry(incarnation=incarnation, seq=seq, at=at, facts=new)


def _ids(*draws: int) -> tuple[str, ...]:
    return tuple(layout.group_id("run", draw) for draw in draws)


def _admitted(*draws: int) -> facts.Admitted:
    return facts.Admitted(round=0, draws=tuple(draw_of("run", draw) for draw in draws))


def _generated(*draws: int, tokens: tuple[int, int]) -> facts.Generated:
    return facts.Generated(
        round=0,
        replica=0,
        part=PartRef(key="k", sha256="s", bytes=1, rows=3 * len(draws)),
        group_ids=_ids(*draws),
        policy_version_min=0,
        policy_version_max=0,
        prompt_tokens=tokens[0],
        response_tokens=tokens[1],
    )


def _committed(*draws: int, commit: str = "commit") -> facts.Committed:
    return facts.Committed(
        round=0, commit=commit, group_ids=_ids(*draws), episodes=3 * len(draws), score_set="run"
    )


def _dropped(*draws: int, reason: str) -> facts.Dropped:
    return facts.Dropped(group_ids=_ids(*draws), reason=reason, step=None)


def _step(
    step: int, *draws: int, age: tuple[int, float] = (0, 0.0), updates: int = 2, digest: str = "w"
) -> facts.Step:
    return facts.Step(
        step=step,
        group_ids=_ids(*draws),
        score_set="run",
        weights_digest=f"{digest}{step}",
        policy_version=step,
        optimizer_updates=updates,
        age_max=age[0],
        age_mean=age[1],
        metrics={},
        checkpoint=None,
    )


def _published(
    version: int, parity: tuple[float, float] | None, digest: str = "w"
) -> facts.Published:
    return facts.Published(
        policy_version=version,
        weights_digest=f"{digest}{version}",
        parity=parity and facts.Parity(mean=parity[0], max=parity[1], tokens=9, entropy=0.5),
        bytes=10,
        seconds=0.1,
    )


def _evaluated(name: str, sampled: float, greedy: float) -> facts.Evaluated:
    return facts.Evaluated(
        name=name, policy_version=0, sampled=sampled, greedy=greedy, num_prompts=64, parts=()
    )


def _intervals(mesh: str, *intervals: tuple[facts.IntervalKind, float, float]) -> facts.Intervals:
    return facts.Intervals(
        mesh=mesh,
        intervals=tuple(
            Interval(kind=kind, start=start, end=end) for kind, start, end in intervals
        ),
    )


def _held(**amounts: float) -> dict[str, float]:
    return {"device_seconds": 0.0, "core_seconds": 0.0, "bytes": 0, "tokens": 0, **amounts}


def _fold(*new: Fact) -> Ledger:
    return Ledger.fold([_entry(0, 0, 1.0, *new)], [_incarnation(0, 0.0, None)])


INCARNATIONS = [_incarnation(0, 1000.0, None), _incarnation(1, 1030.5, 2)]
ENTRIES = [
    _entry(
        0,
        0,
        1002.0,
        facts.Started(run_id="run", meshes=("generator", "trainer", "idle")),
        facts.WarmStarted(steps=5, loss=0.5, weights_digest="w0", seconds=1.0),
        _evaluated("initial", 0.25, 0.5),
        _admitted(0, 1, 2, 3),
        _generated(0, 1, tokens=(60, 100)),
        _generated(2, 3, tokens=(61, 103)),
        _committed(0, 1, 2, 3, commit="commit-0"),
        _intervals("generator", ("startup", 1000.0, 1001.0), ("generate", 1001.0, 1001.75)),
    ),
    _entry(
        0,
        1,
        1010.0,
        _dropped(3, reason="no_signal"),
        facts.Batched(step=1, group_ids=_ids(1, 0, 2)),
        _step(1, 1, 0, 2, age=(1, 0.25), updates=4),
        _published(1, (0.001, 0.004)),
        _intervals("trainer", ("train", 1002.0, 1009.5)),
    ),
    _entry(
        0,
        2,
        1020.0,
        facts.Retry(stage="generate", attempt=1, cause="lost", seconds=2.0),
        _intervals("generator", ("generate", 1010.0, 1010.5), ("wait_slot", 1010.5, 1018.5)),
    ),
    _entry(0, 3, 1030.0, facts.Sealed(host="h", pid=1)),
    _entry(
        1,
        0,
        1031.5,
        facts.Started(run_id="run", meshes=("generator", "trainer")),
        _admitted(4, 5, 6, 7, 8),
        _generated(4, 5, 6, 7, tokens=(7, 9)),
        _committed(4, 5, 6, commit="commit-1"),
        _dropped(7, 8, reason="failed"),
    ),
    _entry(
        1,
        1,
        1040.25,
        _step(1, 1, 0, 2, age=(1, 0.25), updates=4),
        _step(2, 4, age=(2, 2.0), updates=1),
        _published(1, None),
        _published(2, (0.002, 0.003)),
        _evaluated("final", 0.75, 1.0),
        _dropped(5, reason="end_of_run"),
        facts.End(status="finished", reason=None),
    ),
]
SUMMARY: dict[str, Any] = {
    "run_id": "run",
    "parent_run_id": "elder",
    "regime": "sync",
    "status": "finished",
    "started_at": "1970-01-01T00:16:40.000000+00:00",
    "finished_at": "1970-01-01T00:17:20.250000+00:00",
    "config": CONFIG,
    "sources": [],
    "versions": {"torch": "1"},
    "git_commit": "c0ffee",
    "bitwise": True,
    "steps": 2,
    "policy_version": 2,
    "optimizer_updates": 5,
    "eval": {
        "initial": 0.25,
        "final": 0.75,
        "greedy_initial": 0.5,
        "greedy_final": 1.0,
        "num_prompts": 64,
    },
    "lineage": {"checkpoint": None, "replayed_groups": {}},
    "incarnations": 2,
    "retrained_steps": 1,
    "groups": {
        "admitted": 9,
        "trained": 4,
        "reused": 0,
        "pending": 1,
        "dropped": {"end_of_run": 1, "failed": 2, "no_signal": 1},
    },
    "episodes": {"generated": 24, "trained": 12},
    "tokens": {"prompt": 128, "response": 212},
    "age": {"max": 2, "mean": 0.6875},
    "parity": {"mean": 0.0015, "max": 0.004},
    "retries": 1,
    "failures": 0,
    "seconds": {
        "total": 40.25,
        "down": 10.5,
        "overlap": {"generate": 1.25, "train": 7.5, "both": 0.0},
        "meshes": {
            # The first incarnation died at 1020 without an end; what meshes did since they told last is lost.
            "generator": {
                "generate": 1.25,
                "startup": 1.0,
                "wait_slot": 8.0,
                "lost": 1.5,
                "unaccounted": 18.0,
            },
            "idle": {"lost": 20.0, "unaccounted": 9.75},
            "trainer": {"train": 7.5, "lost": 10.5, "unaccounted": 11.75},
        },
    },
    "accounting": {
        "stages": {
            "generate": _held(core_seconds=1.25, bytes=3, tokens=340),
            "startup": _held(core_seconds=1.0),
            "train": _held(core_seconds=7.5),
            "wait": _held(core_seconds=8.0),
            "weights": _held(bytes=30),
        },
        "total": _held(core_seconds=17.75, bytes=33, tokens=340),
        "episodes": 24,
        "per_episode": _held(core_seconds=17.75 / 24, bytes=33 / 24, tokens=340 / 24),
    },
}


def test_a_summary_is_what_the_log_adds_up_to() -> None:
    ledger = Ledger.fold(ENTRIES, INCARNATIONS)
    assert summarize("run", CONFIG, ledger) == SUMMARY
    assert ledger.problems == []
    assert ledger.pending == list(_ids(6))
    assert ledger.groups.peak_pending == 5
    assert ledger.groups[_ids(4)[0]].state is GroupState.TRAINED


def test_a_ledger_grows_with_its_log() -> None:
    ledger = Ledger.fold(ENTRIES[:3], INCARNATIONS)
    for entry in ENTRIES[3:]:
        ledger.add(entry)
    assert ledger == Ledger.fold(ENTRIES, INCARNATIONS)


def test_a_run_goes_on_until_its_newest_incarnation_says_otherwise() -> None:
    ledger = Ledger.fold(ENTRIES, INCARNATIONS)
    resumed = Ledger.fold(ENTRIES, [*INCARNATIONS, _incarnation(2, 1050.25, 1)])
    assert (ledger.status, resumed.status) == ("finished", "running")
    summary = summarize("run", CONFIG, resumed)
    assert summary["finished_at"] is None
    assert (summary["seconds"]["total"], summary["seconds"]["down"]) == (50.25, 20.5)


def test_nothing_is_made_up_for_a_run_that_did_nothing() -> None:
    summary = summarize("run", CONFIG, Ledger.fold([], [_incarnation(0, 5.0, None)]))
    assert summary["age"] == {"max": None, "mean": None}
    assert summary["parity"] == {"mean": None, "max": None}
    assert set(summary["eval"].values()) == {None}
    never = {"generate": 0.0, "train": 0.0, "both": 0.0}
    assert summary["seconds"] == {"total": 0.0, "down": 0.0, "overlap": never, "meshes": {}}
    assert (summary["status"], summary["steps"]) == ("running", 0)


@pytest.mark.parametrize(
    "new",
    [
        (_step(1, 0), _step(1, 0, digest="v")),
        (_step(1, 0), facts.Diverged(step=None, reason="a replica was lost")),
    ],
)
def test_a_run_that_forked_or_diverged_is_not_bitwise(new: tuple[Fact, ...]) -> None:
    ledger = _fold(_admitted(0), _committed(0), *new)
    assert not summarize("run", CONFIG, ledger)["bitwise"]
    assert summarize("run", CONFIG, ledger)["steps"] == 1


def test_a_run_is_bitwise_only_if_sync_and_of_one_set_of_versions() -> None:
    assert not summarize("run", {"regime": "async"}, Ledger.fold(ENTRIES, INCARNATIONS))["bitwise"]
    upgraded = [INCARNATIONS[0], _incarnation(1, 1030.5, 2, version="2")]
    assert not summarize("run", CONFIG, Ledger.fold(ENTRIES, upgraded))["bitwise"]


def test_each_further_use_of_a_group_counts_it_as_reused_once() -> None:
    uses = [_step(step, 0) for step in (1, 2, 3)]
    summary = summarize("run", CONFIG, _fold(_admitted(0), _committed(0), *uses))
    assert summary["groups"]["reused"] == summary["groups"]["trained"] == 1
    assert summary["episodes"]["trained"] == 3


_READY = (_admitted(0), _committed(0))


@pytest.mark.parametrize(
    ("new", "kinds"),
    [
        ((_admitted(0), _admitted(0)), ["admitted_twice"]),
        ((_committed(0),), ["not_admitted"]),
        ((*_READY, _committed(0)), []),
        ((*_READY, _committed(0, commit="other")), ["committed_twice"]),
        ((_admitted(0), _generated(0, tokens=(1, 1)), _step(1, 0)), ["not_committed"]),
        ((*_READY, _step(1, 0), _dropped(0, reason="stale")), ["trained_and_dropped"]),
        ((*_READY, _dropped(0, reason="stale"), _step(1, 0)), ["trained_and_dropped"]),
        ((*_READY, _dropped(0, reason="a"), _dropped(0, reason="b")), ["dropped_twice"]),
        ((*_READY, _step(2, 0)), ["step_order"]),
        ((*_READY, _step(1, 0).model_copy(update={"policy_version": 2})), ["policy_version"]),
        ((*_READY, facts.Batched(step=1, group_ids=_ids(1)), _step(1, 0)), ["batch"]),
        ((*_READY, _admitted(1), _committed(1), _step(1, 0), _step(1, 1)), ["retraining"]),
        ((_published(1, None),), ["weights"]),
        ((*_READY, _step(1, 0), _published(1, None, digest="v")), ["weights"]),
        ((*_READY, _step(1, 0), _step(1, 0, digest="v"), _published(1, None, digest="v")), []),
    ],
)
def test_facts_that_cannot_be_true_are_found(new: tuple[Fact, ...], kinds: list[str]) -> None:
    assert [problem.kind for problem in _fold(*new).problems] == kinds


def test_run_json_is_the_summary_of_what_is_stored(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store_config(store, "run", CONFIG)
    RunLog.claim(store, "run", INCARNATIONS[0].controller).append(*ENTRIES[0].facts)
    summary = write_run_json(store, "run")
    assert json.loads(store.read("runs/run/run.json")) == summary
    assert summary["groups"]["pending"] == 4
    assert summary["eval"]["initial"] == 0.25
