"""Another architecture with a tokenizer of its own, on two replicas, and every stage failing once."""

from __future__ import annotations

from collections import Counter

from harness import Finished, assert_verified, task_runs


def test_another_architecture_with_its_own_tokenizer(faulty_llama: Finished) -> None:
    assert faulty_llama.code == 0, faulty_llama.errors
    assert faulty_llama.summary["groups"]["trained"] > 0
    assert faulty_llama.summary["parity"]["max"] <= 1e-2
    assert faulty_llama.summary["seconds"]["meshes"].keys() >= {"generator-0", "generator-1"}


def test_stages_that_fail_once_are_retried(faulty_llama: Finished, prefect_server: str) -> None:
    """No retry repeats what the first attempt made true: each group counts once, each step is trained once."""
    retries = faulty_llama.facts("retry")
    assert Counter(fact["stage"] for fact in retries) == {
        "generate": 1,
        "score": 1,
        "buffer": 1,
        "train": 1,
    }
    assert all("planted" in fact["cause"] and fact["seconds"] > 0 for fact in retries)
    assert faulty_llama.summary["retries"] == 4
    runs = task_runs(prefect_server, faulty_llama.run_id, at_least=5 * 3 + 7)
    twice = Counter(run["name"].split()[0] for run in runs if run["run_count"] == 2)
    assert twice == {"generate": 1, "score": 1, "buffer": 1, "train": 1}
    assert [fact["step"] for fact in faulty_llama.facts("step")] == [1, 2, 3]
    drawn = [draw["group_id"] for draw in _draws(faulty_llama)]
    assert len(drawn) == len(set(drawn)) == 3 * 8


def test_verify_finds_it_in_order(faulty_llama: Finished) -> None:
    assert_verified(faulty_llama.run_id, faulty_llama.store)


def _draws(run: Finished) -> list[dict[str, str]]:
    return [draw for fact in run.facts("admitted") for draw in fact["draws"]]
