"""The main job: the tiny preset learns, and everything that is said about the run is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
from harness import QUIET_ENGINE, Finished, artifacts, command, task_runs

KEYS = {
    "run_id": None,
    "parent_run_id": None,
    "regime": None,
    "status": None,
    "started_at": None,
    "finished_at": None,
    "config": None,
    "versions": None,
    "git_commit": None,
    "bitwise": None,
    "steps": None,
    "policy_version": None,
    "optimizer_updates": None,
    "eval": {"initial", "final", "greedy_initial", "greedy_final", "num_prompts"},
    "groups": {"admitted", "trained", "reused", "pending", "dropped"},
    "episodes": {"generated", "trained"},
    "tokens": {"prompt", "response"},
    "age": {"max", "mean"},
    "parity": {"mean", "max"},
    "retries": None,
    "failures": None,
    "seconds": {"total", "down", "meshes"},
}


def _committed(run: Finished, columns: list[str]) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((run.store / "episodes" / "commits" / run.run_id).iterdir()):
        part = json.loads(path.read_bytes())["part"]["key"]
        rows += pq.read_table(run.store / part, columns=columns).to_pylist()
    return rows


def test_it_learns(tiny_run: Finished) -> None:
    evaluation = tiny_run.summary["eval"]
    assert evaluation["num_prompts"] == 500
    assert evaluation["initial"] <= 0.4
    # The bar of 0.8 is that of the whole preset; this is half of its steps.
    assert evaluation["final"] >= 0.7


def test_held_out_prompts_share_none_with_training(tiny_run: Finished) -> None:
    trained = {row["prompt"] for row in _committed(tiny_run, ["prompt"])}
    held_out = set()
    for evaluation in tiny_run.facts("evaluated"):
        for part in evaluation["parts"]:
            rows = pq.read_table(tiny_run.store / part["key"], columns=["prompt"]).to_pylist()
            held_out |= {row["prompt"] for row in rows}
    assert len(held_out) == 500
    assert len(trained) > 500
    assert not trained & held_out


def test_show_carries_every_key(tiny_run: Finished) -> None:
    shown = subprocess.run(
        command("show", "tiny", "--store", str(tiny_run.store), "--json"),
        capture_output=True,
        check=True,
        timeout=60,
    )
    summary = json.loads(shown.stdout)
    assert summary == tiny_run.summary == json.loads((tiny_run.folder / "run.json").read_bytes())
    for key, parts in KEYS.items():
        assert key in summary
        assert parts is None or parts <= summary[key].keys()
    assert summary["status"] == "finished"
    assert summary["bitwise"] is True
    assert summary["retries"] == 0
    assert summary["failures"] == 0
    assert summary["groups"]["pending"] == 0
    assert summary["age"]["max"] == 0


def test_time_is_accounted_for(tiny_run: Finished) -> None:
    seconds = tiny_run.summary["seconds"]
    assert seconds["meshes"].keys() == {"generator-0", "trainer", "verifier"}
    for kinds in seconds["meshes"].values():
        assert kinds["unaccounted"] <= 0.02 * seconds["total"]
        assert abs(sum(kinds.values()) - seconds["total"] + seconds["down"]) < 1e-3
    assert seconds["meshes"]["trainer"].keys() >= {"startup", "warm_start", "train", "weights"}
    assert seconds["meshes"]["generator-0"].keys() >= {"generate", "evaluate", "weights"}


def test_every_publish_is_proved(tiny_run: Finished) -> None:
    published = tiny_run.facts("published")
    steps = {fact["step"]: fact for fact in tiny_run.facts("step")}
    assert [fact["policy_version"] for fact in published] == list(range(len(steps) + 1))
    for fact in published:
        parity = fact["parity"]
        assert parity["mean"] <= 1e-3
        assert parity["max"] <= 1e-2
        assert parity["tokens"] >= 256
        assert parity["entropy"] > 0.1
        if fact["policy_version"]:
            assert fact["weights_digest"] == steps[fact["policy_version"]]["weights_digest"]
    assert len({fact["weights_digest"] for fact in published}) == len(published)
    gaps = [s["metrics"]["sampling/sampling_logp_difference/max"] for s in steps.values()]
    assert max(gaps) <= 1e-2


def test_verify_recounts_it(tiny_run: Finished) -> None:
    result = subprocess.run(
        command("verify", "tiny", "--store", str(tiny_run.store), "--json"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
    counted = Counter(row["group_id"] for row in _committed(tiny_run, ["group_id"]))
    groups = tiny_run.summary["groups"]
    assert len(counted) == groups["admitted"] == groups["trained"] + sum(groups["dropped"].values())
    assert sum(counted.values()) == tiny_run.summary["episodes"]["generated"]
    assert set(counted.values()) == {tiny_run.summary["config"]["group_size"]}


def test_episodes_can_be_read(tiny_run: Finished) -> None:
    result = subprocess.run(
        command("episodes", "tiny", "--store", str(tiny_run.store), "--limit", "3", "--json"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    episodes = json.loads(result.stdout)
    assert len(episodes) == 3
    assert all(episode["prompt"].endswith("=") for episode in episodes)
    listed = subprocess.run(
        command("runs", "--store", str(tiny_run.store), "--json"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [run["run_id"] for run in json.loads(listed.stdout)] == ["tiny"]


def test_stages_are_task_runs_of_their_own(tiny_run: Finished, prefect_server: str) -> None:
    steps = tiny_run.summary["steps"]
    runs = task_runs(prefect_server, tiny_run.run_id, at_least=5 * steps + 7)
    names = Counter(run["name"].split()[0] for run in runs)
    per_step = {stage: names[stage] for stage in ("generate", "score", "buffer", "train")}
    assert per_step == dict.fromkeys(per_step, steps)
    assert names["publish"] == steps + 1
    assert names["evaluate"] == 2
    assert all(run["run_count"] == 1 for run in runs)


def test_pages_of_prefect_show_what_came_of_it(tiny_run: Finished, prefect_server: str) -> None:
    shown = artifacts(prefect_server, tiny_run.run_id)
    assert shown.keys() == {
        f"forgeflow-{what}"
        for what in ("progress", "results", "samples", "time", "accounting", "report")
    }
    assert float(shown["forgeflow-progress"]) == 100.0
    assert "score, sampled" in shown["forgeflow-results"]
    assert (tiny_run.folder / "report.html").as_uri() in shown["forgeflow-report"]
    names = {run["name"] for run in task_runs(prefect_server, tiny_run.run_id, at_least=9)}
    last = f"evaluate final, version {tiny_run.summary['steps']}"
    assert {"train step 1", "publish version 0", last} <= names


def test_the_checkpoint_is_a_hugging_face_model(tiny_run: Finished) -> None:
    """It loads in transformers and in plain vLLM, which agree on what it says."""
    folder = tiny_run.folder / "checkpoints" / f"{tiny_run.summary['steps']:08d}"
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    row = next(r for r in _greedy_rows(tiny_run) if r["reward"] == 1.0)
    script = """
