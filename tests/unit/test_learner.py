"""Training steps of a real sharded model, of one rank, and their data from a real store."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_episodes
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load
from torch.distributed import FileStore  # type: ignore[attr-defined]

from forge_core.actors.messages import TrainRequest
from forge_core.algorithms.batch import Sequence, collate
from forge_core.algorithms.data import load_batch
from forge_core.algorithms.forward import token_logprobs
from forge_core.algorithms.losses import LOSSES
from forge_core.algorithms.nonfinite import batch_file
from forge_core.algorithms.step import Learner
from forge_core.config import RunConfig, TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm
from forge_core.recomputation import recompute_activations
from forge_core.sharding import load_weights, make_layout, shard_model
from storage import layout
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import commit_part

CPU = torch.device("cpu")
SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, context_length=128
)
TEMPERATURE = 0.8
LENGTHS = [(3, 5), (9, 2), (1, 12), (6, 6), (2, 1), (4, 4)]
"""Prompt and response, in tokens."""


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, which finds itself by a file and listens on loopback."""
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=FileStore(str(file), 1), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """The model before any step, whole."""
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(SHAPE, 0, directory)
    return load_causal_lm(str(directory))


Build = Callable[..., tuple[torch.nn.Module, Learner]]


@pytest.fixture
def build(original: torch.nn.Module) -> Build:
    """Makes a sharded copy of the model and its learner; keywords are optimizer settings or sections."""

    def make(**settings: Any) -> tuple[torch.nn.Module, Learner]:
        document: dict[str, Any] = {
            "steps": 10,
            "sampling": {"temperature": TEMPERATURE},
            "trainer": {"ranks": 1},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "max_gradient_norm": 1e6},
        }
        for name, value in settings.items():
            document[name] = {**document.get(name, {}), **value}
        config = RunConfig.model_validate(document)
        layout = make_layout(config.trainer, CPU)
        model = shard_model(copy.deepcopy(original), config, layout)
        learner = Learner(model.train(), config, CPU, pad_id=0, layout=layout)
        learner.begin_post_training()
        return model, learner

    return make


@pytest.fixture
def sequences(original: torch.nn.Module) -> list[Sequence]:
    """Of different lengths, on-policy, with advantages of both signs and some tokens off the mask."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for row, (num_prompt, num_response) in enumerate(LENGTHS):
        token_ids = torch.randint(2, 350, (num_prompt + num_response,), generator=generator)
        sequence = Sequence(
            token_ids=token_ids.tolist(),
            num_prompt_tokens=num_prompt,
            mask=[token % 4 != 3 for token in range(num_response)],
            advantage=(-1.0) ** row * (1 + row / 4),
        )
        logprobs = response_logprobs(original, sequence)
        made.append(dataclasses.replace(sequence, sampled_logprobs=logprobs.tolist()))
    return made


@torch.no_grad()
def response_logprobs(model: torch.nn.Module, sequence: Sequence) -> torch.Tensor:
    scored = token_logprobs(model, collate([sequence], 0, CPU), temperature=TEMPERATURE)
    return scored.logprobs_BT[0, sequence.num_prompt_tokens - 1 :]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole copies of the parameters."""
    parameters: Any = model.named_parameters()
    return {name: each.full_tensor().detach().clone() for name, each in parameters}


def assert_bits_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def with_advantage(sequence: Sequence, advantage: float) -> Sequence:
    return dataclasses.replace(sequence, advantage=advantage)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_moves_the_logprob_the_way_of_the_advantage(
    build: Build, sequences: list[Sequence], sign: float
) -> None:
    model, learner = build()
    sequence = with_advantage(sequences[2], sign)
    written = torch.tensor(sequence.mask)
    before = response_logprobs(model, sequence)[written].sum()
    outcome = learner.train_step(1, [sequence])
    after = response_logprobs(model, sequence)[written].sum()
    assert outcome.optimizer_updates == 1
    assert sign * float(after - before) > 0.05


