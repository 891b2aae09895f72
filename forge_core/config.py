"""The config of a run: every knob, its unit and its bounds, in one place.

Importing this module loads pydantic and nothing heavier, so that a command line can refuse bad input in
well under a second. Unknown keys are refused everywhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from forge_core.regime import Regime, check_bounds, with_defaults

Device = Literal["cpu", "cuda"]

HUB_PREFIX = "hf://"
"""What a `model.path` starts with that names a model of the hub."""


class Section(BaseModel):
    """Base of every part of the config: unknown keys and other types refused, values finite and frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class TinyModelConfig(Section):
    """Shape of the model that is made from the seed when `model.path` is not given (Qwen3 layout)."""

    hidden_size: int = Field(128, ge=16, le=4096)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1, le=64)
    """Number of decoder layers."""
    num_heads: int = Field(4, ge=1, le=64)
    """Number of query heads; head size is `hidden_size / num_heads`."""
    num_kv_heads: int = Field(2, ge=1, le=64)
    """Number of key and value heads; must divide `num_heads`."""
    context_length: int = Field(2048, ge=128)
    """Longest sequence, in tokens."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> TinyModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            )
        return self


class ModelConfig(Section):
    """The policy that is trained."""

    path: str | None = None
    """Directory of a Hugging Face causal language model, or `hf://owner/name` to download one; none: the tiny model."""
    tiny: TinyModelConfig = TinyModelConfig()
    """Shape of the tiny model; ignored when `path` is given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that generate and of the forward pass that trains; float32 on CPU."""


class EnvironmentConfig(Section):
    """Where prompts come from and how answers are scored."""

    name: str = "number_sorting"
    """A reasoning-gym task by its name, or a class of your own as `path/file.py:name` or `module:name`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the task, as reasoning-gym names them (all but `seed` and `size`)."""
    prompt_template: str | None = None
    """Python format string over `question`, `metadata` and the metadata's fields, where a list with a format spec is
    joined by it (`{numbers:, }`); none: the question as it is."""
    answer_template: str | None = None
    """The same for the answers that warm start teaches; none: the reference answer as it is."""
    test_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of prompts, by hash of the rendered prompt, that is held out for evaluation."""


class SamplingConfig(Section):
    """How responses are sampled, in training and in evaluation alike."""

    temperature: float = Field(1.0, gt=0.0, le=4.0)
    """Divides the logits; recorded logprobs include it."""
    max_tokens: int = Field(32, ge=1)
    """Longest response, in tokens."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling; only 1.0, until the trainer can replay its mask."""
    top_k: int = Field(0, ge=0)
    """Top-k sampling; only 0 (off), until the trainer can replay its mask."""

    @model_validator(mode="after")
    def _full_distribution(self) -> SamplingConfig:
        if self.top_p != 1.0:
            raise ValueError(
                f"top_p {self.top_p} would sample from a distribution that the trainer cannot score; set it to 1.0"
            )
        if self.top_k != 0:
            raise ValueError(
                f"top_k {self.top_k} would sample from a distribution that the trainer cannot score; set it to 0"
            )
        return self


class GeneratorsConfig(Section):
    """The mesh that generates: one process with one vLLM engine per replica."""

    replicas: int = Field(1, ge=1, le=256)
    """Number of engines."""
    device: Device = "cpu"
    """Kind of device an engine runs on; with `cuda`, one GPU per replica."""
    threads: int = Field(2, ge=1)
    """CPU threads of each engine's forward pass."""
    kv_cache_gib: float = Field(0.5, gt=0.0)
    """Memory of each engine's key-value cache on CPU, in GiB."""
    gpu_memory_fraction: float = Field(0.85, gt=0.0, le=0.98)
    """Share of a GPU's memory that an engine may use."""
    max_model_len: int = Field(2048, ge=1)
    """Longest prompt and response together, in tokens; the model's own context if that is shorter."""
    max_sequences: int = Field(512, ge=1)
    """Sequences that an engine decodes at once."""


