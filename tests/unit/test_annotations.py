"""Sets of scores beside a run's own: made once, continued, and refused where they would be something else."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_core.actors.verifier import Verifier
from forge_core.rewards import RewardError
from forge_core.scorers import begin_set, counted_commits, resolve_scorer
from storage import layout
from storage.annotations import (
    SCHEMA,
    check_covers,
    complete_set,
    find_scores,
    read_covered,
    read_scores,
    read_set,
    write_scores,
)
from storage.objects import LocalStore
from storage.records import Commit, Controller

MakeRun = Callable[..., Any]
REWARDS = """
def by_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def raises(prompts, completions, **columns):
    return [1 / 0]

def infinite(prompts, completions, **columns):
    return [float("inf")] * len(prompts)

class Own:
    name = "own"

    def __init__(self, config, seed):
        pass

    def train_prompt(self, ordinal): ...
    def test_prompts(self, num_prompts): ...

    def score(self, prompt, response):
        if prompt.answer == "3":
            raise KeyError("no rule for 3")
        return len(response) / 2
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    return file


def begin(run: Any, name: str, verifier: str) -> Any:
    controller = Controller.this_process(versions={}, git_commit=None)
    return begin_set(run.store, run.run_id, name, verifier, controller)


def commits(run: Any) -> list[Commit]:
    return counted_commits(run.store, run.run_id)


def rescore(run: Any, name: str, verifier: str) -> list[int]:
    """What a flow does, in this process; how many episodes of each commit were new."""
    _, config = begin(run, name, verifier)
    actor = Verifier(config, run.store.uri, 0.0)
    endpoint = vars(Verifier)["rescore"]._method
    keys = [layout.commit_key(commit.run_id, commit.key) for commit in commits(run)]
    try:
        new = [asyncio.run(endpoint(actor, key, name)) for key in keys]
    finally:
        actor._panel.close()
    complete_set(run.store, run.run_id, name, commits(run))
    return new


def test_a_run_that_went_on_is_scored_on_from_where_its_scores_end(
    past_run: MakeRun, rewards: Path
) -> None:
    run = past_run("r1")
    run.step(1, [0, 1])
    run.step(2, [2, 3], flat=[3])
    verifier = f"{rewards}:by_length"
    assert rescore(run, "length", verifier) == [4, 4]
    assert rescore(run, "length", verifier) == [0, 0]
    first, second = commits(run)
    assert read_scores(run.store, second, "length") == {
        "r1-00000002-000": 1.0,
        "r1-00000002-001": 2.0,
        "r1-00000003-000": 1.0,
        "r1-00000003-001": 2.0,
    }
    covered = read_covered(run.store, "r1", "length")
    assert covered is not None
    assert (covered.num_commits, covered.num_episodes) == (2, 8)
    assert (covered.reward_mean, covered.score_mean) == (0.375, 1.5)
    run.step(3, [4, 5])
    with pytest.raises(ValueError, match=r"cover 2 of its 3 commits: rescore it again"):
        check_covers(run.store, "r1", "length", commits(run))
    check_covers(run.store, "r1", "length", [first, second])
    assert rescore(run, "length", verifier) == [0, 0, 4]
    check_covers(run.store, "r1", "length", commits(run))


def test_anybody_can_read_a_set_with_pyarrow(past_run: MakeRun, rewards: Path) -> None:
    run = past_run("r1")
    run.step(1, [0])
    rescore(run, "length", f"{rewards}:by_length")
    folder = run.store.root / "episodes" / "annotations" / "r1" / "length"
    (part,) = folder.glob("*.parquet")
    assert pq.read_table(part).to_pylist() == [
        {"episode_id": "r1-00000000-000", "score": 1.0, "details": '{"by_length": 1.0}'},
        {"episode_id": "r1-00000000-001", "score": 2.0, "details": '{"by_length": 2.0}'},
    ]
    told = json.loads((folder / "set.json").read_bytes())
    assert (told["verifier"], told["scorer"]) == (f"{rewards}:by_length", "by_length")
    assert (run.store.root / told["source"]["key"]).read_text() == REWARDS


def test_what_the_log_does_not_count_is_not_scored(past_run: MakeRun, rewards: Path) -> None:
    run, other = past_run("r1"), past_run("r2")
    run.step(1, [0])
    key = layout.commit_key("r1", "000009-000")
    run.store.put_if_absent(key, run.store.read(layout.commit_key("r1", "000001-000")))
    assert [commit.key for commit in commits(run)] == ["000001-000"]
    with pytest.raises(ValueError, match="'r2' has no episodes of its own"):
        commits(other)
    with pytest.raises(ValueError, match="no run 'r3'"):
        counted_commits(run.store, "r3")


