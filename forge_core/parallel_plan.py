"""Tensor parallelism of a transformers model: which of its layers are shared out, and how.

The plan is the model's own, `base_model_tp_plan` of its transformers config. Of a colwise layer each rank has some rows
of the weight, which are some of the attention heads or of the feed-forward units; of the rowwise layer behind it the
columns that go with them. So a block communicates twice a pass, by sums (Shoeybi et al. 2019, arXiv 1909.08053).
Embedding, output layer and the norms between the blocks are not shared: each rank of a group computes them alike.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from forge_core.config import TrainerConfig

_HEADS = 2
"""Dimension of the heads in what a norm of queries or keys is given."""

_STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "rowwise": RowwiseParallel(),
    # A norm of each head: whole on every rank, used on the heads that are there, its gradient a sum over ranks.
    "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=_HEADS, use_local_output=True),
}
_LEFT_WHOLE = {"embedding_rowwise"}
"""Styles of the embedding, which transformers shares where it is tied to the output layer."""


def share_layers(model: Any, mesh: DeviceMesh, trainer: TrainerConfig) -> None:
    """Share a model's layers out over the ranks of `mesh`, which are tensor parallel neighbours.

    Raises ValueError, before anything has changed, for a model without a plan, with one that asks for more than this
    module knows, or of a shape that cannot be shared evenly.
    """
    share = trainer.tensor_parallel
    config = model.config.get_text_config()
    name = type(config).__name__
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"trainer.tensor_parallel {share} needs a plan of how layers are shared, and transformers has none for a "
            f"model with {name}: set it to 1"
        )
    shared = {pattern: style for pattern, style in plan.items() if style not in _LEFT_WHOLE}
    for pattern, style in shared.items():
        if style not in _STYLES:
            raise ValueError(
                f"trainer.tensor_parallel {share} cannot share {pattern!r} of a model with {name}, whose plan asks for "
                f"{style!r} where {', '.join(_STYLES)} are known: set it to 1"
            )
    trainer.check_shares(
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
    )
    parallelize_module(
        model.base_model, mesh, {pattern: _STYLES[style] for pattern, style in shared.items()}
    )