class TrainerConfig(Section):
    """The mesh that trains: FSDP2, one process per rank."""

    ranks: int = Field(2, ge=1, le=4096)
    """Number of processes that share the model and the batch."""
    device: Device = "cpu"
    """Kind of device a rank runs on; with `cuda`, one GPU per rank."""
    threads: int = Field(1, ge=1)
    """CPU threads of each rank."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most tokens, padding included, of one forward and backward pass of a rank."""


class AlgorithmConfig(Section):
    """GRPO (Shao et al. 2024, arXiv 2402.03300), with DAPO's token-level mean (Yu et al. 2025, arXiv 2503.14476)."""

    clip_low: float = Field(0.2, ge=0.0, lt=1.0)
    """The importance ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0.0)
    """The importance ratio is clipped above at 1 + clip_high."""
    scale_advantages: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""
    minibatches: int = Field(1, ge=1)
    """Optimizer updates that one pass over a batch is split into."""
    epochs: int = Field(1, ge=1)
    """Passes over a batch."""


class OptimizerConfig(Section):
    """AdamW for post-training, with linear warm-up and decay."""

    learning_rate: float = Field(3e-4, ge=0.0)
    """Peak learning rate."""
    final_learning_rate_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """Share of the peak that the rate has fallen to, linearly, at the last step; 1: constant."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the denominator."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay per step, times the learning rate."""
    max_gradient_norm: float = Field(1.0, gt=0.0)
    """The gradient is scaled down to this norm."""


class WarmStartConfig(Section):
    """Supervised training on reference answers before reinforcement."""

    steps: int = Field(0, ge=0)
    """Optimizer steps; 0: none."""
    batch_size: int = Field(256, ge=1)
    """Answers per step."""
    learning_rate: float = Field(1e-3, ge=0.0)
    """Peak learning rate, linear warm-up over a tenth of the steps."""


class EvaluationConfig(Section):
    """Held-out prompts, answered once sampled as in training and once greedily."""

    num_prompts: int = Field(500, ge=1)
    """Number of distinct held-out prompts."""


class ParityConfig(Section):
    """How far the logprobs of trainer and generator may be apart on the probe, at each publish."""

    max_mean: float = Field(1e-3, gt=0.0)
    """Bound on the mean absolute difference, in nats."""
    max_max: float = Field(1e-2, gt=0.0)
    """Bound on the largest absolute difference, in nats."""
    probe_tokens: int = Field(256, ge=256)
    """Least number of tokens in the probe batch."""
    min_entropy: float = Field(0.1, gt=0.0)
    """Least mean entropy of the probe, in nats: a probe without doubt shows nothing."""


class CheckpointConfig(Section):
    """When a checkpoint is written; step 0 and the last step always have one."""

    every: int = Field(10, ge=0)
    """Steps between checkpoints; 0: only the first and the last."""
    every_seconds: float = Field(300.0, gt=0.0)
    """Seconds after which a checkpoint is written whatever the step."""


class RetryConfig(Section):
    """How often a stage is tried again after an infrastructure failure."""

    attempts: int = Field(2, ge=0, le=50)
    """Retries of one stage of one round; errors of the user's are never tried again."""
    delay_seconds: float = Field(0.5, ge=0.0)
    """Wait before the first retry; doubles each time, with jitter."""


class TimeoutsConfig(Section):
    """Deadlines of calls between processes, in seconds."""

    startup_seconds: float = Field(300.0, gt=0.0)
    """Until a mesh has spawned and loaded."""
    stage_seconds: float = Field(1800.0, gt=0.0)
    """Until one stage of one round has ended."""
    call_seconds: float = Field(120.0, gt=0.0)
    """Until any other call has ended."""
    reward_seconds: float = Field(60.0, gt=0.0)
    """Until a reward function of your own has scored the completions of one prompt."""


class ShutdownConfig(Section):
    """How a run ends."""

    grace_seconds: float = Field(1.5, ge=0.0)
    """What a mesh gets to stop by itself before its processes are killed."""


