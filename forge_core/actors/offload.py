"""Tensors that give up their memory for a while, and get it back with every bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from forge_core.actors.held_memory import give_back
from forge_core.sharding import local_storage


def storages_of(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Storages of tensors, of a DTensor that of its local shard; each once, and only those that hold memory."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = local_storage(tensor)
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    return list(found.values())


class Offload:
    """Keeps what storages hold, from a GPU in the host's memory and from the host in a file, while they are empty.

    Example:
        offload = Offload(Path("/tmp/asleep"))
        offload.put_away(model.parameters())
        ...  # nobody may use the model
        offload.bring_back()
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []
        self._copies: list[torch.Tensor] = []
        """On the host, of those that were on a GPU."""

    @property
    def is_away(self) -> bool:
        """Whether `bring_back` has something to bring back."""
        return bool(self._sizes)

    def put_away(self, tensors: Iterable[torch.Tensor]) -> None:
        """Empty the tensors' storages. Raises OSError if the file cannot be written; then nothing has changed."""
        assert not self.is_away, "what is away must come back first"
        storages = storages_of(tensors)
        on_host = [storage for storage in storages if storage.device.type == "cpu"]
        with self._file.open("wb") as file:
            for storage in on_host:
                # Of a copy: a storage that numpy has seen cannot be resized any more.
                file.write(bytes_of(storage).clone().numpy().data)
        on_gpu = [storage for storage in storages if storage.device.type != "cpu"]
        self._copies = [bytes_of(storage).to("cpu") for storage in on_gpu]
        self._sizes = [(storage, storage.nbytes()) for storage in (*on_host, *on_gpu)]
        for storage, _ in self._sizes:
            storage.resize_(0)
        for device in {storage.device for storage in storages}:
            give_back(device)

    def bring_back(self) -> None:
        """Fill the storages again; harmless if nothing is away. Raises OSError if the file cannot be read."""
        if not self.is_away:
            return
        copies = iter(self._copies)
        with self._file.open("rb") as file:
            for storage, size in self._sizes:
                if storage.device.type != "cpu":
                    held = next(copies)
                else:
                    held = torch.empty(size, dtype=torch.uint8)
                    if file.readinto(held.numpy().data) != size:
                        raise OSError(f"{self._file} is shorter than what was written")
                storage.resize_(size)
                bytes_of(storage).copy_(held)
        self._sizes, self._copies = [], []
        self._file.unlink()


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a flat tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
