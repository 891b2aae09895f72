"""Weights go from trainer to generator, and what generates is what trains.

The prompts here are long, so that vLLM's prefix cache holds whole blocks of them: a cache that outlived its
weights shows in the logprobs that are recorded at sampling.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from forge_core.actors.messages import (
    AdvanceReply,
    AdvanceRequest,
    DrawnPrompt,
    GenerateRequest,
    LoadReply,
    PublishReply,
    TrainReply,
    TrainRequest,
)
from forge_core.config import RunConfig
from forge_core.environments.base import Prompt, prompt_id
from forge_core.meshes import Meshes, open_meshes
from forge_core.placement.roles import roles_of
from storage import layout
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import commit_part, read_part

RUN = "weights"
TEXT = "The quick brown fox jumps over the lazy dog. " * 8
CONFIG = RunConfig.model_validate(
    {
        "seed": 3,
        "group_size": 4,
        "groups_per_step": 2,
        "sampling": {"max_tokens": 24, "temperature": 0.7},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "max_gradient_norm": 100.0},
        "environment": {"name": "spell_backward"},
        # FSDP2 has its own runs.
        "trainer": {"ranks": 2, "tensor_parallel": 2},
    }
)
CALL_SECONDS = 120.0


@dataclass
class Seen:
    """What both sides said at two versions."""

    published: list[PublishReply]
    loaded: list[LoadReply]
    trained: list[TrainReply]
    sampled: list[list[dict[str, Any]]]
    """Rows of the generated part at each version."""
    swapped: list[dict[str, Any]]
    """Rows of the same prompts, with version 3 swapped in under them, and of two that began after the swap."""
    repeated: list[AdvanceReply]
    """Two answers to one request."""


def _prompts(first_draw: int = 0) -> tuple[DrawnPrompt, ...]:
    return tuple(
        DrawnPrompt(
            draw=draw,
            group_id=layout.group_id(RUN, draw),
            prompt=Prompt(
                prompt_id=prompt_id("test", text, ""),
                text=text,
                answer="",
                target="",
                index=draw,
                environment="test",
                metadata={},
            ),
        )
        for draw, text in enumerate([TEXT + "One:", TEXT + "Two:"], start=first_draw)
    )


@asynccontextmanager
async def _meshes(folder: Path) -> AsyncIterator[tuple[Meshes, LocalStore]]:
    store = LocalStore(folder / "store")
    async with open_meshes(CONFIG, store.uri, folder, time.time(), roles_of(CONFIG)) as meshes:
        yield meshes, store


async def _watch(folder: Path) -> Seen:
    """Publish, sample, train on what was sampled, publish and sample the same prompts again."""
    async with _meshes(folder) as (meshes, store):

        async def call(mesh: Any, name: str, *arguments: Any) -> Any:
            return (await mesh.call(name, *arguments, timeout_seconds=CALL_SECONDS))[0]

        trainer, generator = meshes.trainer, meshes.generators[0]
        model = str(folder / "model")
        await call(trainer, "build_model", model)
        await asyncio.gather(call(trainer, "load", model), call(generator, "load", model))
        probe = await call(trainer, "encode_probe", 256)
        await call(trainer, "warm_start")
        seen = Seen([], [], [], [], [], [])
        for version in range(3):
            replaced = tuple(reply.manifest for reply in seen.published[-1:])
            seen.published.append(
                await call(trainer, "publish", probe, meshes.store_name, replaced)
            )
            seen.loaded.append(
                await call(generator, "load_version", seen.published[-1].manifest, probe)
            )
            request = GenerateRequest(
                run_id=RUN,
                key_prefix=f"generated/{version}",
                prompts=_prompts(),
                num_samples=CONFIG.group_size,
                policy_version=version,
            )
            reply = await call(generator, "generate", request)
            table = read_part(store, reply.stored.part)
            seen.sampled.append(table.to_pylist())
            seen.trained.append(
                await call(trainer, "train", _commit(store, version + 1, table, table["group_id"]))
            )

        # In flight: the prompts begin under version 2 and go on under version 3, and two more begin then.
        await call(generator, "advance", _advance(0, _prompts(), budget_seconds=0.0))
        await call(generator, "advance", _advance(1, (), budget_seconds=0.02))
        put = await call(trainer, "publish", probe, meshes.store_name)
        last = _advance(2, _prompts(first_draw=2), manifest=put.manifest, probe=probe)
        seen.repeated += [await call(generator, "advance", last) for _ in range(2)]
        table = read_part(store, seen.repeated[0].stored.part)
        seen.swapped = table.to_pylist()
        begun_after = pa.array([layout.group_id(RUN, draw) for draw in (2, 3)])
        seen.trained.append(await call(trainer, "train", _commit(store, 4, table, begun_after)))
    return seen


def _commit(store: LocalStore, step: int, table: pa.Table, group_ids: Any) -> TrainRequest:
    """Commit a table with rewards that differ within each group; a request to train on some of its groups."""
    rewards = pa.array([float(i % 4) for i in range(table.num_rows)])
    scored = table.set_column(
        table.schema.get_field_index("reward"), SCHEMA.field("reward"), rewards
    )
    commit = commit_part(store, RUN, f"round-{step}", scored)
    return TrainRequest(
        run_id=RUN,
        step=step,
        commits=(layout.commit_key(RUN, commit.key),),
        group_ids=tuple(dict.fromkeys(group_ids.to_pylist())),
    )


def _advance(
    seq: int,
    prompts: tuple[DrawnPrompt, ...],
    *,
    budget_seconds: float = 60.0,
    manifest: Any = None,
    probe: Any = (),
) -> AdvanceRequest:
    return AdvanceRequest(
        run_id=RUN,
        seq=seq,
        key_prefix=f"generated/in-flight-{seq}",
        prompts=prompts,
        num_samples=CONFIG.group_size,
        manifest=manifest,
        probe=probe,
        part_groups=4,
        budget_seconds=budget_seconds,
        hold_seconds=60.0,
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return asyncio.run(_watch(tmp_path_factory.mktemp("weights")))


def test_the_bytes_arrive(seen: Seen) -> None:
    sent = [reply.manifest.digest for reply in seen.published]
    assert [reply.digest for reply in seen.loaded] == sent
    assert len(set(sent)) == 3
    assert sent[1:] == [reply.weights_digest for reply in seen.trained[:2]]


def test_both_sides_score_the_probe_alike(seen: Seen) -> None:
    """The weights really differ between versions, and the generator's say what the trainer's say."""
    before: np.ndarray | None = None
    for put, loaded in zip(seen.published, seen.loaded, strict=True):
        ours = np.concatenate([np.asarray(row) for row in put.probe_logprobs])
        theirs = np.concatenate([np.asarray(row) for row in loaded.probe_logprobs])
        assert ours.size >= 256
        assert put.probe_entropy > 0.1
        assert np.abs(ours - theirs).mean() <= 1e-3
        assert np.abs(ours - theirs).max() <= 1e-2
        if before is not None:
            assert np.abs(ours - before).mean() > 0.1
        before = ours


def test_recorded_logprobs_are_those_of_the_policy_in_training(seen: Seen) -> None:
    """Through the prefix cache, at a temperature other than 1, at every version."""
    for rows, trained in zip(seen.sampled, seen.trained[:3], strict=True):
        assert all(len(row["prompt_token_ids"]) > 256 for row in rows)
        assert trained.metrics["sampling/sampling_logp_difference/max"] <= 1e-2
        assert trained.metrics["sampling/sampling_logp_difference/mean"] <= 1e-3
        assert all(math.isfinite(logprob) for row in rows for logprob in row["logprobs"])


def test_each_token_names_its_version(seen: Seen) -> None:
    for version, rows in enumerate(seen.sampled):
        assert {v for row in rows for v in row["token_policy_versions"]} == {version}


def test_seeds_follow_from_ids(seen: Seen) -> None:
    assert len({row["seed"] for row in seen.sampled[0]}) == len(seen.sampled[0])
    assert [r["seed"] for r in seen.sampled[0]] == [r["seed"] for r in seen.sampled[2]]


def test_a_swap_lies_between_two_tokens_of_a_request(seen: Seen) -> None:
    """Before it every token is the one that version 2 gave without a swap; after it they are version 3's."""
    undisturbed = {row["episode_id"]: row for row in seen.sampled[2]}
    has_changed = False
    begun_before = [row for row in seen.swapped if row["draw"] < 2]
    assert len(begun_before) == 2 * CONFIG.group_size
    for row in begun_before:
        versions, before = row["token_policy_versions"], undisturbed[row["episode_id"]]
        kept = versions.count(2)
        assert kept >= 1
        assert versions == [2] * kept + [3] * (len(versions) - kept)
        assert row["response_token_ids"][:kept] == before["response_token_ids"][:kept]
        assert np.allclose(row["logprobs"][:kept], before["logprobs"][:kept], atol=1e-3)
        has_changed |= not np.allclose(
            row["logprobs"][kept : kept + 1], before["logprobs"][kept : kept + 1], atol=1e-3
        )
    assert has_changed
    assert {v for row in begun_before for v in row["token_policy_versions"]} == {2, 3}


def test_what_begins_after_a_swap_reads_no_prefix_of_the_old_weights(seen: Seen) -> None:
    begun_after = [row for row in seen.swapped if row["draw"] >= 2]
    assert len(begun_after) == 2 * CONFIG.group_size
    assert {v for row in begun_after for v in row["token_policy_versions"]} == {3}
    assert seen.trained[3].age_max == 0
    assert seen.trained[3].metrics["sampling/sampling_logp_difference/max"] <= 1e-2


def test_an_advance_asked_twice_is_done_once(seen: Seen) -> None:
    first, second = seen.repeated
    assert first.stored is not None and first.loaded is not None
    assert first.num_under_way == 0
    assert first.intervals and not second.intervals
    assert second.stored == first.stored and second.loaded == first.loaded
