"""The groups of a run: how far each has come, by the facts of its log.

    admitted ──▶ generated ──▶ committed ──▶ trained
        │            │             ├───────▶ handed over
        └────────────┴─────────────┴───────▶ dropped
                replayed ──────▶ committed

A group moves to the right only. Nothing is raised: where a fact cannot be true after the facts before it, it is taken
as it is and a `Problem` is kept.
"""

from dataclasses import dataclass
from enum import StrEnum

from storage import facts


class GroupState(StrEnum):
    """How far a group has come."""

    ADMITTED = "admitted"
    GENERATED = "generated"
    COMMITTED = "committed"
    HANDED_OVER = "handed_over"
    TRAINED = "trained"
    DROPPED = "dropped"

    def is_terminal(self) -> bool:
        """Whether nothing more is due for the group."""
        return self in (GroupState.HANDED_OVER, GroupState.TRAINED, GroupState.DROPPED)


_ORDER = {state: position for position, state in enumerate(GroupState)}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that cannot be true of a sound run."""

    kind: str
    """One word for the rule that is broken."""
    offender: str
    """Id or key of what breaks it."""
    sentence: str
    """What is wrong, in words."""


@dataclass(slots=True, kw_only=True)
class Group:
    """What the log says about one group."""

    drawn: tuple[int, str, str, str, int, int] | None = None
    """What the draw that admitted it says, as plain values: a record each would be most of a long run's memory."""
    state: GroupState = GroupState.ADMITTED
    """How far it has come."""
    commit: str | None = None
    """Key of the commit record that holds its episodes."""
    num_episodes: int = 0
    """Number of its committed episodes."""
    steps: tuple[int, ...] = ()
    """Steps that trained on it, in order; a retraining of the same step counts once."""
    policy_version: int | None = None
    """A version that none of its tokens is older than, by the part that it was generated in."""
    batched: tuple[int, ...] = ()
    """Steps that it was batched for, in the order in which that was logged."""
    released: str | None = None
    """Why it left the buffer, if it did."""
    reason: str | None = None
    """Why it was dropped."""
    dropped_at: int | None = None
    """Step for which it was considered when it was dropped, if any."""
    run_id: str | None = None
    """Run that generated it, where that is another one."""
    to_run: str | None = None
    """Run that it was handed over to, if it was."""

    @property
    def draw(self) -> facts.Draw | None:
        """The draw that admitted it; None if the log never did."""
        if self.drawn is None:
            return None
        draw, group_id, prompt_id, environment, index, level = self.drawn
        # They were valid when they came.
        return facts.Draw.model_construct(
            draw=draw,
            group_id=group_id,
            prompt_id=prompt_id,
            environment=environment,
            index=index,
            level=level,
        )

    @draw.setter
    def draw(self, draw: facts.Draw) -> None:
        self.drawn = (
            draw.draw, draw.group_id, draw.prompt_id, draw.environment, draw.index, draw.level,
        )  # fmt: skip


