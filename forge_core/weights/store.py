"""TorchStore on Monarch 0.7: one place that starts it, puts a version and gets one.

`install()` runs in every process that touches TorchStore. Monarch 0.7 refuses actor classes that mix sync
and async endpoints, and TorchStore 0.1.2's controller does; the subclass below declares them all async.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import torch
import torchstore
import torchstore.api
from monarch.actor import endpoint
from torchstore.controller import Controller
from torchstore.storage_volume import StorageVolume

from forge_core.config import HostsConfig
from forge_core.services.fault_hook import handle_faults_of
from forge_core.weights import packing, transport
from forge_core.weights.digest import checksum, combine, digest, head, is_sha256
from forge_core.weights.manifest import Manifest

logger = logging.getLogger(__name__)


class AsyncController(Controller):
    """TorchStore's index of keys with every endpoint async."""

    @endpoint
    async def get_controller_strategy(self) -> Any:
        return Controller.get_controller_strategy._method(self)

    @endpoint
    async def locate_volumes(self, key: str) -> Any:
        return Controller.locate_volumes._method(self, key)

    @endpoint
    async def notify_put(self, key: str, request: Any, storage_volume_id: str) -> None:
        Controller.notify_put._method(self, key, request, storage_volume_id)

    @endpoint
    async def keys(self, prefix: str | None = None) -> list[str]:
        return Controller.keys._method(self, prefix)

    @endpoint
    async def notify_delete(self, key: str, storage_volume_id: str) -> None:
        Controller.notify_delete._method(self, key, storage_volume_id)


def install(hosts: HostsConfig | None = None) -> None:
    """Make TorchStore use `AsyncController` in this process, and shared memory where all is on this machine.

    Harmless to repeat.
    """
    torchstore.api.Controller = AsyncController
    if hosts is None or hosts.source == "this_machine":
        transport.share_memory()
    else:
        transport.share_nothing()


async def start(volume: Any, name: str, *, timeout_seconds: float) -> None:
    """Start a store with one volume on the process mesh `volume`; called by the controller, once for each name.

    A store whose volume died is replaced by one of another name: those that hold a handle to the old one would go on
    asking it.
    """
    install()
    # They go with the processes of `volume`, which whoever started those watches.
    handle_faults_of(StorageVolume.actor_name)
    async with asyncio.timeout(timeout_seconds):
        await torchstore.initialize(mesh=volume, store_name=name)


async def forget(name: str, *, timeout_seconds: float) -> None:
    """Shut a store down as far as it still answers, so that this process may start another one of its name."""
    try:
        async with asyncio.timeout(timeout_seconds):
            await torchstore.shutdown(name)
    except Exception as error:
        # Its volume may be dead, which is why it is given up; the volume's process is stopped by its owner.
        logger.debug("TorchStore %s did not shut down in order: %s", name, error)
        torchstore.reset_client(name)


async def put_version(
    manifest: Manifest, buckets: packing.Buckets, *, timeout_seconds: float
) -> None:
    """Put the buckets of a version that this process has; it is there once every rank has put its own.

    Raises TimeoutError when the store does not take them in time.
    """
    keys = manifest.keys
    async with asyncio.timeout(timeout_seconds):
        await asyncio.gather(
            *(
                torchstore.put(keys[index], bucket, store_name=manifest.store)
                for index, bucket in buckets.items()
            )
        )


async def get_version(
    manifest: Manifest, wanted: packing.Wanted | None = None, *, timeout_seconds: float
) -> dict[int, torch.Tensor]:
    """Get the buckets of a version that hold anything of what is wanted, by their index.

    Raises TimeoutError, KeyError if one is not there, and ValueError for a slice that the version has not got.
    """
    keys = manifest.keys
    indices = sorted({slot.bucket for slot in packing.touched(manifest, wanted)})
    async with asyncio.timeout(timeout_seconds):
        buckets = await asyncio.gather(
            *(torchstore.get(keys[index], store_name=manifest.store) for index in indices)
        )
    return dict(zip(indices, buckets, strict=True))


async def get_tensors(
    manifest: Manifest, wanted: packing.Wanted | None = None, *, timeout_seconds: float
) -> dict[str, torch.Tensor]:
    """Whole tensors of a version, or the slices that are wanted, by name; as views of what arrived where they can be.

    Raises what `get_version` raises, and ValueError if the bytes are not those that the manifest tells.
    """
    buckets = await get_version(manifest, wanted, timeout_seconds=timeout_seconds)
    # Beside the loop, which may be sampling with the version before.
    return await asyncio.to_thread(_unpack, manifest, buckets, wanted)


def _unpack(
    manifest: Manifest, buckets: packing.Buckets, wanted: packing.Wanted | None
) -> dict[str, torch.Tensor]:
    """What is wanted, held against the checksum of each slot that it was taken from and, if whole, the digest."""
    tensors = packing.unpack(manifest, buckets, wanted)
    # Tied names lie in one place.
    places = {(slot.bucket, slot.offset_bytes): slot for slot in packing.touched(manifest, wanted)}
    has_arrived = all(
        checksum(packing.view(manifest, slot, buckets)) == slot.checksum for slot in places.values()
    )
    if has_arrived and wanted is None and not is_sha256(manifest.digest):
        is_joined = any(slot.held.shape != slot.shape for slot in manifest.slots)
        told = {head(s.name, s.dtype, s.shape): s.checksum for s in manifest.slots}
        has_arrived = manifest.digest == (digest(tensors) if is_joined else combine(told))
    if not has_arrived:
        raise ValueError(
            f"other bytes of version {manifest.policy_version} arrived than the trainer sent"
        )
    return tensors


async def delete_version(manifest: Manifest, *, timeout_seconds: float) -> None:
    """Forget a version that no generator will ask for again. Safe to repeat."""
    async with asyncio.timeout(timeout_seconds):
        for key in manifest.keys:
            if await torchstore.exists(key, store_name=manifest.store):
                await torchstore.delete(key, store_name=manifest.store)
