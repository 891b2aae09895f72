"""How sequences lie one after another in one row, and which of them attention takes side by side.

Shapes: N tokens of all sequences; a group of G sequences of at most L tokens.

Imports no transformers: the controller imports it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

GROUPED = "forgeflow_grouped"
"""Name of the attention in `forge_core.attention`, among those of transformers."""

_MOST_PADDING = 0.25
"""Share of a group's longest sequence that its others may lack."""
_FREE_PADDING = 16
"""Tokens that they may lack anyway: of short sequences more groups cost more than padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How sequences lie one after another in a row of N tokens."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, in the order of the row."""
    position_ids_1N: torch.Tensor
    """Position of each token in its own sequence."""
    groups_GL: tuple[torch.Tensor, ...]
    """Of each group of sequences, where in the row its tokens lie; beyond the end of a sequence, its last token."""
    places_N: torch.Tensor
    """Where each token of the row lies in all groups one after another."""


def lay_out(lengths: Sequence[int], device: torch.device) -> Row:
    """The row of sequences of these lengths, each at least 1."""
    starts = [0, *accumulate(lengths)]
    places_N = torch.empty(starts[-1], dtype=torch.long)
    groups_GL: list[torch.Tensor] = []
    before = 0
    for members in _grouped(lengths):
        longest = lengths[members[0]]
        steps_1L = torch.arange(longest)[None]
        starts_G1 = torch.tensor([starts[each] for each in members])[:, None]
        lengths_G1 = torch.tensor([lengths[each] for each in members])[:, None]
        taken_GL = starts_G1 + torch.minimum(steps_1L, lengths_G1 - 1)
        is_real_GL = steps_1L < lengths_G1
        found_GL = before + torch.arange(taken_GL.numel()).view_as(taken_GL)
        places_N[taken_GL[is_real_GL]] = found_GL[is_real_GL]
        groups_GL.append(taken_GL.to(device))
        before += taken_GL.numel()
    return Row(
        lengths=tuple(lengths),
        position_ids_1N=torch.cat([torch.arange(each) for each in lengths])[None].to(device),
        groups_GL=tuple(groups_GL),
        places_N=places_N.to(device),
    )


def _grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences of about the same length, longest first."""
    groups: list[list[int]] = []
    least = 0.0
    for each in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[each]
        if not groups or length < least:
            groups.append([])
            least = min(length * (1 - _MOST_PADDING), length - _FREE_PADDING)
        groups[-1].append(each)
    return groups


def row_arguments(config: Any, row: Row) -> dict[str, Any]:
    """What a decoder with this transformers config is called with, beside token ids, so that its attention knows a row.

    Raises ValueError for a kind of attention that does not know rows.
    """
    kind = config._attn_implementation
    arguments: dict[str, Any] = {"position_ids": row.position_ids_1N}
    if kind == GROUPED:
        # A mask that is whole already, so that none of N x N is made.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.places_N.device)
        return {**arguments, "attention_mask": mask, "row": row}
    if kind.startswith("flash_attention"):
        ends = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32)
        ends, longest = ends.to(row.places_N.device), max(row.lengths)
        return {
            **arguments,
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    raise ValueError(
        f"attention {kind!r} does not keep the sequences of a row apart: set trainer.packing to false"
    )