def test_the_gradient_is_that_of_the_mean_over_the_batch(
    build: Build, original: torch.nn.Module, sequences: list[Sequence]
) -> None:
    """Held against the policy gradient of the whole model, one sequence at a time."""
    beta1, beta2 = 0.75, 0.5
    _, learner = build(optimizer={"beta1": beta1, "beta2": beta2})
    outcome = learner.train_step(1, sequences)
    moments, _ = learner.full_state()

    whole = copy.deepcopy(original)
    num_tokens = sum(sum(sequence.mask) for sequence in sequences)
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        logits = whole(input_ids=ids).logits[0, sequence.num_prompt_tokens - 1 : -1]
        logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        written = logprobs[range(len(sequence.mask)), ids[0, sequence.num_prompt_tokens :]]
        objective = written[torch.tensor(sequence.mask)].sum() * sequence.advantage / num_tokens
        (-objective).backward()
    squares = 0.0
    for name, parameter in whole.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        squares += float((gradient.double() ** 2).sum())
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            moments[f"{name}/exp_avg"], (1 - beta1) * gradient, rtol=1e-3, atol=1e-4 * scale
        )
        torch.testing.assert_close(
            moments[f"{name}/exp_avg_sq"],
            (1 - beta2) * gradient**2,
            rtol=1e-3,
            atol=1e-4 * scale**2,
        )
    assert outcome.metrics["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)
    assert outcome.metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_without_a_learning_rate_nothing_changes(build: Build, sequences: list[Sequence]) -> None:
    model, learner = build(optimizer={"learning_rate": 0.0, "weight_decay": 0.1})
    before = weights(model)
    assert learner.train_step(1, sequences).optimizer_updates == 1
    assert_bits_equal(weights(model), before)


def test_an_empty_batch_changes_nothing(build: Build, sequences: list[Sequence]) -> None:
    model, learner = build()
    learner.train_step(1, sequences)
    before = weights(model)
    state = {name: tensor.clone() for name, tensor in learner.full_state()[0].items()}
    outcome = learner.train_step(2, [])
    assert (outcome.optimizer_updates, outcome.metrics) == (0, {})
    assert_bits_equal(weights(model), before)
    assert_bits_equal(learner.full_state()[0], state)


@pytest.mark.parametrize("limit", [1, 16, 30])
def test_micro_batches_add_up_to_the_batch(
    build: Build, sequences: list[Sequence], limit: int
) -> None:
    # AdamW's first update is almost the gradient's sign; a large eps makes it follow the gradient.
    optimizer = {"eps": 1.0, "learning_rate": 0.5}
    whole, learner = build(optimizer=optimizer)
    told = learner.train_step(1, sequences)
    pieces, in_pieces = build(optimizer=optimizer, trainer={"micro_batch_tokens": limit})
    told_in_pieces = in_pieces.train_step(1, sequences)
    wanted, found = weights(whole), weights(pieces)
    moved = max(
        float((wanted[name] - before).abs().max()) for name, before in weights(build()[0]).items()
    )
    assert moved > 1e-2
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)
    assert told_in_pieces.metrics == pytest.approx(told.metrics, rel=1e-3, abs=1e-6)
    assert told_in_pieces.optimizer_updates == told.optimizer_updates == 1


