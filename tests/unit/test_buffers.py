"""Replay buffers: sampling against its definition, exact priorities and evictions, whole accounts, the same again."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest

from forge_core.buffers.chance import below, fraction, number, stream
from forge_core.buffers.fifo import Fifo
from forge_core.buffers.mixture import Choice, Pick, ReplayBuffer
from forge_core.buffers.prioritised import Prioritised
from forge_core.buffers.reservoir import Reservoir
from forge_core.buffers.source import Item, Reason, Source
from forge_core.buffers.sum_tree import SumTree


def item(n: int, *, version: int = 0, reward: float = 0.0, priority: float = 1.0) -> Item:
    return Item(group_id=f"g{n}", policy_version=version, reward=reward, priority=priority)


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """How many standard deviations chi-square lies above its mean; the approximation of Wilson and Hilferty (1931)."""
    total = sum(counts)
    degrees = len(counts) - 1
    statistic = sum(
        (count - total * p) ** 2 / (total * p)
        for count, p in zip(counts, probabilities, strict=True)
    )
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def fits(counts: Sequence[int], probabilities: Sequence[float]) -> bool:
    """Whether chi-square does not refuse the definition at a level of 0.0001; the seed is fixed, so never by chance."""
    assert math.isclose(sum(probabilities), 1.0)
    return chi_square(counts, probabilities) < 3.72


def test_the_test_of_fit_knows_a_wrong_definition() -> None:
    assert abs(chi_square([110, 90, 105, 95], [0.25] * 4) - 0.2) < 0.3
    assert not fits([1300, 900, 900, 900], [0.25] * 4)


def test_numbers_are_even_and_the_same_everywhere() -> None:
    assert number(7, "fifo", 3) == 5595340755399629408
    counts = Counter(below(7, bits) for bits, _ in zip(stream(1, "x"), range(14_000), strict=False))
    assert fits([counts[n] for n in range(7)], [1 / 7] * 7)
    assert 0.0 <= fraction(0) < fraction(2**64 - 1) < 1.0


def test_a_tree_draws_by_weight_and_never_where_there_is_none() -> None:
    tree = SumTree()
    weights = [0.0, 3.0, 0.5, 0.0, 2.5, 0.0, 4.0]
    for place, weight in enumerate(weights):
        tree[place] = weight
    assert tree.total == 10.0
    found = [tree.find(mass / 2) for mass in range(20)]
    assert Counter(found) == {1: 6, 2: 1, 4: 5, 6: 8}
    assert tree.find(10.0) == 6, "rounding must not lead past the last weight"
    tree[6] = 0.0
    assert tree.total == 6.0 and tree.find(6.0) == 4
    with pytest.raises(ValueError, match="nothing to draw"):
        SumTree().find(0.0)


def test_a_tree_forgets_what_its_sums_were_before() -> None:
    used, new = SumTree(), SumTree()
    for turn in range(50):
        for place in range(9):
            used[place] = fraction(number(2, turn, place)) * 10.0**turn
    for place in range(9):
        used[place] = new[place] = 0.1 * (place + 1)
    assert used.total == new.total


def sampled(source: Source, draws: int, most: int = 1) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(drawn.group_id for drawn in source.sample(most, stream(5, "test", turn)))
        for turn in range(draws)
    )


def test_fifo_holds_the_newest_and_draws_evenly_each_at_most_once() -> None:
    fifo = Fifo(capacity=5)
    left = [fifo.admit(item(n)) for n in range(8)]
    assert left == [None] * 5 + [(f"g{n}", Reason.EVICTED) for n in range(3)]
    assert sorted(fifo) == ["g3", "g4", "g5", "g6", "g7"]
    pairs = list(itertools.permutations(sorted(fifo), 2))
    counts = sampled(fifo, 6000, most=2)
    assert fits([counts[pair] for pair in pairs], [1 / 20] * 20)
    assert len(fifo.sample(9, stream(1))) == 5
    others = {drawn.group_id for drawn in fifo.sample(9, stream(1), without={"g4", "g9"})}
    assert others == {"g3", "g5", "g6", "g7"}


def test_fifo_evicts_in_order_of_admission_whoever_left_before() -> None:
    fifo = Fifo(capacity=3)
    for n in range(3):
        fifo.admit(item(n))
    fifo.discard("g0")
    assert fifo.admit(item(3)) is None
    assert fifo.admit(item(4)) == ("g1", Reason.EVICTED)
    with pytest.raises(ValueError, match="g4 is in the buffer already"):
        fifo.admit(item(4))


def test_priorities_draw_as_defined_one_after_another() -> None:
    alpha, priorities = 0.7, [0.2, 1.0, 3.0, 0.05]
    source = Prioritised(capacity=8, alpha=alpha)
    for n, priority in enumerate(priorities):
        source.admit(item(n, priority=priority))
    mass = [priority**alpha for priority in priorities]
    pairs = list(itertools.permutations(range(4), 2))
    chances = [mass[a] / sum(mass) * mass[b] / (sum(mass) - mass[a]) for a, b in pairs]
    counts = sampled(source, 20_000, most=2)
    assert fits([counts[f"g{a}", f"g{b}"] for a, b in pairs], chances)
    assert not fits([counts[f"g{a}", f"g{b}"] for a, b in pairs], [1 / 12] * 12)


def test_importance_weights_are_the_papers() -> None:
    priorities = {"g0": 0.2, "g1": 1.0, "g2": 3.0}
    source = Prioritised(capacity=8, alpha=0.5, beta=0.4)
    for n, priority in enumerate(priorities.values()):
        source.admit(item(n, priority=priority))
    source.admit(item(3, priority=100.0))
    drawn = source.sample(3, stream(3), without={"g3"})
    total = sum(priority**0.5 for priority in priorities.values())
    raw = {g: (3 * priority**0.5 / total) ** -0.4 for g, priority in priorities.items()}
    assert {d.group_id: d.weight for d in drawn} == pytest.approx(
        {g: weight / max(raw.values()) for g, weight in raw.items()}
    )


def test_priority_updates_and_evictions_are_exact() -> None:
    source = Prioritised(capacity=3, alpha=1.0, use_discount=0.25)
    for n in range(3):
        source.admit(item(n, priority=float(n + 1)))
    source.update("g0", 10.0)
    source.use("g2")
    assert [source.priority(f"g{n}") for n in range(3)] == [10.0, 2.0, 0.75]
    assert source._tree.total == 12.75
    assert source.admit(item(3, priority=5.0)) == ("g0", Reason.EVICTED)
    assert source._tree.total == 7.75
    source.discard("g3"), source.discard("g1")
    assert source._tree.total == 0.75 and sampled(source, 20) == {("g2",): 20}
    before = source._tree.total
    source.sample(3, stream(1), without={"g2"})
    assert source._tree.total == before, "what was hidden from a draw is back"
    with pytest.raises(ValueError, match=r"priority 0\.0"):
        source.update("g2", 0.0)
    with pytest.raises(KeyError):
        source.update("g1", 1.0)


def test_a_tree_of_priorities_agrees_with_a_plain_table_whatever_happens() -> None:
    source, plain = Prioritised(capacity=20, alpha=1.0), dict[str, float]()
    for turn in range(2000):
        bits = stream(11, turn)
        act, n, priority = below(4, next(bits)), turn, 0.5 + fraction(next(bits))
        held = sorted(plain)
        one = held[below(len(held), next(bits))] if held else None
        if act < 2:
            left = source.admit(item(n, priority=priority))
            if left is not None:
                assert left[0] == next(iter(plain)), "the oldest that is left"
                del plain[left[0]]
            plain[f"g{n}"] = priority
        elif one is not None and act == 2:
            source.update(one, priority)
            plain[one] = priority
        elif one is not None:
            assert source.discard(one)
            del plain[one]
        assert sorted(source) == sorted(plain)
        assert source._tree.total == pytest.approx(sum(plain.values()))


def test_a_reservoir_is_an_even_sample_of_all_that_came_by() -> None:
    held: Counter[str] = Counter()
    for seed in range(3000):
        reservoir = Reservoir(capacity=4, seed=seed)
        for n in range(12):
            reservoir.admit(item(n))
        assert len(reservoir) == 4
        held.update(reservoir)
    assert fits([held[f"g{n}"] for n in range(12)], [1 / 12] * 12)
    counts = sampled(reservoir, 4000)
    assert fits([counts[group,] for group in reservoir], [0.25] * 4)


def test_a_reservoir_stays_even_when_groups_leave_in_between() -> None:
    held: Counter[str] = Counter()
    for seed in range(4000):
        reservoir = Reservoir(capacity=4, seed=seed)
        for n in range(12):
            if n == 6:
                for gone in ("g0", "g1", "g2"):
                    reservoir.discard(gone)
            reservoir.admit(item(n))
        held.update(reservoir)
    assert fits([held[f"g{n}"] for n in range(3, 12)], [1 / 9] * 9)


def test_whoever_a_reservoir_turns_away_is_told() -> None:
    reservoir = Reservoir(capacity=2, seed=1)
    left = [reservoir.admit(item(n)) for n in range(40)]
    assert left[:2] == [None, None]
    for n, gone in enumerate(left[2:], start=2):
        assert gone is not None
        assert (gone[0] == f"g{n}") == (gone[1] is Reason.PASSED_OVER)
    assert len({gone[0] for gone in left if gone} | set(reservoir)) == 40


@pytest.mark.parametrize(
    "source",
    [
        Fifo(capacity=9, max_age=2),
        Prioritised(capacity=9, max_age=2),
        Reservoir(capacity=9, max_age=2, seed=0),
    ],
)
def test_groups_leave_at_the_age_that_their_source_allows(source: Source) -> None:
    for n, version in enumerate([3, 1, 2, 1]):
        source.admit(item(n, version=version))
    assert source.expire(4) == []  # at step 4, version 1 is of age 2
    assert source.expire(5) == ["g1", "g3"]
    source.discard("g2")
    assert source.expire(6) == []
    assert list(source) == ["g0"]


def mixed(*, seed: int = 3, max_uses: int = 3, has_fresh: bool = True) -> ReplayBuffer:
    sources: dict[str, Source] = {
        "success": Fifo(capacity=6, min_reward=0.5, max_age=4),
        "hard": Prioritised(capacity=10, use_discount=0.5),
        "all": Reservoir(capacity=5, seed=seed),
    }
    shares = {"success": 2, "hard": 2, "all": 1}
    return ReplayBuffer(sources, shares, max_uses=max_uses, has_fresh=has_fresh, seed=seed)


def fresh(step: int) -> list[Item]:
    return [
        item(n, version=step - 1, reward=(n % 4) / 4, priority=0.1 + fraction(number(1, n)))
        for n in range(4 * step, 4 * step + 4)
    ]


def run_through(buffer: ReplayBuffer, steps: int) -> list[Choice]:
    return [buffer.choose(s, fresh(s), is_last=s == steps) for s in range(1, steps + 1)]


@pytest.mark.parametrize("has_fresh", [True, False])
def test_a_mixture_takes_its_shares_and_accounts_for_every_group(has_fresh: bool) -> None:
    buffer = mixed(has_fresh=has_fresh)
    uses: Counter[str] = Counter()
    gone: dict[str, Reason] = {}
    for step, choice in enumerate(run_through(buffer, 40), start=1):
        groups = [pick.group_id for pick in choice.picks]
        assert len(set(groups)) == len(groups), "whole groups, each once a batch"
        assert not gone.keys() & set(groups), "what left is never drawn again"
        by_source = Counter(pick.source for pick in choice.picks)
        if step > 5:
            # A reservoir whose groups are used up waits for those of later steps.
            assert by_source["hard"] == 2 and by_source["all"] <= 1
        assert by_source["fresh"] == 4 * has_fresh
        for pick in choice.picks:
            assert 0.0 < pick.weight <= 1.0
            if pick.source == "success":
                assert (int(pick.group_id[1:]) % 4) / 4 >= 0.5
                assert step - 1 - (int(pick.group_id[1:]) // 4 - 1) <= 4
        uses.update(groups)
        for reason, left in choice.left.items():
            assert not gone.keys() & set(left)
            gone.update(dict.fromkeys(left, reason))
            if reason is Reason.USED_UP:
                assert all(uses[group_id] == 3 for group_id in left)
    assert max(uses.values()) == 3
    assert gone.keys() == {i.group_id for s in range(1, 41) for i in fresh(s)}
    assert len(buffer) == 0
    assert set(gone.values()) >= {Reason.USED_UP, Reason.EVICTED, Reason.END_OF_RUN}


def test_the_same_seed_gives_the_same_and_another_gives_others() -> None:
    assert run_through(mixed(), 30) == run_through(mixed(), 30)
    assert run_through(mixed(), 30) != run_through(mixed(seed=4), 30)


def test_a_buffer_is_rebuilt_from_what_was_admitted_and_used() -> None:
    whole, broken, again = mixed(), mixed(), mixed()
    for step in range(1, 18):
        assert whole.choose(step, fresh(step)) == (told := broken.choose(step, fresh(step)))
        assert again.recall(step, fresh(step), told.picks) == told
    for step in range(18, 31):
        assert again.choose(step, fresh(step)) == whole.choose(step, fresh(step))


def test_a_log_that_uses_what_the_buffer_has_not_got_is_refused() -> None:
    buffer = mixed()
    with pytest.raises(
        ValueError, match="group g99 of source 'all' is not in the buffer at step 1"
    ):
        buffer.recall(1, fresh(1), [Pick(group_id="g99", source="all")])
    with pytest.raises(ValueError, match="step 1 does not follow step 1"):
        buffer.choose(1, fresh(1))


def test_one_use_is_no_reuse() -> None:
    buffer = mixed(max_uses=1, has_fresh=False)
    uses = Counter(pick.group_id for choice in run_through(buffer, 20) for pick in choice.picks)
    assert set(uses.values()) == {1}
