"""What the async stages share loses nothing when the store fails between an answer and its log entry.

The meshes are left out; log, ledger and admission are real.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest

from forge_core.actors.messages import AdvanceReply, LoadReply, PublishReply, StoredPart
from forge_core.config import RunConfig
from forge_core.environments.base import Prompt
from forge_core.timeline import Interval
from forge_core.weights.manifest import Manifest
from storage import facts, layout
from storage.groups import GroupState
from storage.ledger import Ledger
from storage.log import RunLog, read_entries, read_incarnations
from storage.objects import LocalStore
from storage.records import Controller, PartRef
from tasks.learn import BoundExceeded
from tasks.pipeline import Part, Pipeline
from tasks.run import ActiveRun

CONFIG = RunConfig.model_validate(
    {"regime": "async", "groups_per_step": 2, "group_size": 2, "steps": 3, "trainer": {"ranks": 1}}
)
MANIFEST = Manifest(policy_version=1, slots=(), bucket_bytes=(64,), digest="d1")
PROBE = ((-0.5,) * 300,)
PUT = PublishReply(
    manifest=MANIFEST, probe_logprobs=PROBE, probe_entropy=0.6, seconds=0.5, intervals=()
)
LOADED = LoadReply(policy_version=1, digest="d1", probe_logprobs=PROBE, seconds=0.25)


class Environment:
    def train_prompt(self, ordinal: int) -> Prompt:
        return Prompt(
            prompt_id=f"p{ordinal}", text="", answer="", target="", index=ordinal,
            environment="e", metadata={},
        )  # fmt: skip


class Failing:
    """A log that cannot write the next entry, once told so."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self.fails = False

    def append(self, *new: Any) -> Any:
        if self.fails:
            self.fails = False
            raise OSError("the store does not answer")
        return self._log.append(*new)

    def settle(self) -> Any:
        return self._log.settle()


@dataclasses.dataclass
class Mesh:
    name: str
    openings: int = 1
    is_dead: bool = False
    load: float = 0.0
    produced: int = 0

    def produce(self, number: int) -> None:
        self.produced += number

    def has_failed(self) -> bool:
        return self.is_dead


@pytest.fixture
def line(tmp_path: Path) -> Pipeline:
    store = LocalStore(tmp_path)
    log = RunLog.claim(store, "r", Controller.this_process(versions={}, git_commit=None))
    run = ActiveRun(
        run_id="r",
        config=CONFIG,
        store_uri=store.uri,
        store=store,
        folder=store.root,
        log=cast(RunLog, Failing(log)),
        ledger=Ledger.fold([], read_incarnations(store, "r")),
        meshes=cast(Any, type("Meshes", (), {"generators": (Mesh("generator-0"),)})),
        environment=cast(Any, Environment()),
    )
    run.append(
        facts.Published(policy_version=0, weights_digest="d0", parity=None, bytes=1, seconds=0.1)
    )
    return Pipeline.of(run)


def _fail_next(line: Pipeline) -> None:
    cast(Failing, line.run.log).fails = True


def _stored(*groups: str) -> StoredPart:
    return StoredPart(
        part=PartRef(key="part", sha256="s", bytes=1, rows=2 * len(groups)), group_ids=groups,
        policy_version_min=0, policy_version_max=0, prompt_tokens=4, response_tokens=6, seconds=0.5,
    )  # fmt: skip


def _reply(seq: int, **what: Any) -> AdvanceReply:
    given = {"stored": None, "too_long": (), "loaded": None, "num_under_way": 0, **what}
    return AdvanceReply(seq=seq, seconds=0.5, intervals=(), **given)


def test_draws_that_could_not_be_logged_are_asked_for_again_under_the_same_number(
    line: Pipeline,
) -> None:
    _fail_next(line)
    with pytest.raises(OSError):
        line.request(0)
    request = line.request(0)
    assert [drawn.draw for drawn in request.prompts] == [0, 1, 2, 3]
    assert request.seq == 0
    assert line.run.ledger.groups.keys() == {d.group_id for d in request.prompts}
    assert line.request(0) == dataclasses.replace(request, attempt=3)
    assert line.run.ledger.groups.num_pending == 4


def test_an_answer_that_could_not_be_logged_is_taken_once_when_it_comes_again(
    line: Pipeline,
) -> None:
    groups = [drawn.group_id for drawn in line.request(0).prompts]
    reply = _reply(0, stored=_stored(*groups[:2]), too_long=(groups[2],), num_under_way=1)
    _fail_next(line)
    with pytest.raises(OSError):
        asyncio.run(line.answered(0, reply))
    assert not line.parts and line.has_work(0)
    asyncio.run(line.answered(0, reply))
    assert len(line.parts) == 1
    states = [line.run.ledger.groups[group].state for group in groups]
    assert states == [
        GroupState.GENERATED,
        GroupState.GENERATED,
        GroupState.DROPPED,
        GroupState.ADMITTED,
    ]
    assert line.admission.dropped == 1
    assert line.has_work(0)


