"""Meshes, checkpoints, retries, deadlines, traces."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_core.config.base import Device, Section
from forge_core.services.policy import Policy, RestartPolicy


class GeneratorsConfig(Section):
    """The mesh that generates: one vLLM engine per replica, on one process or several."""

    replicas: int = Field(1, ge=1, le=256)
    """Number of engines."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """Processes that share each engine's model by its attention heads, whose number must be divisible by it."""
    device: Device = "cpu"
    """Kind of device an engine runs on; with `cuda`, one GPU per process."""
    threads: int = Field(2, ge=1)
    """CPU threads of the forward pass, of each process."""
    kv_cache_gib: float = Field(0.5, gt=0.0)
    """Memory of each engine's key-value cache on CPU, in GiB; its processes share it."""
    gpu_memory_fraction: float = Field(0.85, gt=0.0, le=0.98)
    """Share of a GPU's memory that an engine may use."""
    max_model_len: int = Field(2048, ge=1)
    """Longest prompt and response together, in tokens; the model's own context if that is shorter."""
    max_sequences: int = Field(512, ge=1)
    """Sequences that an engine decodes at once."""


Attention = Literal["sdpa", "flash_attention_2"]
"""Kernels of the trainer's attention."""

Precision = Literal["model", "bf16_autocast"]
"""Of the trainer's forward and backward passes."""


class TrainerConfig(Section):
    """The mesh that trains: FSDP2, tensor parallelism or both, one process per rank."""

    ranks: int = Field(2, ge=1, le=4096)
    """Number of processes that share the model and the batch."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """Ranks that share each layer by its attention heads and train on the same episodes; must divide `ranks` and the
    numbers of heads. FSDP2 shares the model and the batch among the `ranks` / `tensor_parallel` groups of them."""
    device: Device = "cpu"
    """Kind of device a rank runs on; with `cuda`, one GPU per rank."""
    threads: int = Field(1, ge=1)
    """CPU threads of each rank."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most tokens of one forward and backward pass of a rank; without `packing` padding counts."""
    packing: bool = True
    """Forward passes of trainer, reference and critic run over sequences one after another, each of which sees only
    itself; false: side by side, padded to the longest."""
    logprob_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits, one for each word of the vocabulary, are in memory at once; of several such chunks they are
    computed once more in the backward pass."""
    activation_checkpointing: bool = False
    """Of each layer only the input is kept, and the rest computed once more in the backward pass: less memory, about a
    third more time."""
    precision: Precision = "model"
    """`model`: passes compute in `model.dtype`. `bf16_autocast`: PyTorch's autocast, matrix products and attention in
    bfloat16 and the rest in float32. Either way weights, their gradients' sums and AdamW's state are in float32. Where
    engines compute in float32, autocast needs wider bounds under `parity`."""
    attention: Attention = "sdpa"
    """Kernels of attention: `sdpa`, PyTorch's, for all devices and types; `flash_attention_2`, of the package
    flash-attn, which must be installed beside, for `cuda` and bfloat16."""

    @model_validator(mode="after")
    def _has_the_kernels(self) -> Self:
        if self.attention != "sdpa" and self.device == "cpu":
            raise ValueError(
                f"attention {self.attention!r} needs a GPU, and device is 'cpu': set attention to 'sdpa'"
            )
        return self

    @property
    def data_ranks(self) -> int:
        """Parts into which a batch is shared."""
        return self.ranks // self.tensor_parallel

    @model_validator(mode="after")
    def _is_a_layout(self) -> TrainerConfig:
        if self.ranks % self.tensor_parallel:
            raise ValueError(
                f"ranks {self.ranks} are no multiple of tensor_parallel {self.tensor_parallel}: set ranks to "
                f"{self.tensor_parallel} times the number of FSDP2's shards"
            )
        return self

    def check_shares(
        self, *, num_heads: int, num_kv_heads: int, head_size: int, intermediate_size: int
    ) -> None:
        """Refuse a model's shape that tensor parallelism, or FSDP2 after it, cannot share evenly.

        Heads stay whole, and FSDP2 cuts what tensor parallelism has left of a dimension. Raises ValueError.
        """
        share, ranks = self.tensor_parallel, self.ranks
        if share == 1:
            return
        for what, number in (
            (f"{num_heads} attention heads", num_heads),
            (f"{num_kv_heads} heads of keys and values", num_kv_heads),
            (f"{intermediate_size} hidden units", intermediate_size),
        ):
            if number % share:
                raise ValueError(
                    f"trainer.tensor_parallel {share} cannot share out the model's {what} evenly: set it to a divisor "
                    f"of {number}"
                )
        for what, rows in (
            ("queries", num_heads * head_size),
            ("keys and values", num_kv_heads * head_size),
            ("hidden units", intermediate_size),
        ):
            if rows % ranks:
                raise ValueError(
                    f"trainer.ranks {ranks} with trainer.tensor_parallel {share} cannot share out evenly the model's "
                    f"{rows} rows of {what}: set trainer.ranks to a divisor of {rows}"
                )


class CheckpointConfig(Section):
    """When a checkpoint is written; step 0 and the last step always have one."""

    every: int = Field(10, ge=0)
    """Steps between checkpoints; 0: only the first and the last."""
    every_seconds: float = Field(300.0, gt=0.0)
    """Seconds after which a checkpoint is written whatever the step."""
    keep_last: int = Field(3, ge=0)
    """Newest checkpoints that are kept, beside the first and the last step's; 0: all of them."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are a multiple of this are kept as well; 0: none for that reason."""
    keep_best: bool = False
    """Also keep the one whose steps since the checkpoint before it had the highest mean reward."""


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
    episode_seconds: float = Field(600.0, gt=0.0)
    """Until a `generate_episode` of your own has made one episode."""
    reward_seconds: float = Field(60.0, gt=0.0)
    """Until a reward function of your own has scored the completions of one prompt."""


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


