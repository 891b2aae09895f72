"""A vLLM engine inside this process, driven step by step.

Episodes are coroutines that await `sample()`; `run()` steps the engine whenever all of them wait for it. Every
request that the coroutines make before the first step enters before it, in their order, so that a round's
batches, and with seeded requests its tokens, repeat to the bit.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from typing import Any

import torch
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.outputs import RequestOutput

from forge_core.chat import encode_prompt
from forge_core.config import RunConfig
from forge_core.rollout import Sample
from forge_core.weights import transfer

# Turns of the event loop in which a coroutine that was answered may ask again before the engine's next step.
_SETTLE_TURNS = 3
_BATCHED_TOKENS = 8192


class Engine:
    """The policy of one replica: samples, scores, and takes new weights."""

    def __init__(self, model_dir: str, config: RunConfig) -> None:
        transfer.register()
        on_cpu = config.generators.device == "cpu"
        memory: dict[str, Any] = (
            {"kv_cache_memory_bytes": int(config.generators.kv_cache_gib * 2**30)}
            if on_cpu
            else {"gpu_memory_utilization": config.generators.gpu_memory_fraction}
        )
        model_config = AutoConfig.from_pretrained(model_dir)
        context = config.generators.max_model_len
        # Models without a position table of fixed length name no limit.
        context = min(context, getattr(model_config, "max_position_embeddings", context))
        self._llm = LLM(
            model=model_dir,
            dtype=config.model.dtype,
            seed=config.seed,
            enforce_eager=on_cpu,
            max_num_seqs=config.generators.max_sequences,
            max_model_len=context,
            # On CPU vLLM cannot take back the random numbers of a seeded request whose prompt is cut in two.
            enable_chunked_prefill=not on_cpu,
            max_num_batched_tokens=max(_BATCHED_TOKENS, context),
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=transfer.BACKEND),
            **memory,
        )
        self._engine = self._llm.llm_engine
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._sampling = config.sampling
        self._context_length = context
        self._request_ids = itertools.count()
        self._waiting: dict[str, asyncio.Future[RequestOutput]] = {}
        self.policy_version = -1
        self.greedy = False

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a full response, in tokens."""
        return self._context_length - self._sampling.max_tokens

    def encode_prompt(self, text: str) -> list[int]:
        """See `Policy.encode_prompt`."""
        return encode_prompt(self._tokenizer, text)

    def decode(self, token_ids: list[int]) -> str:
        """See `Policy.decode`."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    async def sample(self, token_ids: list[int], *, seed: int) -> Sample:
        """See `Policy.sample`; greedy while `self.greedy` is set."""
        params = SamplingParams(
            temperature=0.0 if self.greedy else self._sampling.temperature,
            max_tokens=self._sampling.max_tokens,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        version = self.policy_version
        completion = (await self._request(token_ids, params)).outputs[0]
        sampled = list(completion.token_ids)
        flat: Any = completion.logprobs
        return Sample(
            token_ids=sampled,
            logprobs=_sampled_logprobs(flat, sampled),
            token_policy_versions=[version] * len(sampled),
            finish_reason=str(completion.finish_reason),
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        """Logprob of every token but the first, given those before it, at temperature 1, in nats."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._request(token_ids, params)
        prompt_logprobs: Any = output.prompt_logprobs
        return [
            float(prompt_logprobs[i][token].logprob) for i, token in enumerate(token_ids) if i > 0
        ]

    async def _request(self, token_ids: list[int], params: SamplingParams) -> RequestOutput:
        request_id = str(next(self._request_ids))
        self._engine.add_request(request_id, {"prompt_token_ids": token_ids}, params)
        future: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        return await future

    async def run(self, coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run coroutines that use this engine to their end; their results in order.

        The first exception cancels the others and is raised; the engine is left empty.
        """
        tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
        try:
            while True:
                for _ in range(_SETTLE_TURNS):
                    await asyncio.sleep(0)
                if any(task.done() and task.exception() for task in tasks):
                    break
                if self._engine.has_unfinished_requests():
                    self._step()
                elif all(task.done() for task in tasks):
                    break
                else:  # an episode waits for something else, such as a tool
                    await asyncio.wait(
                        [t for t in tasks if not t.done()],
                        timeout=0.01,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            if self._waiting:
                self._engine.abort_request(list(self._waiting))
                self._waiting.clear()

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished and (future := self._waiting.pop(output.request_id, None)):
                if not future.done():
                    future.set_result(output)  # type: ignore[arg-type]

    def load_version(self, policy_version: int, tensors: dict[str, torch.Tensor]) -> None:
        """Load a version's weights and forget every cached prefix of the old ones."""
        transfer.stage(policy_version, tensors)
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", args=({"policy_version": policy_version},))
        self._llm.collective_rpc("finish_weight_update")
        self.reset_prefix_cache()
        self.policy_version = policy_version

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes; RuntimeError if the engine refuses, for stale ones would be used silently."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache: requests are still running")


def _sampled_logprobs(flat: Any, token_ids: list[int]) -> list[float]:
    # FlatLogprobs lists, per position, the sampled token first.
    values = [float(flat.logprobs[start]) for start in flat.start_indices]
    if len(values) != len(token_ids):
        raise RuntimeError(f"vLLM gave {len(values)} logprobs for {len(token_ids)} tokens")
    return values
