"""Figures of a batch's response tokens that a model beside the trainer makes, and the file that they travel in.

Shapes: B sequences, T predicted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from safetensors.torch import load, save

from forge_core.algorithms import batch as batches
from forge_core.algorithms.batch import MicroBatch

_FIGURES, _LENGTHS = "figures", "lengths"


@torch.no_grad()
def response_figures(
    sequences: Sequence[batches.Sequence],
    figures_of: Callable[[MicroBatch], torch.Tensor],
    *,
    max_tokens: int,
    packed: bool,
    pad_id: int,
    device: torch.device,
) -> list[list[float]]:
    """By sequence, what `figures_of` gives of its response tokens, at most about `max_tokens` at once.

    Its result has shape (B, T), a micro-batch's. With `packed` passes are without padding.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].token_ids), i))
    found: list[list[float]] = []
    for run in batches.split([sequences[i] for i in order], max_tokens, packed=packed):
        batch = batches.collate(run, pad_id, device, packed=packed)
        figures_BT = figures_of(batch).float().cpu()
        for row, sequence in enumerate(run):
            begin, end = sequence.num_prompt_tokens - 1, len(sequence.token_ids) - 1
            found.append(figures_BT[row, begin:end].tolist())
    by_place = dict(zip(order, found, strict=True))
    return [by_place[place] for place in range(len(sequences))]


def estimates_file(figures: Sequence[list[float]]) -> bytes:
    """A safetensors file: `figures`, one number a response token of all sequences one after another; `lengths`."""
    return save(
        {
            _FIGURES: torch.tensor([each for row in figures for each in row], dtype=torch.float32),
            _LENGTHS: torch.tensor([len(row) for row in figures], dtype=torch.int64),
        }
    )


def read_estimates(data: bytes, lengths: Iterable[int]) -> list[list[float]]:
    """By sequence, the figures of its response tokens. Raises ValueError unless the file is of these lengths."""
    try:
        tensors = load(data)
        figures, found = tensors[_FIGURES], tensors[_LENGTHS].tolist()
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ValueError(f"these are no estimates: {error}") from error
    wanted = list(lengths)
    if found != wanted or figures.numel() != sum(wanted):
        raise ValueError(
            f"the estimates are of {len(found)} sequences with {figures.numel()} tokens; "
            f"{len(wanted)} with {sum(wanted)} are due"
        )
    return [row.tolist() for row in figures.split(wanted)]
