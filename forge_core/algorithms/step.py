"""One optimizer's view of training: a supervised step and a post-training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from forge_core.algorithms.batch import (
    MicroBatch,
    Sequence,
    collate,
    share,
    split,
    token_logprobs,
)
from forge_core.algorithms.custom_loss import CustomLoss
from forge_core.algorithms.grpo import LossSums, grpo_loss
from forge_core.algorithms.ratios import Ratios
from forge_core.config import RunConfig
from forge_core.sharding import reshard, shard_like


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a post-training step did."""

    optimizer_updates: int
    """Optimizer updates made."""
    metrics: dict[str, float]
    """Means over the step's tokens, and norms."""


class Learner:
    """A sharded model with its optimizer. All methods are collective: every rank calls them alike."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: RunConfig,
        device: torch.device,
        pad_id: int,
        rank: int,
    ) -> None:
        self._model = model
        self._config = config
        self._device = device
        self._pad_id = pad_id
        self._rank = rank
        self._ranks = config.trainer.ranks
        self._optimizer = self._new_optimizer(config.warm_start.learning_rate)
        self._custom_loss = CustomLoss(config.loss) if config.loss is not None else None

    def _new_optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        settings = self._config.optimizer
        return torch.optim.AdamW(
            self._model.parameters(),
            lr=learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def begin_post_training(self) -> None:
        """Forget the supervised optimizer's moments: they are of another objective."""
        self._optimizer = self._new_optimizer(self._config.optimizer.learning_rate)

    def supervised_step(self, step: int, sequences: list[Sequence]) -> float:
        """One update towards the masked tokens; the loss before it, in nats per token."""
        settings = self._config.warm_start
        warmup = max(1, settings.steps // 10)
        self._set_learning_rate(settings.learning_rate * min(1.0, (step + 1) / warmup))
        num_tokens = _count(sequences)
        total = 0.0
        for batch in self._micro_batches(sequences):
            scored = token_logprobs(self._model, batch, temperature=1.0)
            loss = -(scored.logprobs_BT * batch.mask_BT).sum() / num_tokens
            (loss * self._ranks).backward()
            total += float(loss.detach())
        self._update()
        return self._sum_over_ranks([total])[0]

    def train_step(self, step: int, sequences: list[Sequence]) -> Outcome:
        """All epochs and minibatches of a step (from 1) on a batch; an empty batch changes nothing."""
        if not sequences:
            return Outcome(optimizer_updates=0, metrics={})
        algorithm = self._config.algorithm
        learning_rate = self._learning_rate(step)
        self._set_learning_rate(learning_rate)
        sums: dict[str, float] = {}
        updates, gradient_norms = 0, []
        ratios = Ratios(self._device)
        for epoch in range(algorithm.epochs):
            for index in range(algorithm.minibatches):
                minibatch = sequences[index :: algorithm.minibatches]
                if not minibatch:
                    continue
                is_on_policy = epoch == 0 and index == 0
                self._accumulate(minibatch, sums, ratios, is_on_policy=is_on_policy)
                gradient_norms.append(self._update())
                updates += 1
        metrics = self._reduce(sums, num_tokens=_count(sequences) * algorithm.epochs)
        metrics.update(ratios.metrics())
        metrics["grad_norm"] = max(gradient_norms)
        metrics["learning_rate"] = learning_rate
        return Outcome(optimizer_updates=updates, metrics=metrics)

    def _accumulate(
        self,
        minibatch: list[Sequence],
        sums: dict[str, float],
        ratios: Ratios,
        *,
        is_on_policy: bool,
    ) -> None:
        num_tokens = _count(minibatch)
        fault: ValueError | None = None
        for batch in self._micro_batches(minibatch):
            scored = token_logprobs(
                self._model, batch, temperature=self._config.sampling.temperature
            )
            try:
                share_of_loss = self._loss(scored.logprobs_BT, batch, num_tokens)
            except ValueError as error:
                # The other ranks are in the same collectives: it is raised once all are through them.
                fault = fault or error
                share_of_loss = LossSums(loss=scored.logprobs_BT.sum() * 0.0, metrics={})
            ratios.add(scored.logprobs_BT, batch.sampled_logprobs_BT, batch.mask_BT)
            # FSDP averages gradients over ranks; shares of one sum have to be added.
            (share_of_loss.loss * self._ranks).backward()
            entropy = float((scored.entropy_BT * batch.mask_BT).sum())
            loss = float(share_of_loss.loss.detach()) * num_tokens
            for name, value in {**share_of_loss.metrics, "entropy": entropy, "loss": loss}.items():
                sums[name] = sums.get(name, 0.0) + value
            if is_on_policy:
                apart_BT = (scored.logprobs_BT.detach() - batch.sampled_logprobs_BT).abs()
                gap = float(torch.where(batch.mask_BT, apart_BT, 0.0).max())
                name = "max:sampling/sampling_logp_difference/max"
                # Infinity stands for a gap that is no number, which `max` would let go.
                sums[name] = max(sums.get(name, 0.0), gap if gap == gap else float("inf"))

        if self._custom_loss is not None:
            self._raise_together(fault)

    def _loss(self, logprobs_BT: torch.Tensor, batch: MicroBatch, num_tokens: int) -> LossSums:
        arguments = (logprobs_BT, batch.sampled_logprobs_BT, batch.advantages_B, batch.mask_BT)
        if self._custom_loss is not None:
            return self._custom_loss(*arguments, num_tokens=num_tokens)
        return grpo_loss(*arguments, num_tokens=num_tokens, config=self._config.algorithm)

    def _raise_together(self, fault: ValueError | None) -> None:
        (num_faults,) = self._sum_over_ranks([float(fault is not None)])
        if num_faults:
            self._optimizer.zero_grad()
            raise fault or ValueError("the loss failed on another rank of the trainer")

    def _micro_batches(self, sequences: list[Sequence]) -> Iterable[Any]:
        limit = self._config.trainer.micro_batch_tokens
        shares = [share(sequences, rank, self._ranks) for rank in range(self._ranks)]
        pieces = max(len(split(s, limit)) for s in shares)
        for run in split(shares[self._rank], limit, pieces):
            yield collate(run, self._pad_id, self._device)

    def _update(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), self._config.optimizer.max_gradient_norm
        )
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(norm):
            self._optimizer.zero_grad()
            of = f" of loss {self._config.loss!r}" if self._config.loss else ""
            raise RuntimeError(f"the gradient's norm{of} is {float(norm)}; nothing was updated")
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def _learning_rate(self, step: int) -> float:
        settings = self._config.optimizer
        rising = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
        # A loop of the user's may go on beyond the steps that the schedule was made for.
        progress = min(1.0, (step - 1) / max(1, self._config.steps - 1))
        falling = 1.0 - (1.0 - settings.final_learning_rate_fraction) * progress
        return settings.learning_rate * rising * falling

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def _sum_over_ranks(self, values: list[float], op: Any = dist.ReduceOp.SUM) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=op)
        return [float(value) for value in tensor]

    def _reduce(self, sums: dict[str, float], num_tokens: int) -> dict[str, float]:
        names = sorted(name for name in sums if not name.startswith("max:"))
        maxima = sorted(name for name in sums if name.startswith("max:"))
        means = self._sum_over_ranks([sums[name] for name in names])
        tops = self._sum_over_ranks([sums[name] for name in maxima], dist.ReduceOp.MAX)
        return {
            **{name: value / num_tokens for name, value in zip(names, means, strict=True)},
            **{name.removeprefix("max:"): v for name, v in zip(maxima, tops, strict=True)},
        }

    def full_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The optimizer's state, gathered: CPU tensors by `parameter/entry`, and the plain rest.

        Empty before the optimizer's first step.
        """
        tensors: dict[str, torch.Tensor] = {}
        reshard(self._model)
        for name, parameter in self._model.named_parameters():
            # In one order on every rank, whatever order a checkpoint was read in: each is a collective.
            for entry, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                full = value.full_tensor() if hasattr(value, "full_tensor") else value
                # A copy: with one rank the full tensor is the optimizer's own, which the next step changes.
                tensors[f"{name}/{entry}"] = full.detach().cpu().clone()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        return tensors, {"param_groups": groups}

    def load_state(self, pieces: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Begin post-training with what `full_state` gave, of any number of ranks; nothing to load is a fresh start.

        Raises ValueError for state of a parameter that the model has not got, or of another shape.
        """
        reshard(self._model)
        self.begin_post_training()
        parameters = dict(self._model.named_parameters())
        for piece in pieces:
            for key, value in piece.items():
                name, _, entry = key.rpartition("/")
                if (parameter := parameters.get(name)) is None:
                    raise ValueError(
                        f"the checkpoint has an optimizer's state of {name!r}, a parameter unknown here"
                    )
                if value.shape not in (parameter.shape, torch.Size([])):
                    raise ValueError(
                        f"the optimizer's {key!r} has shape {tuple(value.shape)} where {tuple(parameter.shape)} is due"
                    )
                # As AdamW makes them itself: moments lie where the parameter does, the count of steps on the CPU.
                state = self._optimizer.state[parameter]
                state[entry] = value.clone() if value.ndim == 0 else shard_like(value, parameter)

    def bytes_by_group(self) -> dict[str, int]:
        """Bytes that this rank holds of parameters, their gradients, and the optimizer's state."""
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [value for p in parameters for value in self._optimizer.state.get(p, {}).values()]
        return {
            name: sum(_local_bytes(tensor) for tensor in tensors)
            for name, tensors in (
                ("parameters", parameters),
                ("gradients", gradients),
                ("optimizer", state),
            )
        }


def _local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _count(sequences: list[Sequence]) -> int:
    return max(1, sum(sum(sequence.mask) for sequence in sequences))
