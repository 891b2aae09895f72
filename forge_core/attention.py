"""Attention of sequences that lie one after another in one row, none of which sees another.

Shapes: N tokens of all sequences; a group of G sequences of at most L tokens; H heads of size D.

Attention is the one layer in which tokens meet: all others run over the row as it is, without padding. Here sequences
of about the same length are taken out of the row and put side by side, so that the kernel for causal attention serves
a group at once. Neither a mask of N x N nor the work of one is needed, and a sequence cannot see what is not in its
own line. Where flash attention is chosen, its kernel for rows of sequences does the same by their boundaries.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from forge_core.algorithms.rows import GROUPED, Row
from forge_core.config import Attention


def implementation(attention: Attention) -> str:
    """What transformers calls the attention that the config chooses."""
    return GROUPED if attention == "sdpa" else attention


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row: Row | None = None,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a row.

    Shapes of its tensors are (1, H, N, D), that of the result is (1, N, H, D).

    Without a row, PyTorch's attention with the mask that it is given, shapes (B, H, L, D) and (B, L, H, D).
    """
    if row is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **other
        )
        return found
    query_NHD, key_NHD, value_NHD = (each[0].transpose(0, 1) for each in (query, key, value))
    results = []
    for taken_GL in row.groups_GL:
        shape = tuple(taken_GL.shape)
        query_GHLD, key_GHLD, value_GHLD = (
            each.index_select(0, taken_GL.flatten()).unflatten(0, shape).transpose(1, 2)
            for each in (query_NHD, key_NHD, value_NHD)
        )
        result_GLHD, _ = sdpa_attention_forward(
            module,
            query_GHLD,
            key_GHLD,
            value_GHLD,
            _window(shape[1], sliding_window, query.device),
            **other,
        )
        results.append(result_GLHD.flatten(0, 1))
    return torch.cat(results).index_select(0, row.places_N)[None], None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which tokens a token sees where it sees only the last few; None where it sees all before it."""
    if window is None or window >= length:
        return None
    steps = torch.arange(length, device=device)
    apart_LL = steps[:, None] - steps[None]
    return (apart_LL >= 0) & (apart_LL < window)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
