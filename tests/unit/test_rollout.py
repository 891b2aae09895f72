"""One episode from a prompt, and the seeds of samples."""

import asyncio

from forge_core.rollout import Episode, Sample, Turn, derive_seed, generate_episode


class Shouting:
    """A policy whose tokens are code points; it answers in capitals and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def encode_prompt(self, text: str) -> list[int]:
        return [2, *map(ord, text), 3]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids[:-1]))

    async def sample(self, token_ids: list[int], *, seed: int) -> Sample:
        self.asked.append((token_ids, seed))
        answer = [*(code - 32 for code in token_ids[1:-1]), 1]
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
