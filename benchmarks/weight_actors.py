"""The two ends of a weight transfer as actors: one that has parameters, and those that take its versions."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from monarch.actor import Actor, endpoint

from forge_core.config import HostsConfig
from forge_core.weights import packing, store
from forge_core.weights.manifest import Manifest
from forge_core.weights.segments import Pool

SECONDS = 300.0


def install(is_shared: bool) -> None:
    """As a run installs it, on this machine alone or on several."""
    store.install(
        HostsConfig() if is_shared else HostsConfig(source="workers", workers=["tcp://127.0.0.1:9"])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version that was put."""

    manifest: Manifest
    started_at: float
    """When packing began, on the machine's monotonic clock."""
    packed_at: float
    put_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A version that can be read."""

    started_at: float
    arrived_at: float
    total: float
    """Of one element of each tensor: proof that they can be read."""


class Publisher(Actor):
    """Has parameters, one thread and a pool of segments, as a rank of the trainer."""

    def __init__(self, sizes: tuple[int, ...], store_name: str, is_shared: bool) -> None:
        torch.set_num_threads(1)
        install(is_shared)
        self._parameters = [(f"p{n}", torch.rand(size)) for n, size in enumerate(sizes)]
        self._store_name = store_name
        self._allocate = Pool().take if is_shared else None
        self._version = 0

    @endpoint
    async def publish(self, replaced: Manifest | None) -> Published:
        """Other weights than before, packed and put."""
        self._version += 1
        for _, tensor in self._parameters:
            tensor[0] = self._version
        started_at = time.monotonic()
        more = {} if self._allocate is None else {"allocate": self._allocate}
        manifest, buckets = packing.pack(self._parameters, self._version, **more)
        packed_at = time.monotonic()
        manifest = dataclasses.replace(manifest, store=self._store_name)
        await store.put_version(manifest, buckets, timeout_seconds=SECONDS)
        put_at = time.monotonic()
        if replaced is not None:
            await store.delete_version(replaced, timeout_seconds=SECONDS)
        return Published(
            manifest=manifest, started_at=started_at, packed_at=packed_at, put_at=put_at
        )

    @endpoint
    async def copy(self, repeats: int) -> list[float]:
        """Seconds of one memory copy of all parameters, both sides of which have been touched before."""
        source = torch.cat([tensor for _, tensor in self._parameters])
        target, found = torch.zeros_like(source), []
        for _ in range(repeats):
            started = time.monotonic()
            target.copy_(source)
            found.append(time.monotonic() - started)
        return found


class Consumer(Actor):
    """Takes versions as a generator does."""

    def __init__(self, is_shared: bool) -> None:
        torch.set_num_threads(1)
        install(is_shared)

    @endpoint
    async def fetch(self, manifest: Manifest) -> Fetched:
        """Get a version, checked; it is let go at once."""
        started_at = time.monotonic()
        tensors = await store.get_tensors(manifest, timeout_seconds=SECONDS)
        arrived_at = time.monotonic()
        total = float(sum(tensor[0] for tensor in tensors.values()))
        assert total == manifest.policy_version * len(tensors)
        return Fetched(started_at=started_at, arrived_at=arrived_at, total=total)
