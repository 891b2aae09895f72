"""Sequences as tensors: nothing is lost or counted twice, and every logprob is of the right token."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from forge_core.algorithms.batch import Sequence, collate, share, split
from forge_core.algorithms.forward import token_logprobs
from forge_core.algorithms.losses import LOSSES
from forge_core.algorithms.metrics import StepMetrics
from forge_core.algorithms.tokens import Tokens
from forge_core.config import AlgorithmConfig, TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm

CPU = torch.device("cpu")
PAD = 0
SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, context_length=128
)
LENGTHS = [(3, 5), (9, 2), (1, 12), (6, 6), (2, 1)]
"""Prompt and response, in tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A tiny Qwen3 with weights so large that each position predicts something else."""
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(SHAPE, 0, Path(directory))
    model = load_causal_lm(str(directory))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def tokens_of(length: int) -> Sequence:
    """A sequence of one prompt token and a response, known by its length."""
    return Sequence(
        token_ids=[length] * length, num_prompt_tokens=1, mask=[True] * (length - 1), advantage=1.0
    )


@pytest.fixture
def sequences() -> list[Sequence]:
    """Prompts and responses of different lengths; some response tokens are another speaker's."""
    random = np.random.default_rng(5)
    made = []
    for row, (num_prompt, num_response) in enumerate(LENGTHS):
        mask = [True] * num_response
        if num_response > 4:
            mask[2] = mask[3] = False
        made.append(
            Sequence(
                token_ids=random.integers(2, 350, num_prompt + num_response).tolist(),
                num_prompt_tokens=num_prompt,
                mask=mask,
                sampled_logprobs=random.uniform(-3, 0, num_response).tolist(),
                advantage=float(row - 2),
            )
        )
    return made


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("max_tokens", [1, 20, 64, 10_000])
def test_ranks_see_every_sequence_once_in_equally_many_pieces(
    ranks: int, max_tokens: int, packed: bool
) -> None:
    lengths = np.random.default_rng(7).integers(2, 30, 23).tolist()
    whole = [tokens_of(length) for length in lengths]
    shares = [share(whole, rank, ranks) for rank in range(ranks)]
    pieces = max(len(split(own, max_tokens, packed=packed)) for own in shares)
    runs = [split(own, max_tokens, pieces, packed=packed) for own in shares]
    assert {len(own) for own in runs} == {pieces}
    seen = Counter(id(s) for own in runs for run in own for s in run)
    assert seen == Counter(id(s) for s in whole)
    for run in itertools.chain(*runs):
        lengths = [len(s.token_ids) for s in run]
        size = sum(lengths) if packed else len(run) * max(lengths, default=0)
        assert size <= max_tokens or len(run) == 1


def test_shares_are_of_about_the_same_work() -> None:
    whole = [tokens_of(length) for length in (2, 100, 3, 99, 4, 98, 5, 97)]
    first, second = (sum(len(s.token_ids) for s in share(whole, rank, 2)) for rank in (0, 1))
    assert abs(first - second) <= 4
    assert [len(s.token_ids) for s in share(whole, 0, 2)] == [100, 98, 5, 3]


def test_pieces_are_not_smaller_than_they_need_to_be() -> None:
    lengths = [10, 10, 9, 4, 4, 4, 4]
    runs = split([tokens_of(length) for length in lengths], 20)
    assert [[len(s.token_ids) for s in run] for run in runs] == [[10, 10], [9, 4], [4, 4, 4]]


def test_the_longest_of_a_run_counts_wherever_it_stands() -> None:
    runs = split([tokens_of(length) for length in (4, 4, 10, 4)], 20)
    assert [[len(s.token_ids) for s in run] for run in runs] == [[4, 4], [10, 4]]


def test_an_oversized_sequence_is_a_run_of_its_own() -> None:
    runs = split([tokens_of(length) for length in (50, 5, 5)], 16, 4)
    assert [[len(s.token_ids) for s in run] for run in runs] == [[50], [5, 5], [], []]
    with pytest.raises(ValueError, match="2 runs do not fit in 1"):
        split([tokens_of(length) for length in (50, 5, 5)], 16, 1)