import json, sys
folder, prompt = sys.argv[1:]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = tokenizer(prompt, return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1]:]
from vllm import LLM, SamplingParams
llm = LLM(model=folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**28)
params = SamplingParams(temperature=0.0, max_tokens=16)
said = llm.generate({"prompt_token_ids": ids[0].tolist()}, params)[0].outputs[0]
print(json.dumps([tokenizer.decode(out, skip_special_tokens=True), said.text]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder), row["prompt"]],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **QUIET_ENGINE},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    by_transformers, by_vllm = json.loads(result.stdout.splitlines()[-1])
    assert by_transformers == by_vllm == row["response"]


def _greedy_rows(run: Finished) -> list[dict[str, Any]]:
    final = next(fact for fact in run.facts("evaluated") if fact["name"] == "final")
    rows: list[dict[str, Any]] = []
    for part in final["parts"]:
        table = pq.read_table(
            run.store / part["key"], columns=["sample", "prompt", "response", "reward"]
        )
        rows += [row for row in table.to_pylist() if row["sample"] == 1]
    return rows


def test_tensorboard_files_are_there(tiny_run: Finished) -> None:
    files = list((tiny_run.folder / "tensorboard").glob("events.out.tfevents.*"))
    assert files
    assert sum(file.stat().st_size for file in files) > 10_000
