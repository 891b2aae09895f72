"""vLLM's end of the transfer: a weight-transfer engine that loads what TorchStore delivered.

The owner of the engine process fetches the buckets (an async call) and hands them over with `stage()`; vLLM
then drives `start_weight_update`, `update_weights` and `finish_weight_update` on every worker. Loading goes
through vLLM's layer-wise reload, which redoes the repacking of CPU layers and the tying of embeddings; a
plain `load_weights` on a running engine does neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "torchstore"

_staged: dict[int, dict[str, torch.Tensor]] = {}


def register() -> None:
    """Make `WeightTransferConfig(backend="torchstore")` known to vLLM; harmless to repeat."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, TorchStoreWeightTransferEngine)


def stage(policy_version: int, tensors: dict[str, torch.Tensor]) -> None:
    """Hold the tensors of a version for this process's engine; replaces whatever was held."""
    _staged.clear()
    _staged[policy_version] = tensors


@dataclass
class TorchStoreInitInfo(WeightTransferInitInfo):
    """Nothing to rendezvous: TorchStore is found by its name."""


@dataclass
class TorchStoreUpdateInfo(WeightTransferUpdateInfo):
    """Which staged version to load."""

    policy_version: int
    """A version that `stage()` was called with."""


class TorchStoreWeightTransferEngine(
    WeightTransferEngine[TorchStoreInitInfo, TorchStoreUpdateInfo]
):
    """Loads a staged version into the worker's model, in Hugging Face layout."""

    init_info_cls = TorchStoreInitInfo
    update_info_cls = TorchStoreUpdateInfo

    def init_transfer_engine(self, init_info: TorchStoreInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Put the model's layers back into loadable form."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the staged tensors; on a GPU, wait until they are there."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: TorchStoreUpdateInfo) -> None:
        """Load version `update_info.policy_version`; KeyError if it was not staged."""
        tensors = _staged[update_info.policy_version]
        load_weights: Any = self.model.load_weights
        load_weights(iter(tensors.items()))

    def finish_weight_update(self) -> None:
        """Repack and tie; the staged copy is let go."""
        finalize_layerwise_reload(self.model, self.model_config)
        _staged.clear()

    def shutdown(self) -> None:
        """Let go of anything staged."""
        _staged.clear()
