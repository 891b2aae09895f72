"""One episode from a prompt, and the seeds of samples."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from forge_core.rollout import (
    Episode,
    EpisodeError,
    Sample,
    Transcript,
    Turn,
    custom_generate_episode,
    derive_seed,
    generate_episode,
)


class Shouting:
    """A policy whose tokens are code points; it answers in capitals and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def encode_prompt(self, text: str) -> list[int]:
        return [2, *map(ord, text), 3]

    def encode(self, text: str) -> list[int]:
        return [*map(ord, text)]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token) for token in token_ids if token > 3)

    async def sample(
        self,
        token_ids: list[int],
        *,
        seed: int,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> Sample:
        self.asked.append((token_ids, seed))
        answer = [*(code - 32 for code in token_ids[1:4]), 1]
        return Sample(
            token_ids=answer,
            logprobs=[-0.25 * i for i in range(len(answer))],
            token_policy_versions=[7, 7, 8, 8],
            finish_reason="stop",
        )


def test_an_episode_is_what_the_policy_saw_and_wrote() -> None:
    policy = Shouting()
    episode = asyncio.run(generate_episode(policy, "abc", seed=11))
    assert policy.asked == [([2, 97, 98, 99, 3], 11)]
    assert episode == Episode(
        prompt_token_ids=[2, 97, 98, 99, 3],
        response_token_ids=[65, 66, 67, 1],
        logprobs=[0.0, -0.25, -0.5, -0.75],
        mask=[True, True, True, True],
        token_policy_versions=[7, 7, 8, 8],
        finish_reason="stop",
        response="ABC",
        turns=[Turn(role="policy", start=0, end=4)],
        seed=11,
    )


def test_turns_make_one_sequence_of_which_the_policy_wrote_a_part() -> None:
    """What others say is neither trained on nor encoded anew with what stands before it."""
    policy = Shouting()

    async def two_turns() -> Episode:
        transcript = Transcript(policy, "abc", seed=11)
        assert await transcript.policy_writes() == "ABC"
        transcript.tell("tool", "no")
        await transcript.policy_writes()
        return transcript.episode()

    episode = asyncio.run(two_turns())
    (first, seed), (second, other_seed) = policy.asked
    assert second == [*first, 65, 66, 67, 1, ord("n"), ord("o")]
    assert seed == 11 != other_seed
    assert episode.response_token_ids == [65, 66, 67, 1, ord("n"), ord("o"), 65, 66, 67, 1]
    assert episode.mask == [True] * 4 + [False] * 2 + [True] * 4
    assert episode.token_policy_versions == [7, 7, 8, 8, 8, 8, 7, 7, 8, 8]
    assert [episode.logprobs[i] for i, is_ours in enumerate(episode.mask) if not is_ours] == [0, 0]
    assert episode.response == "ABCnoABC"
    assert [(t.role, t.start, t.end) for t in episode.turns] == [
        ("policy", 0, 4), ("tool", 4, 6), ("policy", 6, 10),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('tool')", "raised KeyError: 'tool'"),
        ("return 'abc'", "returned str where"),
        ("import asyncio; await asyncio.sleep(9)", r"gave no episode within 0\.2 s"),
    ],
)
def test_an_own_function_that_fails_is_named_with_the_prompt(
    tmp_path: Path, body: str, words: str
) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"async def talk(policy, prompt_text, *, seed):\n    {body}\n")
    generate = custom_generate_episode(f"{file}:talk", timeout_seconds=0.2)
    with pytest.raises(EpisodeError, match=words) as caught:
        asyncio.run(cast(Any, generate(Shouting(), "abc", seed=1)))
    assert f"{file}:talk" in str(caught.value) and "'abc'" in str(caught.value)


def test_seeds_are_distinct_in_range_and_always_the_same() -> None:
    parts = [
        (seed, purpose, draw, sample)
        for seed in (0, 1, 12)
        for purpose in ("train", "evaluate")
        for draw in range(30)
        for sample in range(8)
    ]
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # The range is used: 32 bits would collide within a long run.
    # Pinned: another derivation would break the reproduction of stored runs.
    assert derive_seed(0, "train", 1, 2) == 381532481141669058


def test_seeds_depend_on_where_a_part_ends_and_on_the_order() -> None:
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(3, 12)}) == 4
