"""A vLLM engine inside this process, driven step by step.

Episodes are coroutines that await `sample()`; `run()` and `drive()` step the engine whenever all of them wait for it.
Every request that the coroutines make before the first step enters before it, in their order, so that a round's
batches, and with seeded requests its tokens, repeat to the bit.

Weights may be swapped between two steps while requests live. They go on over the keys and values they have, and each
token keeps the version that sampled it; one that has no token yet begins anew.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from forge_core.actors.engine_arguments import context_length, engine_arguments
from forge_core.actors.membership import Membership
from forge_core.actors.tensor_parallel import leading
from forge_core.chat import encode_prompt
from forge_core.config import RunConfig
from forge_core.rollout import Sample
from forge_core.weights import transfer

T = TypeVar("T")

# Turns of the event loop in which a coroutine that was answered may ask again before the engine's next step.
_SETTLE_TURNS = 3
_TOOL_POLL_SECONDS = 0.01


@dataclass(slots=True, kw_only=True)
class _Request:
    """What the engine is asked to do for one `sample()` or `score()`."""

    token_ids: list[int]
    params: SamplingParams
    future: asyncio.Future[RequestOutput]
    internal_id: str = ""
    """vLLM's own name for it."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(first token, version that samples from there on), in order."""


class Engine:
    """The policy of one replica: samples, scores, and takes new weights."""

    def __init__(self, model_dir: str, config: RunConfig, membership: Membership) -> None:
        """Start the engine, with this process as the leader of all that it runs on."""
        arguments = engine_arguments(model_dir, config)
        executor = leading(membership) if membership.num_ranks > 1 else None
        try:
            self._llm = LLM(**arguments, distributed_executor_backend=executor)
        finally:
            self._channel = executor.channel if executor else None
            if self._channel:
                self._channel.send(None)
        self._engine = self._llm.llm_engine
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._sampling = config.sampling
        self._context_length = context_length(model_dir, config)
        self._request_ids = itertools.count()
        self._requests: dict[str, _Request] = {}
        self.policy_version = -1
        self.in_flight = False
        """Set before weights are swapped under requests: those that begin then share no prefix with other versions'."""
        self.greedy = False
        self.is_asleep = False

    @contextmanager
    def leading(self) -> Iterator[None]:
        """The engine is used only inside: meanwhile its other processes serve it."""
        try:
            yield
        finally:
            if self._channel:
                self._channel.send(None)

    def agree(self, error: Exception | None) -> None:
        """Raise, in every process of the engine, if any has an error."""
        if self._channel:
            self._channel.agree(error)
        elif error:
            raise error

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a full response, in tokens."""
        return self._context_length - self._sampling.max_tokens

    def encode_prompt(self, text: str) -> list[int]:
        """See `Policy.encode_prompt`."""
        return encode_prompt(self._tokenizer, text)

    def encode(self, text: str) -> list[int]:
        """See `Policy.encode`."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, token_ids: list[int]) -> str:
        """See `Policy.decode`."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    async def sample(
        self,
        token_ids: list[int],
        *,
        seed: int,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> Sample:
        """See `Policy.sample`; greedy while `self.greedy` is set."""
        most = self._sampling.max_tokens
        if len(token_ids) >= self._context_length:
            return Sample(
                token_ids=[], logprobs=[], token_policy_versions=[], finish_reason="length"
            )
        params = SamplingParams(
            temperature=0.0 if self.greedy else self._sampling.temperature,
            max_tokens=most if max_tokens is None else min(most, max_tokens),
            stop=list(stop),
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output, spans = await self._request(token_ids, params)
        completion = output.outputs[0]
        sampled = list(completion.token_ids)
        flat: Any = completion.logprobs
        return Sample(
            token_ids=sampled,
            logprobs=_sampled_logprobs(flat, sampled),
            token_policy_versions=_token_versions(spans, len(sampled)),
            finish_reason=str(completion.finish_reason),
            stopped_at=completion.stop_reason if isinstance(completion.stop_reason, str) else None,
        )

    async def score(self, token_ids: list[int]) -> list[float]:
        """Logprob of every token but the first, given those before it, at temperature 1, in nats."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        output, _ = await self._request(token_ids, params)
        prompt_logprobs: Any = output.prompt_logprobs
        return [
            float(prompt_logprobs[i][token].logprob) for i, token in enumerate(token_ids) if i > 0
        ]

    async def _request(
        self, token_ids: list[int], params: SamplingParams
    ) -> tuple[RequestOutput, list[tuple[int, int]]]:
        """What came of a request, and which version sampled it from which token on; cancelling aborts it."""
        request_id = str(next(self._request_ids))
        request = _Request(
            token_ids=token_ids,
            params=params,
            future=asyncio.get_running_loop().create_future(),
        )
        self._requests[request_id] = request
        try:
            self._add(request_id, request)
            return await request.future, request.spans
        finally:
            del self._requests[request_id]
            if request.future.cancelled():
                self._engine.abort_request([request_id])

    def _add(self, request_id: str, request: _Request) -> None:
        prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
        if self.in_flight:
            # What older weights left in the prefix cache is not for this request.
            prompt["cache_salt"] = str(self.policy_version)
        request.internal_id = self._engine.add_request(request_id, prompt, request.params)  # type: ignore[arg-type]
        request.spans = [(0, self.policy_version)]

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Have a coroutine that uses this engine run whenever the engine is driven."""
        return asyncio.ensure_future(coroutine)

    async def run(self, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run coroutines that use this engine to their end; their results in order.

        The first exception cancels the others and is raised; their requests are aborted.
        """
        tasks = [self.start(coroutine) for coroutine in coroutines]

        def is_over() -> bool:
            return any(t.done() and t.exception() for t in tasks) or all(t.done() for t in tasks)

        try:
            await self.drive(is_over)
            failed = next((t for t in tasks if t.done() and t.exception()), None)
            return [failed.result()] if failed else [task.result() for task in tasks]
        finally:
            await discard(tasks)

    async def drive(self, is_over: Callable[[], bool]) -> None:
        """Step the engine, for whoever has requests in it, until `is_over`."""
        while True:
            for _ in range(_SETTLE_TURNS):
                await asyncio.sleep(0)
            if is_over():
                return
            if self._engine.has_unfinished_requests():
                self._step()
            else:  # every episode waits for something else, such as a tool
                await asyncio.sleep(_TOOL_POLL_SECONDS)

    def _step(self) -> None:
        for output in self._engine.step():
            request = self._requests.get(output.request_id)
            if output.finished and request and not request.future.done():
                request.future.set_result(output)  # type: ignore[arg-type]

    def load_version(self, policy_version: int, tensors: dict[str, torch.Tensor]) -> None:
        """Load a version's weights and forget every cached prefix of the old ones.

        Where prefixes carry their version instead, requests may be under way: they go on with the new weights.
        """
        transfer.stage(policy_version, tensors)
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", args=({"policy_version": policy_version},))
        self._llm.collective_rpc("finish_weight_update")
        self.policy_version = policy_version
        if not self._requests:
            self.reset_prefix_cache()
        elif not self.in_flight:
            raise RuntimeError(
                "weights were swapped under requests whose prefixes carry no version"
            )
        for request_id, request in list(self._requests.items()):
            if not request.future.done():
                self._go_on(request_id, request)

    def _go_on(self, request_id: str, request: _Request) -> None:
        state = self._engine.output_processor.request_states[request.internal_id]
        num_sampled = state.detokenizer.num_output_tokens()  # type: ignore[union-attr]
        if num_sampled:
            request.spans.append((num_sampled, self.policy_version))
        else:
            # Its first token would be of the new version over a prompt that the old one may have read.
            self._engine.abort_request([request_id])
            self._add(request_id, request)

    def sleep(self) -> None:
        """Give up weights and key-value cache; no request may be under way. Harmless if it sleeps."""
        assert not self._requests, "requests would lose what they have"
        if not self.is_asleep:
            self._llm.sleep(level=2)
            self.is_asleep, self.policy_version = True, -1

    def wake(self) -> None:
        """Take the memory again; a version has to be loaded before anything is asked. Harmless if it is awake."""
        if self.is_asleep:
            self._llm.wake_up()
            self.is_asleep = False

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes; RuntimeError if the engine refuses, for stale ones would be used silently."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache: requests are still running")


async def discard(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what is not done yet, and wait until its requests are aborted."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _token_versions(spans: list[tuple[int, int]], num_tokens: int) -> list[int]:
    versions: list[int] = []
    for (start, version), (end, _) in pairwise([*spans, (num_tokens, 0)]):
        versions += [version] * (end - start)
    return versions


def _sampled_logprobs(flat: Any, token_ids: list[int]) -> list[float]:
    # FlatLogprobs lists, per position, the sampled token first.
    values = [float(flat.logprobs[start]) for start in flat.start_indices]
    if len(values) != len(token_ids):
        raise RuntimeError(f"vLLM gave {len(values)} logprobs for {len(token_ids)} tokens")
    return values
