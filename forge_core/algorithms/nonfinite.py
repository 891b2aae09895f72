"""A batch that could not be trained on, as a file to look into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save

from forge_core.actors.messages import TrainRequest
from forge_core.algorithms.batch import Sequence
from storage import layout
from storage.objects import ObjectStore


def keep_batch(
    store: ObjectStore, request: TrainRequest, sequences: list[Sequence], told: Mapping[str, str]
) -> str:
    """Put a step's batch that could not be trained on into the store, for people; its key."""
    data = batch_file(
        sequences,
        {
            "run_id": request.run_id,
            "step": str(request.step),
            "group_ids": " ".join(request.group_ids),
            **told,
        },
    )
    sha256 = hashlib.sha256(data).hexdigest()
    folder = layout.nonfinite_folder(request.run_id)
    key = f"{folder}{request.step:08d}-{sha256[:12]}.safetensors"
    store.put_if_absent(key, data)
    return key


def batch_file(sequences: list[Sequence], told: Mapping[str, str]) -> bytes:
    """What a step was trained on, as a safetensors file, and with it what is told of it.

    One row a token of all sequences one after another, the prompts' among them: `token_ids`, `mask` (whether it was
    trained on), `sampled_logprobs` (0 in prompts). One row a sequence: `lengths` in tokens, `prompt_lengths`,
    `advantages`.

    Example:
        with safetensors.safe_open(path, "pt") as file:
            print(file.metadata()["cause"], file.get_tensor("advantages"))
    """

    def per_token(values: Callable[[Sequence], list[float]]) -> list[float]:
        return [
            value
            for sequence in sequences
            for value in [0.0] * sequence.num_prompt_tokens + values(sequence)
        ]

    tensors = {
        "token_ids": torch.tensor([token for s in sequences for token in s.token_ids]),
        "mask": torch.tensor(per_token(lambda s: [float(each) for each in s.mask])).bool(),
        "sampled_logprobs": torch.tensor(per_token(lambda s: s.sampled_logprobs)),
        "lengths": torch.tensor([len(s.token_ids) for s in sequences]),
        "prompt_lengths": torch.tensor([s.num_prompt_tokens for s in sequences]),
        "advantages": torch.tensor([s.advantage for s in sequences]),
    }
    return save(tensors, metadata=dict(told))
