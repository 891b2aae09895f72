"""Every loss against a second implementation in NumPy and against TRL's own numbers: values, gradients, metrics."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy_losses
import pytest
import torch
from numpy_losses import Case

from forge_core.algorithms.divergence import divergence, lost_rewards
from forge_core.algorithms.losses import LOSSES
from forge_core.algorithms.metrics import Largest, Mean, Metric, Smallest, StepMetrics
from forge_core.algorithms.primitives import drift
from forge_core.algorithms.tokens import LossShare, Tokens
from forge_core.config import AlgorithmConfig, CorrectionConfig, Estimator, KLConfig

TRL = json.loads((Path(__file__).parents[1] / "trl_losses.json").read_text("utf-8"))
CLIPS = {"gspo": (0.05, 0.08), "rloo": (0.4, 0.6), "cispo": (0.3, 0.4)}
"""Where the ratios of the case lie on both sides of both bounds; elsewhere 0.2 and 0.28."""


def case_of(loss: str = "dapo", **changes: Any) -> Case:
    """Six sequences: padded left, right and on both sides, with a gap, empty; ratios on both sides of every bound."""
    random = np.random.default_rng(3)
    mask = np.zeros((6, 12), dtype=bool)
    for row, (first, last) in enumerate([(0, 12), (5, 12), (0, 4), (3, 9), (0, 0), (7, 8)]):
        mask[row, first:last] = True
    mask[0, 4:6] = False
    logprobs = -random.uniform(0.1, 3.0, mask.shape)
    advantages = np.array([1.5, -0.7, 2.0, -1.1, 0.4, -0.9])
    low, high = CLIPS.get(loss, (0.2, 0.28))
    return Case(
        logprobs=logprobs,
        sampled=logprobs - random.choice([-0.6, -0.15, -0.02, 0.0, 0.1, 0.2, 0.7], mask.shape),
        advantages=np.broadcast_to(advantages[:, None], mask.shape).copy(),
        entropy=random.uniform(0.1, 2.0, mask.shape),
        mask=mask,
        **{"loss": loss, "clip_low": low, "clip_high": high, "num_tokens": 29.0, "num_sequences": 7.0, **changes},
    )  # fmt: skip


def decoupled(loss: str, weights: str, level: str) -> Case:
    """The same with proximal logprobs between sampled ones and those in training."""
    case = case_of(loss)
    random = np.random.default_rng(5)
    proximal = case.logprobs - random.choice([-0.5, -0.1, 0.0, 0.15, 0.5], case.mask.shape)
    sampled = proximal - random.choice([-1.2, -0.4, 0.0, 0.3, 1.1], case.mask.shape)
    return replace(case, proximal=proximal, sampled=sampled, weights=weights, level=level)


def of_tokens(loss: str) -> Case:
    """The same with an advantage for each token, as a critic gives it."""
    case = case_of(loss)
    return replace(case, advantages=np.random.default_rng(2).normal(size=case.mask.shape))


def with_reference(loss: str, estimator: str) -> Case:
    """The same with a reference policy in the loss."""
    case = case_of(loss)
    random = np.random.default_rng(11)
    reference = case.logprobs - random.normal(scale=0.5, size=case.mask.shape)
    return replace(case, reference=reference, kl_coefficient=0.3, kl_estimator=estimator)


def cases() -> Iterator[Any]:
    """Each loss with each correction."""
    for name in LOSSES:
        yield pytest.param(case_of(name), id=name)
        yield pytest.param(case_of(name, entropy_coefficient=0.1), id=f"{name}-entropy")
        for level, low, high in (("token", 0.8, 1.3), ("sequence", 0.3, 4.0)):
            masked = case_of(name, weights="masked", level=level, low=low, high=high)
            yield pytest.param(masked, id=f"{name}-masked-{level}")
        for weights, level in product(("plain", "truncated", "masked"), ("token", "sequence")):
            case = decoupled(name, weights, level)
            yield pytest.param(case, id=f"{name}-decoupled-{weights}-{level}")
        yield pytest.param(decoupled(name, "none", "token"), id=f"{name}-uncorrected")
        for estimator in ("k1", "k2", "k3"):
            yield pytest.param(with_reference(name, estimator), id=f"{name}-{estimator}")
    for name in ("dapo", "cispo", "ppo"):
        yield pytest.param(of_tokens(name), id=f"{name}-advantages-of-tokens")


def config_of(case: Case) -> AlgorithmConfig:
    bounds = {"truncated": ("high",), "masked": ("low", "high")}.get(case.weights, ())
    correction = {
        "anchor": "sampled" if case.proximal is None else "proximal",
        "weights": case.weights,
        "level": case.level,
        **{name: getattr(case, name) for name in bounds},
    }
    return AlgorithmConfig(
        loss=case.loss,  # type: ignore[arg-type]
        clip_low=case.clip_low,
        clip_high=case.clip_high,
        entropy_coefficient=case.entropy_coefficient,
        kl=KLConfig.model_validate(kl_of(case)),
        correction=CorrectionConfig.model_validate(correction),
    )


def kl_of(case: Case) -> dict[str, Any]:
    if case.reference is None:
        return {}
    return {"coefficient": case.kl_coefficient, "estimator": case.kl_estimator}


def tokens_of(case: Case, dtype: torch.dtype = torch.float64) -> Tokens:
    def tensor(array: Any) -> torch.Tensor:
        return torch.tensor(array, dtype=dtype)

    return Tokens(
        logprobs_BT=tensor(case.logprobs).requires_grad_(),
        sampled_logprobs_BT=tensor(case.sampled),
        proximal_logprobs_BT=None if case.proximal is None else tensor(case.proximal),
        reference_logprobs_BT=None if case.reference is None else tensor(case.reference),
        advantages_BT=tensor(case.advantages),
        entropy_BT=tensor(case.entropy).requires_grad_(),
        mask_BT=torch.tensor(case.mask),
        num_tokens=case.num_tokens,
        num_sequences=case.num_sequences,
        max_tokens=case.max_tokens,
    )


def share_of(case: Case) -> tuple[LossShare, np.ndarray]:
    """Our loss and its gradient by the logprobs."""
    tokens = tokens_of(case)
    share = LOSSES[case.loss](tokens, config_of(case))  # type: ignore[index]
    share.loss.backward()
    assert tokens.logprobs_BT.grad is not None
    return share, tokens.logprobs_BT.grad.numpy()


@pytest.mark.parametrize("case", list(cases()))
def test_values_and_gradients_are_those_of_the_second_implementation(case: Case) -> None:
    share, gradient = share_of(case)
    assert share.loss.item() == pytest.approx(numpy_losses.loss(case), rel=1e-12)
    slopes = numpy_losses.slopes(case)
    assert np.count_nonzero(slopes) >= 3
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_lies_off_the_mask_has_no_say(loss: str) -> None:
    reference = with_reference(loss, "k3").reference
    case = replace(
        decoupled(loss, "truncated", "sequence"), reference=reference, kl_coefficient=0.2
    )
    before, wanted = share_of(replace(case, entropy_coefficient=0.1))
    poisoned = replace(
        case,
        entropy_coefficient=0.1,
        **{
            name: np.where(case.mask, getattr(case, name), value)
            for name, value in (
                ("logprobs", np.inf), ("sampled", np.nan), ("proximal", -np.inf),
                ("advantages", np.nan), ("entropy", np.nan), ("reference", np.inf),
            )
        },
    )  # fmt: skip
    after, found = share_of(poisoned)
    assert after.loss.item() == before.loss.item()
    assert after.metrics == before.metrics
    np.testing.assert_array_equal(found, wanted)
    assert not found[~case.mask].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_on_either_side_changes_nothing(loss: str) -> None:
    case = case_of(loss)
    share, gradient = share_of(case)
    for left, right in ((3, 0), (0, 3), (2, 2)):
        widths = ((0, 0), (left, right))
        padded = replace(
            case,
            **{
                name: np.pad(getattr(case, name), widths)
                for name in ("logprobs", "sampled", "advantages", "entropy", "mask")
            },
        )
        found, slopes = share_of(padded)
        assert found.loss.item() == pytest.approx(share.loss.item(), rel=1e-12)
        np.testing.assert_allclose(slopes[:, left : left + 12], gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_shares_of_a_batch_add_up_to_the_whole(loss: str) -> None:
    case = replace(decoupled(loss, "masked", "token"), entropy_coefficient=0.2)
    whole, gradient = share_of(case)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        names = ("logprobs", "sampled", "proximal", "advantages", "entropy", "mask")
        parts.append(share_of(replace(case, **{name: getattr(case, name)[rows] for name in names})))
    assert sum(part.loss.item() for part, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-12)
    gathered = StepMetrics()
    for part, _ in parts:
        gathered.add(part.metrics)
    assert gathered.reduced(lambda values, _: values) == pytest.approx(figures(whole.metrics))


@pytest.mark.parametrize("loss", LOSSES)
def test_in_bfloat16_it_is_computed_in_float32(loss: str) -> None:
    case = replace(
        with_reference(loss, "k3"), **{
            name: getattr(decoupled(loss, "truncated", "token"), name)
            for name in ("proximal", "sampled", "weights")
        }, entropy_coefficient=0.1,
    )  # fmt: skip
    tokens = tokens_of(case, torch.bfloat16)
    rounded = replace(
        case,
        **{
            name: torch.tensor(getattr(case, name)).bfloat16().double().numpy()
            for name in ("logprobs", "sampled", "proximal", "advantages", "entropy", "reference")
        },
    )
    share = LOSSES[loss](tokens, config_of(case))  # type: ignore[index]
    assert share.loss.dtype == torch.float32
    assert share.loss.item() == pytest.approx(numpy_losses.loss(rounded), rel=1e-5)
    entropy = float(rounded.entropy[case.mask].mean())
    assert figures(share.metrics)["entropy_bonus"] == pytest.approx(0.1 * entropy, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_an_advantage_there_is_no_gradient(loss: str) -> None:
    share, gradient = share_of(replace(case_of(loss), advantages=np.zeros((6, 12))))
    assert share.loss.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_the_gradient_is_the_policy_gradient(loss: str) -> None:
    """At ratio 1 a positive advantage raises a token's logprob and a negative lowers it."""
    case = case_of(loss)
    _, gradient = share_of(replace(case, sampled=case.logprobs))
    lengths = np.maximum(case.mask.sum(axis=1, keepdims=True), 1)
    divisors = {
        "dapo": case.num_tokens,
        "cispo": case.num_tokens,
        "ppo": case.num_tokens,
        "dr_grpo": case.num_sequences * case.max_tokens,
        # A response as one action: each of its tokens counts whole.
        "rloo": case.num_sequences,
    }
    divisor = divisors.get(loss, case.num_sequences * lengths)
    wanted = -case.advantages * case.mask / divisor
    np.testing.assert_allclose(gradient, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "slope", "low", "high"),
    [
        (0.5, 1.0, 0.0, 0.0, 1.0),
        (-0.5, 1.0, -np.exp(-0.5), 0.0, 0.0),
        (0.5, -1.0, np.exp(0.5), 0.0, 0.0),
        (-0.5, -1.0, 0.0, 1.0, 0.0),
        (np.log(1.25), 1.0, -1.25, 0.0, 0.0),
        (np.log(0.78), -1.0, 0.0, 1.0, 0.0),
    ],
)
def test_only_the_ratio_that_ran_ahead_of_its_advantage_is_clipped(
    log_ratio: float, advantage: float, slope: float, low: float, high: float
) -> None:
    one = np.full((1, 1), -1.0)
    case = Case(
        logprobs=one,
        sampled=one - log_ratio,
        advantages=np.full((1, 1), advantage),
        mask=np.full((1, 1), True),
        entropy=one,
    )
    share, gradient = share_of(case)
    assert gradient.item() == pytest.approx(slope, rel=1e-12)
    assert share.metrics["clip_ratio/low_mean"] == Mean(low, 1.0)
    assert share.metrics["clip_ratio/high_mean"] == Mean(high, 1.0)


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_shares_of_clipped_tokens_are_by_each_token_s_own_advantage(loss: str) -> None:
    case = of_tokens(loss)
    told = figures(share_of(case)[0].metrics)
    ratios, signs = np.exp(case.logprobs - case.sampled)[case.mask], case.advantages[case.mask]
    high = np.mean((ratios > 1 + case.clip_high) & (signs > 0))
    assert 0 < told["cispo_clip_ratio" if loss == "cispo" else "clip_ratio/high_mean"] == high
    if loss == "dapo":
        low = np.mean((ratios < 1 - case.clip_low) & (signs < 0))
        assert 0 < told["clip_ratio/low_mean"] == low
        assert told["clip_ratio/region_mean"] == pytest.approx(low + high, rel=1e-12)


