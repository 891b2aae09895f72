"""`verify` finds nothing wrong with a sound run, and each fault that is planted in one."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storage import facts, layout
from storage.episodes import SCHEMA, Figures
from storage.facts import Interval
from storage.log import RunLog
from storage.objects import LocalStore
from storage.parts import commit_part, write_part
from storage.records import Controller, FileRef
from storage.runs import store_config
from storage.summary import write_run_json
from storage.verify import Report, verify

GROUP_SIZE = 2
CONFIG = {"regime": "async", "group_size": GROUP_SIZE, "groups_per_step": 2, "max_policy_age": 1}
PART_0, PART_1 = "round-000000", "round-000001"


def _table(draws: list[int], version: int, *, held_out: bool = False) -> pa.Table:
    """Two episodes for each draw, all of whose tokens are of one policy version."""
    rows = [
        {
            "episode_id": layout.episode_id(layout.group_id("run", draw), sample),
            "run_id": "run",
            "group_id": layout.group_id("run", draw),
            "draw": draw,
            "sample": sample,
            "environment": "sums",
            "prompt_id": f"{'held-out' if held_out else 'p'}-{draw}",
            "prompt": "1+1=",
            "metadata": "{}",
            "response": "2",
            "prompt_token_ids": [5, 6],
            "response_token_ids": [7, 8],
            "logprobs": [-0.5, -1.0],
            "mask": [True, True],
            "token_policy_versions": [version + 1, version],
            "turns": [],
            "finish_reason": "stop",
            "reward": 0.1 * draw + sample,
            "scores": [],
            "seed": 17,
            "attempts": 1,
            "generate_seconds": 0.5,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        }
        for draw in draws
        for sample in range(GROUP_SIZE)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


class _MadeRun:
    """A finished run of two steps and two incarnations, written as a controller would.

    Draws 0 and 1 make step 1 at age 0, draws 2 and 3 step 2 at age 1, and draw 4 is dropped.
    """

    def __init__(self, store: LocalStore, *, cut: Callable[[pa.Table], pa.Table] = lambda t: t):
        self.store = store
        self.cut = cut
        store_config(store, "run", CONFIG)
        self.log = self._claim()
        self._checkpoint(0)
        self.evaluate("initial", held_out=True)
        self._round(0, [0, 1], version=0)
        self.train(1, [0, 1], age=0)
        self.log = self._claim()
        self._round(1, [2, 3, 4], version=0)
        self.drop(4, "no_signal")
        self.train(2, [2, 3], age=1)
        self._checkpoint(2)
        self.log.append(facts.End(status="finished", reason=None))
        write_run_json(store, "run")

    def _claim(self) -> RunLog:
        controller = Controller.this_process(versions={}, git_commit=None)
        log = RunLog.claim(self.store, "run", controller)
        start = log.incarnation.controller.claimed_at
        startup = Interval(kind="startup", start=start, end=start + 1e-4)
        log.append(
            facts.Started(run_id="run", meshes=("trainer",)),
            facts.Intervals(mesh="trainer", intervals=(startup,)),
        )
        return log

    def _round(self, number: int, draws: list[int], version: int) -> None:
        self.admit(number, draws)
        table = self.cut(_table(draws, version))
        figures = Figures.of(table)
        generated = facts.Generated(
            round=number,
            replica=0,
            part=write_part(self.store, layout.generated_prefix("run", f"r{number}"), table),
            group_ids=figures.group_ids,
            policy_version_min=figures.policy_version_min,
            policy_version_max=figures.policy_version_max,
            prompt_tokens=figures.prompt_tokens,
            response_tokens=figures.response_tokens,
        )
        commit = commit_part(self.store, "run", f"round-{number:06d}", table)
        committed = facts.Committed(
            round=number,
            commit=layout.commit_key("run", commit.key),
            group_ids=commit.group_ids,
            episodes=commit.rows,
            score_set="run",
        )
        self.log.append(generated, committed)

    def admit(self, number: int, draws: list[int]) -> None:
        self.log.append(
            facts.Admitted(
                round=number,
                draws=tuple(
                    facts.Draw(
                        draw=draw,
                        group_id=layout.group_id("run", draw),
                        prompt_id=f"p-{draw}",
                        environment="sums",
                        index=draw,
                    )
                    for draw in draws
                ),
            )
        )

    def train(self, step: int, draws: list[int], *, age: int, digest: str = "w") -> None:
        self.log.append(
            facts.Step(
                step=step,
                group_ids=tuple(layout.group_id("run", draw) for draw in draws),
                score_set="run",
                weights_digest=f"{digest}{step}",
                policy_version=step,
                optimizer_updates=1,
                age_max=age,
                age_mean=float(age),
                metrics={},
                checkpoint=None,
            )
        )

    def drop(self, draw: int, reason: str) -> None:
        group_ids = (layout.group_id("run", draw),)
        self.log.append(facts.Dropped(group_ids=group_ids, reason=reason, step=None))

    def evaluate(self, name: str, *, held_out: bool, greedy: float = 1.05) -> None:
        prefix = layout.evaluation_prefix("run", name)
        part = write_part(self.store, prefix, _table([0, 1], 0, held_out=held_out))
        self.log.append(
            facts.Evaluated(
                name=name,
                policy_version=0,
                sampled=0.05,
                greedy=greedy,
                num_prompts=2,
                parts=(part,),
            )
        )

    def _checkpoint(self, step: int) -> None:
        key = layout.checkpoint_folder("run", step)
        self.store.put_if_absent(f"{key}weights", b"123")
        sha256 = "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3"
        file = FileRef(key=f"{key}weights", sha256=sha256, bytes=3)
        self.log.append(
            facts.Checkpoint(step=step, key=key, weights_digest=f"w{step}", files=(file,))
        )

    def mesh(self, *intervals: tuple[float, float]) -> None:
        """Log trainer intervals, in seconds after the first claim."""
        start = self.log.incarnation.controller.claimed_at
        self.log.append(
            facts.Intervals(
                mesh="trainer",
                intervals=tuple(
                    Interval(kind="train", start=start + first, end=start + last)
                    for first, last in intervals
                ),
            )
        )

    def part(self, commit: str) -> Path:
        """The file of a commit's part."""
        (key,) = self.store.keys(layout.episodes_prefix("run", commit))
        return self.store.local_path(key)

    def edit(self, key: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change a JSON object behind the store's back."""
        content = json.loads(self.store.read(key))
        change(content)
        self.store.replace(key, json.dumps(content).encode())


@pytest.fixture
def run(tmp_path: Path) -> _MadeRun:
    return _MadeRun(LocalStore(tmp_path))


def _kinds(run: _MadeRun, *, but: tuple[str, ...] = ()) -> list[str]:
    """Kinds of the problems of a run, without those of facts that come after its run.json."""
    return [each.kind for each in verify(run.store, "run").problems if each.kind not in but]


def _sentences(report: Report, kind: str) -> str:
    return " | ".join(each.sentence for each in report.problems if each.kind == kind)


def test_a_sound_run_has_no_problem(run: _MadeRun) -> None:
    report = verify(run.store, "run")
    assert report.problems == []
    assert report.ok
    assert report.counted["entries"] == 13
    assert report.counted["incarnations"] == 2
    assert report.counted["groups"] == 5
    assert report.counted["steps"] == 2
    assert report.counted["parts"] == 5
    assert report.counted["episodes"] == 24
    assert report.counted["checkpoints"] == 2


def test_a_truncated_part_is_found(run: _MadeRun) -> None:
    path = run.part(PART_0)
    path.write_bytes(path.read_bytes()[:-10])
    report = verify(run.store, "run")
    assert [each.kind for each in report.problems] == ["part"]
    assert path.name in _sentences(report, "part")


def test_an_altered_part_is_found(run: _MadeRun) -> None:
    path = run.part(PART_0)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    report = verify(run.store, "run")
    assert "other bytes" in _sentences(report, "part")


def test_a_removed_part_is_found(run: _MadeRun) -> None:
    run.part(PART_1).unlink()
    assert _kinds(run) == ["part"]


def test_a_removed_commit_is_found(run: _MadeRun) -> None:
    run.store.local_path(layout.commit_key("run", PART_1)).unlink()
    assert _kinds(run) == ["part"]


def test_a_commit_that_says_other_things_than_its_part_is_found(run: _MadeRun) -> None:
    run.edit(layout.commit_key("run", PART_0), lambda commit: commit.update(reward_mean=0.9))
    assert _kinds(run) == ["commit"]


@pytest.mark.parametrize(("incarnation", "seq"), [(0, 2), (0, 4), (1, 2)])
def test_a_missing_entry_is_found(run: _MadeRun, incarnation: int, seq: int) -> None:
    key = layout.entry_key("run", incarnation, seq)
    run.store.local_path(key).unlink()
    assert key in _sentences(verify(run.store, "run"), "missing_entry")


def test_a_missing_end_is_found_by_run_json(run: _MadeRun) -> None:
    run.store.local_path(layout.entry_key("run", 1, 6)).unlink()
    assert 'status = "finished"; the log says "running"' in _sentences(
        verify(run.store, "run"), "run_json"
    )


def test_an_altered_entry_is_found(run: _MadeRun) -> None:
    key = layout.entry_key("run", 0, 4)
    run.edit(key, lambda entry: entry["facts"][0].update(surplus=1))
    assert key in _sentences(verify(run.store, "run"), "entry")
    run.edit(key, lambda entry: entry["facts"][0].pop("surplus"))
    run.edit(key, lambda entry: entry["facts"][0].update(response_tokens=1))
    assert _kinds(run) == ["figures", "run_json"]


def test_a_group_that_was_trained_twice_is_found(run: _MadeRun) -> None:
    run.train(3, [3], age=2)
    report = verify(run.store, "run")
    assert "run-00000003 was trained on at steps 2, 3" in _sentences(report, "trained_twice")


def test_a_group_that_is_twice_in_a_batch_is_found(run: _MadeRun) -> None:
    run.train(2, [2, 2], age=1)
    assert "in the batch of step 2 2 times" in _sentences(verify(run.store, "run"), "trained_twice")


def test_an_age_above_the_bound_is_found(run: _MadeRun) -> None:
    run.edit(layout.config_key("run"), lambda config: config.update(max_policy_age=0))
    report = verify(run.store, "run")
    assert "step 2 trained on group run-00000002 at age 1" in _sentences(report, "age")
    assert "step 1" not in _sentences(report, "age")


def test_an_age_that_was_logged_wrongly_is_found(run: _MadeRun) -> None:
    key = layout.entry_key("run", 1, 4)
    run.edit(key, lambda entry: entry["facts"][0].update(age_max=0, age_mean=0.0))
    assert "its episodes have 1 and 1.0" in _sentences(verify(run.store, "run"), "age")


def test_a_group_that_was_dropped_and_trained_is_found(run: _MadeRun) -> None:
    run.drop(2, "stale")
    assert "run-00000002" in _sentences(verify(run.store, "run"), "trained_and_dropped")


def test_a_short_group_is_found(tmp_path: Path) -> None:
    run = _MadeRun(LocalStore(tmp_path), cut=lambda table: table.slice(1))
    report = verify(run.store, "run")
    assert [each.offender for each in report.problems] == ["run-00000000", "run-00000002"]
    assert "samples [1] where 0 to 1 are due" in _sentences(report, "short_group")


def test_an_episode_of_another_prompt_is_found(tmp_path: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        place = SCHEMA.get_field_index("prompt_id")
        return table.set_column(place, SCHEMA.field(place), table["prompt_id"].take([1, 2, 0, 3]))

    run = _MadeRun(LocalStore(tmp_path), cut=lambda t: swap(t) if t.num_rows == 4 else t)
    assert [each.offender for each in verify(run.store, "run").problems] == [
        "run-00000000-001",
        "run-00000001-000",
    ]


def test_a_forgotten_group_is_found(run: _MadeRun) -> None:
    run.admit(2, [5])
    assert "run-00000005" in _sentences(verify(run.store, "run"), "pending")


def test_admission_beyond_the_age_bound_is_found(run: _MadeRun) -> None:
    run.admit(2, [5, 6, 7, 8])
    assert "admission" not in _kinds(run)
    run.admit(2, [9])
    assert "5 groups were pending at once; the age bound allows 4" in _sentences(
        verify(run.store, "run"), "admission"
    )


def test_a_fork_is_found_unless_it_is_recorded(run: _MadeRun) -> None:
    run.train(2, [2, 3], age=1)
    assert _kinds(run, but=("run_json",)) == []
    run.train(2, [2, 3], age=1, digest="v")
    assert "step 2 was trained again with other weights" in _sentences(
        verify(run.store, "run"), "fork"
    )
    run.log.append(facts.Diverged(step=2, reason="other CPU"))
    assert _kinds(run, but=("run_json",)) == []


@pytest.mark.parametrize(
    ("intervals", "kinds"),
    [
        (((2e-4, 3e-4), (3e-4, 4e-4)), []),
        (((2e-4, 4e-4), (3e-4, 5e-4)), ["overlap"]),
        (((0.0, 2e-4),), ["overlap"]),
        (((4e-4, 3e-4),), ["interval"]),
        (((1.0, 3600.0),), ["interval"]),
    ],
)
def test_intervals_that_cannot_be_are_found(
    run: _MadeRun, intervals: tuple[tuple[float, float], ...], kinds: list[str]
) -> None:
    run.mesh(*intervals)
    assert _kinds(run, but=("run_json",)) == kinds


def test_an_altered_run_json_is_found(run: _MadeRun) -> None:
    run.edit(layout.run_json_key("run"), lambda content: content.update(steps=7))
    report = verify(run.store, "run")
    assert [each.sentence for each in report.problems] == [
        "run.json says steps = 7; the log says 2"
    ]


def test_a_run_json_that_lags_behind_a_living_run_is_no_problem(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store_config(store, "run", CONFIG)
    log = RunLog.claim(store, "run", Controller.this_process(versions={}, git_commit=None))
    write_run_json(store, "run")
    log.append(facts.Retry(stage="train", attempt=1, cause="test", seconds=1.0))
    assert verify(store, "run").ok


def test_a_wrong_score_of_an_evaluation_is_found(run: _MadeRun) -> None:
    run.evaluate("final", held_out=True, greedy=0.9)
    assert "as 0.9 greedy; its episodes give 1.05" in _sentences(
        verify(run.store, "run"), "evaluation"
    )


def test_a_held_out_prompt_that_was_trained_on_is_found(run: _MadeRun) -> None:
    run.evaluate("final", held_out=False)
    assert "prompt p-0 of evaluation final" in _sentences(verify(run.store, "run"), "held_out")


def test_a_missing_or_altered_checkpoint_is_found(run: _MadeRun) -> None:
    path = run.store.local_path(f"{layout.checkpoint_folder('run', 2)}weights")
    path.write_bytes(b"124")
    assert _kinds(run) == ["checkpoint"]
    path.unlink()
    assert _kinds(run) == ["checkpoint"]


def test_a_config_without_bounds_is_found(run: _MadeRun) -> None:
    run.edit(layout.config_key("run"), lambda config: config.pop("max_policy_age"))
    assert "sets no max_policy_age" in _sentences(verify(run.store, "run"), "config")


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no run 'absent'"):
        verify(LocalStore(tmp_path), "absent")