def test_collate_puts_everything_at_the_position_that_predicts_it(
    sequences: list[Sequence],
) -> None:
    batch = collate(sequences, PAD, CPU)
    longest = max(sum(lengths) for lengths in LENGTHS)
    assert batch.token_ids_BL.shape == (len(sequences), longest)
    assert batch.mask_BT.shape == batch.sampled_logprobs_BT.shape == (len(sequences), longest - 1)
    lengths = [len(s.token_ids) for s in sequences]
    assert batch.is_real_BL.sum(dim=1).tolist() == lengths
    for row, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        assert batch.token_ids_BL[row].tolist() == sequence.token_ids + [PAD] * (longest - length)
        for position in range(longest - 1):
            # The token at position + 1 is this response token, if it is one at all.
            token = position + 1 - sequence.num_prompt_tokens
            is_response = 0 <= token < len(sequence.mask)
            counts = is_response and sequence.mask[token]
            assert bool(batch.mask_BT[row, position]) == counts
            recorded = sequence.sampled_logprobs[token] if is_response else 0.0
            found = float(batch.sampled_logprobs_BT[row, position])
            assert found == pytest.approx(recorded, rel=1e-6)
        assert float(batch.advantages_B[row]) == sequence.advantage


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 3], [0]])
def test_logprobs_are_those_of_one_token_after_the_other(
    model: torch.nn.Module,
    sequences: list[Sequence],
    rows: list[int],
    temperature: float,
    packed: bool,
) -> None:
    chosen = [sequences[row] for row in rows]
    batch = collate(chosen, PAD, CPU, packed=packed)
    with torch.no_grad():
        scored = token_logprobs(model, batch, temperature=temperature)
    assert scored.logprobs_BT.shape == scored.entropy_BT.shape == batch.mask_BT.shape
    assert not scored.logprobs_BT[~batch.mask_BT].any()
    for row, sequence in enumerate(chosen):
        for token in range(sequence.num_prompt_tokens, len(sequence.token_ids)):
            if not sequence.mask[token - sequence.num_prompt_tokens]:
                continue
            logprobs = next_logprobs(model, sequence.token_ids[:token], temperature)
            position = token - 1
            assert float(scored.logprobs_BT[row, position]) == pytest.approx(
                float(logprobs[sequence.token_ids[token]]), abs=2e-4
            )
            entropy = float(-(logprobs.exp() * logprobs).sum())
            assert float(scored.entropy_BT[row, position]) == pytest.approx(entropy, abs=2e-4)


@torch.no_grad()
def next_logprobs(model: torch.nn.Module, prefix: list[int], temperature: float) -> torch.Tensor:
    """Logprobs of whatever follows the prefix, which is all that the model is shown."""
    logits = model(input_ids=torch.tensor([prefix])).logits[0, -1].double()
    return torch.log_softmax(logits / temperature, dim=-1)


def test_neighbouring_positions_predict_differently(
    model: torch.nn.Module, sequences: list[Sequence]
) -> None:
    """Without this the comparison token by token could not tell a shift by one."""
    batch = collate(sequences[:1], PAD, CPU)
    logprobs_BT = token_logprobs(model, batch, temperature=1.0).logprobs_BT.detach()
    logprobs = logprobs_BT[batch.mask_BT]
    gaps = (logprobs[1:] - logprobs[:-1]).abs()
    assert float(gaps.min()) > 1e-2


def test_padding_changes_no_logprob(model: torch.nn.Module, sequences: list[Sequence]) -> None:
    lengths = [len(s.token_ids) for s in sequences]
    scored = [
        token_logprobs(model, collate(sequences, pad_id, CPU), temperature=1.0)
        .logprobs_BT.detach()
        .numpy()
        for pad_id in (PAD, 77)
    ]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(scored[0][row, : length - 1], scored[1][row, : length - 1])


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_micro_batch_takes_part_and_counts_nothing(
    model: torch.nn.Module, packed: bool
) -> None:
    batch = collate([], PAD, CPU, packed=packed)
    assert not batch.mask_BT.any()
    scored = token_logprobs(model, batch, temperature=1.0)
    tokens = Tokens(
        logprobs_BT=scored.logprobs_BT,
        sampled_logprobs_BT=batch.sampled_logprobs_BT,
        advantages_BT=batch.advantages_B[:, None].expand_as(scored.logprobs_BT),
        entropy_BT=scored.entropy_BT,
        mask_BT=batch.mask_BT,
        num_tokens=7.0,
        num_sequences=2.0,
        max_tokens=8,
    )
    for name, loss in LOSSES.items():
        share = loss(tokens, AlgorithmConfig(loss=name, entropy_coefficient=0.1))
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(share.loss, parameters, retain_graph=True)
        assert share.loss.item() == 0.0
        assert not any(bool(gradient.any()) for gradient in gradients)
        told = StepMetrics()
        told.add(share.metrics)
        assert told.reduced(lambda values, _: values) == {}
