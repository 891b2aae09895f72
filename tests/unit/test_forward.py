"""Rows of sequences without padding: each sees itself alone, and scores as it does padded, beside others."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.allocations import peak_bytes
from forge_core.algorithms.batch import Sequence, collate, split
from forge_core.algorithms.critic import ValueModel
from forge_core.algorithms.forward import check_forward, token_logprobs
from forge_core.algorithms.rows import lay_out, row_arguments
from forge_core.attention import grouped_attention, implementation
from forge_core.config import RunConfig, TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm

CPU = torch.device("cpu")
SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, context_length=128
)
LENGTHS = [8, 61, 13, 3, 2, 40, 60, 17, 59]


def sharpened(model: Any) -> Any:
    """With weights so large that each token weighs on those after it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(SHAPE, 0, Path(directory))
    return sharpened(load_causal_lm(str(directory)))


def with_a_window() -> Any:
    """A model each of whose tokens sees the last five alone."""
    config = MistralConfig(
        vocab_size=353, hidden_size=32, intermediate_size=64, num_hidden_layers=2, sliding_window=5,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation=implementation("sdpa"),
    )  # fmt: skip
    return sharpened(MistralForCausalLM(config))


@pytest.fixture
def sequences() -> list[Sequence]:
    random = np.random.default_rng(5)
    return [
        Sequence(
            token_ids=random.integers(2, 350, length).tolist(),
            num_prompt_tokens=1 + row % 2,
            mask=[place % 5 != 4 for place in range(length - 1 - row % 2)],
        )
        for row, length in enumerate(LENGTHS)
    ]


def test_a_row_has_every_token_in_one_group_of_about_its_length() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        lengths = random.integers(1, 200, random.integers(1, 30)).tolist()
        row = lay_out(lengths, CPU)
        starts = np.cumsum([0, *lengths]).tolist()
        wanted = [place for length in lengths for place in range(length)]
        assert row.position_ids_1N.tolist() == [wanted]
        in_groups = torch.cat([taken_GL.flatten() for taken_GL in row.groups_GL])
        assert torch.equal(in_groups[row.places_N], torch.arange(sum(lengths)))
        seen = []
        for taken_GL in row.groups_GL:
            for line in taken_GL.tolist():
                which = starts.index(line[0])
                length, longest = lengths[which], len(line)
                # Beyond its end a line repeats its own last token, and no other sequence's.
                assert line == [starts[which] + min(at, length - 1) for at in range(longest)]
                assert longest - length <= max(16, longest / 4)
                seen.append(which)
        assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("window", [None, 4])
