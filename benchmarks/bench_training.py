"""What the trainer's passes cost: sequences in rows against padding, and the memory of the loss against vocabulary.

    python -m benchmarks.bench_training
    python -m benchmarks.bench_training --rounds 2 --sequences 32      fewer, for a look

Three ways to lay out the same sequences in forward and backward passes of at most so many tokens: `packed`, one after
another; `padded`, in the order of arrival; `sorted`, padded too but longest first, as the trainer does with
trainer.packing = false. They take turns in one process on one thread; a ratio is of two passes of the same turn, by the
clock (`seconds`) and by the processor's time (`cpu_seconds`), which other processes change less.
The loss is the policy gradient's, a mean over tokens of -A log p. Lengths of responses are log-normal: with a
`long_tail`, as of reasoning, or `short` and much alike, as of the tiny preset, where there is little padding to save.

The memory is the allocator's peak during forward and backward pass of a model that is little but its output layer,
less that of its weights and their gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.allocations import peak_bytes
from benchmarks.record import write_record
from forge_core.algorithms.batch import Sequence, collate, share, split
from forge_core.algorithms.forward import token_logprobs
from forge_core.config import RunConfig, TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm

_CPU = torch.device("cpu")
_SETTINGS = RunConfig().trainer
_WAYS = ("packed", "padded", "sorted")
_PROMPT = 16
_LENGTHS = {"long_tail": (4.5, 0.9), "short": (2.3, 0.2)}
"""Mean and deviation of the logarithm."""


def _sequences(kind: str, number: int, vocabulary: int) -> list[Sequence]:
    """Responses of such lengths, with advantages of both signs."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(*_LENGTHS[kind], number).astype(int), 4, 1500)
    return [
        Sequence(
            token_ids=random.integers(2, vocabulary, _PROMPT + length).tolist(),
            num_prompt_tokens=_PROMPT,
            mask=[True] * int(length),
            advantage=float(random.normal()),
        )
        for length in lengths
    ]


def _pass(model: Any, sequences: list[Sequence], way: str, max_tokens: int) -> dict[str, float]:
    """Loss and gradient of all sequences in micro-batches, and what they took."""
    num_tokens = sum(sum(sequence.mask) for sequence in sequences)
    clock, cpu, loss, passes = time.perf_counter(), time.process_time(), 0.0, 0
    ordered = sequences if way == "padded" else share(sequences, 0, 1)
    for run in split(ordered, max_tokens, packed=way == "packed"):
        batch = collate(run, 0, _CPU, packed=way == "packed")
        scored = token_logprobs(
            model, batch, temperature=1.0, chunk_tokens=_SETTINGS.logprob_chunk_tokens
        )
        part = -(scored.logprobs_BT * batch.advantages_B[:, None]).sum() / num_tokens
        part.backward()
        loss += float(part.detach())
        passes += 1
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    model.zero_grad()
    return {
        "loss": loss,
        "gradient_norm": norm,
        "passes": passes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def layouts(kind: str, rounds: int, number: int, max_tokens: int) -> dict[str, Any]:
    """Tokens a second of each way, and the ratios of turns."""
    shape = TinyModelConfig()
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(shape, 0, Path(folder) / "model")
        model = load_causal_lm(f"{folder}/model").eval()
    sequences = _sequences(kind, number, int(model.config.vocab_size))  # type: ignore[union-attr,arg-type]
    lengths = sorted(len(sequence.token_ids) for sequence in sequences)
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    for turn in range(rounds + 1):
        for way in _WAYS:
            found = _pass(model, sequences, way, max_tokens)
            if turn:  # the first one warms up
                turns[way].append(found)
    loss, norm = turns["padded"][0]["loss"], turns["padded"][0]["gradient_norm"]
    return {
        "sequences": number,
        "micro_batch_tokens": max_tokens,
        "tokens": sum(lengths),
        "share_of_padding": 1 - sum(lengths) / (number * lengths[-1]),
        "length": {
            "median": lengths[number // 2],
            "mean": sum(lengths) / number,
            "max": lengths[-1],
        },
        "ways": {
            way: {
                "passes": turns[way][0]["passes"],
                "tokens_per_second": _spread(
                    [sum(lengths) / each["seconds"] for each in turns[way]]
                ),
                "loss": turns[way][0]["loss"],
                "loss_difference": max(abs(each["loss"] - loss) for each in turns[way]),
                "gradient_norm_relative_difference": max(
                    abs(each["gradient_norm"] / norm - 1.0) for each in turns[way]
                ),
            }
            for way in _WAYS
        },
        "ratios": {
            f"packed_to_{way}": {
                of: _spread(
                    [a[of] / b[of] for a, b in zip(turns[way], turns["packed"], strict=True)]
                )
                for of in ("seconds", "cpu_seconds")
            }
            for way in ("padded", "sorted")
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def memory() -> list[dict[str, Any]]:
    """Peak of the loss by vocabulary and tokens, all logits at once and in chunks."""
    rows = []
    for vocabulary in (4_096, 16_384, 65_536):
        for tokens in (1_024, 4_096):
            rows.append(
                {
                    "vocabulary": vocabulary,
                    "tokens": tokens,
                    "logits_mib": tokens * vocabulary * 4 / 2**20,
                    "whole_mib": _peak(vocabulary, tokens, None) / 2**20
                    if tokens * vocabulary <= 2**24
                    else None,
                    "chunked_mib": _peak(vocabulary, tokens, 256) / 2**20,
                }
            )
    return rows


def _peak(vocabulary: int, tokens: int, chunk_tokens: int | None) -> int:
    """Bytes of tensors at once, less the weights' gradients; the weights were made before."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    ids = (torch.arange(tokens + 1) % vocabulary).tolist()
    one = Sequence(token_ids=ids, num_prompt_tokens=1, mask=[True] * tokens)
    batch = collate([one], 0, _CPU)

    def both_passes() -> None:
        scored = token_logprobs(model, batch, temperature=1.0, chunk_tokens=chunk_tokens)
        scored.logprobs_BT.sum().backward()

    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    return peak_bytes(both_passes) - gradients


def main() -> None:
    """Measure, print, and write the record if it is of the whole size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--micro-batch-tokens", type=int, default=_SETTINGS.micro_batch_tokens)
    options = parser.parse_args()
    torch.set_num_threads(1)
    of: Callable[[str], Any] = parser.get_default
    result = {
        "layouts": {
            kind: layouts(kind, options.rounds, options.sequences, options.micro_batch_tokens)
            for kind in _LENGTHS
        },
        "memory": memory(),
    }
    print(json.dumps(result, indent=2))
    if (options.rounds, options.sequences, options.micro_batch_tokens) == (
        of("rounds"),
        of("sequences"),
        of("micro_batch_tokens"),
    ):
        print(write_record("training", "python -m benchmarks.bench_training", result))


if __name__ == "__main__":
    main()
