"""How tensors get to a TorchStore volume and back: shared memory on one machine, else as TorchStore has it.

TorchStore sends what a client puts, or gets, in a transport buffer. Ours carries the handle of a segment of shared
memory, and nothing of a tensor's bytes: the trainer writes a version once, and every generator reads it there. A tensor
that is no segment travels in Monarch's messages, as does everything where volume and clients are on several machines,
unless those have RDMA.
"""

from __future__ import annotations

from typing import Any

import torch
from torchstore.transport.buffers import MonarchTransportBuffer, TransportBuffer
from torchstore.transport.pipe import Pipe

from forge_core.weights.segments import Handle, attach, handle_of

_chosen_by_torchstore = Pipe.create_transport_buffer


def share_memory() -> None:
    """Have this process put and get by shared memory; the volumes that it talks to are on this machine."""
    Pipe.create_transport_buffer = lambda _: SharedMemoryTransportBuffer()


def share_nothing() -> None:
    """Leave it to TorchStore: RDMA where there is, else messages."""
    Pipe.create_transport_buffer = _chosen_by_torchstore


class SharedMemoryTransportBuffer(MonarchTransportBuffer):
    """Takes a tensor that is a segment as its handle."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: Handle | None = None
        self._is_kept = True
        """Whether who reads is a volume, which looks at no byte."""

    async def write_from(self, tensor: torch.Tensor | None) -> None:
        """Of a client that puts, and of a volume that is asked."""
        self._handle = None if tensor is None else handle_of(tensor)
        await super().write_from(tensor if self._handle is None else None)

    async def read_into(self, tensor: torch.Tensor | None = None) -> Any:
        """Of a volume that is given something, and of a client that gets. Raises OSError if the memory is gone."""
        if self._handle is None:
            return await super().read_into(tensor)
        found = attach(self._handle, is_read=not self._is_kept)
        return found if tensor is None else tensor.copy_(found)

    def update(self, other_buffer: TransportBuffer) -> None:
        """Take over what a volume answered."""
        super().update(other_buffer)
        assert isinstance(other_buffer, SharedMemoryTransportBuffer)
        self._handle, self._is_kept = other_buffer._handle, False