def test_chunks_of_logprobs_change_no_step_of_a_sharded_model(
    build: Build, sequences: list[Sequence]
) -> None:
    state = []
    for size in (2, 1000):
        algorithm = {"minibatches": 2, "epochs": 2, "entropy_coefficient": 0.01}
        model, learner = build(
            trainer={"logprob_chunk_tokens": size}, algorithm=algorithm, optimizer={"eps": 1.0}
        )
        learner.train_step(1, sequences)
        state.append({**weights(model), **learner.full_state()[0]})
    for name, wanted in state[1].items():
        torch.testing.assert_close(state[0][name], wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_without_padding_is_that_with_padding(
    build: Build, sequences: list[Sequence], loss: str
) -> None:
    """Whatever the loss, also where it has ratios and means of sequences."""
    stale = [
        dataclasses.replace(each, sampled_logprobs=[p - 0.1 * (-1) ** row for p in each.sampled_logprobs])
        for row, each in enumerate(sequences)
    ]  # fmt: skip
    told = {}
    state = {}
    for packing in (True, False):
        settings = {"packing": packing, "micro_batch_tokens": 24}
        algorithm = {"loss": loss, "entropy_coefficient": 0.01}
        model, learner = build(trainer=settings, algorithm=algorithm, optimizer={"eps": 1.0})
        told[packing] = learner.train_step(1, stale).metrics
        state[packing] = {**weights(model), **learner.full_state()[0]}
    assert told[True].keys() == told[False].keys()
    assert told[True] == pytest.approx(told[False], rel=1e-4, abs=1e-5)
    for name, wanted in state[False].items():
        torch.testing.assert_close(state[True][name], wanted, rtol=0, atol=1e-6, msg=name)


def test_two_steps_of_one_config_are_the_same_to_the_bit(
    build: Build, sequences: list[Sequence]
) -> None:
    found = []
    for _ in range(2):
        model, learner = build(algorithm={"minibatches": 2}, trainer={"micro_batch_tokens": 24})
        for step in (1, 2):
            learner.train_step(step, sequences)
        found.append(weights(model))
    assert_bits_equal(*found)


def test_every_minibatch_of_every_epoch_is_an_update(
    build: Build, sequences: list[Sequence]
) -> None:
    _, learner = build(algorithm={"minibatches": 4, "epochs": 3})
    outcome = learner.train_step(1, sequences)
    assert outcome.optimizer_updates == 12
    moments, _ = learner.full_state()
    assert {float(value) for name, value in moments.items() if name.endswith("/step")} == {12.0}
    _, learner = build(algorithm={"minibatches": 4})
    assert learner.train_step(1, sequences[:3]).optimizer_updates == 3


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(build: Build, sequences: list[Sequence], loss: str) -> None:
    model, learner = build(algorithm={"loss": loss, "minibatches": 2})
    before = weights(model)
    outcome = learner.train_step(1, sequences)
    assert outcome.optimizer_updates == 2
    assert all(math.isfinite(value) for value in outcome.metrics.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("repeats", [{"minibatches": 1}, {"minibatches": 3, "epochs": 2}])
def test_the_proximal_policy_is_that_of_the_step_s_start(
    build: Build, sequences: list[Sequence], repeats: dict[str, int]
) -> None:
    """What was recorded on-policy is the proximal policy; what older weights recorded has no say without weights."""
    wanted, learner = build(algorithm=repeats)
    learner.train_step(1, sequences)
    stale = [
        dataclasses.replace(
            each, sampled_logprobs=[logprob - 0.7 for logprob in each.sampled_logprobs]
        )
        for each in sequences
    ]
    anchored = {"anchor": "proximal", "weights": "none"}
    found, decoupled = build(algorithm={**repeats, "correction": anchored})
    outcome = decoupled.train_step(1, stale)
    for name, tensor in weights(wanted).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=0, atol=1e-5)
    # The weights that make up for it are those of the proximal policy against the recorded logprobs.
    _, corrected = build(algorithm={**repeats, "correction": {**anchored, "weights": "plain"}})
    weight = corrected.train_step(1, stale).metrics["correction/weight_mean"]
    assert weight == pytest.approx(math.exp(0.7), rel=1e-4)
    assert "correction/weight_mean" not in outcome.metrics


def test_an_entropy_bonus_raises_the_entropy(build: Build, sequences: list[Sequence]) -> None:
    neutral = [with_advantage(sequence, 0.0) for sequence in sequences]
    _, learner = build(algorithm={"entropy_coefficient": 1.0})
    first, second = (learner.train_step(step, neutral).metrics["entropy"] for step in (1, 2))
    assert second > first + 1e-3


@pytest.mark.parametrize("repeats", [{"minibatches": 1}, {"minibatches": 3}])
@pytest.mark.parametrize("poison", ["advantage", "sampled_logprobs"])
def test_a_loss_that_is_not_finite_is_told_and_changes_nothing(
    build: Build, sequences: list[Sequence], poison: str, repeats: dict[str, int]
) -> None:
    """Whether nothing was learned before, or something; and at an update after others."""
    value: Any = float("nan") if poison == "advantage" else [float("-inf")] * len(sequences[5].mask)
    bad = [*sequences[:5], dataclasses.replace(sequences[5], **{poison: value})]
    for steps_before in (0, 1):
        model, learner = build(algorithm=repeats)
        clean, other = build(algorithm=repeats)
        for _ in range(steps_before):
            learner.train_step(1, sequences)
            other.train_step(1, sequences)
        outcome = learner.train_step(2, bad)
        assert outcome.nonfinite is not None
        last = repeats["minibatches"]
        assert outcome.nonfinite.endswith(f"at update {last} of {last}")
        assert "nan" in outcome.nonfinite or "inf" in outcome.nonfinite
        assert (outcome.optimizer_updates, outcome.metrics) == (0, {})
        assert_bits_equal(weights(model), weights(clean))
        assert_bits_equal(learner.full_state()[0], other.full_state()[0])
        # Nor does the bad gradient linger: what comes next is what it would have been.
        assert learner.train_step(2, sequences).nonfinite is None
        other.train_step(2, sequences)
        assert_bits_equal(weights(model), weights(clean))


def test_the_learning_rate_rises_and_falls(build: Build, sequences: list[Sequence]) -> None:
    schedule = {"learning_rate": 1e-3, "warmup_steps": 4, "final_learning_rate_fraction": 0.1}
    _, learner = build(optimizer=schedule)
    rates = {
        step: learner.train_step(step, sequences[:1]).metrics["learning_rate"]
        for step in (1, 2, 4, 10)
    }
    assert rates[1] == pytest.approx(1e-3 / 4)
    assert rates[2] == pytest.approx(1e-3 / 2 * (1 - 0.9 / 9))
    assert rates[4] == pytest.approx(1e-3 * (1 - 0.9 * 3 / 9))
    assert rates[10] == pytest.approx(1e-4)
    assert learner.full_state()[1]["param_groups"][0]["lr"] == rates[10]


def test_autocast_computes_in_bfloat16_and_keeps_weights_in_float32(
    build: Build, sequences: list[Sequence]
) -> None:
    plain, exact = build(trainer={"precision": "model"})
    model, learner = build(trainer={"precision": "bf16_autocast", "logprob_chunk_tokens": 5})
    kinds: dict[str, set[torch.dtype]] = {"projection": set(), "norm": set(), "head": set()}
    inner: Any = model
    for name, module in (
        ("projection", inner.model.layers[0].mlp.up_proj),
        ("norm", inner.model.norm),
        ("head", inner.lm_head),
    ):
        module.register_forward_hook(lambda _, __, output, name=name: kinds[name].add(output.dtype))
    told, wanted = learner.train_step(1, sequences).metrics, exact.train_step(1, sequences).metrics
    assert kinds["projection"] == kinds["head"] == {torch.bfloat16}
    assert kinds["norm"] == {torch.float32}
    state = {**weights(model), **learner.full_state()[0]}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    # Rounded to eight bits, and no worse.
    assert told["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)
    assert 0 < told["sampling/sampling_logp_difference/max"] < 0.05
    for name, tensor in weights(plain).items():
        assert (weights(model)[name] - tensor).abs().max() < 2.5e-3, name


def test_activations_that_are_made_again_change_nothing(
    original: torch.nn.Module, sequences: list[Sequence]
) -> None:
    """To the bit, in a sharded model; and fewer are kept."""
    found, kept = [], []
    for checkpointing in (False, True):
        config = RunConfig.model_validate(
            {"trainer": {"ranks": 1, "activation_checkpointing": checkpointing}}
        )
        layout = make_layout(config.trainer, CPU)
        model = shard_model(copy.deepcopy(original), config, layout)
        assert weights(model).keys() == dict(original.named_parameters()).keys()
        learner = Learner(model, config, CPU, pad_id=0, layout=layout)
        learner.begin_post_training()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            learner.train_step(1, sequences)
        kept.append(sum(sizes))
        found.append(weights(model))
    assert_bits_equal(*found)
    assert kept[1] < kept[0] / 2


def test_a_model_that_names_no_layers_cannot_make_them_again() -> None:
    with pytest.raises(ValueError, match="Linear does not tell which layers it repeats"):
        recompute_activations(torch.nn.Linear(1, 1))


def test_supervised_steps_learn_the_answers(build: Build, sequences: list[Sequence]) -> None:
    model, learner = build(
        warm_start={"steps": 20, "batch_size": 6, "learning_rate": 1e-2},
        sampling={"temperature": 1.0},
    )
    with torch.no_grad():
        batch = collate(sequences, 0, CPU)
        logprobs = token_logprobs(model, batch, temperature=1.0).logprobs_BT
        first = -float(logprobs[batch.mask_BT].mean())
    assert learner.supervised_loss(sequences) == pytest.approx(first, rel=1e-4)
    kept = learner.keep()
    losses = [learner.supervised_step(step, sequences) for step in range(8)]
    assert losses[0] == pytest.approx(first, rel=1e-4)
    assert losses[-1] < losses[0] - 1.0
    assert learner.supervised_loss(sequences) < losses[0] - 1.0
    kept.undo()
    assert learner.supervised_loss(sequences) == pytest.approx(first, rel=1e-4)


def test_post_training_starts_with_a_fresh_optimizer(
    build: Build, sequences: list[Sequence]
) -> None:
    _, learner = build(warm_start={"steps": 2, "batch_size": 6})
    learner.supervised_step(0, sequences)
    assert learner.full_state()[0]
    learner.begin_post_training()
    assert learner.full_state()[0] == {}


def test_full_state_has_the_moments_of_every_parameter(
    build: Build, sequences: list[Sequence]
) -> None:
    model, learner = build()
    learner.train_step(1, sequences)
    tensors, plain = learner.full_state()
    shapes = {name: tensor.shape for name, tensor in weights(model).items()}
    for entry in ("exp_avg", "exp_avg_sq"):
        found = {
            name.removesuffix(f"/{entry}"): tensor
            for name, tensor in tensors.items()
            if name.endswith(f"/{entry}")
        }
        assert {name: tensor.shape for name, tensor in found.items()} == shapes
        assert all(bool(tensor.any()) for tensor in found.values())
    assert len(tensors) == 3 * len(shapes)
    assert not any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    [settings] = json.loads(json.dumps(plain))["param_groups"]
    assert (settings["lr"], settings["betas"]) == (1e-3, [0.9, 0.95])


def episode(draw: int, sample: int, **other: Any) -> dict[str, Any]:
    """Three tokens, of which the second is the policy's in every other sample only."""
    columns: dict[str, Any] = {
        "response": "2 .",
        "prompt_token_ids": [5, 6 + draw],
        "response_token_ids": [10 * draw + sample, 8, 9],
        "logprobs": [-0.5, -1.0, -0.25 * (draw + 1)],
        "mask": [True, sample == 0, True],
        "token_policy_versions": [3, 3, 3],
    }
    return made_episodes.episode(draw, sample, **columns | other)


def commit(store: LocalStore, name: str, rows: list[dict[str, Any]]) -> str:
    commit_part(store, "run", name, pa.Table.from_pylist(rows, SCHEMA))
    return layout.commit_key("run", name)


def request(step: int, commits: tuple[str, ...], *draws: int) -> TrainRequest:
    group_ids = tuple(layout.group_id("run", draw) for draw in draws)
    return TrainRequest(run_id="run", step=step, commits=commits, group_ids=group_ids)


def test_a_batch_is_in_the_order_of_its_groups(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    # Samples lie scattered, and a group that was not asked for between them.
    first = commit(store, "a", [episode(d, s) for s in (1, 0) for d in (0, 1, 2)])
    second = commit(store, "b", [episode(3, 1), episode(3, 0, reward=4.0)])
    plain = RunConfig.model_validate({"algorithm": {"scale_advantages": False}})
    batch = load_batch(store, request(4, (first, second), 3, 0, 2), plain)
    assert [(s.token_ids, s.advantage) for s in batch.sequences] == [
        ([5, 9, 30, 8, 9], 1.5),
        ([5, 9, 31, 8, 9], -1.5),
        ([5, 6, 0, 8, 9], -0.5),
        ([5, 6, 1, 8, 9], 0.5),
        ([5, 8, 20, 8, 9], -0.5),
        ([5, 8, 21, 8, 9], 0.5),
    ]
    assert {s.num_prompt_tokens for s in batch.sequences} == {2}
    assert [s.mask for s in batch.sequences[:2]] == [[True, True, True], [True, False, True]]
    assert batch.sequences[0].sampled_logprobs == [-0.5, -1.0, -1.0]
    assert batch.sequences[4].sampled_logprobs == [-0.5, -1.0, -0.75]
    scaled = load_batch(store, request(4, (first, second), 3, 0, 2), RunConfig())
    size = 0.5**0.5
    wanted = [size, -size, -size, size, -size, size]
    assert [s.advantage for s in scaled.sequences] == pytest.approx(wanted, rel=1e-3)


def test_age_is_from_the_oldest_token_that_the_policy_wrote(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = commit(
        store,
        "a",
        [
            episode(0, 0, token_policy_versions=[6, 5, 6]),
            episode(0, 1, token_policy_versions=[6, -1, 6], mask=[True, False, True]),
            episode(1, 0, token_policy_versions=[6, 6, 6]),
            episode(1, 1, token_policy_versions=[6, 6, 3]),
            episode(2, 0, token_policy_versions=[6, 6, 6]),
            episode(2, 1, token_policy_versions=[6, 6, 6]),
        ],
    )
    batch = load_batch(store, request(7, (key,), 0, 1, 2), RunConfig())
    assert batch.age_max == 3
    assert batch.age_mean == pytest.approx(4 / 3)
    batch = load_batch(store, request(7, (key,), 2), RunConfig())
    assert (batch.age_max, batch.age_mean) == (0, 0.0)


def test_metrics_of_a_batch_are_those_of_its_episodes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    short = {"response_token_ids": [1], "logprobs": [-1.0], "mask": [True]}
    rows = [
        episode(0, 0, reward=1.0, finish_reason="length"),
        episode(0, 1, reward=3.0, token_policy_versions=[3], **short),
    ]
    batch = load_batch(store, request(4, (commit(store, "a", rows),), 0), RunConfig())
    assert batch.metrics == {
        "num_tokens": 8.0,
        "completions/mean_terminated_length": 1.0,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 1.0,
        "completions/mean_length": 2.0,
        "completions/min_length": 1.0,
        "completions/max_length": 3.0,
        "completions/clipped_ratio": 0.5,
        "trained_reward": 2.0,
        "trained_reward_std": pytest.approx(2**0.5),
        "frac_groups_without_signal": 0.0,
    }


def test_overlong_responses_lose_reward_before_they_are_compared(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    short = {"response_token_ids": [1], "logprobs": [-1.0], "mask": [True]}
    rows = [
        episode(0, 0, reward=1.0, token_policy_versions=[3], **short),
        episode(0, 1, reward=2.0),
    ]
    key = commit(store, "a", rows)
    config = RunConfig.model_validate(
        {"algorithm": {"loss": "dr_grpo", "overlong_tokens": 2, "overlong_penalty": 3.0}, "sampling": {"max_tokens": 4}}
    )  # fmt: skip
    batch = load_batch(store, request(4, (key,), 0), config)
    # Three of four tokens are half of the way into the last two.
    assert [s.advantage for s in batch.sequences] == [0.25, -0.25]
    assert batch.metrics["overlong_penalty"] == -0.75
    assert batch.metrics["trained_reward"] == 1.5


def test_a_batch_with_a_missing_or_torn_group_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    rows = [episode(d, s) for d in (0, 1) for s in (0, 1)]
    key = commit(store, "a", [*rows, episode(2, 0)])
    assert len(load_batch(store, request(4, (key,), 0, 1), RunConfig()).sequences) == 4
    for draws, sizes in (((0, 9), r"\[0, 2\]"), ((9,), r"\[0\]"), ((0, 2), r"\[1, 2\]")):
        with pytest.raises(ValueError, match=f"step 4: its groups have {sizes} samples"):
            load_batch(store, request(4, (key,), *draws), RunConfig())


def test_a_step_without_groups_has_an_empty_batch(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = commit(store, "a", [episode(0, 0), episode(0, 1)])
    for commits in ((), (key,)):
        batch = load_batch(store, request(4, commits), RunConfig())
        assert (batch.sequences, batch.age_max, batch.age_mean) == ([], 0, 0.0)


def test_state_that_was_loaded_goes_on_to_the_same_bits(
    build: Build, sequences: list[Sequence]
) -> None:
    model, learner = build()
    for step in (1, 2):
        learner.train_step(step, sequences)
    kept = weights(model)
    # As a publish does: the root's parameters are whole after it, and not those that the optimizer knows.
    response_logprobs(model, sequences[0])
    state, _ = learner.full_state()
    assert {key.rpartition("/")[0] for key in state} == kept.keys()
    learner.train_step(3, sequences)
    wanted = weights(model)

    again, restored = build()
    load_weights(again, [kept])
    pieces = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    restored.load_state(pieces)
    assert_bits_equal(restored.full_state()[0], state)
    restored.train_step(3, sequences)
    assert_bits_equal(weights(again), wanted)


def test_a_batch_that_was_kept_tells_what_it_was(sequences: list[Sequence]) -> None:
    data = batch_file(sequences, {"cause": "the loss is nan"})
    found = load(data)
    assert found["lengths"].tolist() == [len(s.token_ids) for s in sequences]
    ends = found["lengths"].cumsum(0).tolist()
    for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        sequence, prompt = sequences[row], int(found["prompt_lengths"][row])
        assert found["token_ids"][start:end].tolist() == sequence.token_ids
        assert found["mask"][start:end].tolist() == [False] * prompt + sequence.mask
        recorded = torch.tensor(sequence.sampled_logprobs)
        assert torch.equal(found["sampled_logprobs"][start + prompt : end], recorded)
        assert float(found["advantages"][row]) == sequence.advantage
    assert b"the loss is nan" in data
