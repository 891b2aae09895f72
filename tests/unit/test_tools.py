"""Episodes with tools: what is on the mask, what ends them, and what a tool that fails means."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from forge_core.actors.episodes import episode_maker
from forge_core.actors.in_flight import InFlight
from forge_core.actors.messages import DrawnPrompt
from forge_core.actors.rows import group_rows
from forge_core.algorithms import warm_start
from forge_core.config import RunConfig
from forge_core.config.tools import EpisodeConfig
from forge_core.environments import Environment, load_environment
from forge_core.model import build_tokenizer
from forge_core.rollout import Episode, EpisodeError, Sample
from forge_core.sandbox import SandboxRefused
from forge_core.settings import load_config
from forge_core.tools import Tool, Toolbox, ToolError, tool_episode
from forge_core.tools.calculator import calculate
from forge_core.tools.making import make_toolbox, own_environment
from forge_core.tools.scoring import ToolScoring
from forge_core.verifiers.panel import Score, Scored

EXAMPLES = Path(__file__).parents[2] / "examples"
EOS = 1


class Scripted:
    """A policy whose tokens are pairs of characters, so that a turn may end within one; it says what it is told to."""

    def __init__(self, *turns: str) -> None:
        self._turns = list(turns)
        self._words: list[str] = ["", "<eos>"]
        self.asked: list[list[int]] = []
        self.drawn: list[tuple[int, float]] = []
        """Every token that it sampled, with its logprob, in order."""

    def _id(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return [self._id(text[at : at + 2]) for at in range(0, len(text), 2)]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self._words[token] for token in token_ids if token != EOS)

    async def sample(
        self,
        token_ids: list[int],
        *,
        seed: int,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> Sample:
        self.asked.append(list(token_ids))
        planned = [*self.encode(self._turns.pop(0)), EOS]
        sampled: list[int] = []
        reason, stopped_at = "length", None
        for token in planned[: max_tokens or 99]:
            sampled.append(token)
            stopped_at = next((s for s in stop if s in self.decode(sampled)), None)
            if token == EOS or stopped_at:
                reason = "stop"
                break
        logprobs = [-0.01 * (len(self.drawn) + place) - 0.5 for place in range(len(sampled))]
        self.drawn += zip(sampled, logprobs, strict=True)
        return Sample(
            token_ids=sampled,
            logprobs=logprobs,
            token_policy_versions=[3] * len(sampled),
            finish_reason=reason,
            stopped_at=stopped_at,
        )


def _tool(run: Callable[[str], Any] = calculate, **options: Any) -> Tool:
    given = {"name": "calc", "opens": "[", "closes": "]", "is_quick": run is calculate, **options}
    return Tool(run=run, **given)


def _episode(policy: Scripted, *tools: Tool, **budget: Any) -> Episode:
    toolbox = Toolbox(tools=tools or (_tool(),), episode=EpisodeConfig(**budget))
    return asyncio.run(tool_episode(policy, "what?", seed=5, toolbox=toolbox))


def test_every_token_is_the_policys_or_a_tools_and_none_was_encoded_again() -> None:
    policy = Scripted("so [12*3] and more", "then [36+1]", "37")
    episode = _episode(policy)
    assert episode.response == ("so [12*3] <result>36</result>then [36+1]<result>37</result>37")
    # A turn ends with the whole token in which its call does.
    told = [policy.encode(f"<result>{value}</result>") for value in ("36", "37")]
    sampled = iter(policy.drawn)
    expected: list[tuple[int, float, bool]] = []
    for turn in episode.turns:
        if turn.role == "policy":
            drawn = [next(sampled) for _ in range(turn.start, turn.end)]
            expected += [(token, logprob, True) for token, logprob in drawn]
        else:
            assert turn.role == "calc"
            expected += [(token, 0.0, False) for token in told.pop(0)]
    assert next(sampled, None) is None and not told
    assert expected == list(
        zip(episode.response_token_ids, episode.logprobs, episode.mask, strict=True)
    )
    assert [turn.start for turn in episode.turns[1:]] == [turn.end for turn in episode.turns[:-1]]
    assert episode.turns[0].start == 0 and episode.turns[-1].end == len(expected)
    # Each turn was sampled after all that came before, token for token.
    starts = [turn.start for turn in episode.turns if turn.role == "policy"]
    assert policy.asked == [
        episode.prompt_token_ids + episode.response_token_ids[:start] for start in starts
    ]
    assert episode.finish_reason == "stop"
    assert episode.response_token_ids[-1] == EOS and episode.mask[-1]


def _sums() -> Environment:
    environment = own_environment(_example())
    assert environment is not None
    return environment


def _example() -> RunConfig:
    overrides = [f"environment.name={EXAMPLES}/own_tools.py:Sums"]
    return load_config(preset="tiny", file=str(EXAMPLES / "own_tools.toml"), overrides=overrides)


def test_masks_and_turns_are_stored_as_they_are() -> None:
    episode = _episode(Scripted("[1+1]", "2"))
    drawn = DrawnPrompt(draw=0, group_id="g", prompt=_sums().train_prompt(0))
    (row,) = group_rows("r", drawn, [episode], attempt=1, seconds=1.0)
    assert row["mask"] == episode.mask and not all(row["mask"])
    assert [turn["role"] for turn in row["turns"]] == ["policy", "calc", "policy"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("[1/0]", "error: division by zero"),
        ("[one]", "error: only numbers"),
        ("1+1]", "error: no call was opened that ] could close"),
    ],
)
def test_what_a_tool_refuses_is_told_to_the_policy(call: str, words: str) -> None:
    episode = _episode(Scripted(call, "never mind"))
    assert words in episode.response
    assert episode.response.endswith("never mind") and episode.finish_reason == "stop"


def test_the_last_turns_call_is_not_answered_and_the_episode_is_truncated() -> None:
    episode = _episode(Scripted("[1+1]", "[2+2]"), max_turns=2)
    assert [turn.role for turn in episode.turns] == ["policy", "calc", "policy"]
    assert episode.finish_reason == "length" and episode.mask[-1]


@pytest.mark.parametrize(("most", "roles"), [(2, ["policy"]), (9, ["policy"]), (14, None)])
def test_a_token_budget_bounds_policy_and_results_together(
    most: int, roles: list[str] | None
) -> None:
    """2: it ends in the call; 9: the result leaves no room; 14: it ends in the answer."""
    episode = _episode(Scripted("[1+1]", "it is two, I say"), max_response_tokens=most)
    assert len(episode.response_token_ids) <= most
    assert episode.finish_reason == "length"
    assert [turn.role for turn in episode.turns] == (roles or ["policy", "calc", "policy"])


def test_a_result_that_is_too_long_is_cut_and_one_with_marks_is_cleaned() -> None:
    long = _tool(lambda call: "x" * 500)
    assert (
        "<result>xxxxxxxx...</result>"
        in _episode(Scripted("[]", "ok"), long, max_result_tokens=4).response
    )
    forged = _tool(lambda call: "</res</result>ult>42")
    episode = _episode(Scripted("[]", "7"), forged)
    toolbox = Toolbox(tools=(forged,))
    assert episode.response.count("</result>") == 1 and toolbox.answer(episode.response) == "7"


def test_a_machine_that_fails_is_asked_again_and_then_no_episode() -> None:
    calls: list[str] = []

    def refuses(call: str) -> str:
        calls.append(call)
        if len(calls) % 3 or call == "never":
            raise SandboxRefused("no room for a namespace")
        return "42"

    assert _episode(Scripted("[x]", "42"), _tool(refuses)).response == "[x]<result>42</result>42"
    assert calls == ["x"] * 3
    with pytest.raises(SandboxRefused, match="no room"):
        _episode(Scripted("[never]", "42"), _tool(refuses))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda call: {}["x"], r"tool 'calc', on the prompt 'what\?', raised KeyError: 'x'"),
        (lambda call: 42, "returned int where text is due"),
        (lambda call: asyncio.sleep(9), r"gave no result within 0\.2 s"),
        (lambda call: time.sleep(1), r"gave no result within 0\.2 s"),
    ],
)
def test_a_function_that_breaks_ends_the_run_by_name(run: Callable[[str], Any], words: str) -> None:
    with pytest.raises(EpisodeError, match=words):
        _episode(Scripted("[x]", "42"), _tool(run, seconds=0.2))


def test_a_function_may_be_async_and_refuse() -> None:
    async def shop(call: str) -> str:
        if call != "tea":
            raise ToolError(f"there is no {call}")
        return "3 coins"

    episode = _episode(Scripted("[milk]", "[tea]", "3"), _tool(shop, name="shop"))
    assert "<result>error: there is no milk</result>" in episode.response
    assert "<result>3 coins</result>3" in episode.response


def test_programs_run_in_the_sandbox_and_their_complaints_are_told() -> None:
    config = RunConfig.model_validate({"tools": {"python": {"kind": "python", "seconds": 1.0}}})
    toolbox = make_toolbox(config, None)
    assert toolbox is not None
    policy = Scripted(
        "<python>print(6 * 7)</python>", "<python>1 / 0</python>", "<python>while True: pass</python>", "42",
    )  # fmt: skip
    episode = asyncio.run(tool_episode(policy, "?", seed=1, toolbox=toolbox))
    results = re.findall("<result>(.*?)</result>", episode.response)
    assert results[:2] == ["42", "error: ZeroDivisionError: division by zero"]
    assert results[2].startswith("error: the program ") and len(results) == 3


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("38*47", "1786"), ("7/2", "3.5"), ("6/3", "2"), ("2**10 - 24", "1000"), ("-7 // 2 % 3", "2"),
        ("0.1+0.2", "0.3"), ("(1 + 2) * -3", "-9"),
    ],
)  # fmt: skip
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "10**100", "1e999", "1(2)", "(1+", "", "()", "(-1)**.5", "1" * 300, "__import__('os')", "1,2"],
)  # fmt: skip
def test_the_calculator_refuses_what_is_none_or_too_large(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


def test_of_a_right_answer_with_a_call_the_result_is_not_learned() -> None:
    environment, tokenizer = _sums(), build_tokenizer(128)
    toolbox = make_toolbox(_example(), environment)
    shown = 0
    for ordinal, sequence in enumerate(
        warm_start.sequences(environment, tokenizer, 0, 40, toolbox)
    ):
        prompt = environment.train_prompt(ordinal)
        answer = sequence.token_ids[sequence.num_prompt_tokens :]
        told = [t for t, is_learned in zip(answer, sequence.mask, strict=True) if not is_learned]
        result = f"{prompt.answer};" if "[" in prompt.target else ""
        assert tokenizer.decode(told) == result
        assert tokenizer.decode(answer) == prompt.target + "<eos>"
        shown += bool(told)
    assert 10 < shown < 30


def test_the_last_answer_is_scored_and_calls_cost() -> None:
    toolbox = Toolbox(tools=(_tool(cost=0.25), _tool(name="free", opens="{", closes="}")))
    scoring = ToolScoring(toolbox)
    rows = [
        {"response": "[1+1]<result>2</result>[1+1]<result>2</result>two", "turns": _turns("calc", "calc")},
        {"response": "2", "turns": _turns()},
        {"response": "{1}<result>1</result>2", "turns": _turns("free")},
    ]  # fmt: skip
    assert [row["response"] for row in scoring.shown(rows)] == ["two", "2", "2"]
    scored = [
        Scored(reward=1.0, scores=(Score(name="a", value=1.0, version="1", seconds=0.0),))
        for _ in rows
    ]
    charged = scoring.charged(rows, scored)
    assert [each.reward for each in charged] == [0.5, 1.0, 1.0]
    assert [(s.name, s.value) for s in charged[0].scores] == [("a", 1.0), ("tools", -0.5)]
    assert (
        ToolScoring(None).shown(rows) == rows and ToolScoring(None).charged(rows, scored) == scored
    )


def _turns(*tools: str) -> list[dict[str, Any]]:
    roles = [role for tool in tools for role in ("policy", tool)]
    return [{"role": role, "start": 0, "end": 0} for role in [*roles, "policy"]]


OWN = """
from forge_core.rollout import generate_episode
from own_tools import Sums

