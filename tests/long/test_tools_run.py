"""A short run with a calculator: every token that was stored is the policy's or the tool's, and is marked so."""

from __future__ import annotations

from pathlib import Path

from harness import Start, assert_verified

from forge_core.model import build_tokenizer
from forge_core.tools.calculator import calculate
from storage.objects import open_store
from storage.parts import read_committed

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = (
    "steps=2", "warm_start.steps=40", "warm_start.batch_size=128", "groups_per_step=16", "evaluation.num_prompts=16",
    f"environment.name={EXAMPLES}/own_tools.py:Sums",
)  # fmt: skip


def test_every_stored_token_is_the_policys_or_the_tools(start_run: Start) -> None:
    options = [option for each in SHORT for option in ("--set", each)]
    run = start_run(
        "tools", "--preset", "tiny", "--config", str(EXAMPLES / "own_tools.toml"), *options
    )()
    # In sync the trainer holds the recorded logprobs of the masked tokens against its own, and would have ended it.
    assert run.code == 0, run.errors
    rows = read_committed(open_store(str(run.store)), run.run_id).to_pylist()
    tokenizer = build_tokenizer(2048)
    num_answered = 0
    for row in rows:
        ids, mask, turns = row["response_token_ids"], row["mask"], row["turns"]
        bounds = [(turn["start"], turn["end"]) for turn in turns]
        assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
        assert bounds[-1][1] == len(ids) == len(mask)
        said = ""
        for turn in turns:
            tokens = ids[turn["start"] : turn["end"]]
            is_policys = turn["role"] == "policy"
            assert mask[turn["start"] : turn["end"]] == [is_policys] * len(tokens)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if is_policys:
                assert "]" not in text[:-1]
            else:
                assert turn["role"] == "calculator" or "no call was opened" in text
                assert set(row["logprobs"][turn["start"] : turn["end"]]) == {0.0}
                num_answered += _is_right(said, text)
            said = text
        cost = next(score["value"] for score in row["scores"] if score["name"] == "tools")
        assert cost == -0.2 * sum(turn["role"] == "calculator" for turn in turns)
    assert num_answered > 0
    assert_verified(run.run_id, run.store)


def _is_right(call: str, result: str) -> bool:
    """Whether a call was answered by its value; one that is no expression by an error."""
    assert call.endswith("]") and result.endswith(";")
    if result.startswith("error: "):
        return False
    assert result == calculate(call[:-1].rpartition("[")[2]) + ";"
    return True