def test_attention_in_a_row_is_that_of_a_block_diagonal_mask(window: int | None) -> None:
    lengths = [5, 1, 33, 18, 2]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    owner_N = torch.tensor([which for which, length in enumerate(lengths) for _ in range(length)])
    apart_NN = torch.arange(len(owner_N))[:, None] - torch.arange(len(owner_N))
    is_seen_NN = (owner_N[:, None] == owner_N) & (apart_NN >= 0)
    if window is not None:
        is_seen_NN &= apart_NN < window
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    weights = scores.masked_fill(~is_seen_NN, -torch.inf).softmax(-1)
    wanted = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)

    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found, _ = grouped_attention(
        module, query, key, value, None,
        row=lay_out(lengths, CPU), sliding_window=window, scaling=0.3, dropout=0.0,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_neighbour_has_no_say(model: Any, sequences: list[Sequence], kind: str) -> None:
    own = model if kind == "full" else with_a_window()
    before = token_logprobs(own, collate(sequences, 0, CPU, packed=True), temperature=0.7)
    for changed in range(len(sequences)):
        others = [each for each in range(len(sequences)) if each != changed]
        perturbed = list(sequences)
        ids = [(token + 7) % 350 for token in sequences[changed].token_ids]
        perturbed[changed] = dataclasses.replace(sequences[changed], token_ids=ids)
        after = token_logprobs(own, collate(perturbed, 0, CPU, packed=True), temperature=0.7)
        for found, wanted in (
            (after.logprobs_BT, before.logprobs_BT),
            (after.entropy_BT, before.entropy_BT),
        ):
            assert torch.equal(found[others], wanted[others])
            assert (found[changed] - wanted[changed]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_row_scores_as_padded_sequences_do_and_so_does_its_gradient(
    model: Any, sequences: list[Sequence], kind: str
) -> None:
    own = copy.deepcopy(model) if kind == "full" else with_a_window()
    results = []
    for packed in (True, False):
        batch = collate(sequences, 0, CPU, packed=packed)
        assert (batch.row is not None) == packed
        scored = token_logprobs(own, batch, temperature=0.7, entropy_has_gradient=True)
        assert not scored.logprobs_BT[~batch.mask_BT].any()
        own.zero_grad()
        ((scored.logprobs_BT + 0.1 * scored.entropy_BT).sum() / batch.mask_BT.sum()).backward()
        gradients = {name: each.grad for name, each in own.named_parameters()}
        results.append((scored.logprobs_BT.detach(), scored.entropy_BT.detach(), gradients))
    (logprobs, entropy, gradients), (wanted_logprobs, wanted_entropy, wanted) = results
    torch.testing.assert_close(logprobs, wanted_logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=0, atol=2e-5)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale)


def test_values_of_a_row_are_those_of_padded_sequences(
    model: Any, sequences: list[Sequence]
) -> None:
    values = ValueModel(copy.deepcopy(model))
    torch.nn.init.normal_(values.head.weight)
    found, wanted = (
        values(collate(sequences, 0, CPU, packed=packed)).detach() for packed in (True, False)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert wanted.any()


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunks_change_neither_values_nor_gradients(
    model: Any, sequences: list[Sequence], chunk_tokens: int
) -> None:
    own = copy.deepcopy(model)
    results = []
    for size in (chunk_tokens, None):
        batch = collate(sequences, 0, CPU, packed=True)
        scored = token_logprobs(
            own, batch, temperature=0.7, entropy_has_gradient=True, chunk_tokens=size
        )
        own.zero_grad()
        ((scored.logprobs_BT + 0.1 * scored.entropy_BT).sum() / batch.mask_BT.sum()).backward()
        gradients = {name: each.grad for name, each in own.named_parameters()}
        results.append((scored.logprobs_BT.detach(), scored.entropy_BT.detach(), gradients))
    (logprobs, entropy, gradients), (wanted_logprobs, wanted_entropy, wanted) = results
    torch.testing.assert_close(logprobs, wanted_logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale)


def peak_of_loss(num_tokens: int, vocabulary: int, chunk_tokens: int | None) -> int:
    """Bytes that forward and backward pass take at most, beyond what the model itself has."""
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, attn_implementation=implementation("sdpa"),
    )  # fmt: skip
    own = MistralForCausalLM(config)
    ids = (torch.arange(num_tokens) % vocabulary).tolist()
    whole = Sequence(token_ids=ids, num_prompt_tokens=1, mask=[True] * (num_tokens - 1))
    batch = collate([whole], 0, CPU, packed=True)

    def both_passes() -> None:
        scored = token_logprobs(own, batch, temperature=0.7, chunk_tokens=chunk_tokens)
        scored.logprobs_BT.sum().backward()

    return peak_bytes(both_passes)


def test_the_peak_does_not_grow_with_tokens_times_vocabulary() -> None:
    tokens, vocabulary = 512, 4096
    one_tensor = 4 * tokens * vocabulary

    def grown(chunk_tokens: int | None) -> int:
        few, many = (peak_of_loss(n, vocabulary, chunk_tokens) for n in (tokens, 2 * tokens))
        return many - few

    assert grown(64) < one_tensor / 8
    # The measure does see logits that stand in memory at once.
    assert grown(None) > 2 * one_tensor


def test_without_padding_more_sequences_fit() -> None:
    made = [
        Sequence(token_ids=[1] * n, num_prompt_tokens=1, mask=[True] * (n - 1))
        for n in (20, 9, 8, 7, 5, 5, 5, 1)
    ]
    runs = split(made, 20, packed=True)
    assert [[len(s.token_ids) for s in run] for run in runs] == [[20], [9, 8], [7, 5, 5], [5, 1]]


def layout(packed: bool) -> RunConfig:
    return RunConfig.model_validate({"trainer": {"packing": packed}})


def test_the_check_passes_models_that_keep_sequences_apart(model: Any) -> None:
    for packed in (True, False):
        check_forward(model, layout(packed), CPU)
    check_forward(with_a_window(), layout(True), CPU)


def test_a_model_that_mixes_sequences_by_other_means_is_refused(model: Any) -> None:
    """As recurrent layers do, which go along the row."""
    mixing = copy.deepcopy(model)
    mixing.model.layers[0].register_forward_hook(lambda _, __, states: states.cumsum(dim=1))
    check_forward(mixing, layout(False), CPU)
    with pytest.raises(
        ValueError, match=r"Qwen3Config are on average .* set trainer.packing to false"
    ):
        check_forward(mixing, layout(True), CPU)


def test_a_model_whose_output_is_more_than_a_layer_is_refused(model: Any) -> None:
    """As those are that cap their logits."""
    capped = copy.deepcopy(model)
    forward = capped.forward

    def with_a_cap(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    capped.forward = with_a_cap
    with pytest.raises(ValueError, match="more than a layer over its hidden states"):
        check_forward(capped, layout(False), CPU)


def test_each_kind_of_attention_is_told_of_the_row_in_its_own_way(model: Any) -> None:
    config = copy.deepcopy(model.config)
    row = lay_out([3, 5, 2], CPU)
    assert row_arguments(config, row)["row"] is row
    config._attn_implementation = "flash_attention_2"
    told = row_arguments(config, row)
    assert told["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    for side in ("q", "k"):
        assert told[f"cu_seq_lens_{side}"].tolist() == [0, 3, 8, 10]
        assert told[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert told[f"max_length_{side}"] == 5
    config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="'eager' does not keep the sequences of a row apart"):
        row_arguments(config, row)


def test_kernels_that_cannot_run_are_refused() -> None:
    def refusal(trainer: dict[str, Any], dtype: str) -> str:
        with pytest.raises(ValueError) as caught:
            RunConfig.model_validate({"trainer": trainer, "model": {"dtype": dtype}})
        return str(caught.value)

    flash = {"attention": "flash_attention_2"}
    assert "needs a GPU, and device is 'cpu'" in refusal(flash, "bfloat16")
    on_gpu = {**flash, "device": "cuda"}
    assert "no kernels for model.dtype 'float32'" in refusal(on_gpu, "float32")
