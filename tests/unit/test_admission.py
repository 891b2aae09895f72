"""The age bound, by a state machine that drives admission alone through any order of events."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forge_core.admission import Admission, spare_steps


class Pipeline(RuleBasedStateMachine):
    """Replicas that generate, are lost and come back; a trainer that takes batches; weights that arrive late.

    The model keeps what admission must not be believed about: the oldest version that each group's tokens can have.
    """

    @initialize(
        size=st.integers(1, 4),
        window=st.integers(1, 5),
        extra_age=st.integers(0, 3),
        steps=st.integers(1, 12),
        replicas=st.integers(1, 3),
    )
    def start(self, size: int, window: int, extra_age: int, steps: int, replicas: int) -> None:
        self.size, self.steps, self.replicas = size, steps, replicas
        self.age = math.ceil((window - 1) / size) + extra_age
        self.admission = Admission(
            groups_per_step=size,
            max_policy_age=self.age,
            window=window,
            steps=steps,
            replicas=replicas,
        )
        self.serves = dict.fromkeys(range(replicas), 0)
        self.newest = 0
        """Newest version that a replica served which is lost."""
        self.at_work: dict[int, int] = {}
        self.oldest: dict[int, int] = {}
        self.done: set[int] = set()
        self.outside: set[int] = set()
        self.trained: dict[int, int] = {}
        self.owed: set[int] = set()
        """Steps whose batch was given up, and that have no other yet."""

    def latest(self) -> int:
        """The newest version that can exist."""
        return min(self.owed, default=self.admission.taken + 1) - 1

    @rule(replica=st.integers(0, 2), most=st.integers(1, 20))
    def admit(self, replica: int, most: int) -> None:
        for ordinal in self.admission.admit(replica, most):
            assert ordinal not in self.oldest
            self.at_work[ordinal] = replica
            self.oldest[ordinal] = self.serves[replica]

    @precondition(lambda self: self.at_work)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ordinal = data.draw(st.sampled_from(sorted(self.at_work)))
        del self.at_work[ordinal]
        self.done.add(ordinal)
        self.admission.finish(ordinal)

    @precondition(lambda self: self.at_work or self.done - self.trained.keys())
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A prompt is too long, or a group that is ready has no signal."""
        ready = self.done - self.trained.keys()
        ordinal = data.draw(st.sampled_from(sorted({*self.at_work, *ready})))
        self.at_work.pop(ordinal, None)
        self.done.discard(ordinal)
        self.outside.add(ordinal)
        self.admission.drop(ordinal)

    @precondition(lambda self: self.admission.taken < self.steps)
    @rule()
    def take(self) -> None:
        step = self.admission.taken + 1
        batch = self.admission.take(step)
        if batch is None:
            return
        assert len(batch) == self.size
        assert self.admission.take(step) == batch
        for ordinal in batch:
            assert ordinal in self.done, "a batch holds only what is ready"
            assert ordinal not in self.trained, "and nothing twice"
            self.trained[ordinal] = step

    @precondition(lambda self: self.latest() > max([self.newest, *self.serves.values()]))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The loss of a step's batch is not finite; the batches of steps after it may be chosen by then."""
        first = max([self.newest, *self.serves.values()]) + 1
        step = data.draw(st.integers(first, self.latest()))
        self.admission.give_up(step)
        with pytest.raises(ValueError, match="no batch"):
            self.admission.give_up(step)
        batch = {ordinal for ordinal, of_step in self.trained.items() if of_step == step}
        for ordinal in batch:
            del self.trained[ordinal]
        self.done -= batch
        self.outside |= batch
        self.owed.add(step)

    @precondition(lambda self: self.owed)
    @rule()
    def take_again(self) -> None:
        step = min(self.owed)
        batch = self.admission.take(step)
        if batch is None:
            return
        assert len(batch) == self.size
        assert self.admission.take(step) == batch
        self.owed.remove(step)
        for ordinal in batch:
            assert ordinal in self.done
            assert ordinal not in self.trained
            self.trained[ordinal] = step

    @rule(rounds=st.integers(1, 9))
    def overtake(self, rounds: int) -> None:
        """The worst for age: the newest draw straggles, and all that its replica can get ready goes before it."""
        self.admit(0, 1000)
        straggler = max(self.at_work, default=None)
        for _ in range(rounds):
            for ordinal in [o for o in sorted(self.at_work) if o != straggler]:
                del self.at_work[ordinal]
                self.done.add(ordinal)
                self.admission.finish(ordinal)
            if self.admission.taken < self.steps:
                self.take()
            if 0 in self.serves:
                self.serves[0] = max(self.serves[0], self.latest())
                self.admission.serve(0, self.serves[0])
            self.admit(0, 1000)

    @rule(replica=st.integers(0, 2), data=st.data())
    def serve(self, replica: int, data: st.DataObject) -> None:
        if replica < self.replicas:
            version = data.draw(st.integers(self.serves.get(replica, 0), self.latest()))
            self.serves[replica] = version
            self.admission.serve(replica, version)

    @precondition(lambda self: len(self.serves) > 1)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(sorted(self.serves)))
        self.newest = max(self.newest, self.serves.pop(replica))
        orphans = self.admission.lose(replica)
        assert sorted(orphans) == sorted(o for o, r in self.at_work.items() if r == replica)
        for ordinal in orphans:
            del self.at_work[ordinal]

    @rule(replica=st.integers(0, 2))
    def adopt(self, replica: int) -> None:
        orphans = self.admission.orphans(replica)
        self.admission.adopt(replica, orphans)
        for ordinal in orphans:
            assert ordinal not in self.at_work
            # What a new replica samples begins with the weights that it serves.
            self.oldest[ordinal] = self.serves[replica]
            self.at_work[ordinal] = replica

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """The controller dies; another goes on from what the log tells, with replicas that all serve one version."""
        # None older than what was ever served, also by a replica that is lost: it restores the newest step there is.
        newest = max(self.newest, *self.serves.values(), 0)
        served = data.draw(st.integers(newest, self.latest()))
        # Of what was under way some is stored unscored, and is scored now; the rest is lost in the engines.
        stored = {o for o in self.at_work if data.draw(st.booleans())}
        lost = set(self.oldest) - self.done - self.outside - stored
        before = self.admission
        self.admission = Admission(
            groups_per_step=self.size,
            max_policy_age=self.age,
            window=before.window,
            steps=self.steps,
            replicas=self.replicas,
        )
        self.admission.resume(
            taken=before.taken,
            served=served,
            admitted=before.admitted,
            dropped=len(self.outside),
            ready=self.done - self.trained.keys(),
            under_way=stored,
            orphaned=lost,
            given_up=self.owed,
        )
        self.serves = dict.fromkeys(range(self.replicas), served)
        self.at_work = dict.fromkeys(stored, -1)

    @invariant()
    def ages_are_bounded(self) -> None:
        for ordinal, step in getattr(self, "trained", {}).items():
            assert 0 <= step - 1 - self.oldest[ordinal] <= self.age

    def teardown(self) -> None:
        """Whatever happened, the run can be brought to its end, and then nothing is left."""
        if not hasattr(self, "admission"):
            return
        for _ in range(10 * (self.steps + 1)):
            for replica in range(self.replicas):
                self.serves[replica] = max(self.serves.get(replica, 0), self.latest())
                self.admission.serve(replica, self.serves[replica])
                self.adopt(replica)
                self.admit(replica, 1000)
            for ordinal in sorted(self.at_work):
                del self.at_work[ordinal]
                self.done.add(ordinal)
                self.admission.finish(ordinal)
            if self.owed:
                self.take_again()
            elif self.admission.taken < self.steps:
                self.take()
        self.ages_are_bounded()
        assert self.admission.taken == self.steps
        assert self.trained.keys() | self.outside == set(range(self.admission.admitted))
        assert len(self.trained) == self.steps * self.size


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize(
    ("age", "window", "size", "spare"), [(0, 1, 64, 0), (2, 64, 64, 1), (2, 65, 64, 1), (2, 66, 64, 0)]
)  # fmt: skip
def test_spare_steps_are_the_age_less_what_the_window_costs(age, window, size, spare):
    assert spare_steps(max_policy_age=age, window=window, groups_per_step=size) == spare


