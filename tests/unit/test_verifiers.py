"""Verifiers: what each takes for right, that nothing a model writes breaks them, and what becomes of their scores."""

from __future__ import annotations

import json
import random
import string
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import made_episodes
import psutil
import pyarrow as pa
import pytest

from forge_core.actors.messages import ScoreRequest
from forge_core.actors.verifier import Verifier as Actor
from forge_core.config import RunConfig
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardError
from forge_core.sandbox import SandboxRefused
from forge_core.verifiers import Panel, Response, Scored, make_panel
from storage import layout
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import read_committed, read_part, write_part


def prompt(answer: str = "", **metadata: Any) -> Prompt:
    return Prompt(
        prompt_id="p", text="What is it?", answer=answer, target=answer, index=0, environment="made",
        metadata=metadata,
    )  # fmt: skip


def panel(scoring: dict[str, Any] | None = None, **verifiers: dict[str, Any]) -> Panel:
    return make_panel(RunConfig.model_validate({"verifiers": verifiers, "scoring": scoring or {}}))


def scored(panel: Panel, prompt: Prompt, *texts: str, policy_version: float = 0) -> list[Scored]:
    responses = [
        Response(text=text, token_ids=tuple(text.encode(errors="surrogatepass"))) for text in texts
    ]
    return panel(prompt, responses, policy_version=policy_version)


def values(kind: str, answer: str, *texts: str, **params: Any) -> list[float]:
    with_kind = panel(it={"kind": kind, "params": params})
    try:
        return [each.reward for each in scored(with_kind, prompt(answer), *texts)]
    finally:
        with_kind.close()


@pytest.mark.parametrize(
    ("kind", "params", "answer", "right", "wrong"),
    [
        ("exact", {}, "Paris", ["Paris", " Paris\n"], ["paris", "It is Paris", ""]),
        ("exact", {"extract": r"<a>(.*?)</a>"}, "4", ["no <a>3</a> but <a> 4 </a>"], ["4", "<a>4"]),
        (
            "exact", {"extract": r"####\s*(\S+)", "extract_reference": r"####\s*(\S+)"},
            "2+2 = 4 #### 4", ["so #### 4"], ["4", "#### 5"],
        ),
        ("normalised", {}, "The Eiffel Tower", ["eiffel  tower!", "an EIFFEL tower"], ["tower", ""]),
        ("normalised", {}, "$5", ["\uff15", "5"], ["6"]),
        (
            "numeric", {}, "0.5",
            ["1/2", "50%", r"50\%", "it is .5", "5e-1", "0.50000", "3 of 6, so 3/6", "500,000e-6"],
            ["0.51", "half", "", "-0.5", "1/0", "0.5 or 0.6", "9" * 100],
        ),
        ("numeric", {"absolute": 0.1}, "1,234", ["1234.05", "1233.9"], ["1234.2", "1"]),
        ("numeric", {"relative": 0.01}, "-200", ["-201.9"], ["-202.1", "200"]),
        ("regex", {"pattern": r"\d{3}"}, "", ["abc 123"], ["12"]),
        ("regex", {"pattern": r"\d{3}", "whole": True}, "", [" 123 "], ["abc 123"]),
        (
            "format", {}, "",
            ["<think>a</think><answer>b</answer>", " <think>a\n</think>\n\n<answer>b</answer>\n"],
            [
                "<think>a</think>", "<answer>b</answer><think>a</think>", "x<think>a</think><answer>b</answer>",
                "<think>a</think><answer> </answer>", "<think>a</think><answer>b</answer> and",
                "<think>a<think>b</think><answer>c</answer>", "",
            ],
        ),
    ],
)  # fmt: skip
def test_what_is_right(
    kind: str, params: dict[str, Any], answer: str, right: list[str], wrong: list[str]
) -> None:
    assert values(kind, answer, *right, **params) == [1.0] * len(right)
    assert values(kind, answer, *wrong, **params) == [0.0] * len(wrong)


def test_nothing_is_right_without_a_reference() -> None:
    for kind in ("exact", "normalised", "numeric"):
        assert values(kind, "", "", "x") == [0.0, 0.0]


