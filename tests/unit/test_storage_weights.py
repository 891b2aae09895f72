"""The digest of a checkpoint's weights, recomputed from its files, is the one that the trainer logs."""

import hashlib

import made_episodes
import pytest
from made_episodes import TIED

from storage.verify_weights import WeightsDigest


def _torch_tensors() -> dict[str, object]:
    import torch

    embed = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    return {
        "lm_head.weight": embed,
        "embed.weight": embed,
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "ids": torch.tensor([[-1], [2]]),
        "flags": torch.tensor([True, False]),
    }


def test_the_digest_of_files_is_the_one_that_the_trainer_computes() -> None:
    from safetensors.torch import save

    from forge_core.weights.digest import digest as digest_of

    tensors: dict[str, object] = _torch_tensors()
    digest = WeightsDigest("xxh3-", tied={"lm_head.weight": "embed.weight"})
    digest.add("one", save({"embed.weight": tensors["embed.weight"], "ids": tensors["ids"]}))
    rest = {name: tensors[name] for name in ("scale", "empty", "flags")}
    digest.add("two", save(rest, metadata={"format": "pt"}))
    assert digest.hexdigest() == digest_of(tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"\xff" * 16,
        (2).to_bytes(8, "little") + b"[]",
        (24).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}   ',
        (60).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60),
        b"\x80" * 100,
    ],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="weights is no safetensors file"):
        WeightsDigest("", tied={}).add("weights", data)


def test_the_made_weights_have_the_digest_of_their_file() -> None:
    from safetensors.numpy import save

    digest = WeightsDigest(made_episodes.weights_digest(3), TIED)
    digest.add("weights", save(made_episodes.weights(3)))
    assert digest.hexdigest() == made_episodes.weights_digest(3)


def test_the_digest_of_a_run_that_was_made_with_sha256_is_still_one() -> None:
    from safetensors.numpy import save

    tensors = made_episodes.weights(3)
    names = sorted([*tensors, *TIED])
    total = hashlib.sha256()
    for name in names:
        tensor = tensors[TIED.get(name, name)]
        head = f"{name}|{tensor.dtype}|{tensor.shape}|".encode()
        total.update(hashlib.sha256(head + tensor.tobytes()).digest())
    digest = WeightsDigest(total.hexdigest(), TIED)
    digest.add("weights", save(tensors))
    assert digest.hexdigest() == total.hexdigest()


def test_the_trainer_knows_such_a_digest_as_well() -> None:
    from safetensors.torch import save

    from forge_core.weights.digest import is_sha256, sha256_digest

    tensors: dict[str, object] = _torch_tensors()
    told = sha256_digest(tensors)  # type: ignore[arg-type]
    assert is_sha256(told) and not is_sha256(made_episodes.weights_digest(3))
    digest = WeightsDigest(told, tied={"lm_head.weight": "embed.weight"})
    rest = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    digest.add("one", save(rest))  # type: ignore[arg-type]
    assert digest.hexdigest() == told