def test_slots_of_a_step_come_back_only_with_its_weights():
    admission = Admission(groups_per_step=2, max_policy_age=1, window=1, steps=9, replicas=2)
    assert admission.admit(0, 99) == [0, 1, 2, 3]
    for ordinal in (0, 1):
        admission.finish(ordinal)
    assert admission.take(1) == (0, 1)
    assert admission.free_slots(0) == 0
    admission.serve(1, 1)
    assert (admission.free_slots(0), admission.free_slots(1)) == (0, 2)


def test_the_window_lets_a_straggler_be_overtaken_and_no_further():
    admission = Admission(groups_per_step=1, max_policy_age=5, window=3, steps=9, replicas=1)
    admission.admit(0, 4)
    for ordinal in (1, 2, 3):
        admission.finish(ordinal)
    assert admission.take(1) == (1,)
    assert admission.take(2) == (2,)
    assert admission.take(3) is None
    admission.finish(0)
    assert admission.take(3) == (0,)


def test_an_orphan_waits_for_weights_as_new_as_those_it_was_admitted_under():
    admission = Admission(groups_per_step=1, max_policy_age=2, window=1, steps=9, replicas=2)
    admission.admit(0, 1)
    admission.finish(0)
    admission.take(1)
    admission.serve(0, 1)
    (orphan,) = admission.admit(0, 1)
    assert admission.lose(0) == [orphan]
    assert admission.orphans(1) == []
    with pytest.raises(ValueError, match="cannot adopt"):
        admission.adopt(1, [orphan])
    admission.serve(1, 1)
    assert admission.orphans(1) == [orphan]
    admission.adopt(1, [orphan])
    assert (admission.orphans(1), admission.under_way(1)) == ([], [orphan])