def test_the_soft_penalty_falls_from_where_the_reserve_begins() -> None:
    """DAPO's equation 13, at its corners."""
    lengths = (0, 12, 13, 14, 16, 99)
    texts = ["x" * length for length in lengths]
    given = values("length", "", *texts, max_tokens=16, overlong_tokens=4)
    assert given == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_a_pattern_that_backtracks_for_ever_does_not_match() -> None:
    assert values("regex", "", "a" * 60 + "b", pattern=r"(a|a)+$") == [0.0]


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Panel]:
    with_math = panel(it={"kind": "math", "params": {"cpu_seconds": 1.0}})
    with_math.load()
    yield with_math
    with_math.close()


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            r"\frac{1}{2}",
            ["0.5", r"50\%", "50%", r"\frac{1}{2}", r"$\frac{2}{4}$", "The answer is 1/2.", r"\boxed{0.50}",
             r"So \(\frac12\)."],
            ["0.51", "2", "", "half", r"\frac{2}{1}", "$"],
        ),
        ("0.5", [r"\frac{1}{2}", r"$50\%$", "1/2"], ["5"]),
        (r"50\%", ["0.5", r"\frac{1}{2}", r"50\%"], ["0.05"]),
        (r"$x^2+2x+1$", ["$(x+1)^2$"], ["$(x-1)^2$", "$x^2$"]),
        (r"\sqrt{2}/2", [r"$\frac{1}{\sqrt{2}}$"], ["$1/2$"]),
        (r"\{1, 2\}", [r"$\{2, 1\}$"], [r"$\{1\}$"]),
    ],
)  # fmt: skip
def test_equivalent_forms_are_right(
    mathematics: Panel, answer: str, right: list[str], wrong: list[str]
) -> None:
    assert [each.reward for each in scored(mathematics, prompt(answer), *right)] == [1.0] * len(
        right
    )
    assert [each.reward for each in scored(mathematics, prompt(answer), *wrong)] == [0.0] * len(
        wrong
    )


def adversarial_strings() -> list[str]:
    """Two hundred: some known to be hard, the rest made of what LaTeX is made of; the same ones each time."""
    hard = [
        "$" + "{" * 2000 + "}" * 2000 + "$", "$" + r"\frac{" * 300 + "1" + "}{2}" * 300 + "$", "$9^{9^{9^{9}}}$",
        "9**9**9**9", "$10^{10^{10}}!$", r"$\int_0^1 e^{x^2 \sin(x^{x})} dx$", "$" + "1+" * 3000 + "1$",
        r"\boxed{" * 500, "$x=" * 400, "1/0", r"$\frac{1}{0}$", r"$\sqrt[0]{1}$", "9" * 50_000,
        "$" + "9" * 5000 + "!$", "\x00\x01", "\ud800", "$\\", r"\(\[\(\[", "__import__('os')._exit(1)", "exit()",
        r"$\text{" + "a" * 10_000 + "}$", "\u0646\u0635", "\u00bd", "\u221e", "nan", "1e999999999", "$1e999999999$",
        r"$\sum_{k=0}^{10^9} k^{k}$", r"$\prod_{n=1}^{99999} n^n$", "-" * 5000, "(" * 1000,
        r"$\begin{pmatrix}" + r"1 & " * 500 + r"\end{pmatrix}$", "$" + "x_{" * 200 + "}" * 200 + "$",
        "0x" + "f" * 999,
    ]  # fmt: skip
    rng = random.Random(7)
    latex = (
        r"\frac{ \sqrt{ \boxed{ \int \sum \left( \right) \infty \% \text{ \begin{matrix} & \\ ^ _ { } ( ) $ $$ \( \)"
        " ! = < , ; ."
    )
    pieces = [
        *latex.split(), "9" * 9, "x", "y", "e", "pi", " ", "\n", "+", "-", "*", "/", "**", "factorial", "0", "1",
        *string.printable,
    ]  # fmt: skip
    return hard + [
        "".join(rng.choices(pieces, k=rng.randrange(1, 80))) for _ in range(200 - len(hard))
    ]


