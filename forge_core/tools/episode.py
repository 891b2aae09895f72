"""An episode in which the policy may call tools.

    policy writes ──stopped by a call's end──▶ tool answers ──▶ policy writes ── … ──▶ end-of-sequence token

What the policy wrote is on the mask, results are not. Results are encoded by themselves, and nothing that was sampled
is encoded again. Every turn of an episode is sampled by the same engine, which finds what came before in its prefix
cache.
"""

from __future__ import annotations

import asyncio
import inspect

from forge_core.rollout import Episode, EpisodeError, Policy, Transcript
from forge_core.tools.base import Tool, Toolbox, ToolError

_ATTEMPTS = 3
"""How often a tool is asked the same if the machine fails it."""
_CUT = "..."
_SHOWN_CHARACTERS = 200


async def tool_episode(policy: Policy, prompt_text: str, *, seed: int, toolbox: Toolbox) -> Episode:
    """Have the policy write, and answer its calls, until it ends or a budget does.

    A budget that is used up marks the episode as truncated: at `max_turns` the last call is not answered, and a result
    that leaves no token to the policy is not told. What makes a tool refuse a call is told to the policy. Raises
    EpisodeError, naming tool and prompt, where a tool fails otherwise, and OSError where the machine failed it every
    time: neither is an episode.
    """
    budget = toolbox.episode
    transcript = Transcript(policy, prompt_text, seed=seed)
    for turn in range(budget.max_turns):
        left = (
            None
            if budget.max_response_tokens is None
            else budget.max_response_tokens - transcript.num_tokens
        )
        text = await transcript.policy_writes(stop=toolbox.stops, max_tokens=left)
        if transcript.stopped_at is None:
            break
        if turn == budget.max_turns - 1:
            transcript.truncate()
            break
        role, result = await _result(toolbox, text, transcript.stopped_at, prompt_text)
        tokens = _cut(policy, toolbox, result)
        if (
            budget.max_response_tokens is not None
            and transcript.num_tokens + len(tokens) >= budget.max_response_tokens
        ):
            transcript.truncate()
            break
        transcript.tell_tokens(role, tokens)
    return transcript.episode()


async def _result(
    toolbox: Toolbox, text: str, stopped_at: str, prompt_text: str
) -> tuple[str, str]:
    """Who answers a turn's call, and what."""
    role = "tool"
    try:
        tool, call = toolbox.find_call(text, stopped_at)
        role = tool.name
        return role, await _call(tool, call, prompt_text)
    except ToolError as error:
        return role, f"error: {error}"


async def _call(tool: Tool, call: str, prompt_text: str) -> str:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            async with asyncio.timeout(tool.seconds) as deadline:
                result = await _asked(tool, call)
            break
        except ToolError:
            raise
        except Exception as error:  # It may be the user's, and raise anything.
            if isinstance(error, OSError) and not deadline.expired():
                if attempt == _ATTEMPTS:
                    raise
                continue
            what = (
                f"gave no result within {tool.seconds:g} s"
                if deadline.expired()
                else f"raised {type(error).__name__}: {error}"
            )
            raise EpisodeError(f"{_named(tool, prompt_text)} {what}") from error
    if not isinstance(result, str):
        raise EpisodeError(
            f"{_named(tool, prompt_text)} returned {type(result).__name__} where text is due"
        )
    return result


async def _asked(tool: Tool, call: str) -> object:
    if tool.is_quick or inspect.iscoroutinefunction(tool.run):
        result = tool.run(call)
    else:
        result = await asyncio.to_thread(tool.run, call)
    return await result if inspect.isawaitable(result) else result


def _named(tool: Tool, prompt_text: str) -> str:
    return f"tool {tool.name!r}, on the prompt {prompt_text[:_SHOWN_CHARACTERS]!r},"


def _cut(policy: Policy, toolbox: Toolbox, result: str) -> list[int]:
    """The tokens of a result with its marks; one that is too long is cut before it is marked."""
    most = toolbox.episode.max_result_tokens
    tokens = policy.encode(result)
    if len(tokens) > most:
        result = policy.decode(tokens[:most]) + _CUT
    return policy.encode(toolbox.quoted(result))
