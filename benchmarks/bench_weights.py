"""Weights from the trainer's parameters into the generators' address spaces, next to a copy of the same bytes.

    python -m benchmarks.bench_weights
    python -m benchmarks.bench_weights --sizes 3MB

One process with parameters and one thread publishes version after version, which one consumer takes, then four at the
same time, all checked against their checksums; the store's volume has a process of its own, as in a run. The clock runs
from the beginning of packing until the last consumer can read its tensors, the call that tells it of the version
included. A copy is made by the publisher in between, with one thread, of memory that was touched before. With
`messages` the same versions travel as TorchStore sends them without shared memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from contextlib import suppress
from typing import Any

ROUNDS, SKIPPED = 9, 3
"""Versions, and how many of the first are not counted: every buffer is new to someone then."""
CONSUMERS = 4
SIZES: dict[str, tuple[int, ...]] = {
    # Elements of each tensor, in float32.
    "3MB": (16_300,) * 46,
    "64MB": (205_000,) * 80,
    "0.5GB": (493_000,) * 272,
    "2GB": (1_850_000,) * 290,
}
MESSAGES = ("3MB", "64MB", "0.5GB")
MOST_COPIES = {"0.5GB": 4.0, "2GB": 4.0}
MOST_SECONDS = {"3MB": 0.015}
MOST_OF_FOUR = 1.2
SECONDS = 300.0


async def measure_size(name: str, *, is_shared: bool) -> dict[str, Any]:
    """Versions of one size, to one consumer and to four in turns."""
    from monarch.actor import this_host

    from benchmarks.weight_actors import Consumer, Publisher, install
    from forge_core.weights import store

    sizes, store_name = SIZES[name], f"bench-{name}-{is_shared}"
    install(is_shared)
    host = this_host()
    meshes: list[Any] = []

    def spawn(label: str) -> Any:
        meshes.append(host.spawn_procs(per_host={"procs": 1}, name=f"{label}_{len(meshes)}"))
        return meshes[-1]

    try:
        volume = spawn("volume")
        await store.start(volume, store_name, timeout_seconds=SECONDS)
        publisher = spawn("publisher").spawn("publisher", Publisher, sizes, store_name, is_shared)
        consumers = [
            spawn("consumer").spawn(f"consumer{n}", Consumer, is_shared) for n in range(CONSUMERS)
        ]
        figures: dict[str, list[float]] = {}
        before = None
        for number in range(2 * ROUNDS):
            takers = consumers[: CONSUMERS if number % 2 else 1]
            async with asyncio.timeout(SECONDS):
                [copied] = await publisher.copy.call_one(1)
                put = await publisher.publish.call_one(before)
                got = await asyncio.gather(*(c.fetch.call_one(put.manifest) for c in takers))
            before = put.manifest
            if number < 2 * SKIPPED:
                continue
            told = f"to_{len(takers)}"
            seconds = max(each.arrived_at for each in got) - put.started_at
            for key, value in (
                ("copy", copied),
                (f"{told}_seconds", seconds),
                (f"{told}_copies", seconds / copied),
                ("pack_seconds", put.packed_at - put.started_at),
                ("put_seconds", put.put_at - put.packed_at),
                (f"{told}_get_seconds", max(e.arrived_at for e in got) - put.put_at),
            ):
                figures.setdefault(key, []).append(value)
        with suppress(Exception):
            await store.forget(store_name, timeout_seconds=SECONDS)
    finally:
        for mesh in meshes:
            await asyncio.wait_for(mesh.stop("measured"), SECONDS)
    one, four = figures["to_1_seconds"], figures["to_4_seconds"]
    return {
        "bytes": 4 * sum(sizes),
        "tensors": len(sizes),
        **{key: statistics.median(values) for key, values in figures.items()},
        "to_1_copies_range": [min(figures["to_1_copies"]), max(figures["to_1_copies"])],
        "four_to_one": statistics.median(b / a for a, b in zip(one, four, strict=True)),
    }


async def measure(names: list[str]) -> dict[str, Any]:
    """Every size, in shared memory and in messages."""
    shared, messages = {}, {}
    for name in names:
        shared[name] = await measure_size(name, is_shared=True)
        print(name, shared[name], flush=True)
        if name in MESSAGES:
            messages[name] = await measure_size(name, is_shared=False)
            print(name, "in messages", messages[name], flush=True)
    is_met = (
        all(shared[n]["to_1_copies"] <= most for n, most in MOST_COPIES.items() if n in shared)
        and all(shared[n]["to_1_seconds"] <= m for n, m in MOST_SECONDS.items() if n in shared)
        and all(each["four_to_one"] <= MOST_OF_FOUR for each in shared.values())
        and list(SIZES) == names
    )
    return {"shared_memory": shared, "messages": messages, "met": is_met}


def main() -> None:
    """Measure, print, record."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    names = parser.parse_args().sizes
    from benchmarks.record import write_record
    from forge_core.process_environment import MONARCH_ENVIRONMENT

    os.environ.update(MONARCH_ENVIRONMENT)
    result = asyncio.run(measure(names))
    print(result)
    if names == list(SIZES):
        print(write_record("weights", "python -m benchmarks.bench_weights", result))


if __name__ == "__main__":
    main()
