"""The trainer's layout: ranks, a model that they share, and whole tensors into and out of it.

Ranks are a mesh of FSDP2 by tensor parallelism. Of four ranks with `trainer.tensor_parallel` 2:

```
             tp 0     tp 1
    fsdp 0   rank 0   rank 1     train on one half of the episodes, together
    fsdp 1   rank 2   rank 3     train on the other half
```
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from forge_core.config import RunConfig, TrainerConfig
from forge_core.parallel_plan import share_layers
from forge_core.recomputation import blocks_of, recompute_activations

_FSDP, _TP = "fsdp", "tp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the ranks of the trainer share model and episodes."""

    device: torch.device
    """Of this rank."""
    mesh: DeviceMesh
    """All ranks, by FSDP and, where there is any, tensor parallelism."""

    @property
    def data(self) -> DeviceMesh:
        """The ranks that share the episodes with this one, each of them another part."""
        return self.mesh[_FSDP]

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks that share each layer with this one and train on the same episodes; None if there are no others."""
        return self.mesh[_TP] if self.mesh.ndim > 1 else None

    def copies(self, tensor: torch.Tensor) -> int:
        """How many ranks hold the same part of a tensor."""
        if not isinstance(tensor, DTensor):
            return self.mesh.size()
        mesh = tensor.device_mesh
        parts = [
            mesh.size(at) for at, how in enumerate(tensor.placements) if not how.is_replicate()
        ]
        return self.mesh.size() // math.prod(parts)


def make_layout(config: TrainerConfig, device: torch.device) -> Layout:
    """The layout that a config asks for; collective, in a process group of all ranks."""
    share = config.tensor_parallel
    if share == 1:
        mesh = init_device_mesh(device.type, (config.ranks,), mesh_dim_names=(_FSDP,))
    else:
        # It warns of gathering in two goes, which whole tensors of such a mesh take.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        mesh = init_device_mesh(
            device.type, (config.ranks // share, share), mesh_dim_names=(_FSDP, _TP)
        )
    return Layout(device=device, mesh=mesh)


def join_group(config: TrainerConfig, rendezvous: str, rank: int) -> torch.device:
    """Join the process group of all ranks, which meet at the file `rendezvous`; the device of this one."""
    on_gpu = config.device == "cuda"
    # Each rank sees only its own GPU.
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        # By file: a TCP store would listen on every address of the machine.
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=config.ranks,
        device_id=device if on_gpu else None,
    )
    return device


def shard_model(model: torch.nn.Module, config: RunConfig, layout: Layout) -> torch.nn.Module:
    """The model on the device, shared by all ranks, by FSDP2 block by block; without dropout.

    Raises ValueError for a model that tensor parallelism cannot share.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if config.model.dtype == "bfloat16" and config.trainer.precision == "model"
        else MixedPrecisionPolicy()
    )
    model.to(layout.device)
    if layout.tensor is not None:
        share_layers(model, layout.tensor, config.trainer)
    if config.trainer.activation_checkpointing:
        recompute_activations(model)
    mesh = layout.data
    for layer in blocks_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # Without dropout: the policy that is trained is the one that sampled.
    model.eval()
    return model


def reshard(model: torch.nn.Module) -> None:
    """Have every module hold its sharded parameters, as a forward pass without a backward one does not leave them.

    Only those are what the optimizer and a checkpoint know.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all ranks, which shares no memory with what it was gathered from; collective."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    gathered: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    # With one rank there is nothing to gather.
    is_shared = gathered.untyped_storage().data_ptr() == local_storage(tensor).data_ptr()
    return gathered.clone() if is_shared else gathered


def whole_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies on the host of all tensors of a model, by name; collective.

    Tied parameters are one object under two names, and stay one.
    """
    reshard(model)
    full: dict[int, torch.Tensor] = {}
    named = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in full:
            full[id(tensor)] = whole(tensor).to("cpu")
        named[name] = full[id(tensor)]
    return named


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the memory that the tensor has."""
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def local_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage of this rank's part of a tensor."""
    return local_part(tensor).untyped_storage()


def shard_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device and, where `like` is one, as a DTensor of its layout; without communication."""
    if not isinstance(like, DTensor):
        return full.to(like.device, copy=True)
    # No rank sends: every rank has read the whole tensor.
    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def load_weights(model: torch.nn.Module, pieces: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Copy whole tensors, by their Hugging Face names, into a model that may be sharded.

    Raises ValueError for a name that the model has not got, another shape, or a tensor of the model that is missing.
    """
    reshard(model)
    own = model.state_dict(keep_vars=True)
    missing = {id(tensor): name for name, tensor in own.items()}
    for piece in pieces:
        for name, full in piece.items():
            tensor = own.get(name)
            if tensor is None or tensor.shape != full.shape:
                has = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"the checkpoint has a tensor {name!r} of shape {tuple(full.shape)} and the model has {has}"
                )
            with torch.no_grad():
                tensor.copy_(shard_like(full.to(tensor.dtype), tensor))
            missing.pop(id(tensor), None)
    if missing:
        raise ValueError(
            f"the checkpoint lacks tensors of the model: {sorted(missing.values())[:5]}"
        )
