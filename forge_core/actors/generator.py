"""The generator: one process, one vLLM engine, one replica."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa
from monarch.actor import Actor, endpoint

from forge_core.actors.messages import (
    DrawnPrompt,
    GenerateReply,
    GenerateRequest,
    LoadReply,
)
from forge_core.config import RunConfig
from forge_core.rollout import Episode, derive_seed, generate_episode
from forge_core.timeline import Interval, Timeline
from forge_core.weights import packing, store
from forge_core.weights.manifest import Manifest
from storage import layout
from storage.episodes import SCHEMA, Figures
from storage.objects import open_store
from storage.parts import write_part

if TYPE_CHECKING:
    from forge_core.actors.engine import Engine


class Generator(Actor):
    """Samples episodes from the current policy and stores them; takes new weights between rounds."""

    def __init__(self, replica: int, config: RunConfig, store_uri: str, spawned_at: float) -> None:
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        store.install()
        self._replica = replica
        self._config = config
        self._store = open_store(store_uri)
        self._timeline = Timeline(
            started_at=spawned_at,
            # What a replica waits for follows from what it did: after generating, for new weights.
            waits={"generate": "wait_weights", "weights": "wait_slot", "evaluate": "wait_slot"},
            default_wait="wait_slot",
        )
        self._engine: Engine

    @endpoint
    async def load(self, model_dir: str) -> None:
        """Start the engine on a Hugging Face directory; it serves no version before `load_version`."""
        # Deferred: the controller imports this module too, and has no use for vLLM.
        from forge_core.actors.engine import Engine

        if hasattr(self, "_engine"):  # a retry of the stage: one engine is enough
            return
        with self._timeline.during("startup"):
            self._engine = Engine(model_dir, self._config)

    @endpoint
    async def generate(self, request: GenerateRequest) -> GenerateReply:
        """Sample, from an empty prefix cache, and store.

        Raises ValueError if the engine holds another version than the request asks for.
        Repeating a request stores the same tokens: seeds follow from run seed and ids.
        """
        return await self._generate(request, evaluate=False)

    @endpoint
    async def evaluate(self, request: GenerateRequest) -> GenerateReply:
        """As `generate`, for held-out prompts."""
        return await self._generate(request, evaluate=True)

    @endpoint
    async def load_version(
        self, manifest: Manifest, probe: tuple[tuple[int, ...], ...]
    ) -> LoadReply:
        """Fetch a version from TorchStore, serve it, and score the probe with it.

        Raises ValueError, and goes on with the version it has, if the bytes are not those that the manifest tells.
        """
        with self._timeline.during("weights"):
            buckets = await store.get_version(
                manifest, timeout_seconds=self._config.timeouts.call_seconds
            )
            tensors = packing.unpack(manifest, buckets)
            digest = packing.digest(tensors)
            if digest != manifest.digest:
                raise ValueError(
                    f"generator {self._replica} received other bytes of version {manifest.policy_version} than the "
                    "trainer sent"
                )
            self._engine.load_version(manifest.policy_version, tensors)
            scored = await self._engine.run([self._engine.score(list(ids)) for ids in probe])
        return LoadReply(
            digest=digest,
            probe_logprobs=tuple(tuple(logprobs) for logprobs in scored),
            intervals=tuple(self._timeline.drain()),
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
        with self._timeline.during("evaluate" if evaluate else "generate"):
            started = time.monotonic()
            # Also on a retry: what is cached decides how a batch is made up, and so the last bit of a logprob.
            self._engine.reset_prefix_cache()
            fitting = [p for p in request.prompts if self._fits(p)]
            episodes = await self._sample(request, fitting, "evaluate" if evaluate else "train")
            seconds = time.monotonic() - started
            part = None
            figures = None
            if fitting:
                table = _table(request, fitting, episodes, seconds)
                part = write_part(self._store, request.key_prefix, table)
                figures = Figures.of(table)
        version = request.policy_version
        return GenerateReply(
            part=part,
            group_ids=tuple(p.group_id for p in fitting),
            too_long=tuple(p.group_id for p in request.prompts if p not in fitting),
            policy_version_min=figures.policy_version_min if figures else version,
            policy_version_max=figures.policy_version_max if figures else version,
            prompt_tokens=figures.prompt_tokens if figures else 0,
            response_tokens=figures.response_tokens if figures else 0,
            seconds=seconds,
            intervals=tuple(self._timeline.drain()),
        )

    def _fits(self, drawn: DrawnPrompt) -> bool:
        tokens = self._engine.encode_prompt(drawn.prompt.text)
        return len(tokens) <= self._engine.max_prompt_tokens

    async def _sample(
        self, request: GenerateRequest, prompts: list[DrawnPrompt], purpose: str
    ) -> list[Episode]:
        """Every prompt's samples, prompt by prompt; the greedy ones are the last of each prompt."""
        num_random = request.num_samples - request.num_greedy
        by_sample: dict[tuple[int, int], Episode] = {}
        for greedy, samples in (
            (False, range(num_random)),
            (True, range(num_random, request.num_samples)),
        ):
            keys = [(p.draw, sample) for p in prompts for sample in samples]
            self._engine.greedy = greedy
            try:
                episodes = await self._engine.run(
                    [
                        generate_episode(
                            self._engine,
                            drawn.prompt.text,
                            seed=derive_seed(self._config.seed, purpose, drawn.draw, sample),
                        )
                        for drawn in prompts
                        for sample in samples
                    ]
                )
            finally:
                self._engine.greedy = False
            by_sample.update(zip(keys, episodes, strict=True))
        return [by_sample[p.draw, sample] for p in prompts for sample in range(request.num_samples)]


def _table(
    request: GenerateRequest, prompts: list[DrawnPrompt], episodes: list[Episode], seconds: float
) -> pa.Table:
    now = datetime.now(UTC)
    rows = []
    drawn_samples = [(p, sample) for p in prompts for sample in range(request.num_samples)]
    for (drawn, sample), episode in zip(drawn_samples, episodes, strict=True):
        prompt = drawn.prompt
        rows.append(
            {
                "episode_id": layout.episode_id(drawn.group_id, sample),
                "run_id": request.run_id,
                "group_id": drawn.group_id,
                "draw": drawn.draw,
                "sample": sample,
                "environment": prompt.environment,
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "answer": prompt.answer,
                "metadata": json.dumps({"index": prompt.index, **prompt.metadata}, sort_keys=True),
                "response": episode.response,
                "prompt_token_ids": episode.prompt_token_ids,
                "response_token_ids": episode.response_token_ids,
                "logprobs": episode.logprobs,
                "mask": episode.mask,
                "token_policy_versions": episode.token_policy_versions,
                "turns": [{"role": t.role, "start": t.start, "end": t.end} for t in episode.turns],
                "finish_reason": episode.finish_reason,
                "reward": None,
                "scores": None,
                "seed": episode.seed,
                "attempts": request.attempt,
                "generate_seconds": seconds,
                "created_at": now,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)
