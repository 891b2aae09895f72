"""A critic of a real model learns values, undoes a step, and goes on from its state to the same bits."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from forge_core.algorithms.batch import Sequence, collate
from forge_core.algorithms.critic import CriticLearner
from forge_core.algorithms.estimates import estimates_file, read_estimates, response_figures
from forge_core.checkpoint import read_tensors, write_tensors
from forge_core.config import RunConfig, TinyModelConfig
from forge_core.model import build_tiny_model, load_causal_lm
from storage.objects import LocalStore

CPU = torch.device("cpu")
SHAPE = TinyModelConfig(
    hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, context_length=128
)
CONFIG = RunConfig.model_validate(
    {
        "algorithm": {
            "loss": "ppo",
            "critic": {"learning_rate": 3e-3, "minibatches": 2, "clip": 0},
        },
        "optimizer": {"max_gradient_norm": 1e6},
    }
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(SHAPE, 0, directory)
    return load_causal_lm(str(directory))


@pytest.fixture
def critic(language_model: torch.nn.Module) -> CriticLearner:
    return CriticLearner(copy.deepcopy(language_model), CONFIG, CPU, 0)


def sequences(target: float = 1.0) -> list[Sequence]:
    """Half of them return `target` at every token, the others its opposite; their prompts tell which."""
    made = []
    for row, length in enumerate((5, 2, 7, 3)):
        sign = 1.0 if row % 2 else -1.0
        made.append(
            Sequence(
                token_ids=[40 + row % 2] * 3 + [60 + place for place in range(length)],
                num_prompt_tokens=3,
                mask=[place != 1 for place in range(length)],
                figures={"values": [0.0] * length, "returns": [sign * target] * length},
            )
        )
    return made


def values(critic: CriticLearner, batch: list[Sequence]) -> list[list[float]]:
    return response_figures(batch, critic.model, max_tokens=16, packed=True, pad_id=0, device=CPU)


def test_it_begins_with_zeros_and_learns_what_prompts_return(critic: CriticLearner) -> None:
    batch = sequences()
    assert {value for row in values(critic, batch) for value in row} == {0.0}
    losses = [critic.train_step(batch).metrics["loss/value_avg"] for _ in range(40)]
    assert losses[0] == pytest.approx(0.5, abs=0.1)
    assert losses[-1] < 0.05
    for sequence, row in zip(batch, values(critic, batch), strict=True):
        sign = sequence.figures["returns"][0]
        written = [v for v, counts in zip(row, sequence.mask, strict=True) if counts]
        assert all(sign * value > 0.5 for value in written)


def test_values_do_not_depend_on_what_they_are_computed_beside(critic: CriticLearner) -> None:
    batch = sequences()
    critic.train_step(batch)
    alone = [values(critic, [sequence])[0] for sequence in batch]
    for row, wanted in zip(values(critic, batch), alone, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)


def test_a_value_is_that_of_the_state_before_its_token(critic: CriticLearner) -> None:
    batch = sequences()
    critic.train_step(batch)
    first = batch[0]
    other = dataclasses.replace(first, token_ids=[*first.token_ids[:-1], 99])
    before, after = (values(critic, [each])[0] for each in (first, other))
    assert before == pytest.approx(after, abs=1e-6)


def test_a_step_is_undone_to_the_bit_also_the_first(critic: CriticLearner) -> None:
    critic.undo()
    for _ in range(2):
        kept = critic.full_state()
        critic.train_step(sequences())
        changed = critic.full_state()
        assert any(not torch.equal(kept[name], changed[name]) for name in kept)
        critic.undo()
        again = critic.full_state()
        assert again.keys() == kept.keys()
        assert all(torch.equal(again[name], kept[name]) for name in kept)
        critic.train_step(sequences())


def test_a_loss_that_is_not_finite_changes_nothing(critic: CriticLearner) -> None:
    critic.train_step(sequences())
    kept = critic.full_state()
    outcome = critic.train_step([*sequences()[:3], *sequences(float("inf"))[3:]])
    assert outcome.nonfinite is not None and "the critic's loss is inf" in outcome.nonfinite
    assert all(torch.equal(each, kept[name]) for name, each in critic.full_state().items())


def test_from_its_stored_state_it_goes_on_to_the_same_bits(
    critic: CriticLearner, language_model: torch.nn.Module, tmp_path: Path
) -> None:
    critic.train_step(sequences())
    store = LocalStore(tmp_path)
    files = write_tensors(store, "critic/", critic.full_state())
    assert write_tensors(store, "critic/", critic.full_state()) == files
    other = CriticLearner(copy.deepcopy(language_model), CONFIG, CPU, 0)
    other.train_step(sequences(3.0))
    other.load_state(read_tensors(store, files))
    for each in (critic, other):
        each.train_step(sequences(-1.0))
    wanted = critic.full_state()
    assert all(torch.equal(each, wanted[name]) for name, each in other.full_state().items())


def test_the_gradient_is_that_of_the_mean_over_the_minibatch(critic: CriticLearner) -> None:
    batch = sequences()
    critic._accumulate(batch, _Ignored())  # type: ignore[arg-type]
    found = critic.model.head.bias.grad
    assert found is not None
    # At values of 0 each token pulls the bias by -its return, whatever its micro-batch.
    pulls = [-r for s in batch for r, c in zip(s.figures["returns"], s.mask, strict=True) if c]
    assert found.item() == pytest.approx(sum(pulls) / len(pulls), rel=1e-6)


class _Ignored:
    def add(self, metrics: object) -> None: ...


def test_estimates_come_back_as_they_were_stored() -> None:
    figures = [[0.5, -1.25], [], [3.0]]
    data = estimates_file(figures)
    assert read_estimates(data, [2, 0, 1]) == figures
    for lengths in ([2, 1, 0], [2, 0], [3]):
        with pytest.raises(ValueError, match="3 sequences with 3 tokens"):
            read_estimates(data, lengths)
    with pytest.raises(ValueError, match="no estimates"):
        read_estimates(b"nothing", [1])


def test_figures_lie_at_the_tokens_that_they_are_of() -> None:
    batch = collate(sequences(), 0, CPU)
    returns_BT = batch.figures_BT["returns"]
    assert returns_BT.shape == batch.mask_BT.shape
    assert (returns_BT[batch.mask_BT].abs() == 1.0).all()
    assert collate([], 0, CPU).figures_BT == {}
