"""What Prefect's pages show of a run: names of task runs, progress, samples and shares of time."""

import pytest

from flows.artifacts import Progress, samples_markdown, time_shares
from flows.html_report.data import Sample
from storage import facts
from storage.records import PartRef
from tasks.references import Generation, Round, Segment, StepBatch
from tasks.stage_names import task_run_name


def batch(step: int) -> StepBatch:
    return StepBatch(step=step, commits=(), group_ids=(), metrics={})


def generation(*, number: int, first_step: int, last_step: int) -> Generation:
    part = PartRef(key="k", sha256="s", bytes=1, rows=1)
    this = Round(number=number, first_step=first_step, last_step=last_step)
    return Generation(round=this, parts=(part,), replicas=(0,), tokens_per_second=1.0)


@pytest.mark.parametrize(
    ("stage", "arguments", "name"),
    [
        ("build-model", {}, "build-model"),
        ("publish", {"policy_version": 4}, "publish version 4"),
        ("checkpoint", {"step": 4}, "checkpoint step 4"),
        ("evaluate", {"name": "final", "policy_version": 4}, "evaluate final, version 4"),
        ("train", {"batches": (batch(3),)}, "train step 3"),
        ("train", {"batches": (batch(3), batch(4))}, "train steps 3 to 4"),
        ("train", {"batches": ()}, "train"),
        ("generate", {"round": Round(number=3, first_step=3, last_step=3)}, "generate step 3"),
        (
            "score",
            {"generation": generation(number=2, first_step=3, last_step=4)},
            "score round 2, steps 3 to 4",
        ),
        (
            "generate",
            {"round": Round(number=9, first_step=3, last_step=3, spare_draws=(5, 1))},
            "generate round 9, step 3",
        ),
        ("buffer", {"segment": Segment(first_step=1, last_step=20)}, "buffer steps 1 to 20"),
    ],
)
def test_task_runs_are_named_by_where_they_are(
    stage: str, arguments: dict[str, object], name: str
) -> None:
    assert task_run_name(stage, arguments) == name


def stepped(step: int) -> facts.Step:
    return facts.Step(
        step=step,
        group_ids=(),
        score_set="run",
        weights_digest="d",
        policy_version=step,
        optimizer_updates=1,
        age_max=0,
        age_mean=0.0,
        metrics={},
        checkpoint=None,
    )


def test_progress_counts_from_where_a_fork_begins_and_never_goes_back() -> None:
    progress = Progress(first_step=11, steps=14)
    told = []
    for step in (11, 13, 12, 14):
        progress(stepped(step))
        told.append(progress.percent)
    assert told == [25.0, 75.0, 75.0, 100.0]
    without_steps = Progress(first_step=1, steps=0)
    without_steps(facts.End(status="finished", reason=None))
    assert without_steps.percent == 100.0


def test_shares_are_of_the_time_in_which_the_run_was_held() -> None:
    seconds = {
        "total": 12.0,
        "down": 2.0,
        "meshes": {"trainer": {"train": 7.5, "unaccounted": 0.0}},
    }
    assert time_shares({"seconds": seconds}) == [
        {"mesh": "trainer", "doing": "train", "seconds": "7.5", "share": "75.0%"},
        {"mesh": "trainer", "doing": "unaccounted", "seconds": "0.0", "share": "0.0%"},
    ]


def test_nothing_in_a_sample_is_taken_for_markdown() -> None:
    sample = Sample(
        prompt="# 1\n```",
        answer="a\nb",
        before="<b>x</b>",
        before_reward=0.0,
        after="y" * 3000,
        after_reward=1.0,
    )
    lines = samples_markdown([sample]).splitlines()
    assert "    # 1" in lines and "    ```" in lines and "    <b>x</b>" in lines
    assert "reference: `a b`" in lines
    assert max(map(len, lines)) < 2100