class Groups(dict[str, Group]):
    """Groups by id, in order of first mention.

    Example:
        groups = Groups(problems)
        groups.admit(draw)
        groups.drop(draw.group_id, fact)
    """

    def __init__(self, problems: list[Problem]) -> None:
        """What cannot be true is added to `problems`."""
        super().__init__()
        self.num_pending = 0
        """Number of groups that are admitted and neither trained, handed over nor dropped."""
        self.peak_pending = 0
        """Largest number of pending groups there ever was."""
        self._problems = problems

    def admit(self, draw: facts.Draw) -> Group:
        """A draw lets its group in."""
        group = self.setdefault(draw.group_id, Group())
        if group.drawn is not None:
            self._object(
                "admitted_twice", draw.group_id, f"group {draw.group_id} was admitted twice"
            )
            return group
        group.draw = draw
        self.num_pending += 1
        self.peak_pending = max(self.peak_pending, self.num_pending)
        return group

    def replay(self, fact: facts.Replayed) -> None:
        """Groups of another run are let in, committed as they are."""
        for draw in fact.draws:
            group = self.admit(draw)
            group.run_id = fact.run_id
            group.commit = fact.commit
            group.num_episodes = fact.group_size
            self.reach(draw.group_id, GroupState.COMMITTED)

    def reach(self, group_id: str, state: GroupState) -> Group:
        """Move a group to a later state; a group that is there or beyond stays where it is."""
        group = self.setdefault(group_id, Group())
        if group.drawn is None:
            self._object(
                "not_admitted", group_id, f"group {group_id} was {state} and never admitted before"
            )
        elif state.is_terminal() and not group.state.is_terminal():
            self.num_pending -= 1
        group.state = max(group.state, state, key=_ORDER.__getitem__)
        return group

    def commit(self, fact: facts.Committed) -> None:
        """Episodes of groups may be trained on."""
        for group_id in fact.group_ids:
            group = self.reach(group_id, GroupState.COMMITTED)
            if group.commit not in (None, fact.commit):
                sentence = f"group {group_id} was committed by {group.commit} and by {fact.commit}"
                self._object("committed_twice", group_id, sentence)
            group.commit = fact.commit
            group.num_episodes = fact.episodes // len(fact.group_ids)

    def hand_over(self, group_id: str, to_run: str) -> None:
        """Another run will train on a group."""
        group = self.reach(group_id, GroupState.HANDED_OVER)
        if group.commit is None or group.reason is not None or group.to_run is not None:
            sentence = f"group {group_id} was handed over to run {to_run}, and was not a committed one that is left"
            self._object("handed_over", group_id, sentence)
        group.to_run = to_run

    def drop(self, group_id: str, fact: facts.Dropped) -> None:
        """A group will never be trained on."""
        reason = fact.reason
        group = self.reach(group_id, GroupState.DROPPED)
        group.dropped_at = fact.step
        if group.steps:
            sentence = (
                f"group {group_id} was dropped as {reason} and trained on at step {group.steps[0]}"
            )
            self._object("trained_and_dropped", group_id, sentence)
        if group.reason is not None:
            sentence = f"group {group_id} was dropped as {group.reason} and then as {reason}"
            self._object("dropped_twice", group_id, sentence)
        group.reason = reason

    def batch(self, group_id: str, step: int) -> None:
        """A step is about to train on a group."""
        group = self.setdefault(group_id, Group())
        if group.released is not None:
            left = f"group {group_id} left the buffer as {group.released}"
            self._object("released", group_id, f"{left} before it was batched for step {step}")
        group.batched += (step,)

    def release(self, group_id: str, fact: facts.Released) -> None:
        """A group left the buffer; one that was in no batch is dropped."""
        group = self.setdefault(group_id, Group())
        if group.released is not None:
            sentence = f"group {group_id} left the buffer as {group.released} and as {fact.reason}"
            self._object("released", group_id, sentence)
        group.released = fact.reason
        if not group.batched:
            self.reach(group_id, GroupState.DROPPED)
            group.reason, group.dropped_at = fact.reason, fact.step

    def train(self, group_id: str, step: int) -> None:
        """A step trained on a group."""
        group = self.reach(group_id, GroupState.TRAINED)
        if group.commit is None:
            sentence = f"group {group_id} was trained on at step {step} and never committed before"
            self._object("not_committed", group_id, sentence)
        if group.reason is not None:
            sentence = (
                f"group {group_id} was trained on at step {step} and dropped as {group.reason}"
            )
            self._object("trained_and_dropped", group_id, sentence)
        if group.to_run is not None:
            sentence = f"group {group_id} was trained on at step {step} and handed over to run {group.to_run}"
            self._object("handed_over", group_id, sentence)
        if step not in group.steps:
            group.steps += (step,)

    def _object(self, kind: str, offender: str, sentence: str) -> None:
        self._problems.append(Problem(kind, offender, sentence))