def test_impossible_versions_are_refused():
    admission = Admission(groups_per_step=1, max_policy_age=0, window=1, steps=2, replicas=1)
    with pytest.raises(ValueError, match="cannot go from version 0 to 1"):
        admission.serve(0, 1)
    with pytest.raises(ValueError, match="does not follow"):
        admission.take(2)
    admission.admit(0, 1)
    admission.finish(0)
    admission.take(1)
    admission.serve(0, 1)
    with pytest.raises(ValueError, match="cannot go from version 1 to 0"):
        admission.serve(0, 0)
    with pytest.raises(ValueError, match=r"max_policy_age 1 is below ceil.* = 2"):
        Admission(groups_per_step=2, max_policy_age=1, window=5, steps=2, replicas=1)


def test_what_is_dropped_or_lost_twice_is_so_once():
    admission = Admission(groups_per_step=2, max_policy_age=1, window=1, steps=9, replicas=2)
    admission.admit(0, 2)
    for _ in range(2):
        admission.drop(0)
    assert (admission.dropped, admission.lose(0), admission.lose(0)) == (1, [1], [])


def test_what_was_stored_when_a_controller_died_is_nobody_s_to_lose():
    admission = Admission(groups_per_step=2, max_policy_age=1, window=1, steps=9, replicas=2)
    admission.resume(
        taken=0, served=0, admitted=2, dropped=0, ready=(), under_way={0, 1}, orphaned=()
    )
    assert [admission.lose(replica) for replica in (0, 1)] == [[], []]


def test_a_batch_is_given_up_before_its_weights_exist_and_once():
    admission = Admission(groups_per_step=1, max_policy_age=1, window=1, steps=9, replicas=1)
    with pytest.raises(ValueError, match="step 1 has no batch"):
        admission.give_up(1)
    for ordinal in admission.admit(0, 2):
        admission.finish(ordinal)
    assert (admission.take(1), admission.take(2)) == ((0,), (1,))
    admission.give_up(1)
    assert (admission.take(1), admission.free_slots(0)) == (None, 1)
    admission.finish(*admission.admit(0, 1))
    assert admission.take(1) == admission.take(1) == (2,)
    admission.give_up(1)
    admission.finish(*admission.admit(0, 1))
    assert admission.take(1) == (3,)
    admission.serve(0, 1)
    with pytest.raises(ValueError, match="step 1 has no batch"):
        admission.give_up(1)


def test_a_step_whose_batch_was_given_up_comes_before_the_next():
    admission = Admission(groups_per_step=1, max_policy_age=1, window=2, steps=2, replicas=1)
    admission.finish(*admission.admit(0, 9))
    assert admission.take(1) == (0,)
    admission.give_up(1)
    admission.finish(*admission.admit(0, 9))
    assert admission.take(2) is None
    assert admission.take(1) == (1,)
    admission.serve(0, 1)
    admission.finish(*admission.admit(0, 9))
    assert admission.take(2) == (2,)
