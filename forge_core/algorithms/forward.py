"""Forward passes over a micro-batch: the logprobs of its tokens, by way of the hidden states that predict them.

Shapes: B sequences, L tokens, T = L - 1 predicted positions; K of them count, at most C at once; N tokens in a row;
D hidden units; V words of the vocabulary.

A micro-batch goes through the decoder as a row without padding where it has one, else as the padded tensor. Only the
positions of the mask go on to the output layer, and their logprobs are put back into the padded shape that losses know.
Where they are more than a chunk, they go there chunk by chunk, and what the layer gave is made again in the backward
pass: logits are C x V large at most, however many tokens there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from forge_core.algorithms.batch import MicroBatch, Sequence, collate
from forge_core.algorithms.rows import row_arguments
from forge_core.config import Precision, RunConfig
from forge_core.sharding import reshard

_METHOD = "run_as_forward"
_PROBE_LENGTHS = (11, 7, 5)
_MOST_APART = {False: 1e-4, True: 0.2}
"""Nats that logprobs of the probe may be apart on average, in float32 and in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What a forward pass says of the tokens of a micro-batch."""

    logprobs_BT: torch.Tensor
    """Logprob of each predicted token; 0 off the mask."""
    entropy_BT: torch.Tensor
    """Entropy of each prediction, in nats, with gradient only if asked for; 0 off the mask."""


def token_logprobs(
    model: Any,
    batch: MicroBatch,
    *,
    temperature: float,
    entropy_has_gradient: bool = False,
    chunk_tokens: int | None = None,
    precision: Precision = "model",
) -> TokenLogprobs:
    """Logprobs in float32 under softmax(logits / temperature), of the tokens of the mask, so many at once.

    Collective where the model is sharded: also a rank whose mask is empty takes part.
    """

    def scored(inner: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_1KD = hidden_states(inner.get_decoder(), batch)
        targets_1K = batch.token_ids_BL[:, 1:][batch.mask_BT][None]
        score = functools.partial(
            _scored, inner.get_output_embeddings(), temperature, entropy_has_gradient
        )
        return _in_chunks(score, hidden_1KD, targets_1K, chunk_tokens)

    with computing_in(precision, batch.mask_BT.device):
        logprobs_1K, entropy_1K = _as_forward(model, scored)
    return TokenLogprobs(
        logprobs_BT=on_mask(logprobs_1K, batch.mask_BT),
        entropy_BT=on_mask(entropy_1K, batch.mask_BT),
    )


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which forward passes compute so; what is made again in a backward pass is made as it was."""
    # Without its cache, which would hold a copy of every layer's weights while FSDP frees them.
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=precision == "bf16_autocast", cache_enabled=False
    )


def hidden_states(decoder: Any, batch: MicroBatch) -> torch.Tensor:
    """What the decoder makes of the positions that predict the tokens of the mask, shape (1, K, D)."""
    if batch.row is None:
        states_BLD = decoder(input_ids=batch.token_ids_BL, use_cache=False).last_hidden_state
        kept_1KD: torch.Tensor = states_BLD[:, :-1][batch.mask_BT][None]
        return kept_1KD
    is_real_BL = batch.is_real_BL
    states_1ND = decoder(
        input_ids=batch.token_ids_BL[is_real_BL][None],
        use_cache=False,
        **row_arguments(decoder.config, batch.row),
    ).last_hidden_state
    is_kept_BL = torch.nn.functional.pad(batch.mask_BT, (0, 1))
    kept_K = is_kept_BL[is_real_BL].nonzero().squeeze(1)
    kept_1KD = states_1ND.index_select(1, kept_K)
    return kept_1KD


def on_mask(value_1K: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Values of the tokens of the mask where they belong, 0 off it, shape (B, T)."""
    nothing_BT = torch.zeros(mask_BT.shape, dtype=value_1K.dtype, device=value_1K.device)
    return nothing_BT.masked_scatter(mask_BT, value_1K)


def _in_chunks(
    score: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    hidden_1KD: torch.Tensor,
    targets_1K: torch.Tensor,
    chunk_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `score` gives of each chunk, one after another; without what it holds for the backward pass if there are
    several."""
    size = chunk_tokens or max(1, hidden_1KD.shape[1])
    chunks = list(zip(hidden_1KD.split(size, dim=1), targets_1K.split(size, dim=1), strict=True))
    if len(chunks) > 1:
        score = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    logprobs, entropies = zip(*[score(*chunk) for chunk in chunks], strict=True)
    # New tensors also of one chunk: FSDP hooks on to what a forward pass returns, and a view could lose that.
    return torch.cat(logprobs, dim=1), torch.cat(entropies, dim=1)


def _scored(
    head: torch.nn.Module,
    temperature: float,
    entropy_has_gradient: bool,
    hidden_1CD: torch.Tensor,
    targets_1C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies of predictions, shapes (1, C)."""
    all_logprobs_1CV = torch.log_softmax(head(hidden_1CD).float() / temperature, dim=-1)
    logprobs_1C = all_logprobs_1CV.gather(-1, targets_1C[..., None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
        entropy_1C = -(all_logprobs_1CV.exp() * all_logprobs_1CV).sum(-1)
    return logprobs_1C, entropy_1C


def _as_forward(model: Any, work: Callable[[Any], tuple[torch.Tensor, ...]]) -> Any:
    """What `work` makes of the model, within what FSDP does before and after a forward pass of its root."""
    is_sharded = isinstance(model, FSDPModule)
    if not is_sharded:
        return work(model)
    if not hasattr(model, _METHOD):
        setattr(model, _METHOD, lambda work: work(model))
        register_fsdp_forward_method(model, _METHOD)
    return getattr(model, _METHOD)(work)


@torch.no_grad()
def check_forward(model: Any, config: RunConfig, device: torch.device) -> None:
    """Compare logprobs by way of hidden states, and of a row, with those that the model's own forward pass gives.

    Raises ValueError for a model whose layers mix the sequences of a row other than by attention, or whose output is
    more than a layer over the hidden states. Collective where the model is sharded.
    """
    packed, precision = config.trainer.packing, config.trainer.precision
    vocabulary = model.config.get_text_config().vocab_size
    ids = [[(7 * at * at + 3) % vocabulary for at in range(n)] for n in _PROBE_LENGTHS]
    probe = [
        Sequence(token_ids=each, num_prompt_tokens=1, mask=[True] * (len(each) - 1)) for each in ids
    ]
    batch = collate(probe, 0, device, packed=packed)
    found_BT = token_logprobs(model, batch, temperature=1.0, precision=precision).logprobs_BT
    wanted_BT = torch.zeros_like(found_BT)
    for row, each in enumerate(ids):
        ids_1L = torch.tensor([each], device=device)
        with computing_in(precision, device):
            logits_1LV = model(input_ids=ids_1L, use_cache=False).logits
        logprobs_TV = torch.log_softmax(logits_1LV[0, :-1].float(), dim=-1)
        wanted_BT[row, : len(each) - 1] = logprobs_TV[range(len(each) - 1), each[1:]]
    reshard(model)
    apart = float((found_BT - wanted_BT)[batch.mask_BT].abs().mean())
    is_half = config.model.dtype == "bfloat16" or precision == "bf16_autocast"
    if not apart <= _MOST_APART[is_half]:
        mend = (
            "set trainer.packing to false, and if that does not help, the model cannot be trained"
            if packed
            else "its output is more than a layer over its hidden states, and it cannot be trained"
        )
        raise ValueError(
            f"logprobs of a model with {type(model.config).__name__} are on average {apart:.3g} nats from those of its "
            f"own forward pass: {mend}"
        )
