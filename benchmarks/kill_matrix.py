"""Runs whose flow process is killed at seeded points of their log and which then go on, in each regime, on any store.

A point is the n-th fact of a kind in an incarnation's log, plus up to 300 ms: between stages and inside them. What is
left is judged by `verify`, by an audit that knows nothing of this package but file names, and in sync by the bytes of
the weights.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage import layout
from storage.ledger import Ledger
from storage.log import read_entries, read_entry, read_incarnations
from storage.objects import ObjectNotFound, ObjectStore, open_store
from storage.resume import read_ledger
from storage.verify import verify

ROOT = Path(__file__).parents[1]
FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")
LONGEST_DELAY_SECONDS = 0.3
_RUN_SECONDS = 300.0
_POLL_SECONDS = 0.02

SMALL = (
    "--set", "warm_start.steps=5", "--set", "evaluation.num_prompts=20",
    "--set", "groups_per_step=16", "--set", "trainer.ranks=1", "--set", "generators.threads=1",
    "--set", "steps=6", "--set", "checkpoint.every=3",
    "--set", f"reward={ROOT / 'tests' / 'stack' / 'rewards.py'}:by_hash",
)  # fmt: skip
"""A short run of the tiny preset in which every group has a signal."""

# How often each kind comes in the log of the short run, about: a point is drawn below that.
_OFTEN = {"step": 5, "batched": 5, "committed": 5, "generated": 5, "admitted": 5, "published": 5}
_ONCE = ("started", "warm_started", "checkpoint", "evaluated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """When to kill."""

    kind: str
    """Kind of fact."""
    nth: int
    """Which of those that the incarnation logs, from 1."""
    delay_seconds: float
    """How long after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """What was there when a process was killed."""

    point: Point
    """Where it was to be killed."""
    num_entries: int
    """Entries of its incarnation by then."""
    last_step: int
    """Last step of the log."""
    checkpoint: int | None
    """Step of the newest checkpoint, if there was one."""

    @property
    def is_provisional(self) -> bool:
        """Whether steps had to be trained again."""
        return self.last_step > (self.checkpoint or 0)


@dataclass(slots=True, kw_only=True)
class Survivor:
    """A run that was killed and went on to its end."""

    run_id: str
    """The run."""
    regime: str
    """Its regime."""
    deaths: list[Death] = field(default_factory=list)
    """Where it was killed."""
    missed: int = 0
    """Points that it did not come to, having ended before."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with what it left."""
    weights_digest: str = ""
    """Digest of its last weights."""
    seconds: float = 0.0
    """Wall time of all its processes."""


def draw_points(seed: int, number: int) -> list[Point]:
    """So many points, the same for the same seed."""
    chance = random.Random(seed)
    points = []
    for index in range(number):
        # A run that goes on has less before it, and neither learns nor evaluates first again.
        kinds = [*_OFTEN, *_OFTEN, *_ONCE] if index == 0 else [*_OFTEN, "started", "restored"]
        kind = chance.choice(kinds)
        nth = chance.randint(1, _OFTEN.get(kind, 1) if index == 0 else 1)
        delay = chance.uniform(0.0, LONGEST_DELAY_SECONDS)
        points.append(Point(kind=kind, nth=nth, delay_seconds=delay))
    return points


def survive(
    store_uri: str,
    run_id: str,
    regime: str,
    points: list[Point],
    audit: Callable[[str, str], Any] | None = None,
    options: tuple[str, ...] = SMALL,
) -> Survivor:
    """Run, killing the flow process at each point and going on after it, until the run is finished.

    `audit` is given the store's URI and the run's id, and raises AssertionError for what it finds wrong.

    Raises RuntimeError if a process ends in another way than by finishing or by being killed here.
    """
    store = open_store(store_uri)
    survivor = Survivor(run_id=run_id, regime=regime)
    started = time.monotonic()
    first = [
        FORGEFLOW, "run", "--preset", "tiny", "--regime", regime, "--run-id", run_id,
        "--store", store_uri, *options,
    ]  # fmt: skip
    again = [FORGEFLOW, "resume", run_id, "--store", store_uri]
    for point in points:
        begun = store.exists(layout.incarnation_key(run_id, 0))
        death = _run_until(store, run_id, again if begun else first, point)
        if death is None:
            survivor.missed += 1
            break
        survivor.deaths.append(death)
    else:
        begun = store.exists(layout.incarnation_key(run_id, 0))
        _finish(again if begun else first)
    survivor.seconds = time.monotonic() - started
    _judge(store, survivor, audit)
    return survivor


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # By its folder's output.log and its own log, what became of it can be read.
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _finish(command: list[str]) -> None:
    process = _start(command)
    try:
        code = process.wait(timeout=_RUN_SECONDS)
    finally:
        process.kill()
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} exited {code}")