def test_a_name_belongs_to_one_verifier(past_run: MakeRun, rewards: Path) -> None:
    run = past_run("r1", environment={"name": "chain_sum", "params": {"max_terms": 2}})
    run.step(1, [0])
    begin(run, "length", f"{rewards}:by_length")
    with pytest.raises(ValueError, match=r"are those of verifier '.*:by_length': take another"):
        begin(run, "length", f"{rewards}:raises")
    rewards.write_text(REWARDS.replace("len(text)", "-len(text)"))
    with pytest.raises(ValueError, match=r"as its file was, which is kept at episodes/annot"):
        begin(run, "length", f"{rewards}:by_length")
    begin(run, "sums", "environment")
    begin(run, "sums", "chain_sum")
    with pytest.raises(ValueError, match="name 'run' is that of the run's own scores"):
        begin(run, "run", "environment")
    with pytest.raises(ValueError, match="not usable"):
        begin(run, "a/b", "environment")
    assert run.store.folders(layout.annotations_folder("r1")) == ["length", "sums"]


def test_what_scores_is_told_by_its_name(past_run: MakeRun, rewards: Path) -> None:
    run = past_run("r1", reward=f"{rewards}:raises")
    config = run.config

    def resolve(verifier: str) -> Any:
        return resolve_scorer(verifier, config, run.store)

    assert resolve("environment").config.reward is None
    assert resolve("environment").config.environment == config.environment
    assert resolve("chain_sum").config.environment.name == "chain_sum"
    assert resolve(f"{rewards}:by_length").config.reward == f"{rewards}:by_length"
    own = resolve(f"{rewards}:Own")
    assert (own.config.reward, own.name, own.source) == (None, "Own", rewards)
    for verifier, words in {
        "chain_sums": "--verifier 'chain_sums' is no task .* chain_sum",
        f"{rewards}:nothing": "--verifier .* has no 'nothing' at its top level",
        "nowhere.py:f": "--verifier 'nowhere.py:f' does not resolve",
    }.items():
        with pytest.raises(ValueError, match=words):
            resolve(verifier)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("raises", r"reward '.*:raises' raised ZeroDivisionError.*on the prompt '0\+1='"),
        ("infinite", r"reward '.*:infinite' returned inf.*on the prompt '0\+1='"),
        ("Own", r"verifier 'own' raised KeyError: 'no rule for 3', on the prompt '2\+1='"),
    ],
)
def test_a_verifier_that_fails_is_one_error_and_no_score(
    past_run: MakeRun, rewards: Path, scorer: str, words: str
) -> None:
    run = past_run("r1")
    run.step(1, [0, 2])
    with pytest.raises(RewardError, match=words):
        rescore(run, "new", f"{rewards}:{scorer}")
    assert find_scores(run.store, commits(run)[0], "new") is None
    with pytest.raises(ValueError, match="cover 0 of its 1 commits: rescore it again"):
        check_covers(run.store, "r1", "new", commits(run))
    with pytest.raises(ValueError, match="lack commit 000001-000"):
        read_scores(run.store, commits(run)[0], "new")


def test_the_first_scores_of_a_commit_stand(past_run: MakeRun) -> None:
    run = past_run("r1")
    run.step(1, [0])
    (commit,) = commits(run)
    ids = ["r1-00000000-000", "r1-00000000-001"]
    first = write_scores(run.store, commit, "new", ids, [0.0, 1.0], [{}, {}], reward_mean=0.5)
    again = write_scores(run.store, commit, "new", ids, [5.0, 5.0], [{}, {}], reward_mean=0.5)
    assert again == first
    assert read_scores(run.store, commit, "new") == {ids[0]: 0.0, ids[1]: 1.0}
    with pytest.raises(ValueError, match="r1-00000000-001 has no finite score"):
        write_scores(run.store, commit, "x", ids, [0.0, float("nan")], [{}, {}], reward_mean=0.5)
    with pytest.raises(ValueError, match="has 2 episodes and was given 1 scores"):
        write_scores(run.store, commit, "x", ids[:1], [0.0], [{}], reward_mean=0.5)


def test_unknown_scores_are_refused_with_those_that_there_are(
    past_run: MakeRun, rewards: Path
) -> None:
    run = past_run("r1")
    run.step(1, [0])
    begin(run, "length", f"{rewards}:by_length")
    with pytest.raises(ValueError, match=r"no scores 'lenght' \(it has: length\)"):
        read_set(run.store, "r1", "lenght")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo exploded > exploded",)


