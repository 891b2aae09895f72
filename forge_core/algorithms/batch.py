"""Sequences as tensors, shared among ranks.

Shapes: B sequences, L tokens (padded on the right), T = L - 1 predicted positions.

Losses see padded tensors. The forward pass, which costs most, runs over a row of the sequences' own tokens one after
another unless it is to be padded as well: padding lies to the right of every token that counts, so that a causal model
needs no mask for it, and positions start at 0, as they did when vLLM generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from forge_core.algorithms.rows import Row, lay_out

Figure = Literal["reference_logprobs", "values", "advantages", "returns"]
"""What may be known of each response token beside its sampled logprob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One prompt and response, ready to train on."""

    token_ids: list[int]
    """Prompt and response."""
    num_prompt_tokens: int
    """How many of them are prompt."""
    mask: list[bool]
    """Per response token: does it count?"""
    sampled_logprobs: list[float] = field(default_factory=list)
    """Per response token; empty in supervised training."""
    advantage: float = 0.0
    """One per sequence; unused in supervised training."""
    figures: Mapping[Figure, list[float]] = field(default_factory=dict)
    """What else is known of the response tokens, one number each; of the same kinds in all sequences of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward and backward pass."""

    token_ids_BL: torch.Tensor
    """Right-padded token ids."""
    mask_BT: torch.Tensor
    """True where the predicted token counts."""
    sampled_logprobs_BT: torch.Tensor
    """Recorded logprobs, 0 elsewhere."""
    advantages_B: torch.Tensor
    """Per sequence."""
    figures_BT: Mapping[Figure, torch.Tensor]
    """What else is known of the tokens, 0 elsewhere; empty for padding."""
    is_real_BL: torch.Tensor
    """True where a token is no padding."""
    row: Row | None
    """How the sequences lie one after another, where the forward pass is without padding."""


def share(sequences: list[Sequence], rank: int, ranks: int) -> list[Sequence]:
    """Every `ranks`-th sequence, longest first, so that ranks get about the same work."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].token_ids), i))
    return [sequences[i] for i in order[rank::ranks]]


def split(
    sequences: list[Sequence], max_tokens: int, pieces: int | None = None, *, packed: bool = False
) -> list[list[Sequence]]:
    """Runs of sequences whose size stays within `max_tokens` (one sequence may exceed it alone).

    The size is that of the padded tensor; with `packed` that of the sequences themselves.

    With `pieces`, exactly so many runs: empty ones are appended, for ranks that must take part in the others'
    collectives with nothing of their own.
    """
    runs: list[list[Sequence]] = []
    longest = total = 0
    for sequence in sequences:
        length = len(sequence.token_ids)
        longest, total = max(longest, length), total + length
        size = total if packed else (len(runs[-1]) + 1 if runs else 1) * longest
        if not runs or size > max_tokens:
            runs.append([])
            longest = total = length
        runs[-1].append(sequence)
    if pieces is not None:
        if len(runs) > pieces:
            raise ValueError(f"{len(runs)} runs do not fit in {pieces} pieces")
        runs += [[] for _ in range(pieces - len(runs))]
    return runs


def collate(
    sequences: list[Sequence], pad_id: int, device: torch.device, *, packed: bool = False
) -> MicroBatch:
    """Pad sequences into tensors; none at all makes one sequence of padding in which nothing counts.

    With `packed` the forward pass goes without the padding.
    """
    if not sequences:
        sequences = [Sequence(token_ids=[pad_id, pad_id], num_prompt_tokens=1, mask=[False])]
    lengths = [len(s.token_ids) for s in sequences]
    rows, length = len(sequences), max(lengths)
    token_ids_BL = torch.full((rows, length), pad_id, dtype=torch.long)
    is_real_BL = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    mask_BT = torch.zeros(rows, length - 1, dtype=torch.bool)
    sampled_BT = torch.zeros(rows, length - 1, dtype=torch.float32)
    figures_BT = {name: torch.zeros_like(sampled_BT) for name in sequences[0].figures}
    for row, sequence in enumerate(sequences):
        # The token at position p is predicted from position p - 1: hence the shift by one.
        start = sequence.num_prompt_tokens - 1
        end = len(sequence.token_ids) - 1
        token_ids_BL[row, : end + 1] = torch.tensor(sequence.token_ids)
        mask_BT[row, start:end] = torch.tensor(sequence.mask)
        if sequence.sampled_logprobs:
            sampled_BT[row, start:end] = torch.tensor(sequence.sampled_logprobs)
        for name, of_tokens in sequence.figures.items():
            figures_BT[name][row, start:end] = torch.tensor(of_tokens)
    return MicroBatch(
        token_ids_BL=token_ids_BL.to(device),
        mask_BT=mask_BT.to(device),
        sampled_logprobs_BT=sampled_BT.to(device),
        advantages_B=torch.tensor([s.advantage for s in sequences], dtype=torch.float32).to(device),
        figures_BT={name: figure_BT.to(device) for name, figure_BT in figures_BT.items()},
        is_real_BL=is_real_BL.to(device),
        row=lay_out(lengths, device) if packed else None,
    )