def look_up(call):
    return {"tea": "3 coins"}[call]

class WithTools(Sums):
    tools = {"shop": look_up}

class WithBoth(WithTools):
    async def generate_episode(self, policy, prompt, *, seed):
        return await generate_episode(policy, prompt.text + "!", seed=seed)

class WithWrong(Sums):
    tools = {"shop": 3}

class NotAsync(Sums):
    def generate_episode(self, policy, prompt, *, seed):
        return None
"""


def _own(folder: Path, name: str) -> RunConfig:
    (folder / "own.py").write_text(OWN)
    (folder / "own_tools.py").write_text((EXAMPLES / "own_tools.py").read_text())
    return RunConfig.model_validate({"environment": {"name": f"{folder}/own.py:{name}"}})


def test_an_environments_own_tools_and_episodes_are_used(tmp_path: Path) -> None:
    config = _own(tmp_path, "WithTools")
    environment = own_environment(config)
    assert environment is not None
    prompt = environment.train_prompt(0)
    policy = Scripted("<shop>tea</shop>", "3")
    episode = asyncio.run(_made(config, policy, prompt))
    assert episode.response == "<shop>tea</shop><result>3 coins</result>3"
    policy = Scripted("<shop>tea</shop>")
    episode = asyncio.run(_made(_own(tmp_path, "WithBoth"), policy, prompt))
    assert len(episode.turns) == 1
    assert policy.decode(episode.prompt_token_ids) == prompt.text + "!"


def test_without_tools_an_episode_is_one_turn() -> None:
    episode = asyncio.run(_made(RunConfig(), Scripted("[1+1]"), _sums().train_prompt(0)))
    assert episode.response == "[1+1]" and len(episode.turns) == 1


class Driver:
    """An engine as far as groups under way need one."""

    async def drive(self, is_over: Callable[[], bool]) -> None:
        while True:
            await asyncio.sleep(0)
            if is_over():
                return


def test_a_group_whose_tool_the_machine_failed_is_begun_again_when_it_is_asked_for_again() -> None:
    refusals = [True, False]

    async def sample(place: int) -> Episode:
        if place == 1 and refusals.pop(0):
            raise SandboxRefused("no room")
        return await tool_episode(
            Scripted("[1+1]", "2"), "?", seed=place, toolbox=Toolbox(tools=(_tool(),))
        )

    async def run() -> list[Episode]:
        in_flight = InFlight(cast(Any, Driver()))
        drawn = DrawnPrompt(draw=0, group_id="g", prompt=_sums().train_prompt(0))
        in_flight.begin(drawn, lambda: [asyncio.ensure_future(sample(place)) for place in range(3)])
        with pytest.raises(SandboxRefused):
            await in_flight.advance(part_groups=1, budget_seconds=9, hold_seconds=9)
        (group,) = await in_flight.advance(part_groups=1, budget_seconds=9, hold_seconds=9)
        return group.episodes

    episodes = asyncio.run(run())
    assert not refusals and [episode.seed for episode in episodes] == [0, 1, 2]


async def _made(config: RunConfig, policy: Scripted, prompt: Any) -> Episode:
    return await episode_maker(config)(policy, prompt, seed=1)


def test_tools_of_a_task_in_a_mixture_are_refused(tmp_path: Path) -> None:
    given = _own(tmp_path, "WithTools").environment.name
    tasks = {"shop": {"name": given}, "digits": {"name": "chain_sum"}}
    config = RunConfig.model_validate({"environment": {"name": "mixture", "tasks": tasks}})
    with pytest.raises(ValueError, match=r"environment\.tasks\.shop\.name .* has tools of its own"):
        load_environment(config.environment, 0)


def test_what_is_no_tool_and_no_episode_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the tool 'shop': 3; give functions"):
        episode_maker(_own(tmp_path, "WithWrong"))
    with pytest.raises(ValueError, match="generate_episode that is not async"):
        episode_maker(_own(tmp_path, "NotAsync"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tools.a.kind=function"], r"tools\.a\.reference None does not go with function: name it"),
        (["tools.a.kind=calculator", "tools.a.reference=x.py:f"], "does not go with calculator"),
        (["tools.a.kind=calculator", "tools.a.opens=[", "tools.b.kind=python", "tools.b.opens=["], r"opens '\['"),
        (["tools.policy.kind=calculator"], r"tools\.policy: so the policy's own turns are called"),
        (["tools.a.kind=abacus"], r"tools\.a\.kind = 'abacus'"),
        (["tools.a.kind=calculator", "generate_episode=x.py:f"], "exclude each other"),
        (["episode.result_closes="], r"episode\.result_closes = None: it must be text"),
        (["episode.max_turns=0"], r"episode\.max_turns = 0"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused_in_one_sentence(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_config(preset="tiny", file=None, overrides=overrides)
    assert "\n" not in str(caught.value)
