"""Where a run's processes lie: what follows from its config, what is refused, and that runs of one machine differ."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forge_core.config import RunConfig
from forge_core.placement import claims, memory
from forge_core.placement.allocator import peak_bytes
from forge_core.placement.claims import claimed_plan
from forge_core.placement.hosts import THIS_MACHINE, Host, this_machine
from forge_core.placement.plan import Plan, asks, make_plan
from forge_core.processes import Processes
from forge_core.settings import load_config


def _config(*overrides: str) -> RunConfig:
    return load_config(preset="tiny", file=None, overrides=list(overrides))


def _host(cores: int, gpus: int = 0) -> Host:
    return Host(
        name=THIS_MACHINE,
        cores=tuple(range(cores)),
        gpus=tuple(map(str, range(gpus))),
        memory_bytes=None,
    )


def _cores(plan: Plan) -> dict[str, list[tuple[int, ...]]]:
    return {
        name: [slot.cores for slot in grant.slots]
        for name, grant in plan.grants.items()
        if grant.cores
    }


def test_in_sync_generators_and_trainer_have_the_same_cores_one_after_the_other() -> None:
    assert _cores(make_plan(_config(), [_host(2)])) == {
        "trainer": [(0,), (1,)],
        "generator-0": [(0, 1)],
    }


@pytest.mark.parametrize("regime", ["async", "hybrid"])
def test_those_that_are_busy_at_the_same_time_have_cores_of_their_own(regime: str) -> None:
    plan = make_plan(_config(f"regime={regime}", "generators.replicas=2"), [_host(4)])
    assert _cores(plan) == {"trainer": [(0,)], "generator-0": [(1,)], "generator-1": [(2,)]}
    assert plan.unbound is None


def test_too_few_cores_bind_nobody_or_are_refused() -> None:
    crowded = ["regime=async", "generators.replicas=2"]
    plan = make_plan(_config(*crowded), [_host(2)])
    assert _cores(plan) == {} and "ask for 3 cores and 2 are free" in str(plan.unbound)
    shared = make_plan(_config(*crowded, "core_binding=shared"), [_host(2)])
    assert _cores(shared) == {} and shared.unbound is None
    with pytest.raises(ValueError, match=r"generators.replicas 2 .* ask for 3 cores"):
        make_plan(_config(*crowded, "core_binding=bound"), [_host(2)])


def test_gpus_are_the_trainers_first_and_nobody_else_has_them() -> None:
    config = _config("trainer.device=cuda", "generators.device=cuda", "generators.replicas=2")
    plan = make_plan(config, [_host(2, gpus=4)])
    gpus = {name: grant.gpus for name, grant in plan.grants.items() if grant.gpus}
    assert gpus == {"trainer": ("0", "1"), "generator-0": ("2",), "generator-1": ("3",)}
    with pytest.raises(ValueError, match=r"ask for 4 GPUs and there are 3: lower them"):
        make_plan(config, [_host(2, gpus=3)])


COLOCATED = (
    "placement=colocated",
    "trainer.ranks=2",
    "generators.replicas=2",
    "generators.threads=1",
)


@pytest.mark.parametrize("regime", ["sync", "hybrid"])
def test_colocated_meshes_have_the_same_devices(regime: str) -> None:
    plan = make_plan(_config(f"regime={regime}", *COLOCATED), [_host(2)])
    assert _cores(plan) == {"trainer": [(0,), (1,)], "generator-0": [(0,)], "generator-1": [(1,)]}
    on_gpus = _config(
        f"regime={regime}", *COLOCATED, "trainer.device=cuda", "generators.device=cuda"
    )
    gpus = {n: g.gpus for n, g in make_plan(on_gpus, [_host(1, gpus=2)]).grants.items() if g.gpus}
    assert gpus == {"trainer": ("0", "1"), "generator-0": ("0",), "generator-1": ("1",)}
    with pytest.raises(ValueError, match=r"trainer.ranks 2 on device cuda asks for 2 GPUs and"):
        make_plan(on_gpus, [_host(1, gpus=1)])


def test_colocated_meshes_need_the_memory_of_one_side_at_a_time() -> None:
    shape = memory.model_shape(_config())
    assert shape is not None
    needs = {
        layout: peak_bytes(list(asks(_config(f"placement={layout}"), shape=shape).values()))
        for layout in ("apart", "colocated")
    }
    trainer = 2 * sum(memory.trainer_parts(_config(), shape).values())
    generator = sum(memory.generator_parts(_config(), shape).values())
    assert needs["apart"] - needs["colocated"] == min(trainer, generator)


def test_who_writes_checkpoints_asks_for_the_memory_that_takes() -> None:
    shape = memory.model_shape(_config())
    assert shape is not None
    # Weights and two moments of 4 bytes a parameter, and the file of the moments twice.
    writing = 7 * 4 * shape.num_parameters
    asked = asks(_config("trainer.ranks=1"), shape=shape)["trainer"].resting_bytes
    assert asked == memory.PROCESS_BYTES + 2 * memory.published_bytes(shape) + writing


def test_a_mesh_that_stopped_gives_back_what_it_held_and_may_take_it_again() -> None:
    plan = make_plan(_config("regime=hybrid"), [_host(2)])
    before = plan.grants["generator-0"]
    plan.give_back("generator-0")
    assert "generator-0" not in plan.grants
    assert plan.take("generator-0") == before
    assert plan.take("trainer") is plan.grants["trainer"]


def test_runs_of_one_machine_are_bound_to_different_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Cores that a run beside the tests has claimed are not for them to have.
    prefix = f"forgeflow-test-{os.getpid()}-"
    monkeypatch.setattr(claims, "PREFIX", prefix)
    cores = this_machine().cores
    one = _config("regime=sync", "generators.threads=1", "trainer.ranks=1")
    with claimed_plan(one, [this_machine()]) as first:
        taken = first.grants["trainer"].cores
        with claimed_plan(one, [this_machine()]) as second:
            assert second.grants["trainer"].cores == (() if len(cores) == 1 else cores[1:2])
        assert taken == cores[:1]
        script = (
            "from forge_core.placement import claims\n"
            f"claims.PREFIX = {prefix!r}\n"
            "from forge_core.placement.hosts import this_machine\n"
            "host = this_machine()\n"
            "with claims.claimed_cores(host, len(host.cores)) as found: print(found.cores)"
        )
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert told.stdout.strip() == "()", told.stderr
    with claimed_plan(one, [this_machine()]) as again:
        assert again.grants["trainer"].cores == taken


def test_processes_run_where_the_plan_says_and_give_it_back(tmp_path: Path) -> None:
    """Real processes of Monarch's, bound to cores, with their devices visible and no others."""
    seen = asyncio.run(_start_and_look())
    cores = this_machine().cores
    for (affinity, visible), core in zip(seen, cores, strict=False):
        assert affinity == {core} and visible == ""