def test_adversarial_strings_neither_crash_nor_hang_it() -> None:
    judge = panel(it={"kind": "math", "params": {"cpu_seconds": 0.25}})
    texts = adversarial_strings()
    assert len(set(texts)) == 200
    try:
        rewards = [each.reward for each in scored(judge, prompt(r"\frac{7919}{7907}"), *texts)]
        (still,) = scored(judge, prompt("3"), "$6/2$")
    finally:
        judge.close()
    assert rewards == [0.0] * 200 and still.reward == 1.0


def test_a_math_process_that_is_killed_is_asked_again(mathematics: Panel) -> None:
    def kill() -> int:
        workers = [
            each
            for each in psutil.Process().children()
            if any("mathematics" in word for word in each.cmdline())
        ]
        for each in workers:
            each.kill()
        return len(workers)

    scored(mathematics, prompt("3"), "3")
    assert kill() == 1
    assert [each.reward for each in scored(mathematics, prompt("12"), "144/12", "13")] == [1.0, 0.0]


SUM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 -5", "output": "0"}]


@pytest.mark.parametrize(
    ("tests", "text", "params", "reward"),
    [
        (json.dumps(CASES), f"First I add.\n{SUM}\nDone.", {}, 1.0),
        (json.dumps(CASES), "print(3)", {}, 0.0),
        (json.dumps(CASES), "print(3)", {"partial": True}, 0.5),
        ("assert twice(4) == 8", "```py\ndef twice(n):\n    return 2 * n\n```", {}, 1.0),
        ("assert twice(4) == 8", "def twice(n): return n", {}, 0.0),
        # One that ends before it is tested has not passed.
        ("assert twice(4) == 8", "raise SystemExit(0)", {}, 0.0),
        ("assert twice(4) == 8", "import os; os._exit(0)", {}, 0.0),
        ("assert twice(4) == 8", "while True: pass", {"cpu_seconds": 0.3}, 0.0),
        ("assert twice(4) == 8", "this is no program", {}, 0.0),
    ],
)  # fmt: skip
def test_programs_are_run_against_their_tests(
    tests: str, text: str, params: dict[str, Any], reward: float
) -> None:
    assert values("code", tests, text, **params) == [reward]


def test_tests_come_from_a_field_and_have_to_be_there() -> None:
    judge = panel(code={"kind": "code", "params": {"tests": "cases"}})
    for there in (prompt(cases=CASES), prompt(fields={"cases": CASES})):
        assert scored(judge, there, SUM)[0].reward == 1.0
    with pytest.raises(
        RewardError, match=r"tests of the prompt 'What is it\?' are None: .*'cases'"
    ):
        scored(judge, prompt(answer="x"), SUM)


def test_a_weighted_sum_keeps_who_gave_what() -> None:
    judge = panel(
        right={"kind": "exact", "weight": 2.0},
        short={"kind": "regex", "params": {"pattern": "^.{1,3}$"}, "weight": 0.5},
        ignored={"kind": "regex", "params": {"pattern": "."}, "weight": 0.0},
    )
    first, second, third = scored(judge, prompt("4"), "4", "5", "four, I say")
    assert [first.reward, second.reward, third.reward] == [2.5, 0.5, 0.0]
    assert [(s.name, s.value) for s in second.scores] == [
        ("ignored", 1.0),
        ("right", 0.0),
        ("short", 1.0),
    ]
    versions = {score.name: score.version for score in first.scores}
    assert len(set(versions.values())) == 3  # parameters belong to it
    assert all(score.seconds >= 0.0 for score in first.scores)


def test_a_product_multiplies() -> None:
    judge = panel(
        {"compose": "product"},
        a={"kind": "numeric"},
        b={"kind": "regex", "params": {"pattern": "4"}},
    )
    assert [each.reward for each in scored(judge, prompt("4"), "4", "8/2", "5")] == [1.0, 0.0, 0.0]


