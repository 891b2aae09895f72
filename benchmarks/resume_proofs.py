"""Proofs that a run survives its controller: killed at thirty points, and taken over at ten moments of its life."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.kill_matrix import (
    FORGEFLOW,
    ROOT,
    SMALL,
    Survivor,
    describe,
    draw_points,
    survive,
    wait_for_kinds,
    weights_bytes,
)
from storage.objects import open_store
from storage.resume import read_ledger
from storage.verify import verify

# What the tests have is taken from there; their folder is no package.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "stack")]

NUM_POINTS, NUM_ON_S3 = 30, 10
_MOST_FURTHER = 6

# Regime, whether on S3, and how often each run is killed.
_RUNS = [
    *[("sync", False, 3)] * 3, *[("async", False, 3)] * 2, *[("hybrid", False, 3)] * 2,
    *[("sync", True, 2)] * 2, ("async", True, 3), ("hybrid", True, 3),
]  # fmt: skip


def prove_kills() -> tuple[bool, dict[str, Any]]:
    """Every run goes on to its end and is sound; in sync with the weights of one that nobody disturbed."""
    from audits import audit_store
    from s3_server import serving

    survivors: list[tuple[str, Survivor]] = []
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        os.environ.update(server.environment())
        remote = server.new_uri()

        def one(number: int, regime: str, on_s3: bool, kills: int) -> tuple[str, Survivor]:
            uri = remote if on_s3 else folder
            points = draw_points(number, kills)
            survivor = survive(uri, f"{number:02d}-{regime}", regime, points, audit_store)
            print(f"{uri} {describe(survivor)}", flush=True)
            return uri, survivor

        with ThreadPoolExecutor(2) as pool:
            work = [("sync", False, 0), *_RUNS]
            survivors += pool.map(lambda each: one(each[0], *each[1]), enumerate(work))
            for extra in range(_MOST_FURTHER):
                if _deaths(survivors) >= NUM_POINTS and _deaths(survivors, remote) >= NUM_ON_S3:
                    break
                regime = ("sync", "async", "hybrid")[extra % 3]
                on_s3 = _deaths(survivors, remote) < NUM_ON_S3
                survivors.append(one(len(survivors), regime, on_s3, 2))
        undisturbed = survivors[0][1]
        wanted = weights_bytes(open_store(folder), undisturbed.run_id)
        same = all(
            survivor.weights_digest == undisturbed.weights_digest
            and weights_bytes(open_store(uri), survivor.run_id) == wanted
            for uri, survivor in survivors
            if survivor.regime == "sync"
        )
        on_s3 = _deaths(survivors, remote)
    deaths = [death for _, survivor in survivors for death in survivor.deaths]
    result = {
        "points": len(deaths),
        "points_on_s3": on_s3,
        "deaths_with_provisional_steps": sum(death.is_provisional for death in deaths),
        "problems": [p for _, survivor in survivors for p in survivor.problems],
        "sync_weights_equal_to_the_byte": same,
        "runs": {survivor.run_id: describe(survivor) for _, survivor in survivors},
    }
    is_met = (
        len(deaths) >= NUM_POINTS
        and on_s3 >= NUM_ON_S3
        and result["deaths_with_provisional_steps"] > 0
        and not result["problems"]
        and same
    )
    return is_met, result


def _deaths(survivors: list[tuple[str, Survivor]], uri: str | None = None) -> int:
    return sum(len(each.deaths) for where, each in survivors if uri in (None, where))


def prove_take_over() -> tuple[bool, dict[str, Any]]:
    """A living run is taken over at ten moments: exactly one of the two goes on, and says why if it does not."""
    from audits import audit_store

    chance = random.Random(0)
    moments: dict[str, Any] = {}
    is_met = True
    with tempfile.TemporaryDirectory() as folder:
        for number in range(10):
            regime = ("sync", "async", "hybrid")[number % 3]
            kind = chance.choice(["started", "warm_started", "published", "admitted", "step"])
            told = _take_over(folder, f"{number}-{regime}", regime, kind, chance.uniform(0, 3))
            try:
                audit_store(folder, f"{number}-{regime}")
            except AssertionError as error:
                told["problems"].append(f"audit: {error}")
            moments[f"{number}-{regime}"] = told
            print(told, flush=True)
            is_met = is_met and not told["problems"] and sorted(told["codes"]) == [0, 1]
    return is_met, {"moments": moments}


def _take_over(
    store: str, run_id: str, regime: str, kind: str, delay_seconds: float
) -> dict[str, Any]:
    """Resume beside a living run, `delay_seconds` after its first fact of a kind."""
    options = ["--preset", "tiny", "--run-id", run_id, "--store", store, "--regime", regime, *SMALL]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen([FORGEFLOW, "run", *options, "--set", "steps=40"], **quiet)
    try:
        wait_for_kinds(open_store(store), run_id, kind, first, delay_seconds)
        again = [FORGEFLOW, "resume", run_id, "--take-over", "--store", store]
        second = subprocess.run(again, timeout=300, **quiet)
        code = first.wait(60)
    finally:
        first.kill()
        first.wait()
    opened = open_store(store)
    log = (open_store(store).read(f"runs/{run_id}/output.log")).decode(errors="replace")
    problems = [each.sentence for each in verify(opened, run_id).problems]
    if read_ledger(opened, run_id).status != "finished":
        problems.append("it did not finish")
    if code == 1 and "took the run over" not in log:
        problems.append("the one that stopped did not say why")
    return {
        "after": kind,
        "delay_seconds": round(delay_seconds, 2),
        "codes": [code, second.returncode],
        "incarnations": len(read_ledger(opened, run_id).incarnations),
        "problems": problems,
    }


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {
    "3.1": prove_kills,
    "take-over": prove_take_over,
}
