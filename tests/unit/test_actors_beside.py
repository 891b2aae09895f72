"""Reference and critic as the controller calls them, on stored episodes and checkpoints, but without processes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from forge_core.actors.critic import Critic
from forge_core.actors.messages import (
    CheckpointRequest,
    CriticRestoreRequest,
    ReferenceRequest,
    RestoreRequest,
    TrainRequest,
)
from forge_core.actors.reference import Reference
from forge_core.algorithms.batch import collate
from forge_core.algorithms.data import load_batch, load_sequences
from forge_core.algorithms.estimates import read_estimates
from forge_core.algorithms.forward import token_logprobs
from forge_core.checkpoint import Snapshot, write_checkpoint
from forge_core.config import RunConfig, TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm
from forge_core.weights import packing
from forge_core.weights.digest import sha256_digest
from storage import layout
from storage.parts import read_file
from storage.records import FileRef

CPU = torch.device("cpu")
SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, context_length=128
)


def call(actor: Any, endpoint: str, *arguments: Any) -> Any:
    """What an endpoint's own function answers."""
    return asyncio.run(getattr(type(actor), endpoint)._method(actor, *arguments))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(SHAPE, 0, directory)
    return directory


@pytest.fixture
def past(past_run: Any) -> Any:
    """A run of ppo with a reference in the reward, with one group of two samples to train on."""
    kl = {"coefficient": 0.5, "place": "reward", "estimator": "k1"}
    algorithm = {"loss": "ppo", "scale_advantages": False, "kl": kl, "critic": {"minibatches": 1}}
    run = past_run("r", algorithm=algorithm, trainer={"ranks": 1}, sampling={"temperature": 0.7})
    run.round(1, (0,))
    return run


@pytest.fixture
def request_(past: Any) -> TrainRequest:
    commit = layout.commit_key("r", layout.part_name(1, 0))
    return TrainRequest(run_id="r", step=1, commits=(commit,), group_ids=past.groups((0,)))