def test_what_a_gate_holds_back_is_not_seen_by_the_others(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "mine.py").write_text(
        f"def notes(prompts, completions, **columns):\n"
        f"    open({str(seen)!r}, 'a').write(repr(completions) + chr(10))\n"
        f"    return [0.7] * len(completions)\n"
    )
    judge = panel(
        {"closed_reward": -1.0},
        mine={"kind": "function", "params": {"reference": f"{tmp_path}/mine.py:notes"}},
        # First, wherever it stands: a stored config keeps no order of its keys.
        tidy={"kind": "format", "params": {"tags": ["a"]}, "gate": 1.0},
    )
    try:
        closed, through = scored(judge, prompt(), "no form", "<a>x</a>")
        (none,) = scored(judge, prompt("other"), "none")
    finally:
        judge.close()
    assert (closed.reward, through.reward, none.reward) == (-1.0, 0.7, -1.0)
    assert [s.name for s in closed.scores] == ["tidy"]
    assert [s.name for s in through.scores] == ["tidy", "mine"]
    assert seen.read_text() == "['<a>x</a>']\n"


def test_weights_change_with_the_policy_version() -> None:
    judge = panel(
        form={"kind": "regex", "params": {"pattern": "x"}, "weights": [[10, 1.0], [20, 0.0]]},
        right={"kind": "exact", "weight": 0.0},
    )
    versions = (0, 10, 15, 20, 99, float("inf"))
    given = [scored(judge, prompt(), "x", policy_version=v)[0].reward for v in versions]
    assert given == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]


COUNTED = """
from pathlib import Path
import os, time
FOLDER = Path(__file__).parent

def counted(prompts, completions, **columns):
    with open(FOLDER / "calls", "a") as file:
        file.write(f"{os.getpid()} {completions}\\n")
    return [float(len(completion)) for completion in completions]

def dies_once(prompts, completions, **columns):
    marker = FOLDER / "died"
    if not marker.exists():
        marker.touch()
        os._exit(9)
    return [1.0] * len(completions)

def dies(prompts, completions, **columns):
    os._exit(9)

def meets(prompts, completions, **columns):
    # Answers only once another call is under way in another process.
    (FOLDER / f"here-{os.getpid()}").touch()
    while len(list(FOLDER.glob("here-*"))) < 2: time.sleep(0.01)
    return [1.0] * len(completions)
"""


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    (tmp_path / "counted.py").write_text(COUNTED)
    return tmp_path / "counted.py"


def _function(file: Path, name: str, **scoring: Any) -> Panel:
    return panel(scoring, it={"kind": "function", "params": {"reference": f"{file}:{name}"}})


def test_what_is_known_is_not_asked_again(counted: Path) -> None:
    for entries, calls in ((20_000, 2), (0, 3)):
        judge = _function(counted, "counted", cache_entries=entries)
        try:
            first = scored(judge, prompt("a"), "x", "xx")
            again = scored(judge, prompt("a"), "x", "xx")
            scored(judge, prompt("b"), "x", "xx")
        finally:
            judge.close()
        assert [s.reward for s in first] == [s.reward for s in again] == [1.0, 2.0]
        if entries:
            assert [s.scores[0].seconds for s in again] == [0.0, 0.0]
        log = counted.with_name("calls")
        assert len(log.read_text().splitlines()) == calls
        log.unlink()