async def _start_and_look() -> list[tuple[set[int], str]]:
    ranks = min(2, len(this_machine().cores))
    config = _config(f"trainer.ranks={ranks}", "generators.threads=1")
    plan = make_plan(config, [this_machine()])
    owned = Processes(plan, grace_seconds=5.0, startup_seconds=60.0)
    try:
        await owned.start("trainer", lambda slot: {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)})
        assert "trainer" in plan.grants
        return [(os.sched_getaffinity(pid), _environment(pid)) for pid in owned["trainer"].pids]
    finally:
        await owned.stop()
        assert "trainer" not in plan.grants


def _environment(pid: int) -> str:
    pairs: Any = (
        line.partition("=") for line in Path(f"/proc/{pid}/environ").read_text().split("\0")
    )
    return {name: value for name, _, value in pairs}["CUDA_VISIBLE_DEVICES"]


def test_reference_and_critic_have_a_place_only_if_the_algorithm_asks_for_them() -> None:
    def meshes(*overrides: str) -> set[str]:
        return set(make_plan(_config(*overrides), [_host(2)]).grants)

    plain = meshes()
    assert plain.isdisjoint({"reference", "critic"})
    assert meshes("algorithm.kl.coefficient=0.1") == plain | {"reference"}
    assert meshes("algorithm.loss=ppo") == plain | {"critic"}
    on_gpus = _config("algorithm.loss=ppo", "trainer.device=cuda")
    grants = make_plan(on_gpus, [_host(2, gpus=3)]).grants
    assert len({*grants["trainer"].gpus, *grants["critic"].gpus}) == 3
