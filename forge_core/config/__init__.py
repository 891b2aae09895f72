"""The config of a run: every knob, its unit and its bounds, in one place.

Importing this loads pydantic and nothing heavier, so that a command line can refuse bad input in
well under a second. Unknown keys are refused everywhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from forge_core.config.algorithm import (
    AlgorithmConfig,
    CorrectionConfig,
    CriticConfig,
    Estimator,
    KLConfig,
    LossName,
)
from forge_core.config.base import Device, Section
from forge_core.config.buffer import BufferConfig, SourceConfig, check_buffer
from forge_core.config.episodes import (
    ENSEMBLE_PREFIX,
    CurriculumConfig,
    EnvironmentConfig,
    EvaluationConfig,
    SamplingConfig,
)
from forge_core.config.hosts import HostsConfig, KubernetesConfig, SlurmConfig
from forge_core.config.learning import OptimizerConfig, ParityConfig, WarmStartConfig
from forge_core.config.lineage import CollectConfig, ReplayConfig
from forge_core.config.machinery import (
    Attention,
    CheckpointConfig,
    FaultsConfig,
    GeneratorsConfig,
    Precision,
    ProfileConfig,
    RetryConfig,
    ShutdownConfig,
    TimeoutsConfig,
    TrainerConfig,
)
from forge_core.config.model import HUB_PREFIX, ModelConfig, ModelShape, TinyModelConfig
from forge_core.config.tools import EpisodeConfig, ToolConfig, check_tools
from forge_core.config.verifiers import ScoringConfig, VerifierConfig, check_verifiers
from forge_core.regime import Regime, check_bounds, with_defaults
from forge_core.registration import VERIFIERS, environment_class, resolved

__all__ = [
    "ENSEMBLE_PREFIX",
    "HUB_PREFIX",
    "AlgorithmConfig",
    "Attention",
    "BufferConfig",
    "CheckpointConfig",
    "CollectConfig",
    "CorrectionConfig",
    "CriticConfig",
    "CurriculumConfig",
    "Device",
    "EnvironmentConfig",
    "EpisodeConfig",
    "Estimator",
    "EvaluationConfig",
    "FaultsConfig",
    "GeneratorsConfig",
    "HostsConfig",
    "KLConfig",
    "Kind",
    "KubernetesConfig",
    "LossName",
    "ModelConfig",
    "ModelShape",
    "OptimizerConfig",
    "ParityConfig",
    "Precision",
    "ProfileConfig",
    "ReplayConfig",
    "RetryConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoringConfig",
    "Section",
    "ShutdownConfig",
    "SlurmConfig",
    "SourceConfig",
    "TimeoutsConfig",
    "TinyModelConfig",
    "ToolConfig",
    "TrainerConfig",
    "VerifierConfig",
    "WarmStartConfig",
]


Kind = Literal["post_train", "warm_start", "replay", "collect", "evaluate", "train_rounds"]
"""What a run is for."""


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
    `(prompts, completions, **columns) -> list[float]`, as `path/file.py:name`, `module:name` or the name that an
    installed package has registered it by; or an ensemble of verifiers that `forgeflow fit-verifiers` has fitted, as
    `ensemble:NAME@VERSION`."""
    verifiers: dict[str, VerifierConfig] = Field(default_factory=dict)
    """By a name of yours, what scores instead: each has a `kind`, its `params`, a `weight` or `weights` over time, and
    may be a `gate`. Gates are asked first, in the order of their names."""
    tools: dict[str, ToolConfig] = Field(default_factory=dict)
    """By a name of yours, what the policy may call in the middle of an episode: each has a `kind`."""
    loss: str | None = None
    """A loss of your own in the algorithm's stead: `(logprobs, sampled_logprobs, advantages, mask)` to a loss per
    token."""
    generate_episode: str | None = None
    """A function of your own that makes an episode: `async (policy, prompt_text, *, seed) -> Episode`."""
    sinks: list[str] = Field(["tensorboard"])
    """Where metrics go besides the log and the report: `tensorboard`, or classes of your own as `FILE.py:NAME`."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe messages of the run's processes that its controller logs, with the mesh and rank they are from."""
    parent_run_id: str | None = None
    """Run from one of whose checkpoints this one goes on, in the same store; given by `--from RUN@STEP`."""
    parent_step: int | None = Field(None, ge=0)
    """Step of that checkpoint. This run's steps are counted on from it, up to `steps`."""
    replay: ReplayConfig | None = None
    """Episodes of past runs to train on instead of generating; given by `forgeflow replay`."""
    train_rounds: bool = False
    """Train on the rounds that `forgeflow collect` collects, each in a run of its own, instead of generating; given by
    `forgeflow train-rounds`."""
    collect: CollectConfig | None = None
    """A round to collect for another run; given by `forgeflow collect`."""
    evaluate_only: bool = False
    """Answer the held-out prompts with the parent's weights and train nothing; given by `forgeflow evaluate`."""
    warm_start_only: bool = False
    """Make the checkpoint of step 0 and no step after it; given by `forgeflow warm-start`."""
    placement: Literal["apart", "colocated"] = "apart"
    """`colocated`: generators and trainer share their devices and take turns, one side asleep while the other works;
    for sync and hybrid."""
    memory_fraction: float = Field(0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory, on CPU of the machine's, that colocated generators and trainer may hold together at any
    time; the run ends if they hold more."""
    core_binding: Literal["auto", "bound", "shared"] = "auto"
    """Whether processes that compute on CPU are bound to cores of their own. Where those that are busy at the same time
    have more threads than cores are free, `bound` refuses to start and `auto` binds none; `shared` never does."""
    gpu_memory_gib: float | None = Field(None, gt=0.0)
    """Memory of a GPU, in GiB, that estimates are held against; none: what this machine's GPUs have."""
    model: ModelConfig = ModelConfig()
    """The policy."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Prompts and scores."""
    scoring: ScoringConfig = ScoringConfig()
    """From scores to a reward."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    episode: EpisodeConfig = EpisodeConfig()
    """Episodes with tools."""
    generators: GeneratorsConfig = GeneratorsConfig()
    """The generating mesh."""
    trainer: TrainerConfig = TrainerConfig()
    """The training mesh."""
    hosts: HostsConfig = HostsConfig()
    """Machines."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """What is learned from a batch."""
    buffer: BufferConfig = BufferConfig()
    """Groups that are trained on more than once."""
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
    faults: FaultsConfig = FaultsConfig()
    """Processes that die or hang."""
    profile: ProfileConfig = ProfileConfig()
    """Traces."""
    shutdown: ShutdownConfig = ShutdownConfig()
    """Ending."""

    @property
    def first_step(self) -> int:
        """The first step that the run trains, from 1."""
        return (self.parent_step or 0) + 1

    def user_code(self) -> dict[str, str]:
        """References to code of the user's, by the field that names them; registered names are looked up.

        That of an ensemble's verifiers is named by the ensemble. Raises ValueError for a name that is not registered.
        """
        named = {
            **self._environment_classes(),
            "reward": None
            if "reward" in self.ensembles() or self.reward is None
            else resolved("reward", VERIFIERS, self.reward),
            "loss": self.loss,
            "generate_episode": self.generate_episode,
            **{
                f"verifiers.{name}.params.reference": resolved(
                    f"verifiers.{name}.params.reference", VERIFIERS, str(each.params["reference"])
                )
                for name, each in self.verifiers.items()
                if each.kind == "function"
            },
            **{f"tools.{name}.reference": each.reference for name, each in self.tools.items()},
        }
        return {field: reference for field, reference in named.items() if reference is not None}

    def ensembles(self) -> dict[str, str]:
        """References to fitted ensembles, by the field that names them."""
        named = {
            f"verifiers.{name}.params.reference": str(each.params["reference"])
            for name, each in self.verifiers.items()
            if each.kind == "ensemble"
        }
        if self.reward is not None and self.reward.startswith(ENSEMBLE_PREFIX):
            named["reward"] = self.reward
        return named

    @property
    def kind(self) -> Kind:
        """Which flow carries the run out."""
        chosen = self._chosen_kinds()
        return chosen[0] if chosen else "post_train"

    def _chosen_kinds(self) -> list[Kind]:
        kinds: dict[Kind, bool] = {
            "replay": self.replay is not None,
            "train_rounds": self.train_rounds,
            "collect": self.collect is not None,
            "evaluate": self.evaluate_only,
            "warm_start": self.warm_start_only,
        }
        return [name for name, is_chosen in kinds.items() if is_chosen]

    def _environment_classes(self) -> dict[str, str | None]:
        tasks = {
            f"environment.tasks.{k}.name": each.name for k, each in self.environment.tasks.items()
        }
        named = tasks or {"environment.name": self.environment.name}
        return {field: environment_class(field, name) for field, name in named.items()}

    @property
    def trains(self) -> bool:
        """Whether the run makes steps by post-training."""
        return self.kind in ("post_train", "replay", "train_rounds")

    def scoring_seconds(self, num_episodes: int) -> float:
        """Until so many episodes are scored: each prompt has deadlines of its own, which name what misses them."""
        kinds = "code", "function", "math", "ensemble"
        slow = [each for each in self.verifiers.values() if each.kind in kinds]
        num_slow = len(slow) + (self.reward is not None)
        per_prompt = num_slow * self.scoring.attempts * self.timeouts.reward_seconds
        return max(self.timeouts.stage_seconds, num_episodes * per_prompt)

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
    def _has_fitting_verifiers(self) -> RunConfig:
        check_verifiers(self.verifiers, self.scoring)
        if self.verifiers and self.reward is not None:
            raise ValueError(
                f"reward {self.reward!r} and verifiers exclude each other: name the function as a verifier of kind "
                "function"
            )
        return self

    @model_validator(mode="after")
    def _has_fitting_tools(self) -> RunConfig:
        check_tools(self.tools)
        if self.tools and self.generate_episode is not None:
            raise ValueError(
                f"generate_episode {self.generate_episode!r} and tools exclude each other: call "
                "forge_core.tools.tool_episode in the function, or leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _has_a_fitting_loss(self) -> RunConfig:
        algorithm, longest = self.algorithm, self.sampling.max_tokens
        if algorithm.overlong_tokens > longest:
            raise ValueError(
                f"algorithm.overlong_tokens {algorithm.overlong_tokens} are the last of sampling.max_tokens {longest} "
                f"and cannot be more: lower it to {longest} or less"
            )
        if self.loss is not None and algorithm.loss == "ppo":
            raise ValueError(
                f"loss {self.loss!r} gets one advantage a sequence, and algorithm.loss 'ppo' makes one a token: set "
                "algorithm.loss to that whose advantages you want"
            )
        if self.buffer.policy != "once" and algorithm.loss == "ppo":
            raise ValueError(
                f"buffer.policy {self.buffer.policy!r} keeps groups whose rewards differ, and algorithm.loss 'ppo' "
                "also trains on others: set buffer.policy to 'once' or take another loss"
            )
        if self.loss is not None:
            untouched = AlgorithmConfig()
            for name in ("entropy_coefficient", "correction", "kl"):
                if name == "kl" and algorithm.kl.place == "reward":
                    continue
                if getattr(algorithm, name) != getattr(untouched, name):
                    raise ValueError(
                        f"algorithm.{name} is a part of the algorithm's loss, in whose stead loss {self.loss!r} is "
                        "computed: leave one of them out"
                    )
        return self

    @model_validator(mode="after")
    def _has_whole_lineage(self) -> RunConfig:
        if (self.parent_run_id is None) != (self.parent_step is None):
            raise ValueError(
                f"parent_run_id {self.parent_run_id!r} and parent_step {self.parent_step} belong together: give "
                "--from RUN@STEP, which sets both"
            )
        if self.parent_step is not None and self.replay is None and self.steps < self.parent_step:
            raise ValueError(
                f"steps {self.steps} are counted from the parent's step 0 and end before its step "
                f"{self.parent_step}: set steps to {self.parent_step} or more"
            )
        return self

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> RunConfig:
        fields = {"evaluate": "evaluate_only", "warm_start": "warm_start_only"}
        chosen = [fields.get(kind, kind) for kind in self._chosen_kinds()]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: leave out all but one")
        if self.regime != "hybrid" and (self.train_rounds or self.collect is not None):
            raise ValueError(
                f"regime {self.regime!r} has no rounds that could be collected apart: set regime to hybrid"
            )
        curricula = [self.environment.curriculum]
        curricula += [task.curriculum for task in self.environment.tasks.values()]
        is_apart = self.train_rounds or self.collect is not None
        if is_apart and any(each.success is not None for each in curricula):
            raise ValueError(
                "environment.curriculum.success needs the rewards of all groups, and a round that is collected apart "
                "has its own alone: let levels rise by steps"
            )
        if self.collect is not None and self.parent_run_id is None:
            raise ValueError(
                "collect needs the run that it collects for: leave it to `forgeflow collect`"
            )
        if self.evaluate_only and self.parent_run_id is None:
            raise ValueError(
                "evaluate_only needs a run whose weights it evaluates: leave it to `forgeflow evaluate`"
            )
        if self.warm_start_only and self.parent_run_id is not None:
            raise ValueError(
                f"warm_start_only makes weights, and parent_run_id {self.parent_run_id!r} brings some: leave out one"
            )
        return self

    @model_validator(mode="after")
    def _takes_turns(self) -> RunConfig:
        if self.placement == "apart":
            return self
        devices = self.generators.device, self.trainer.device
        if self.regime == "async":
            raise ValueError(
                "placement 'colocated' has generators and trainer take turns, and in regime async both work at the "
                "same time: set placement to apart, or regime to sync or hybrid"
            )
        if devices[0] != devices[1]:
            raise ValueError(
                f"placement 'colocated' shares devices, and generators.device {devices[0]!r} and trainer.device "
                f"{devices[1]!r} differ: set both alike, or placement to apart"
            )
        if self.hosts.count > 1:
            raise ValueError(
                f"placement 'colocated' shares the devices of one machine, and hosts gives {self.hosts.count}: take "
                "one, or set placement to apart"
            )
        if devices[0] == "cuda" and self.generators.gpu_memory_fraction > self.memory_fraction:
            raise ValueError(
                f"memory_fraction {self.memory_fraction:g} is below generators.gpu_memory_fraction "
                f"{self.generators.gpu_memory_fraction:g}, which an engine takes when it is awake: lower the latter"
            )
        return self

    @model_validator(mode="after")
    def _has_a_fitting_buffer(self) -> RunConfig:
        if self.buffer.policy == "once":
            return self
        if self.replay is not None or self.train_rounds or self.collect is not None:
            raise ValueError(
                f"buffer.policy {self.buffer.policy!r} keeps what a run draws itself, and this one trains on or "
                "collects for another run: set it to once"
            )
        try:
            check_buffer(
                self.buffer,
                groups_per_step=self.groups_per_step,
                max_policy_age=self.max_policy_age,
                is_corrected=self.loss is not None or self.algorithm.correction.weights != "none",
            )
        except ValueError as error:
            raise ValueError(f"buffer.{error}") from error
        return self

    @model_validator(mode="after")
    def _has_fitting_kernels(self) -> RunConfig:
        is_half = self.model.dtype == "bfloat16" or self.trainer.precision == "bf16_autocast"
        if self.trainer.attention != "sdpa" and not is_half:
            raise ValueError(
                f"trainer.attention {self.trainer.attention!r} has no kernels for model.dtype {self.model.dtype!r}: "
                "set it to bfloat16 or trainer.precision to 'bf16_autocast', or trainer.attention to 'sdpa'"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        ranks, shared_by = self.trainer.data_ranks, f"trainer.ranks {self.trainer.ranks}"
        if self.trainer.tensor_parallel > 1:
            shared_by += f" / trainer.tensor_parallel {self.trainer.tensor_parallel} = {ranks}"
        episodes = self.groups_per_step * self.group_size
        if episodes % ranks:
            raise ValueError(
                f"groups_per_step {self.groups_per_step} x group_size {self.group_size} = {episodes} episodes "
                f"cannot be shared by {shared_by}; make their product a multiple of it"
            )
        if self.warm_start.steps and self.warm_start.batch_size % ranks:
            raise ValueError(
                f"warm_start.batch_size {self.warm_start.batch_size} cannot be shared by {shared_by}; "
                "make it a multiple"
            )
        return self