def _run_until(store: ObjectStore, run_id: str, command: list[str], point: Point) -> Death | None:
    """Kill the process at the point; None if it finished before."""
    number = len(read_incarnations(store, run_id)) if _exists(store, run_id) else 0
    process = _start(command)
    deadline = time.monotonic() + _RUN_SECONDS
    seen = _Seen(store, run_id, number)
    try:
        while seen.count(point.kind) < point.nth:
            if (code := process.poll()) is not None:
                if code != 0:
                    raise RuntimeError(f"{run_id} exited {code} before {point}")
                return None
            if time.monotonic() > deadline:
                raise RuntimeError(f"{run_id} did not come to {point} in {_RUN_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        time.sleep(point.delay_seconds)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    if process.returncode == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"{run_id} exited {process.returncode} at {point}")
    ledger = Ledger.fold(read_entries(store, run_id), read_incarnations(store, run_id))
    kept = ledger.checkpoints.keys() - ledger.pruned
    return Death(
        point=point,
        num_entries=len(store.keys(layout.entry_prefix(run_id, number))),
        last_step=ledger.last_step,
        checkpoint=max(kept, default=None),
    )


def _exists(store: ObjectStore, run_id: str) -> bool:
    return store.exists(layout.config_key(run_id))


def wait_for_kinds(
    store: ObjectStore,
    run_id: str,
    kind: str,
    process: subprocess.Popen[bytes],
    delay_seconds: float,
) -> None:
    """Return so long after the first fact of a kind in the run's first log; RuntimeError if its process ends before."""
    seen = _Seen(store, run_id, 0)
    deadline = time.monotonic() + _RUN_SECONDS
    while not seen.count(kind):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{run_id} did not come to {kind} in {_RUN_SECONDS:g} s")
        if process.poll() is not None:
            raise RuntimeError(f"{run_id} ended with {process.returncode} before {kind}")
        time.sleep(_POLL_SECONDS)
    time.sleep(delay_seconds)


class _Seen:
    """Facts of one incarnation, read as they come."""

    def __init__(self, store: ObjectStore, run_id: str, number: int) -> None:
        self._store, self._run_id, self._number = store, run_id, number
        self._next = 0
        self._kinds: dict[str, int] = {}

    def count(self, kind: str) -> int:
        """How many of a kind there are by now."""
        while True:
            key = layout.entry_key(self._run_id, self._number, self._next)
            try:
                entry = read_entry(self._store, key)
            except ObjectNotFound:
                return self._kinds.get(kind, 0)
            for fact in entry.facts:
                self._kinds[fact.kind] = self._kinds.get(fact.kind, 0) + 1
            self._next += 1


def _judge(store: ObjectStore, survivor: Survivor, audit: Callable[[str, str], Any] | None) -> None:
    ledger = read_ledger(store, survivor.run_id)
    if ledger.status != "finished" or ledger.pending:
        survivor.problems.append(f"status {ledger.status}, {len(ledger.pending)} groups pending")
    survivor.problems += [each.sentence for each in verify(store, survivor.run_id).problems]
    survivor.problems += generated_again(store, survivor.run_id)
    if audit is not None:
        try:
            audit(store.uri, survivor.run_id)
        except AssertionError as error:
            survivor.problems.append(f"audit: {error}")
    survivor.weights_digest = ledger.weights.get(ledger.last_step, "")


def generated_again(store: ObjectStore, run_id: str) -> list[str]:
    """Groups that were generated although they were committed already."""
    committed: set[str] = set()
    found = []
    for entry in read_entries(store, run_id):
        for fact in entry.facts:
            if fact.kind == "generated":
                found += [f"{g} was generated again" for g in fact.group_ids if g in committed]
            elif fact.kind == "committed":
                committed.update(fact.group_ids)
    return found


def weights_bytes(store: ObjectStore, run_id: str) -> bytes:
    """The file of a finished run's last weights."""
    ledger = read_ledger(store, run_id)
    return store.read(f"{ledger.checkpoints[ledger.last_step].key}model.safetensors")


def describe(survivor: Survivor) -> dict[str, Any]:
    """A survivor for a record."""
    return {
        "regime": survivor.regime,
        "seconds": round(survivor.seconds, 1),
        "deaths": [
            {
                "after": f"{death.point.kind} {death.point.nth}",
                "delay_seconds": round(death.point.delay_seconds, 3),
                "entries": death.num_entries,
                "last_step": death.last_step,
                "checkpoint": death.checkpoint,
            }
            for death in survivor.deaths
        ],
        "missed": survivor.missed,
        "problems": survivor.problems,
        "weights_digest": survivor.weights_digest,
    }


if __name__ == "__main__":
    uri, name, chosen, seed_text, count = sys.argv[1:6]
    told = survive(uri, name, chosen, draw_points(int(seed_text), int(count)))
    print(json.dumps(describe(told), indent=2))
