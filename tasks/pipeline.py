"""What the stages of the async regime share while they run at the same time: queues between them, and admission.

    generate ──parts──▶ score ──admission──▶ buffer ──batches──▶ train ──weights──▶ generate

Everything here can be told again: a stage that is tried again finds what it had not finished.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from forge_core.actors.messages import (
    AdvanceReply,
    AdvanceRequest,
    LoadReply,
    PublishReply,
    StoredPart,
)
from forge_core.admission import Admission
from forge_core.timeline import Interval, merged
from storage import facts, layout
from storage.groups import GroupState
from storage.ledger import Ledger
from tasks.batches import choose_batch, groups_without_signal
from tasks.calls import not_dropped, tokens_of
from tasks.collect import admitted, draw, generated
from tasks.learn import check_parity, published_fact
from tasks.references import StepBatch
from tasks.run import ActiveRun

_PARTS_PER_STEP = 4
"""Parts in which a step's groups are stored, where they finish evenly: scoring begins after the first."""
_BUDGET_SECONDS = 0.25
"""Longest time in which a replica hears of no new weights or slots."""
_TELL_SECONDS = 5.0
"""Longest time for which the log does not tell what a replica does."""
_TOO_LONG_STEPS = 4
"""Steps' worth of prompts that may be too long in a row."""
_HOLD_SECONDS = 2.0
"""Longest time in which a finished group waits for others to fill a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A generated part that is not scored yet."""

    round: int
    replica: int
    stored: StoredPart


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """The queues of one run."""

    run: ActiveRun
    admission: Admission
    parts: deque[Part] = field(default_factory=deque)
    """To be scored, oldest first."""
    batches: dict[int, StepBatch] = field(default_factory=dict)
    """To be trained on, by step."""
    requests: dict[int, AdvanceRequest] = field(default_factory=dict)
    """By replica, what it was asked and has not answered."""
    num_requests: int = 0
    """How many were ever made."""
    under_way: dict[int, int] = field(default_factory=dict)
    """By replica, groups that it has begun and not stored."""
    tokens: int = 0
    """Response tokens since the last batch."""
    seconds: float = 0.0
    """Engine time since the last batch, summed over replicas."""
    intervals: dict[int, list[Interval]] = field(default_factory=dict)
    """By replica, what it did and the log does not tell yet."""
    told_at: float = 0.0
    """When the log was last told, on the monotonic clock."""
    openings: dict[int, int] = field(default_factory=dict)
    """By replica, how often it had been opened when what is known of it began."""
    attempts: Counter[str] = field(default_factory=Counter)
    """By group, how often it was begun and lost."""
    num_filtered: int = 0
    """Groups dropped for want of a signal since a step has had its batch."""
    too_long_in_a_row: int = 0
    """Prompts dropped as too long since one was not."""
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @classmethod
    def of(cls, run: ActiveRun) -> Pipeline:
        """The pipeline of a run whose generators all serve the step that it completed last.

        Empty for a new run. Of one that goes on it has what the log tells: groups to be trained on, parts to be
        scored, batches that were chosen; and what was under way in engines that are gone is begun again.
        """
        ledger = run.ledger
        line = cls(run=run, admission=admission_of(run), num_requests=ledger.last_round + 1)
        for fact in ledger.generated:
            name = layout.part_name(fact.round, fact.replica)
            if layout.commit_key(run.run_id, name) not in ledger.commits:
                stored = stored_part(fact)
                line.parts.append(Part(round=fact.round, replica=fact.replica, stored=stored))
        line.openings = {i: mesh.openings for i, mesh in enumerate(run.meshes.generators)}
        if run.recovery is not None:
            run.recovery.on_change = line.tell
        return line

    @property
    def put(self) -> PublishReply | None:
        """The newest weights that generators may fetch."""
        return self.run.put

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for others to make it so."""
        async with self._changed:
            await self._changed.wait_for(holds)

    async def tell(self) -> None:
        """Have those that wait look again."""
        async with self._changed:
            self._changed.notify_all()

    def has_lost(self, replica: int) -> bool:
        """Whether a replica has failed, or was started again, since it was last heard of."""
        mesh = self.run.meshes.generators[replica]
        return mesh.has_failed() or mesh.openings != self.openings[replica]

    async def lose(self, replica: int) -> None:
        """A replica has failed: what it was generating may be adopted by others."""
        self._lose(replica)
        self._tell_published()
        await self.tell()

    async def take_back(self, replica: int) -> None:
        """A replica that has failed serves again, with the weights that it loaded for that."""
        self._lose(replica)
        self.openings[replica] = self.run.meshes.generators[replica].openings
        loaded = self.run.loads.get(replica)
        version = self.run.ledger.base_step if loaded is None else loaded.policy_version
        self.admission.serve(replica, version)
        self._tell_published()
        await self.tell()

    def _lose(self, replica: int) -> None:
        orphans = self.admission.lose(replica)
        self.attempts.update(layout.group_id(self.run.run_id, ordinal) for ordinal in orphans)
        self.requests.pop(replica, None)
        self.under_way.pop(replica, None)
        self.run.meshes.generators[replica].load = 0.0

    def all_serve(self, version: int) -> bool:
        """Whether every replica serves this version or a newer one."""
        return all(served >= version for served in self.admission.served.values())

    def has_work(self, replica: int) -> bool:
        """Whether there is anything that a replica could be asked."""
        return (
            replica in self.requests
            or self.under_way.get(replica, 0) > 0
            or self._awaits_weights(replica)
            or self._room(replica) > 0
            or bool(self.admission.orphans(replica))
        )

    def _awaits_weights(self, replica: int) -> bool:
        put = self.put
        return put is not None and put.manifest.policy_version > self.admission.served[replica]

    def _room(self, replica: int) -> int:
        """How many groups a replica may begin now: its share of the free slots, and no more than it decodes at once."""
        free = self.admission.free_slots(replica)
        share = math.ceil(free / self.run.config.generators.replicas)
        return min(share, self._at_once(replica))

    def _at_once(self, replica: int) -> int:
        """How many groups more a replica can decode at the same time."""
        config = self.run.config
        at_once = max(1, config.generators.max_sequences // config.group_size)
        return max(0, at_once - self.under_way.get(replica, 0))

    def request(self, replica: int) -> AdvanceRequest:
        """What a replica is to be asked next, its new draws admitted; the same again until it is answered."""
        if (asked := self.requests.get(replica)) is not None:
            self.requests[replica] = replace(
                asked,
                attempt=asked.attempt + 1,
                # They may have been put anew since, in another store.
                manifest=self.put.manifest if self.put and asked.manifest else None,
            )
        else:
            self.requests[replica] = self._next_request(replica)
        request = self.requests[replica]
        # Here, and not when it is made: the store may have failed, and then this is asked again.
        unknown = [d for d in request.prompts if d.group_id not in self.run.ledger.groups]
        if unknown:
            self.run.append(admitted(request.seq, unknown))
        return request

    def _next_request(self, replica: int) -> AdvanceRequest:
        run, config = self.run, self.run.config
        seq, first = self.num_requests, self.admission.admitted
        room = self._room(replica)
        orphans = self.admission.orphans(replica)[: self._at_once(replica)]
        # Drawn before they are admitted: an environment may fail.
        drawn = [
            replace(each, attempt=1 + self.attempts[each.group_id])
            for each in draw(run, [*orphans, *range(first, first + max(0, room - len(orphans)))])
        ]
        self.admission.adopt(replica, orphans)
        self.admission.admit(replica, len(drawn) - len(orphans))
        self.num_requests += 1
        return AdvanceRequest(
            run_id=run.run_id,
            seq=seq,
            key_prefix=layout.generated_prefix(run.run_id, layout.part_name(seq, replica)),
            prompts=tuple(drawn),
            num_samples=config.group_size,
            manifest=self.put.manifest if self.put and self._awaits_weights(replica) else None,
            probe=run.probe,
            part_groups=math.ceil(config.groups_per_step / _PARTS_PER_STEP),
            budget_seconds=_BUDGET_SECONDS,
            hold_seconds=_HOLD_SECONDS,
        )

    async def answered(self, replica: int, reply: AdvanceReply) -> None:
        """Log what a replica has done, and pass it on; in this order, for the store may fail and this come again.

        Raises BoundExceeded if new weights arrived at all replicas and one of them disagrees with the trainer,
        ValueError if no prompt is short enough.
        """
        run = self.run
        new: list[facts.Fact] = []
        if reply.stored is not None and not self._is_logged(reply.stored):
            new.append(generated(reply.seq, replica, reply.stored))
        if dropped := not_dropped(run, reply.too_long):
            new.append(facts.Dropped(group_ids=dropped, reason="prompt_too_long", step=None))
        loads = {**run.loads, replica: reply.loaded} if reply.loaded else run.loads
        published = self._published(loads) if reply.loaded is not None else None
        if published is not None:
            new.append(published)
        self.intervals.setdefault(replica, []).extend(reply.intervals)
        # Many answers tell nothing but how time passed: those are told together.
        self.log(*new, is_urgent=bool(new))
        if published is not None:
            check_parity(run, published)
        del self.requests[replica]
        run.loads = loads
        self.under_way[replica] = reply.num_under_way
        mesh = run.meshes.generators[replica]
        mesh.load = tokens_of(run, reply.num_under_way * run.config.group_size)
        self.seconds += reply.seconds
        if reply.stored is not None:
            self.parts.append(Part(round=reply.seq, replica=replica, stored=reply.stored))
            self.tokens += reply.stored.response_tokens
            mesh.produce(reply.stored.response_tokens)
        for group_id in reply.too_long:
            self.admission.drop(self._ordinal(group_id))
        if reply.loaded is not None:
            self.admission.serve(replica, reply.loaded.policy_version)
        self._check_prompts(reply)
        await self.tell()

    def log(self, *new: facts.Fact, is_urgent: bool = True) -> None:
        """Log facts, and with them what replicas did since that was last told; without urgency only now and then."""
        if not is_urgent and time.monotonic() - self.told_at < _TELL_SECONDS:
            return
        meshes = self.run.meshes.generators
        told = []
        for replica, intervals in self.intervals.items():
            name = meshes[replica].name
            # What an entry told that was written although its writing failed is not told again.
            known = self.run.ledger.meshes.get(name)
            since = known[-1].end if known else 0.0
            if fresh := [each for each in intervals if each.start >= since]:
                told.append(self.run.intervals(name, merged(fresh)))
        if new or told:
            self.run.append(*told, *new)
        self.intervals.clear()
        self.told_at = time.monotonic()

    def _check_prompts(self, reply: AdvanceReply) -> None:
        """Refuse to draw for ever from an environment none of whose prompts fits."""
        self.too_long_in_a_row += len(reply.too_long)
        if reply.num_under_way or reply.stored is not None:
            self.too_long_in_a_row = 0
        if self.too_long_in_a_row > _TOO_LONG_STEPS * self.run.config.groups_per_step:
            raise ValueError(
                f"sampling.max_tokens {self.run.config.sampling.max_tokens} leaves no room for the last "
                f"{self.too_long_in_a_row} prompts drawn; lower it or shorten environment.prompt_template"
            )

    def _is_logged(self, stored: StoredPart) -> bool:
        return self.run.ledger.groups[stored.group_ids[0]].state != GroupState.ADMITTED

    def _published(self, loads: dict[int, LoadReply]) -> facts.Published | None:
        """The fact that the newest weights are served, once every living replica has loaded them and none said so."""
        put = self.put
        living = sorted(self.admission.served)
        if put is None or not living or not loads.keys() >= set(living):
            return None
        version = put.manifest.policy_version
        if {loads[replica].policy_version for replica in living} != {version}:
            return None
        if self.run.ledger.published[-1].policy_version == version:
            return None
        return published_fact(put, [loads[replica] for replica in living])

    def _tell_published(self) -> None:
        """The last that was waited for may have loaded the newest weights, or be gone."""
        if (published := self._published(self.run.loads)) is not None:
            self.log(published)
            check_parity(self.run, published)

    def next_part(self, under_way: Sequence[Part]) -> Part | None:
        """The part to be scored next, beside those under way; None while there is none.

        One in whose scoring the verifier has failed goes alone, so that no other is blamed for what it does.
        """
        lost = [part for part in self.parts if self._is_suspect(part)]
        if lost or any(map(self._is_suspect, under_way)):
            return lost[0] if lost and not under_way else None
        return next((part for part in self.parts if part not in under_way), None)

    def _is_suspect(self, part: Part) -> bool:
        return self.run.scorings_lost[layout.part_name(part.round, part.replica)] > 0

    async def scored(self, part: Part) -> None:
        """A part is committed; its groups are ready to be trained on, or give way to others for want of a signal.

        One that could not be scored has none: its groups were dropped as failed.
        """
        groups = self.run.ledger.groups
        failed = tuple(each for each in part.stored.group_ids if groups[each].reason == "failed")
        scored = tuple(each for each in part.stored.group_ids if each not in failed)
        for group_id in (*failed, *self._filtered(scored)):
            self.admission.drop(self._ordinal(group_id))
        for group_id in part.stored.group_ids:
            self.admission.finish(self._ordinal(group_id))
        if part in self.parts:
            self.parts.remove(part)
        await self.tell()

    def _filtered(self, group_ids: tuple[str, ...]) -> tuple[str, ...]:
        """Drop groups without a signal, as many as the config allows before a step takes what there is."""
        run, groups = self.run, self.run.ledger.groups
        algorithm = run.config.algorithm
        most = algorithm.dynamic_sampling_attempts * run.config.groups_per_step - self.num_filtered
        if most <= 0:
            return ()
        flat = groups_without_signal(run, group_ids)[:most]
        if new := tuple(group_id for group_id in flat if groups[group_id].reason is None):
            run.append(facts.Dropped(group_ids=new, reason="no_signal", step=None))
        self.num_filtered += len(flat)
        return flat

    def take_speed(self) -> float:
        """Response tokens per second of engine time since this was last asked, of all replicas together."""
        replicas = self.run.config.generators.replicas
        speed = replicas * self.tokens / self.seconds if self.seconds else 0.0
        self.tokens, self.seconds = 0, 0.0
        return speed

    def can_choose(self, step: int) -> bool:
        """Whether the batch of a step can be made: the log has it, or enough groups are ready."""
        return step in self.run.ledger.batches or self.admission.take(step) is not None

    def choose(self, step: int) -> None:
        """Make the batch of a step."""
        groups = self.run.ledger.considered(step)
        if step not in self.run.ledger.batches:
            ordinals = self.admission.take(step) or ()
            taken = [layout.group_id(self.run.run_id, ordinal) for ordinal in ordinals]
            groups = [*groups, *taken]
        chosen = choose_batch(self.run, step, groups, tokens_per_second=self.take_speed())
        assert chosen is not None, "it may be short"
        self.batches[step] = chosen
        self.num_filtered = 0

    def is_given_up(self, step: int) -> bool:
        """Whether the batch that a step had was dropped, so that it needs another."""
        return step in self.batches and step not in self.run.ledger.batches

    def give_up(self, step: int) -> None:
        """The batch of a step was dropped: the next that is ready is for it."""
        self.admission.give_up(step)
        del self.batches[step]

    def _ordinal(self, group_id: str) -> int:
        admitted_draw = self.run.ledger.groups[group_id].draw
        assert admitted_draw is not None
        return admitted_draw.draw


def admission_of(run: ActiveRun) -> Admission:
    """Admission as the log tells it, for replicas that all serve the step that the run completed last."""
    config, ledger = run.config, run.ledger
    admission = Admission(
        groups_per_step=config.groups_per_step,
        max_policy_age=config.max_policy_age,
        window=config.window,
        steps=config.steps,
        replicas=config.generators.replicas,
        first_step=config.first_step,
    )
    admission.resume(
        taken=max(ledger.batches, default=ledger.base_step),
        served=ledger.current_step,
        admitted=ledger.base_step * config.groups_per_step + len(ledger.groups),
        dropped=sum(
            group.reason is not None and group.dropped_at is None
            for group in ledger.groups.values()
        )
        + config.groups_per_step * ledger.nonfinite.total(),
        given_up=[
            step
            for step in ledger.nonfinite
            if ledger.current_step < step < max(ledger.batches, default=0)
            and step not in ledger.batches
        ],
        ready={ordinal for ordinal, state in _unbatched(ledger) if state is GroupState.COMMITTED},
        # Scored again or not at all: nothing of them is to be generated.
        under_way={
            ordinal for ordinal, state in _unbatched(ledger) if state is GroupState.GENERATED
        },
        orphaned={ordinal for ordinal, state in _unbatched(ledger) if state is GroupState.ADMITTED},
    )
    return admission


def _unbatched(ledger: Ledger) -> Iterator[tuple[int, GroupState]]:
    """Ordinal and state of each group that no step has considered and that is not dropped."""
    batched = {group_id for groups in ledger.batches.values() for group_id in groups}
    # A buffer was given some that were in no batch yet.
    batched |= {kept.group_id for fact in ledger.buffered.values() for kept in fact.kept or ()}
    for group_id, group in ledger.groups.items():
        if group.draw is not None and not group.state.is_terminal() and group_id not in batched:
            yield group.draw.draw, group.state


def stored_part(fact: facts.Generated) -> StoredPart:
    """What a replica told of a part that the log has."""
    return StoredPart(
        part=fact.part,
        group_ids=fact.group_ids,
        policy_version_min=fact.policy_version_min,
        policy_version_max=fact.policy_version_max,
        prompt_tokens=fact.prompt_tokens,
        response_tokens=fact.response_tokens,
        seconds=0.0,
    )
