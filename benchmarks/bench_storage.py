"""What the episode store costs: next to plain pyarrow, over a long log, and over a million episodes.

    python -m benchmarks.bench_storage
    python -m benchmarks.bench_storage --share 0.01      the same at a hundredth of the size, for a look

Every ratio is of two things done in turn in one process, pair by pair, on the same data: a median of the pairs.

- `commit`: a commit of 512 episodes of 256 tokens next to `pyarrow.parquet.write_table` of the same table, once with
  its defaults and once with the options that the store uses, each followed by fsync of the file and of its directory.
- `log`: opening a run of 10,000 entries; one more entry (append and ledger) at the end of it next to the start.
- `sample`: 256 random rows of 1,000,000 next to the same rows read by pyarrow, which knows their numbers and checks
  nothing: with a sampler that was just made, and with one that has drawn before.
- `stream`: reading all of them, every column, in a process of its own, and the memory that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import facts, layout
from storage.episodes import SCHEMA
from storage.ledger import Ledger
from storage.log import RunLog, read_entries, read_incarnations
from storage.objects import LocalStore
from storage.parts import ROW_GROUP_SIZE, commit_part
from storage.records import Controller
from storage.runs import store_config
from storage.sampling import Sampler
from storage.snapshots import Snapshot, take_snapshot

GROUP_SIZE = 8
COLUMNS = ["episode_id", "prompt_token_ids", "response_token_ids", "logprobs", "mask", "reward"]
"""What a trainer reads."""
SAME_OPTIONS = {
    "compression": "zstd",
    "row_group_size": ROW_GROUP_SIZE,
    "use_dictionary": [field.name for field in SCHEMA if pa.types.is_string(field.type)],
}
"""How the store writes."""


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0, help="Of the full size; not recorded.")
    share = parser.parse_args().share
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-storage-") as folder:
        root = Path(folder)
        result["commit"] = commits(root / "commit", pairs=max(3, int(40 * share)))
        print(json.dumps(result["commit"], indent=2), flush=True)
        result["log"] = long_log(root / "log", entries=max(100, int(10_000 * share)))
        print(json.dumps(result["log"], indent=2), flush=True)
        snapshot = many_episodes(root / "episodes", rows=max(10_000, int(1_000_000 * share)))
        result["sample"] = samples(snapshot, pairs=max(3, int(15 * share)))
        print(json.dumps(result["sample"], indent=2), flush=True)
        result["stream"] = streaming(snapshot)
        print(json.dumps(result["stream"], indent=2), flush=True)
    if share == 1.0:
        # Deferred: it brings Prefect, which is no part of what is measured.
        from benchmarks.record import write_record

        print(write_record("storage", "python -m benchmarks.bench_storage", result))


def commits(root: Path, *, pairs: int) -> dict[str, float]:
    """Milliseconds of a commit and of the same table by pyarrow, and the ratios."""
    store = LocalStore(root / "store")
    plain = root / "plain"
    plain.mkdir(parents=True)

    def write(table: pa.Table, number: int, **options: Any) -> None:
        path = plain / f"{number}-{len(options)}.parquet"
        pq.write_table(table, path, **options)
        for place, flags in ((path, os.O_RDONLY), (plain, os.O_RDONLY | os.O_DIRECTORY)):
            descriptor = os.open(place, flags)
            os.fsync(descriptor)
            os.close(descriptor)

    seconds: dict[str, list[float]] = {"ours": [], "defaults": [], "same": []}
    for number in range(pairs + 1):
        table = table_of("run", number * 512, 512, tokens=256)
        work: dict[str, Callable[[], object]] = {
            "ours": partial(commit_part, store, "run", f"c{number}", table),
            "defaults": partial(write, table, number),
            "same": partial(write, table, number, **SAME_OPTIONS),
        }
        # Each is first as often as the others; the first round warms up.
        names = [*work][number % 3 :] + [*work][: number % 3]
        for name in names:
            seconds[name].append(timed(work[name]))
    ours, defaults, same = (seconds[name][1:] for name in ("ours", "defaults", "same"))
    return {
        "episodes": 512,
        "tokens": 256,
        "pairs": pairs,
        "ours_ms": 1e3 * statistics.median(ours),
        "pyarrow_defaults_ms": 1e3 * statistics.median(defaults),
        "pyarrow_same_options_ms": 1e3 * statistics.median(same),
        "ratio_to_defaults": ratio(ours, defaults),
        "ratio_to_same_options": ratio(ours, same),
    }


def long_log(root: Path, *, entries: int) -> dict[str, float]:
    """Seconds to open a long log, and milliseconds of one more entry at its start and its end."""
    store = LocalStore(root)
    store_config(store, "run", {"regime": "sync"})
    log = RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))
    ledger = Ledger.fold([], [log.incarnation])
    seconds = []
    for number in range(entries):
        new = entry_of(number)
        started = time.perf_counter()
        ledger.add(log.append(*new))
        seconds.append(time.perf_counter() - started)
    opening = []
    for _ in range(3):
        started = time.perf_counter()
        incarnations = read_incarnations(store, "run")
        read = read_entries(store, "run")
        reading = time.perf_counter() - started
        assert len(Ledger.fold(read, incarnations).steps) == len(ledger.steps)
        opening.append((time.perf_counter() - started, reading))
    tenth = max(1, entries // 10)
    return {
        "entries": entries,
        "open_seconds": min(total for total, _ in opening),
        "open_read_seconds": min(reading for _, reading in opening),
        "append_first_tenth_ms": 1e3 * statistics.median(seconds[:tenth]),
        "append_last_tenth_ms": 1e3 * statistics.median(seconds[-tenth:]),
        "append_ratio": statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth]),
    }


def entry_of(number: int) -> list[facts.Fact]:
    """Facts like those of a sync run: four entries to a step of eight groups."""
    step, kind = number // 4 + 1, number % 4
    draws = range(8 * step, 8 * step + 8)
    group_ids = tuple(layout.group_id("run", draw) for draw in draws)
    name = layout.part_name(step, 0)
    intervals = tuple(
        facts.Interval(kind="generate", start=float(number + n), end=number + n + 0.5)
        for n in range(3)
    )
    timing = facts.Intervals(mesh="generator-0", intervals=intervals)
    if kind == 0:
        admitted = tuple(
            facts.Draw(draw=d, group_id=g, prompt_id=f"{d:064x}", environment="sums", index=d)
            for d, g in zip(draws, group_ids, strict=True)
        )
        return [facts.Admitted(round=step, draws=admitted)]
    if kind == 1:
        commit = layout.commit_key("run", name)
        committed = facts.Committed(
            round=step, commit=commit, group_ids=group_ids, episodes=64, score_set="run"
        )
        return [committed, timing]
    if kind == 2:
        return [facts.Batched(step=step, group_ids=group_ids)]
    metrics = {f"metric/{n}": n / 7 for n in range(12)}
    trained = facts.Step(
        step=step, group_ids=group_ids, score_set="run", weights_digest=f"{step:064x}",
        policy_version=step, optimizer_updates=1, age_max=0, age_mean=0.0, metrics=metrics,
        checkpoint=None,
    )  # fmt: skip
    return [trained, timing]


def many_episodes(root: Path, *, rows: int, part_rows: int = 4096) -> Snapshot:
    """A run of so many short episodes, in parts as compaction makes them."""
    store = LocalStore(root)
    store_config(store, "run", {"regime": "sync"})
    log = RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))
    for number, first in enumerate(range(0, rows, part_rows)):
        count = min(part_rows, rows - first)
        commit = commit_part(
            store, "run", f"{number:06d}-000", table_of("run", first, count, tokens=8)
        )
        log.append(
            facts.Committed(
                round=number,
                commit=layout.commit_key("run", commit.key),
                group_ids=commit.group_ids,
                episodes=commit.rows,
                score_set="run",
            )
        )
    return take_snapshot(store, ["run"])


def samples(snapshot: Snapshot, *, pairs: int) -> dict[str, float]:
    """Milliseconds of a sample, and of the same rows read by pyarrow."""
    kept = Sampler(snapshot)
    kept.sample(256, seed=0, columns=COLUMNS)
    seconds: dict[str, list[float]] = {"fresh": [], "kept": [], "pyarrow": []}
    for seed in range(pairs + 1):
        work: dict[str, Callable[[], pa.Table]] = {
            "fresh": lambda seed=seed: Sampler(snapshot).sample(256, seed=seed, columns=COLUMNS),
            "kept": lambda seed=seed: kept.sample(256, seed=seed, columns=COLUMNS),
            "pyarrow": lambda seed=seed: plain_sample(snapshot, seed),
        }
        tables = {}
        for name in [*work][seed % 3 :] + [*work][: seed % 3]:
            started = time.perf_counter()
            tables[name] = work[name]()
            seconds[name].append(time.perf_counter() - started)
        assert tables["fresh"].equals(tables["kept"])
        assert tables["fresh"].sort_by("episode_id").equals(tables["pyarrow"].sort_by("episode_id"))
    fresh, again, plain = (seconds[name][1:] for name in ("fresh", "kept", "pyarrow"))
    return {
        "rows": sum(commit.rows for commit in snapshot.commits),
        "parts": len(snapshot.commits),
        "bytes": sum(commit.part.bytes for commit in snapshot.commits),
        "fresh_ms": 1e3 * statistics.median(fresh),
        "kept_ms": 1e3 * statistics.median(again),
        "pyarrow_ms": 1e3 * statistics.median(plain),
        "ratio_fresh": ratio(fresh, plain),
        "ratio_kept": ratio(again, plain),
    }


def plain_sample(snapshot: Snapshot, seed: int) -> pa.Table:
    """The same rows by pyarrow alone, from files whose rows are known to be in order."""
    counts = np.array([commit.rows for commit in snapshot.commits])
    ends = np.cumsum(counts)
    rows = np.sort(np.random.default_rng(seed).choice(ends[-1], 256, replace=False))
    parts = np.searchsorted(ends, rows, side="right")
    tables = []
    for part in np.unique(parts):
        path = snapshot.store.local_path(snapshot.commits[part].part.key)
        within = rows[parts == part] - (ends[part] - counts[part])
        groups = np.unique(within // ROW_GROUP_SIZE)
        table = pq.ParquetFile(path).read_row_groups(groups.tolist(), COLUMNS, use_threads=False)
        at = np.searchsorted(groups, within // ROW_GROUP_SIZE) * ROW_GROUP_SIZE
        tables.append(table.take(pa.array(at + within % ROW_GROUP_SIZE)))
    return pa.concat_tables(tables)


def streaming(snapshot: Snapshot) -> dict[str, float]:
    """Seconds to read all episodes in a new process, and its peak memory in megabytes."""
    script = (
        "import json, re, sys, time\n"
        "from pathlib import Path\n"
        "from storage.client import Run\n"
        "started, rows, tokens = time.perf_counter(), 0, 0\n"
        "for batch in Run(sys.argv[1], 'run').batches():\n"
        "    rows += batch.num_rows\n"
        "    tokens += len(batch.column('response_token_ids').flatten())\n"
        "seconds = time.perf_counter() - started\n"
        # Not `ru_maxrss`, which a process inherits from the one that started it.
        "kib = int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "print(json.dumps(dict(rows=rows, tokens=tokens, peak_mb=kib * 1024 / 1e6, seconds=seconds)))"
    )
    command = [sys.executable, "-c", script, snapshot.store.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def table_of(run_id: str, first: int, count: int, *, tokens: int) -> pa.Table:
    """Episodes with random tokens, made column by column."""
    generator = np.random.default_rng(first)
    numbers = np.arange(first, first + count)
    draws = numbers // GROUP_SIZE
    groups = [layout.group_id(run_id, int(draw)) for draw in draws]

    def lists(values: np.ndarray, each: int, kind: pa.DataType) -> pa.Array:
        offsets = pa.array(np.arange(0, count * each + 1, each), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

    size = count * tokens
    role = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * count), pa.array([0] * count, pa.int32()), pa.array([tokens] * count, pa.int32())],
        ["role", "start", "end"],
    )  # fmt: skip
    rewards = generator.integers(0, 2, count).astype(float)
    score = pa.StructArray.from_arrays(
        [pa.array(["exact"] * count), pa.array(rewards)], ["name", "value"]
    )
    scored_by = pa.StructArray.from_arrays(
        [pa.array(["exact"] * count), pa.array(["1"] * count), pa.array(np.full(count, 0.001))],
        ["name", "version", "seconds"],
    )
    columns = {
        "episode_id": [layout.episode_id(g, int(n) % GROUP_SIZE) for g, n in zip(groups, numbers, strict=True)],
        "run_id": [run_id] * count,
        "group_id": groups,
        "draw": draws,
        "sample": (numbers % GROUP_SIZE).astype(np.int32),
        "environment": ["sums"] * count,
        "prompt_id": [f"{int(draw):064x}" for draw in draws],
        "prompt": [f"What is {int(draw)} + {int(draw) % 7}?" for draw in draws],
        "answer": [str(int(draw) + int(draw) % 7) for draw in draws],
        "metadata": ['{"index":0}'] * count,
        "response": [f"That is {int(n)}." * (tokens // 4) for n in numbers],
        "prompt_token_ids": lists(generator.integers(0, 32000, count * 8), 8, pa.int32()),
        "response_token_ids": lists(generator.integers(0, 32000, size), tokens, pa.int32()),
        "logprobs": lists(-generator.exponential(1.0, size).astype(np.float32), tokens, pa.float32()),
        "mask": lists(np.ones(size, bool), tokens, pa.bool_()),
        "token_policy_versions": lists(np.full(size, first // 4096, np.int32), tokens, pa.int32()),
        "turns": pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), role),
        "finish_reason": ["stop"] * count,
        "reward": rewards,
        "scores": pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), score),
        "scored_by": pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), scored_by),
        "seed": numbers,
        "attempts": np.ones(count, np.int32),
        "generate_seconds": np.full(count, 0.5),
        "created_at": [datetime(2026, 1, 1, tzinfo=UTC)] * count,
    }  # fmt: skip
    return pa.Table.from_pydict(columns, SCHEMA)


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(ours: list[float], plain: list[float]) -> float:
    """Median over the pairs."""
    return statistics.median(left / right for left, right in zip(ours, plain, strict=True))


if __name__ == "__main__":
    main()
