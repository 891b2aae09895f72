"""How far the policy in training has moved from the one that sampled, told by importance ratios of tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


class Ratios:
    """Importance ratios of a step's tokens, micro-batch by micro-batch; figures over all ranks at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._log_ratios: list[torch.Tensor] = []

    @torch.no_grad()
    def add(
        self, logprobs_BT: torch.Tensor, sampled_logprobs_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> None:
        """Take in a micro-batch."""
        self._log_ratios.append((logprobs_BT - sampled_logprobs_BT)[mask_BT].float())

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Collective. Names are TRL's where it has one; empty without tokens.

        The effective sample size is (sum w)^2 / (n sum w^2), 1 where all n tokens weigh the same (Kong 1992).
        """
        log_ratios = self._gathered()
        if not log_ratios.numel():
            return {}
        ratios = log_ratios.double().exp()
        ordered = ratios.sort().values
        name = "sampling/importance_sampling_ratio"
        figures = {
            f"{name}/min": float(ordered[0]),
            f"{name}/mean": float(ratios.mean()),
            f"{name}/max": float(ordered[-1]),
            "sampling/effective_sample_size": float(
                ratios.sum() ** 2 / (ratios.numel() * (ratios**2).sum())
            ),
        }
        for quantile, share in QUANTILES.items():
            figures[f"{name}/{quantile}"] = float(ordered[round(share * (ordered.numel() - 1))])
        return figures

    def _gathered(self) -> torch.Tensor:
        own = torch.cat(self._log_ratios) if self._log_ratios else torch.zeros(0)
        own = own.to(self._device)
        length = torch.tensor([own.numel()], device=self._device)
        lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, length)
        longest = max(int(each) for each in lengths)
        padded = torch.zeros(longest, device=self._device)
        padded[: own.numel()] = own
        everyone = [torch.zeros_like(padded) for _ in lengths]
        dist.all_gather(everyone, padded)
        return torch.cat([row[: int(n)] for row, n in zip(everyone, lengths, strict=True)])