def test_facts_that_were_written_all_the_same_are_not_written_again(line: Pipeline) -> None:
    groups = [drawn.group_id for drawn in line.request(0).prompts]
    reply = _reply(0, stored=_stored(*groups[:2]), too_long=(groups[2],))
    request = line.requests[0]
    asyncio.run(line.answered(0, reply))
    line.requests[0] = request
    asyncio.run(line.answered(0, reply))
    kinds = [fact.kind for entry in read_entries(line.run.store, "r") for fact in entry.facts]
    assert kinds.count("generated") == kinds.count("dropped") == 1
    assert not line.run.ledger.problems


def test_weights_count_as_published_once_all_have_them_and_agree(line: Pipeline) -> None:
    ordinals = [drawn.draw for drawn in line.request(0).prompts]
    asyncio.run(line.answered(0, _reply(0)))
    for ordinal in ordinals[:2]:
        line.admission.finish(ordinal)
    assert line.admission.take(1) == (0, 1)
    line.run.put = PUT
    assert line.request(0).manifest is MANIFEST
    _fail_next(line)
    with pytest.raises(OSError):
        asyncio.run(line.answered(0, _reply(1, loaded=LOADED)))
    assert not line.all_serve(1)
    asyncio.run(line.answered(0, _reply(1, loaded=LOADED)))
    assert line.all_serve(1)
    _, published = line.run.ledger.published
    assert (published.policy_version, published.seconds) == (1, 0.75)


def test_what_a_lost_replica_had_begun_is_begun_again_under_its_ids(line: Pipeline) -> None:
    first = line.request(0)
    mesh = cast(Any, line.run.meshes.generators[0])
    mesh.is_dead = True
    assert line.has_lost(0)
    asyncio.run(line.lose(0))
    assert line.all_serve(1), "it holds nobody up"
    mesh.is_dead, mesh.openings = False, 2
    assert line.has_lost(0), "a successor knows nothing of what it was asked"
    asyncio.run(line.take_back(0))
    assert not line.has_lost(0)
    again = line.request(0)
    assert again.seq == first.seq + 1
    assert [d.group_id for d in again.prompts] == [d.group_id for d in first.prompts]
    assert {d.attempt for d in again.prompts} == {2}
    assert line.run.ledger.groups.num_pending == len(first.prompts)


def test_a_replica_that_disagrees_stops_the_run(line: Pipeline) -> None:
    line.run.put = PUT
    line.admission.taken = 1
    line.request(0)
    off = dataclasses.replace(LOADED, probe_logprobs=((-0.9,) * 300,))
    with pytest.raises(BoundExceeded, match="version 1"):
        asyncio.run(line.answered(0, _reply(0, loaded=off)))


def test_an_environment_that_fails_to_draw_costs_no_draw(line: Pipeline) -> None:
    environment = line.run.environment
    line.run.environment = cast(Any, None)
    with pytest.raises(AttributeError):
        line.request(0)
    line.run.environment = environment
    assert [drawn.draw for drawn in line.request(0).prompts] == [0, 1, 2, 3]


def test_prompts_that_never_fit_are_refused_instead_of_drawn_for_ever(line: Pipeline) -> None:
    with pytest.raises(ValueError, match="leaves no room for the last"):
        for _ in range(20):
            request = line.request(0)
            groups = tuple(drawn.group_id for drawn in request.prompts)
            asyncio.run(line.answered(0, _reply(request.seq, too_long=groups)))


def test_time_that_passes_without_news_is_told_together(line: Pipeline) -> None:
    stretches = [Interval(kind="generate", start=float(i), end=float(i + 1)) for i in range(3)]
    line.told_at = float("inf")
    for stretch in stretches:
        request = line.request(0)
        reply = dataclasses.replace(_reply(request.seq, num_under_way=1), intervals=(stretch,))
        asyncio.run(line.answered(0, reply))
    assert not line.run.ledger.meshes
    line.log()
    assert [(i.start, i.end) for i in line.run.ledger.meshes["generator-0"]] == [(0.0, 3.0)]
    line.intervals[0] = stretches
    line.log()
    assert len(line.run.ledger.meshes["generator-0"]) == 1


def test_parts_are_scored_side_by_side_but_what_the_verifier_died_of_goes_alone(
    line: Pipeline,
) -> None:
    stored = StoredPart(
        part=PartRef(key="part", sha256="s", bytes=1, rows=2), group_ids=("g",), policy_version_min=0,
        policy_version_max=0, prompt_tokens=4, response_tokens=6, seconds=0.5,
    )  # fmt: skip
    first, second, third = (Part(round=n, replica=0, stored=stored) for n in range(3))
    line.parts.extend((first, second, third))
    assert line.next_part([]) == first
    assert line.next_part([first]) == second
    assert line.next_part([first, second, third]) is None
    line.run.scorings_lost[layout.part_name(1, 0)] += 1
    assert line.next_part([first]) is None
    assert line.next_part([]) == second
    assert line.next_part([second]) is None
    line.parts.remove(second)
    assert line.next_part([]) == first