def test_equal_responses_are_asked_for_once() -> None:
    asked = []

    class Notes:
        version, looks_at_each = "1", True

        def __call__(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
            asked.extend(response.text for response in responses)
            return [1.0 for _ in responses]

        def load(self) -> None: ...

        def close(self) -> None: ...

    config = RunConfig.model_validate({"verifiers": {"it": {"kind": "exact"}}})
    judge = Panel({"it": (config.verifiers["it"], Notes())}, config.scoring)
    first, second = scored(judge, prompt(), "x", "x")
    assert asked == ["x"] and first.scores[0].seconds > 0.0 == second.scores[0].seconds


def test_a_process_that_dies_is_asked_again_and_is_never_a_score(counted: Path) -> None:
    judge = _function(counted, "dies_once")
    try:
        assert [each.reward for each in scored(judge, prompt(), "x", "y")] == [1.0, 1.0]
    finally:
        judge.close()
    judge = _function(counted, "dies")
    try:
        with pytest.raises(
            RewardError, match=r"counted.py:dies' ended its process with exit code 9"
        ):
            scored(judge, prompt(), "x")
    finally:
        judge.close()


def test_a_slow_function_gets_another_process_and_a_quick_one_does_not(counted: Path) -> None:
    judge = _function(counted, "meets")
    given: list[Scored] = []
    threads = [
        threading.Thread(target=lambda n=n: given.extend(scored(judge, prompt(str(n)), "x")))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    judge.close()
    assert [each.reward for each in given] == [1.0, 1.0]
    quick = _function(counted, "counted")
    for n in range(20):
        scored(quick, prompt(str(n)), "x")
    quick.close()
    calls = counted.with_name("calls").read_text().splitlines()
    assert len({line.split()[0] for line in calls}) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"verifiers": {"a": {"kind": "exact", "params": {"x": 1}}}}, r"params.x: .*exact takes: extract"),
        ({"verifiers": {"a": {"kind": "regex"}}}, "params.pattern: Field required"),
        ({"verifiers": {"a": {"kind": "regex", "params": {"pattern": "("}}}}, "is no regular expression"),
        ({"verifiers": {"a": {"kind": "format", "params": {"tags": ["<a>"]}}}}, "no names of elements"),
        ({"verifiers": {"a": {"kind": "exact", "weight": 1.0, "weights": [[0, 1]]}}}, "exclude each other"),
        ({"verifiers": {"a": {"kind": "exact", "weights": [[5, 1], [5, 2]]}}}, "no pairs of a rising"),
        ({"verifiers": {"a": {"kind": "exact", "gate": 1.0}}}, "gates and nothing else"),
        ({"verifiers": {"a b": {"kind": "exact"}}}, r"verifiers.a b: name it"),
        ({"verifiers": {"a": {"kind": "exact"}}, "reward": "x.py:y"}, "exclude each other: name the function"),
        (
            {"verifiers": {"a": {"kind": "exact", "weight": 2.0}}, "scoring": {"compose": "product"}},
            "in a product none counts",
        ),
        (
            {
                "verifiers": {"a": {"kind": "length", "params": {"overlong_tokens": 4}}},
                "scoring": {"compose": "product"},
            },
            "scores are 0 or less",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_reward_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate(config)


def test_the_environments_own_scorer_is_one_of_them() -> None:
    config = {
        "verifiers": {"task": {"kind": "environment"}, "cheap": {"kind": "exact", "weight": 0.5}}
    }
    judge = make_panel(RunConfig.model_validate({**config, "environment": {"name": "chain_sum"}}))
    made = Prompt(
        prompt_id="p", text="1 + 1 =", answer="2", target="2", index=0, environment="chain_sum",
        metadata={"question": "1 + 1 =", "fields": {}},
    )  # fmt: skip
    right, wrong = scored(judge, made, "2", "3")
    assert right.reward == 1.5 and wrong.reward < 0.1
    assert "reasoning-gym" in right.scores[1].version
    alone = make_panel(RunConfig.model_validate({"environment": {"name": "chain_sum"}}))
    assert [s.name for s in scored(alone, made, "2")[0].scores] == ["chain_sum"]


def test_a_part_keeps_who_gave_what_by_the_weights_of_what_sampled_it(tmp_path: Path) -> None:
    """Scored as in a run, and as in an evaluation, which has the last weights."""
    store = LocalStore(tmp_path)
    two_tokens = {
        "response_token_ids": [7, 8], "logprobs": [-0.5, -0.5], "mask": [True, True],
        "token_policy_versions": [7, 5], "metadata": '{"index": 3}',
    }  # fmt: skip
    rows = [made_episodes.episode(d, s, **two_tokens) for d in range(2) for s in range(2)]
    part = write_part(store, "part", pa.Table.from_pylist(rows, SCHEMA))
    verifiers = {
        "right": {"kind": "exact"},
        "digit": {"kind": "regex", "params": {"pattern": "2"}, "weights": [[0, 0.0], [10, 1.0]]},
    }
    actor = Actor(RunConfig.model_validate({"verifiers": verifiers}), store.uri, 0.0)
    of_run = actor._score_part(ScoreRequest(run_id="run", part=part, commit="c"))
    of_evaluation = actor._score_part(ScoreRequest(run_id="run", part=part, key_prefix="e"))
    actor._panel.close()
    table = read_committed(store, "run")
    assert of_run.commit and table["reward"].to_pylist() == [1.5] * 4
    assert of_run.rewards == ()
    assert of_evaluation.rewards == ((2.0, 2.0), (2.0, 2.0))
    assert read_part(store, of_evaluation.part)["reward"].to_pylist() == [2.0] * 4
    for scores, told in zip(
        table["scores"].to_pylist(), table["scored_by"].to_pylist(), strict=True
    ):
        assert scores == [{"name": "digit", "value": 1.0}, {"name": "right", "value": 1.0}]
        assert [each["name"] for each in told] == ["digit", "right"]
        assert all(each["version"] and each["seconds"] >= 0.0 for each in told)


def test_held_out_answers_can_get_the_environments_own_score(tmp_path: Path) -> None:
    """Training sees the verifiers alone, and the evaluation the environment alone."""
    store = LocalStore(tmp_path)
    metadata = '{"index": 0, "question": "1 + 1 =", "fields": {}}'
    told = {"environment": "chain_sum", "prompt": "1 + 1 =", "metadata": metadata}
    rows = [made_episodes.episode(0, s, response=str(3 - s), **told) for s in range(2)]
    part = write_part(store, "part", pa.Table.from_pylist(rows, SCHEMA))
    config = {
        "environment": {"name": "chain_sum"},
        "evaluation": {"scorer": "environment"},
        "verifiers": {"three": {"kind": "regex", "params": {"pattern": "3"}}},
    }
    actor = Actor(RunConfig.model_validate(config), store.uri, 0.0)
    actor._score_part(ScoreRequest(run_id="run", part=part, commit="c"))
    of_evaluation = actor._score_part(ScoreRequest(run_id="run", part=part, key_prefix="e"))
    actor._panel.close()
    table = read_committed(store, "run")
    assert table["reward"].to_pylist() == [1.0, 0.0]
    ((wrong, right),) = of_evaluation.rewards
    assert wrong < 0.1 and right == 1.0
    (score,) = read_part(store, of_evaluation.part)["scores"].to_pylist()[1]
    assert score == {"name": "chain_sum", "value": 1.0}


def _deepest(process: psutil.Process) -> list[psutil.Process]:
    """The longest line of descendants: other children, such as a tracker of resources, have none of their own."""
    try:
        lines = [[child, *_deepest(child)] for child in process.children()]
    except psutil.NoSuchProcess:
        return []
    return max(lines, key=len, default=[])


@pytest.mark.parametrize("which", [0, 1], ids=["launcher", "init"])
def test_a_sandbox_killed_in_mid_call_leaves_nothing_stored_and_the_next_call_all(
    tmp_path: Path, which: int
) -> None:
    """Its part is no commit, and no program of it is wrong; the stage tries it again."""
    store = LocalStore(tmp_path)
    text = "import time\ntime.sleep(%d)\ndef twice(n): return 2 * n"
    rows = [
        made_episodes.episode(
            0,
            sample,
            answer="assert twice(4) == 8",
            response=text % seconds,
            metadata='{"index": 3}',
        )
        for sample, seconds in enumerate((0, 60))
    ]
    part = write_part(store, "part", pa.Table.from_pylist(rows, SCHEMA))
    actor = Actor(RunConfig.model_validate({"verifiers": {"it": {"kind": "code"}}}), store.uri, 0.0)
    request = ScoreRequest(run_id="run", part=part, commit="c")

    def kill() -> None:
        # Once the slow one is there: launcher, init and program, and nothing of the quick one before it.
        seen: list[psutil.Process] = []
        while len(seen) < 3 or time.time() - seen[-1].create_time() < 1.0:
            time.sleep(0.05)
            seen = _deepest(psutil.Process())
        seen[which].kill()

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(SandboxRefused):
        actor._score_part(request)
    killing.join()
    assert not store.exists(layout.commit_key("run", "c"))
    rows[1]["response"] = text % 0
    part = write_part(store, "again", pa.Table.from_pylist(rows, SCHEMA))
    actor._score_part(ScoreRequest(run_id="run", part=part, commit="c"))
    assert read_committed(store, "run")["reward"].to_pylist() == [1.0, 1.0]