class ProfileConfig(Section):
    """Traces of chosen steps, linked in the report."""

    steps: list[int] | None = None
    """First and last step whose generation and training are traced, as `[3, 4]`; none: no traces."""

    @model_validator(mode="after")
    def _is_a_range(self) -> ProfileConfig:
        steps = self.steps
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ValueError(f"steps {steps} is no range of steps: write [first, last], from 1")
        return self


class RunConfig(Section):
    """Everything that decides what a run does."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds the tiny model, the order of prompts, and every sample."""
    regime: Regime = "sync"
    """How generation and training are composed: `sync` one after the other and on-policy; `async` at the same time,
    with weights swapped under running requests; `hybrid` in rounds, each collected while the one before trains."""
    steps: int = Field(100, ge=0)
    """Post-training steps; 0: only warm start and evaluation."""
    group_size: int = Field(8, ge=2)
    """Samples per prompt."""
    groups_per_step: int = Field(64, ge=1)
    """Prompts per step."""
    max_policy_age: int = Field(0, ge=0)
    """Most versions that a group's oldest token may lie behind the weights that train on it. Unless given: 0 in sync,
    2 in async, 2 x steps_per_round - 1 in hybrid."""
    window: int = Field(1, ge=1)
    """Groups among which a step may choose what is ready, first in first out otherwise; 1: strictly in order. Unless
    given: groups_per_step in async with a max_policy_age of 2 or more."""
    steps_per_round: int = Field(1, ge=1)
    """Steps that hybrid trains while it collects the groups of as many more. Unless given: 2 in hybrid."""
    segment_steps: int = Field(20, ge=1)
    """Steps that async runs within one task of each stage."""
    reward: str | None = None
    """A function of your own that scores in the environment's stead, with TRL's signature
    `(prompts, completions, **columns) -> list[float]`, as `path/file.py:name` or `module:name`."""
    loss: str | None = None
    """A loss of your own in GRPO's stead: `(logprobs, sampled_logprobs, advantages, mask)` to a loss per token."""
    generate_episode: str | None = None
    """A function of your own that makes an episode: `async (policy, prompt_text, *, seed) -> Episode`."""
    model: ModelConfig = ModelConfig()
    """The policy."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Prompts and scores."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    generators: GeneratorsConfig = GeneratorsConfig()
    """The generating mesh."""
    trainer: TrainerConfig = TrainerConfig()
    """The training mesh."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer of post-training."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """Supervised training first."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    parity: ParityConfig = ParityConfig()
    """Trainer against generator."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    retry: RetryConfig = RetryConfig()
    """Retries."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """Deadlines."""
    profile: ProfileConfig = ProfileConfig()
    """Traces."""
    shutdown: ShutdownConfig = ShutdownConfig()
    """Ending."""

    def user_code(self) -> dict[str, str]:
        """References to code of the user's, by the field that names them."""
        named = {
            "environment.name": self.environment.name if ":" in self.environment.name else None,
            "reward": self.reward,
            "loss": self.loss,
            "generate_episode": self.generate_episode,
        }
        return {field: reference for field, reference in named.items() if reference is not None}

    @model_validator(mode="before")
    @classmethod
    def _regime_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        size = given.get("groups_per_step", cls.model_fields["groups_per_step"].default)
        return with_defaults(given, groups_per_step=size)

    @model_validator(mode="after")
    def _bounds_age(self) -> RunConfig:
        check_bounds(
            self.regime,
            max_policy_age=self.max_policy_age,
            window=self.window,
            steps_per_round=self.steps_per_round,
            groups_per_step=self.groups_per_step,
        )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        ranks = self.trainer.ranks
        episodes = self.groups_per_step * self.group_size
        if episodes % ranks:
            raise ValueError(
                f"groups_per_step {self.groups_per_step} x group_size {self.group_size} = {episodes} episodes "
                f"cannot be shared by trainer.ranks {ranks}; make their product a multiple of it"
            )
        if self.warm_start.steps and self.warm_start.batch_size % ranks:
            raise ValueError(
                f"warm_start.batch_size {self.warm_start.batch_size} cannot be shared by trainer.ranks {ranks}; "
                "make it a multiple"
            )
        return self