class FaultsConfig(Section):
    """What is done about a process that dies or hangs: `fail_fast` ends the run, resumable; `restart` starts it again
    and has it do again what it was doing; `route_around` gives that to the other replicas at once."""

    generators: Policy = "route_around"
    """A generator replica. It serves again once it has loaded the current weights and passed the probe."""
    verifier: Policy = "route_around"
    """A verifier. Groups that cannot be scored in the end are dropped as failed."""
    trainer: RestartPolicy = "restart"
    """A rank of the trainer. All ranks start again, from the last checkpoint."""
    reference: RestartPolicy = "restart"
    """The reference policy, where there is one. It loads its weights again from the checkpoint that has them."""
    critic: RestartPolicy = "restart"
    """The critic, where there is one. It learns again from the last checkpoint on."""
    weights: RestartPolicy = "restart"
    """The weight store. It is filled again from the trainer's weights."""
    most_restarts: int = Field(5, ge=0)
    """Restarts of one unit in a row, none of which came to serve for `sound_seconds`; one more failure ends the run."""
    restart_delay_seconds: float = Field(0.1, ge=0.0)
    """Wait before the second restart in a row; the first is at once, and each further wait is twice as long."""
    longest_delay_seconds: float = Field(30.0, ge=0.0)
    """Longest wait before a restart."""
    sound_seconds: float = Field(30.0, gt=0.0)
    """Serving for so long ends a row of restarts."""
    silence_seconds: float = Field(2.5, gt=0.0)
    """A process that answers no heartbeat for so long, although it had the CPU or is stopped, hangs."""


class ShutdownConfig(Section):
    """How a run ends."""

    grace_seconds: float = Field(1.5, ge=0.0)
    """What a mesh gets to stop by itself before its processes are killed. Before that a SIGTERM gives as much to the
    step under way and to a last checkpoint together."""
