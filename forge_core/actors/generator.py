"""The generator: one replica, which is one vLLM engine, on one process or several.

Every endpoint is called in all of them at once. The first leads: it has the engine, and its answer counts; the others
compute their share of the model (`forge_core.actors.tensor_parallel`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch
from monarch.actor import Actor, current_rank, endpoint

from forge_core.actors.episodes import EpisodeMaker, episode_maker
from forge_core.actors.following import Following, fetch_together
from forge_core.actors.held_memory import held_memory
from forge_core.actors.in_flight import InFlight
from forge_core.actors.membership import Membership
from forge_core.actors.messages import (
    AdvanceReply,
    AdvanceRequest,
    DrawnPrompt,
    GenerateReply,
    GenerateRequest,
    LoadReply,
    StoredPart,
    TurnReply,
)
from forge_core.actors.rows import group_rows
from forge_core.config import RunConfig
from forge_core.profiling import Profiler
from forge_core.rollout import Episode, derive_seed
from forge_core.timeline import Interval, Timeline
from forge_core.weights import store
from forge_core.weights.manifest import Manifest
from storage.episodes import SCHEMA, Figures
from storage.objects import open_store
from storage.parts import write_part
from storage.process_facts import IntervalKind

if TYPE_CHECKING:
    from forge_core.actors.engine import Engine


class Generator(Actor):
    """Samples episodes from the current policy and stores them; takes new weights between rounds or in flight."""

    def __init__(
        self, replica: int, config: RunConfig, store_uri: str, rendezvous: str, spawned_at: float
    ) -> None:
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        store.install(config.hosts)
        self._replica = replica
        self._config = config
        self._membership = Membership(
            rank=int(current_rank().rank),
            num_ranks=config.generators.tensor_parallel,
            rendezvous=rendezvous,
        )
        self._following = Following(config, self._membership) if self._membership.rank else None
        self._store = open_store(store_uri)
        self._profiler = Profiler(
            config.profile,
            self._store,
            f"generator-{replica}",
            sizes=lambda: {"key_value_cache": int(config.generators.kv_cache_gib * 2**30)},
        )
        self._timeline = Timeline(
            started_at=spawned_at,
            # What a replica waits for follows from what it did: after generating, for new weights.
            waits={"generate": "wait_weights", "weights": "wait_slot", "evaluate": "wait_slot"},
            default_wait="wait_slot",
        )
        self._engine: Engine
        self._in_flight: InFlight
        self._make_episode: EpisodeMaker
        self._last_load: LoadReply | None = None
        self._last_advance: AdvanceReply | None = None

    @endpoint
    async def load(self, model_dir: str) -> None:
        """Start the engine on a Hugging Face directory; it serves no version before `load_version`."""
        # Deferred: the controller imports this module too, and has no use for vLLM.
        from forge_core.actors.engine import Engine

        if self._following:
            return self._following.load(model_dir)
        if hasattr(self, "_engine"):  # a retry of the stage: one engine is enough
            return
        with self._timeline.during("startup"):
            self._make_episode = episode_maker(self._config)
            self._engine = Engine(model_dir, self._config, self._membership)
            self._in_flight = InFlight(self._engine)

    @endpoint
    async def generate(self, request: GenerateRequest) -> GenerateReply | None:
        """Sample, from an empty prefix cache, and store.

        Raises ValueError if the engine holds another version than the request asks for.
        Repeating a request stores the same tokens: seeds follow from run seed and ids.
        """
        if self._following:
            self._following.serve()
            return None
        with self._engine.leading():
            return await self._generate(request, evaluate=False)

    @endpoint
    async def evaluate(self, request: GenerateRequest) -> GenerateReply | None:
        """As `generate`, for held-out prompts."""
        if self._following:
            self._following.serve()
            return None
        with self._engine.leading():
            return await self._generate(request, evaluate=True)

    @endpoint
    async def load_version(
        self, manifest: Manifest, probe: tuple[tuple[int, ...], ...]
    ) -> LoadReply | None:
        """Fetch a version from TorchStore, serve it, and score the probe with it.

        Raises ValueError, and goes on with the version it has, if the bytes are not those that the manifest tells.
        """
        if self._following:
            await self._following.load_version(manifest)
            return None
        with self._engine.leading():
            loaded = await self._load_version(manifest, probe)
        return dataclasses.replace(loaded, intervals=tuple(self._timeline.drain()))

    async def _load_version(
        self, manifest: Manifest, probe: tuple[tuple[int, ...], ...]
    ) -> LoadReply:
        started = time.monotonic()
        with self._timeline.during("weights"):
            tensors = await fetch_together(
                manifest, self._engine.agree, timeout_seconds=self._config.timeouts.call_seconds
            )
            self._engine.load_version(manifest.policy_version, tensors)
            scored = await self._engine.run([self._engine.score(list(ids)) for ids in probe])
        self._last_load = LoadReply(
            policy_version=manifest.policy_version,
            digest=manifest.digest,
            probe_logprobs=tuple(tuple(logprobs) for logprobs in scored),
            seconds=time.monotonic() - started,
        )
        return self._last_load

    @endpoint
    async def advance(self, request: AdvanceRequest) -> AdvanceReply | None:
        """Generate in flight: swap weights, begin groups, and go on with what is under way. Safe to repeat by `seq`.

        Raises what `load_version` raises, and what an episode raises.
        """
        if self._following:
            await self._following.advance(request)
            return None
        with self._engine.leading():
            return await self._advance_once(request)

    async def _advance_once(self, request: AdvanceRequest) -> AdvanceReply:
        last = self._last_advance
        if last is None or last.seq != request.seq:
            last = await self._advance(request)
            # Its intervals are told once, whoever asks again.
            self._last_advance = dataclasses.replace(last, intervals=())
        return last

    async def _advance(self, request: AdvanceRequest) -> AdvanceReply:
        loaded = None
        self._engine.in_flight = True
        if (manifest := request.manifest) is not None:
            if self._engine.policy_version != manifest.policy_version:
                await self._load_version(manifest, request.probe)
            loaded = self._last_load
        fitting = [drawn for drawn in request.prompts if self._fits(drawn)]
        step = self._engine.policy_version + 1
        with self._timeline.during("generate"), self._profiler.during(request.run_id, step):
            started = time.monotonic()
            for drawn in fitting:
                if drawn.group_id not in self._in_flight:
                    start = functools.partial(self._start, drawn, request.num_samples)
                    self._in_flight.begin(drawn, start)
            finished = await self._in_flight.advance(
                part_groups=request.part_groups,
                budget_seconds=request.budget_seconds,
                hold_seconds=request.hold_seconds,
            )
            seconds = time.monotonic() - started
            rows = [
                row
                for group in finished
                for row in group_rows(
                    request.run_id,
                    group.drawn,
                    group.episodes,
                    attempt=request.attempt,
                    seconds=group.seconds,
                )
            ]
            stored = self._store_part(request.key_prefix, rows, seconds)
        self._in_flight.forget(finished)
        return AdvanceReply(
            seq=request.seq,
            stored=stored,
            too_long=tuple(p.group_id for p in request.prompts if p not in fitting),
            loaded=loaded,
            num_under_way=len(self._in_flight),
            seconds=seconds,
            intervals=tuple(self._timeline.drain()),
        )

    def _start(self, drawn: DrawnPrompt, num_samples: int) -> list[asyncio.Task[Episode]]:
        return [
            self._engine.start(self._episode(drawn, "train", sample))
            for sample in range(num_samples)
        ]

    @endpoint
    async def sleep(self) -> TurnReply:
        """Give the device up to the trainer. Safe to repeat, and before anything is loaded."""
        return self._take_turn("sleep")

    @endpoint
    async def wake(self) -> TurnReply:
        """Take the device again; it serves no version before `load_version`. Safe to repeat."""
        return self._take_turn("wake")

    def _take_turn(self, what: Literal["sleep", "wake"]) -> TurnReply:
        device = torch.device(self._config.generators.device)
        before = held_memory(device)
        with self._timeline.during("weights"):
            if self._following:
                self._following.serve()
            elif hasattr(self, "_engine"):
                with self._engine.leading():
                    getattr(self._engine, what)()
        return TurnReply(
            before=before, after=held_memory(device), intervals=tuple(self._timeline.drain())
        )

    @endpoint
    async def intervals(self) -> tuple[Interval, ...]:
        """The replica's time since it last told."""
        return tuple(self._timeline.drain())

    async def _generate(self, request: GenerateRequest, *, evaluate: bool) -> GenerateReply:
        if self._engine.policy_version != request.policy_version:
            raise ValueError(
                f"generator {self._replica} holds version {self._engine.policy_version} "
                f"where {request.policy_version} was asked for"
            )
        kind: IntervalKind = "evaluate" if evaluate else "generate"
        # An evaluation is of no step.
        step = 0 if evaluate else request.policy_version + 1
        with self._timeline.during(kind), self._profiler.during(request.run_id, step):
            started = time.monotonic()
            # Also on a retry: what is cached decides how a batch is made up, and so the last bit of a logprob.
            self._engine.reset_prefix_cache()
            fitting = [p for p in request.prompts if self._fits(p)]
            episodes = await self._sample(request, fitting, "evaluate" if evaluate else "train")
            seconds = time.monotonic() - started
            rows = [
                row
                for drawn, of_group in zip(fitting, episodes, strict=True)
                for row in group_rows(
                    request.run_id, drawn, of_group, attempt=request.attempt, seconds=seconds
                )
            ]
            stored = self._store_part(request.key_prefix, rows, seconds)
        return GenerateReply(
            stored=stored,
            too_long=tuple(p.group_id for p in request.prompts if p not in fitting),
            intervals=tuple(self._timeline.drain()),
        )

    def _store_part(
        self, key_prefix: str, rows: list[dict[str, Any]], seconds: float
    ) -> StoredPart | None:
        if not rows:
            return None
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        figures = Figures.of(table)
        return StoredPart(
            part=write_part(self._store, key_prefix, table),
            group_ids=figures.group_ids,
            policy_version_min=figures.policy_version_min,
            policy_version_max=figures.policy_version_max,
            prompt_tokens=figures.prompt_tokens,
            response_tokens=figures.response_tokens,
            seconds=seconds,
        )

    def _fits(self, drawn: DrawnPrompt) -> bool:
        tokens = self._engine.encode_prompt(drawn.prompt.text)
        return len(tokens) <= self._engine.max_prompt_tokens

    async def _episode(self, drawn: DrawnPrompt, purpose: str, sample: int) -> Episode:
        seed = derive_seed(self._config.seed, purpose, drawn.draw, sample)
        return await self._make_episode(self._engine, drawn.prompt, seed=seed)

    async def _sample(
        self, request: GenerateRequest, prompts: list[DrawnPrompt], purpose: str
    ) -> list[list[Episode]]:
        """Every prompt's samples; the greedy ones are its last."""
        num_random = request.num_samples - request.num_greedy
        of_prompts: list[list[Episode]] = [[] for _ in prompts]
        for greedy, samples in (
            (False, range(num_random)),
            (True, range(num_random, request.num_samples)),
        ):
            self._engine.greedy = greedy
            try:
                episodes = iter(
                    await self._engine.run(
                        [
                            self._episode(drawn, purpose, sample)
                            for drawn in prompts
                            for sample in samples
                        ]
                    )
                )
            finally:
                self._engine.greedy = False
            for of_prompt in of_prompts:
                of_prompt += [next(episodes) for _ in samples]
        return of_prompts
