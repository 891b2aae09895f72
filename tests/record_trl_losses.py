"""Write tests/trl_losses.json: losses and gradients that TRL's own code computes, for tests to hold ours against.

In an environment that has trl==1.16.0 beside what this project needs (TRL is no dependency of it):

    python tests/record_trl_losses.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

FILE = Path(__file__).parent / "trl_losses.json"
LENGTHS = (7, 3, 9, 5)
MOST = 9


class Alone:
    """An accelerator of one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


def inputs() -> dict[str, torch.Tensor]:
    """Four responses of different lengths, in float64; ratios lie on both sides of every clip."""
    generator = torch.Generator().manual_seed(11)

    def uniform(low: float, high: float) -> torch.Tensor:
        drawn = torch.rand(len(LENGTHS), MOST, generator=generator, dtype=torch.float64)
        return low + (high - low) * drawn

    logprobs = -uniform(0.1, 3.0)
    old = logprobs - uniform(-0.6, 0.6)
    return {
        "logprobs": logprobs,
        "old": old,
        "sampled": old - uniform(-0.9, 0.9),
        "entropy": uniform(0.2, 2.0),
        "mask": (torch.arange(MOST)[None] < torch.tensor(LENGTHS)[:, None]).long(),
        "advantages": torch.tensor([1.5, -0.7, 0.4, -1.1], dtype=torch.float64),
    }


def weights(given: dict[str, torch.Tensor], mode: str, high: float) -> torch.Tensor:
    """TRL's importance weights; it computes them while it generates, out of reach of a call."""
    apart = (given["old"] - given["sampled"]) * given["mask"]
    if mode.startswith("sequence"):
        apart = apart.sum(dim=-1, keepdim=True)
    ratio = apart.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(max=high)
    return ratio.masked_fill((ratio < 0.5) | (ratio > high), 0.0)


def trainer(**settings: Any) -> SimpleNamespace:
    """What `_compute_loss` asks of its trainer."""
    return SimpleNamespace(
        accelerator=Alone(), model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0,
        current_gradient_accumulation_steps=1, max_completion_length=MOST, use_adaptive_entropy=False,
        importance_sampling_level="token", use_vllm=False, vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False, epsilon_low=0.2, epsilon_high=0.28,
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        **settings,
    )  # fmt: skip


def computed(owner: Any, self: SimpleNamespace, given: dict[str, torch.Tensor], more: Any) -> Any:
    """Loss, gradient by the logprobs, and what TRL logs."""
    logprobs = given["logprobs"].clone().requires_grad_()
    self._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, given["entropy"], None)
    nothing = torch.zeros(len(LENGTHS), 0, dtype=torch.long)
    found = owner._compute_loss(
        self,
        None,
        {
            "prompt_ids": nothing, "prompt_mask": nothing,
            "completion_ids": torch.zeros_like(given["mask"]), "completion_mask": given["mask"],
            "advantages": given["advantages"], "old_per_token_logps": given["old"],
            "old_logps": (given["old"] * given["mask"]).sum(dim=1),
            "num_items_in_batch": given["mask"].sum(),
            **more,
        },
    )  # fmt: skip
    found.backward()
    assert logprobs.grad is not None
    told = {name: values[0] for name, values in self._metrics["train"].items()}
    return {"loss": float(found.detach()), "gradient": logprobs.grad.tolist(), "metrics": told}


def main() -> None:
    """Compute and write."""
    given = inputs()
    results: dict[str, Any] = {}
    for name in ("grpo", "dr_grpo", "dapo", "cispo", "gspo"):
        changes: dict[str, Any] = {"loss_type": {"gspo": "grpo"}.get(name, name)}
        self = trainer(**changes)
        if name == "gspo":
            self.importance_sampling_level = "sequence"
        if name == "cispo":
            self.epsilon_high = 1.5
        results[name] = computed(GRPOTrainer, self, given, {})
    results["rloo"] = computed(RLOOTrainer, trainer(), given, {})
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        self = trainer(loss_type="dapo")
        self.use_vllm = self.vllm_importance_sampling_correction = True
        more = {"importance_sampling_ratio": weights(given, mode, 2.0)}
        results[f"dapo {mode}"] = computed(GRPOTrainer, self, given, more)
    self = trainer(loss_type="dapo", entropy_coef=0.01)
    self._entropy_bonus_enabled = True
    results["dapo entropy"] = computed(GRPOTrainer, self, given, {})
    document = {
        "trl": trl.__version__,
        "inputs": {name: value.tolist() for name, value in given.items()},
        "results": results,
    }
    FILE.write_text(json.dumps(document) + "\n", "utf-8")


if __name__ == "__main__":
    main()
