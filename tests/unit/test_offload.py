"""What is put away comes back to the bit, and holds no memory meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from forge_core.actors.held_memory import give_back, held_memory
from forge_core.actors.offload import Offload, storages_of

CPU = torch.device("cpu")


def test_every_bit_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(100, 30))
    half = torch.randn(70).to(torch.bfloat16)
    not_a_number = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors = [weights, half, not_a_number, weights[3], torch.empty(0)]
    before = [tensor.detach().clone() for tensor in tensors]
    offload = Offload(tmp_path / "asleep")
    for _ in range(2):
        offload.put_away(tensors)
        assert offload.is_away and (tmp_path / "asleep").stat().st_size == 4 * 3000 + 2 * 70 + 12
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 5
        offload.bring_back()
        offload.bring_back()
        assert not offload.is_away and list(tmp_path.iterdir()) == []
        for tensor, kept in zip(tensors, before, strict=True):
            assert torch.equal(tensor.view(torch.uint8), kept.view(torch.uint8))


def test_storages_are_found_once() -> None:
    whole = torch.zeros(10)
    assert len(storages_of([whole, whole[2:], whole.view(5, 2), torch.zeros(3)])) == 2


def test_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    tensors = [torch.ones(2**20) for _ in range(16)]
    held_memory(CPU)
    offload = Offload(tmp_path / "asleep")
    offload.put_away(tensors)
    asleep = held_memory(CPU)
    offload.bring_back()
    awake = held_memory(CPU)
    assert asleep.peak_bytes - asleep.bytes >= 50 * 2**20
    assert awake.bytes - asleep.bytes >= 50 * 2**20
    assert asleep.total_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    give_back(CPU)


def test_a_file_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    tensor = torch.ones(8)
    offload = Offload(tmp_path / "no-such-folder" / "asleep")
    with pytest.raises(FileNotFoundError):
        offload.put_away([tensor])
    assert not offload.is_away and torch.equal(tensor, torch.ones(8))


def test_a_file_that_was_cut_short_is_found(tmp_path: Path) -> None:
    tensor = torch.ones(8)
    offload = Offload(tmp_path / "asleep")
    offload.put_away([tensor])
    os.truncate(tmp_path / "asleep", 31)
    with pytest.raises(OSError, match="shorter"):
        offload.bring_back()
