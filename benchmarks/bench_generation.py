"""How much of plain vLLM's speed is left when an episode is a coroutine.

    python -m benchmarks.bench_generation

The same 512 seeded requests of the tiny preset's model, in one process and on one engine, in turn: through vLLM's
own `LLM.generate`, and through `generate_episode()` on `Engine.run`. The figure is the ratio of their tokens per
second, pair by pair.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from forge_core.process_environment import PROCESS_ENVIRONMENT

PAIRS = 7


def main() -> None:
    """Measure, print, record."""
    os.environ.update({**PROCESS_ENVIRONMENT, "OMP_NUM_THREADS": "2"})
    from vllm import SamplingParams

    from benchmarks.record import write_record
    from forge_core.actors.engine import Engine
    from forge_core.model import build_tiny_model
    from forge_core.rollout import derive_seed, generate_episode
    from forge_core.settings import load_config

    config = load_config(preset="tiny", file=None, overrides=[])
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(config.model.tiny, 0, Path(folder))
        engine = Engine(folder, config)
    llm: Any = engine._llm
    prompts = [f"{i * 37 % 10000:04d}a=" for i in range(64) for _ in range(8)]
    seeds = [derive_seed("bench", i) for i in range(len(prompts))]

    def plain() -> int:
        params = [
            SamplingParams(
                temperature=1.0, max_tokens=16, seed=seed, logprobs=0, flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        requests = [{"prompt_token_ids": engine.encode_prompt(prompt)} for prompt in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
        for output in outputs:
            engine.decode(output.outputs[0].token_ids)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def ours() -> int:
        episodes = asyncio.run(
            engine.run(
                [
                    generate_episode(engine, prompt, seed=seed)
                    for prompt, seed in zip(prompts, seeds, strict=True)
                ]
            )
        )
        return sum(len(episode.response_token_ids) for episode in episodes)

    plain(), ours()
    speeds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(PAIRS):
        for name, work in (("plain", plain), ("ours", ours)):
            engine.reset_prefix_cache()
            started = time.perf_counter()
            tokens = work()
            speeds[name].append(tokens / (time.perf_counter() - started))
    ratios = [ours / plain for ours, plain in zip(speeds["ours"], speeds["plain"], strict=True)]
    result = {
        "requests": len(prompts),
        "plain_tokens_per_second": statistics.median(speeds["plain"]),
        "ours_tokens_per_second": statistics.median(speeds["ours"]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    print(result)
    print(write_record("generation", "python -m benchmarks.bench_generation", result))


if __name__ == "__main__":
    main()