def a_checkpoint(past: Any, model_dir: Path, scale: float) -> RestoreRequest:
    """Of the model with its weights made so many times as large."""
    model: Any = load_causal_lm(str(model_dir))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    named = list(model.state_dict(keep_vars=True).items())
    manifest, buckets = packing.pack([(name, t.detach()) for name, t in named], 0)
    snapshot = Snapshot(
        run_id="r", step=0, weights_digest=manifest.digest,
        weights=packing.unpack(manifest, buckets), optimizer_tensors={}, optimizer_rest={},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    key, files = write_checkpoint(past.store, f"c{scale}/", model, tokenizer, snapshot)
    return RestoreRequest(key=key, files=files, weights_digest=manifest.digest, step=0)


def figures(past: Any, file: FileRef) -> list[list[float]]:
    return read_estimates(read_file(past.store, file), [2, 2])


def test_a_reference_says_what_the_weights_of_the_checkpoint_it_is_given_say(
    past: Any, request_: TrainRequest, model_dir: Path
) -> None:
    reference = Reference(past.config, past.store.uri, time.time())
    call(reference, "load", str(model_dir))
    for scale in (1.5, 1.0):
        kept = a_checkpoint(past, model_dir, scale)
        asked = ReferenceRequest(batch=request_, weights=kept)
        told = call(reference, "estimate", asked)
        assert call(reference, "estimate", asked).file == told.file
        model = load_causal_lm(str(model_dir))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
            batch = collate(load_sequences(past.store, request_), 0, CPU)
            wanted = token_logprobs(model, batch, temperature=0.7).logprobs_BT[batch.mask_BT]
        found = [each for row in figures(past, told.file) for each in row]
        assert found == pytest.approx(wanted.tolist(), abs=1e-6)
    # A checkpoint of a run whose log has digests of SHA-256.
    tensors = load_causal_lm(str(model_dir)).state_dict()
    old = dataclasses.replace(kept, weights_digest=sha256_digest(tensors))
    again = call(reference, "estimate", ReferenceRequest(batch=request_, weights=old))
    assert again.file == told.file
    with pytest.raises(ValueError, match="holds other weights than the log says"):
        other = dataclasses.replace(kept, weights_digest="0" * 64)
        call(reference, "estimate", ReferenceRequest(batch=request_, weights=other))


def test_what_diverges_from_the_reference_costs_reward_where_it_does(
    past: Any, request_: TrainRequest, model_dir: Path
) -> None:
    reference = Reference(past.config, past.store.uri, time.time())
    call(reference, "load", str(model_dir))
    kept = a_checkpoint(past, model_dir, 1.0)
    logprobs = call(reference, "estimate", ReferenceRequest(batch=request_, weights=kept)).file
    critic = a_critic(past, model_dir)
    call(critic, "restore", CriticRestoreRequest(policy=kept, files=()))
    asked = dataclasses.replace(request_, reference_logprobs=logprobs)
    asked = dataclasses.replace(asked, values=call(critic, "estimate", asked).file)
    batch = load_batch(past.store, asked, past.config)
    told = figures(past, logprobs)
    for row, sequence in enumerate(batch.sequences):
        # Values are 0, gamma is 1 and lambda 0.95: the last advantage is what the last token got.
        gap = [-0.5 - told[row][0], -1.0 - told[row][1]]
        last = float(row) - 0.5 * gap[1]
        assert sequence.figures["advantages"] == pytest.approx(
            [-0.5 * gap[0] + 0.95 * last, last], abs=1e-6
        )
        assert sequence.figures["values"] == [0.0, 0.0]
    total = sum(-0.5 - a + -1.0 - b for a, b in told)
    assert batch.metrics["kl_penalty"] == pytest.approx(0.5 * total / 2, abs=1e-6)


def a_critic(past: Any, model_dir: Path) -> Critic:
    critic = Critic(past.config, past.store.uri, time.time())
    call(critic, "load", str(model_dir))
    return critic


@pytest.fixture
def plain(past: Any) -> Any:
    """The same without a reference."""
    document = past.config.model_dump(mode="json")
    document["algorithm"].pop("kl")
    past.config = RunConfig.model_validate(document)
    return past


def test_a_critic_learns_each_step_once_and_goes_on_from_a_checkpoint(
    plain: Any, request_: TrainRequest, model_dir: Path
) -> None:
    critic = a_critic(plain, model_dir)
    with pytest.raises(ValueError, match="stands at step 0, not at 0"):
        call(critic, "estimate", request_)
    policy = a_checkpoint(plain, model_dir, 1.0)
    call(critic, "restore", CriticRestoreRequest(policy=policy, files=()))
    values = call(critic, "estimate", request_).file
    assert figures(plain, values) == [[0.0, 0.0], [0.0, 0.0]]
    first = dataclasses.replace(request_, values=values)
    reply = call(critic, "train", first)
    assert reply.nonfinite is None and reply.metrics["loss/value_avg"] > 0
    assert call(critic, "train", first).metrics == reply.metrics
    kept = call(critic, "checkpoint", CheckpointRequest(run_id="r", step=1, key="k/"))
    learned = call(critic, "estimate", dataclasses.replace(request_, step=2)).file
    assert figures(plain, learned) != figures(plain, values)

    other = a_critic(plain, model_dir)
    at_one = dataclasses.replace(policy, step=1)
    call(other, "restore", CriticRestoreRequest(policy=at_one, files=kept))
    again = call(other, "estimate", dataclasses.replace(request_, step=2)).file
    assert again == learned
    with pytest.raises(ValueError, match="stands at step 1, not at 2"):
        call(other, "train", dataclasses.replace(first, step=3))

    call(critic, "undo", 1)
    call(critic, "undo", 1)
    assert call(critic, "estimate", request_).file == values
    assert call(critic, "train", first).metrics == reply.metrics