@pytest.mark.parametrize(
    "what", ["truncated", "altered", "gone", "pickled", "other columns", "other scores"]
)
def test_damaged_scores_are_refused(
    past_run: MakeRun, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = past_run("r1")
    run.step(1, [0])
    (commit,) = commits(run)
    ids = ["r1-00000000-000", "r1-00000000-001"]
    record = write_scores(run.store, commit, "length", ids, [0.0, 1.0], [{}, {}], reward_mean=0.5)
    path = run.store.root / record.part.key
    data = path.read_bytes()
    monkeypatch.chdir(path.parent)
    path.unlink()
    if what == "truncated":
        path.write_bytes(data[:-1])
    elif what == "altered":
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif what == "other scores":
        other = write_scores(run.store, commit, "2", ids, [1.0, 0.0], [{}, {}], reward_mean=0.5)
        path.write_bytes(run.store.read(other.part.key))
    elif what in ("pickled", "other columns"):
        stranger = pickle.dumps(_Bomb()) if what == "pickled" else _parquet(SCHEMA.field(0))
        path.write_bytes(stranger)
        _name_in_record(run.store, record, stranger)
    with pytest.raises(ValueError, match=record.part.key[-20:]):
        read_scores(run.store, commit, "length")
    assert not Path("exploded").exists()


def _parquet(field: pa.Field) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([["a", "b"]], schema=pa.schema([field])), sink)
    return bytes(sink.getvalue())


def _name_in_record(store: LocalStore, record: Any, data: bytes) -> None:
    """Have the record name these bytes, as somebody who can write to the store would."""
    import hashlib

    told = json.loads(record.to_bytes())
    told["part"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    key = layout.scores_key(record.run_id, record.name, record.commit[-15:-5])
    store.replace(key, json.dumps(told).encode())


COMPOSITION = """
[verifiers.long]
kind = "regex"
params.pattern = "11"
gate = 1.0

[verifiers.digits]
kind = "function"
params.reference = "{rewards}:by_length"
weight = 0.5

[verifiers.sum]
kind = "environment"
weights = [[0, 0.0], [9, 2.0]]

[scoring]
compose = "sum"
closed_reward = -1.0
"""


def test_a_whole_composition_scores_stored_episodes(past_run: MakeRun, tmp_path: Path) -> None:
    """Of each group the first response is 1, which the gate keeps out, and the second 11."""
    own = tmp_path / "own.py"
    own.write_text(REWARDS)
    run = past_run("r1", environment={"name": f"{own}:Own"})
    run.step(1, [0, 1])
    file = tmp_path / "scoring.toml"
    file.write_text(COMPOSITION.format(rewards=own))
    rescore(run, "whole", str(file))
    (commit,) = commits(run)
    # Half of the length, and twice what the environment gives, which is half of the length.
    assert list(read_scores(run.store, commit, "whole").values()) == [-1.0, 3.0, -1.0, 3.0]
    found = find_scores(run.store, commit, "whole")
    assert found is not None
    table = pq.read_table(pa.BufferReader(run.store.read(found.part.key)))
    told = [json.loads(details) for details in table["details"].to_pylist()]
    assert told[:2] == [{"long": 0.0}, {"long": 1.0, "digits": 2.0, "sum": 1.0}]
    assert found.scored_by.keys() == {"long", "digits", "sum"}
    assert all(each.version and each.seconds >= 0 for each in found.scored_by.values())
    made = read_set(run.store, "r1", "whole")
    assert made.composition is not None and made.composition["scoring"]["closed_reward"] == -1.0
    assert run.store.read(made.sources[0].key).decode() == REWARDS
    assert made.environment is not None
    file.write_text(COMPOSITION.format(rewards=own).replace("0.5", "0.7"))
    with pytest.raises(ValueError, match="scores 'whole' of run 'r1' are those of verifier"):
        begin(run, "whole", str(file))


def test_a_run_can_be_scored_by_what_it_was_scored_with(past_run: MakeRun, rewards: Path) -> None:
    verifiers = {"short": {"kind": "length", "params": {"overlong_tokens": 2, "max_tokens": 4}}}
    composed = past_run("r1", verifiers=verifiers)
    scorer = resolve_scorer("run", composed.config, composed.store)
    assert scorer.composition is not None and scorer.composition["verifiers"].keys() == {"short"}
    by_function = past_run("r2", reward=f"{rewards}:by_length")
    assert resolve_scorer("run", by_function.config, by_function.store).name == "by_length"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 3", "has 'steps', which scores nothing"),
        ("[scoring]", "has no verifiers"),
        ("[verifiers.a]\nkind = 'exakt'", "verifiers.a.kind = 'exakt': it must be"),
        ("[verifiers", "is no valid toml"),
        (
            "[verifiers.a]\nkind = 'ensemble'\nparams.reference = 'weaver@1'",
            "'weaver@1' is no ensemble: write ensemble:NAME@VERSION",
        ),
        (
            "[verifiers.a]\nkind = 'ensemble'\nparams.reference = 'ensemble:weaver@1'",
            "weaver",
        ),
        (
            "[verifiers.a]\nkind = 'function'\nparams.reference = 'nowhere.py:f'",
            "verifiers.a.params.reference 'nowhere.py:f' does not resolve",
        ),
    ],
)
def test_a_composition_that_makes_no_score_is_refused(
    past_run: MakeRun, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "scoring.toml"
    file.write_text(text)
    run = past_run("r1")
    run.step(1, [0])
    with pytest.raises(ValueError, match=words):
        begin(run, "whole", str(file))