def test_of_two_tokens_of_a_sequence_the_one_with_the_advantage_is_clipped() -> None:
    two = np.full((1, 2), -1.0)
    case = Case(
        logprobs=two,
        sampled=two - 0.5,
        advantages=np.array([[3.0, -1.0]]),
        mask=two < 0,
        entropy=two,
    )
    told = figures(share_of(case)[0].metrics)
    assert (told["clip_ratio/high_mean"], told["clip_ratio/low_mean"]) == (0.5, 0.0)


@pytest.mark.parametrize("loss", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_what_lies_on_a_bound_or_has_no_advantage_is_not_clipped(
    loss: str, advantage: float
) -> None:
    case = case_of(loss, clip_low=0.0, clip_high=0.0)
    sampled = case.logprobs if advantage else case.sampled
    share, _ = share_of(replace(case, sampled=sampled, advantages=np.full_like(sampled, advantage)))
    told = figures(share.metrics)
    assert {value for name, value in told.items() if "clip" in name} == {0.0}


@pytest.mark.parametrize(("bound", "log_weight"), [("low", -0.5), ("high", 0.5)])
def test_a_weight_on_a_bound_is_kept(bound: str, log_weight: float) -> None:
    one = np.full((1, 1), -1.0)
    weight = float(torch.tensor(log_weight, dtype=torch.float64).exp())
    case = Case(
        logprobs=one,
        sampled=one - log_weight,
        proximal=one,
        advantages=one,
        mask=np.full((1, 1), True),
        entropy=one,
        weights="masked",
        **{bound: weight},  # type: ignore[arg-type]
    )
    assert share_of(case)[0].loss.item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_in_the_reward_is_told_and_no_part_of_the_loss(estimator: Estimator) -> None:
    case = with_reference("grpo", estimator)
    config = config_of(case)
    kl = config.kl.model_copy(update={"place": "reward"})
    share = LOSSES["grpo"](tokens_of(case), config.model_copy(update={"kl": kl}))
    assert share.loss.item() == pytest.approx(numpy_losses.loss(replace(case, kl_coefficient=0.0)))
    assert case.reference is not None
    apart = [
        numpy_losses.kl(case.logprobs[place], case.reference[place], estimator)
        for place in zip(*np.nonzero(case.mask), strict=True)
    ]
    assert figures(share.metrics)["kl"] == pytest.approx(np.mean(apart), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_a_reward_loses_for_divergence(estimator: Estimator) -> None:
    case = with_reference("grpo", estimator)
    assert case.reference is not None
    config = KLConfig(coefficient=0.3, place="reward", estimator=estimator)
    arrays = [torch.tensor(each) for each in (case.sampled, case.reference)]
    lost, told = lost_rewards(*arrays, torch.tensor(case.mask), config)
    wanted = np.zeros(case.mask.shape)
    for place in zip(*np.nonzero(case.mask), strict=True):
        wanted[place] = -0.3 * numpy_losses.kl(
            case.sampled[place], case.reference[place], estimator
        )
    np.testing.assert_allclose(lost.numpy(), wanted, rtol=1e-12, atol=1e-15)
    assert figures(told)["kl_penalty"] == pytest.approx(-wanted.sum() / 6, rel=1e-12)


def test_the_estimators_estimate_the_divergence() -> None:
    """By the whole distribution: the mean of k1 and k3 over it is the divergence, that of k2 close to it nearby."""
    random = np.random.default_rng(7)
    logits = torch.tensor(random.normal(size=9))
    logprobs = logits.log_softmax(0)
    reference = (logits + torch.tensor(random.normal(scale=0.05, size=9))).log_softmax(0)
    exact = float((logprobs.exp() * (logprobs - reference)).sum())
    mask = torch.ones(1, 9, dtype=torch.bool)
    for estimator, tolerance in (("k1", 1e-12), ("k2", 0.05), ("k3", 1e-12)):
        found = divergence(logprobs[None], reference[None], mask, estimator)  # type: ignore[arg-type]
        assert float((logprobs.exp() * found[0]).sum()) == pytest.approx(exact, rel=tolerance)


def test_the_entropy_bonus_has_a_gradient() -> None:
    case = case_of(entropy_coefficient=0.3)
    tokens = tokens_of(case)
    LOSSES["dapo"](tokens, config_of(case)).loss.backward()
    assert tokens.entropy_BT.grad is not None
    wanted = -0.3 * case.mask / case.num_tokens
    np.testing.assert_allclose(tokens.entropy_BT.grad.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", TRL["results"])
def test_losses_gradients_and_figures_are_those_of_trl(name: str) -> None:
    loss, _, more = name.partition(" ")
    arrays = {key: np.array(value) for key, value in TRL["inputs"].items()}
    level, _, verb = more.partition("_")
    weights = {"truncate": "truncated", "mask": "masked"}.get(verb, "none")
    case = Case(
        logprobs=arrays["logprobs"],
        sampled=arrays["sampled"],
        # TRL's old logprobs: the trainer's before the first update.
        proximal=arrays["old"],
        advantages=np.broadcast_to(arrays["advantages"][:, None], arrays["mask"].shape).copy(),
        mask=arrays["mask"].astype(bool),
        entropy=arrays["entropy"],
        num_tokens=float(arrays["mask"].sum()),
        num_sequences=4.0,
        max_tokens=9,
        loss=loss,
        # TRL bounds CISPO's weight above only, by its value and not its distance from 1.
        clip_low=1.0 if loss == "cispo" else 0.2,
        clip_high=0.5 if loss == "cispo" else 0.28,
        weights=weights,
        level="sequence" if level == "sequence" else "token",
        entropy_coefficient=0.01 if more == "entropy" else 0.0,
    )
    wanted = TRL["results"][name]
    share, gradient = share_of(case)
    assert share.loss.item() == pytest.approx(wanted["loss"], rel=1e-12)
    np.testing.assert_allclose(gradient, wanted["gradient"], rtol=1e-12, atol=1e-15)
    found = figures(share.metrics)
    shared = found.keys() & wanted["metrics"].keys()
    assert shared == {key for key in wanted["metrics"] if "clip" in key}
    for key in shared:
        assert found[key] == pytest.approx(wanted["metrics"][key], rel=1e-6)


def test_drift_is_told_of_the_masked_tokens() -> None:
    case = case_of()
    log_ratios = (case.logprobs - case.sampled)[case.mask]
    tensors = (torch.tensor(each) for each in (case.logprobs, case.sampled, case.mask))
    told = figures(drift(*tensors))
    difference = told["sampling/sampling_logp_difference/mean"]
    assert difference == pytest.approx(np.abs(log_ratios).mean(), rel=1e-12)
    divergence = (np.exp(log_ratios) - 1 - log_ratios).mean()
    assert told["sampling/kl"] == pytest.approx(divergence, rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_tell_their_mean_and_how_many_are_limited(level: str) -> None:
    for weights in ("plain", "truncated", "masked"):
        case = decoupled("dapo", weights, level)
        assert case.proximal is not None
        logs = np.where(case.mask, case.proximal - case.sampled, 0.0)
        plain = np.exp(logs.sum(axis=1) if level == "sequence" else logs)
        kept = plain[case.mask.any(axis=1)] if level == "sequence" else plain[case.mask]
        limited = {
            "plain": kept,
            "truncated": np.minimum(kept, 2.0),
            "masked": np.where((kept >= 0.5) & (kept <= 2.0), kept, 0.0),
        }[weights]
        told = figures(share_of(case)[0].metrics)
        assert told["correction/weight_mean"] == pytest.approx(limited.mean(), rel=1e-12)
        assert told["correction/limited_ratio"] == np.mean(limited != kept)


def figures(metrics: Any) -> dict[str, float]:
    return {name: figure(metric) for name, metric in metrics.items()}


def figure(metric: Metric) -> float:
    match metric:
        case Mean(total, count):
            return total / count
        case Largest(value) | Smallest(value):
            return value
