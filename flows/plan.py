"""A dry run's plan, as people read it."""

from __future__ import annotations

from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from flows.terminal import console


def print_plan(plan: dict[str, Any]) -> None:
    """Print what a run would start, and its resolved config."""
    out = console()
    out.print(f"Store   {plan['store']}", markup=False)
    out.print(f"Run id  {plan['run_id'] or '(made up at the start)'}", markup=False)
    out.print(f"Model   {plan['model']}", markup=False)
    table = Table("mesh", "meshes", "processes each", "threads each", "device", "each process runs")
    for name, mesh in plan["meshes"].items():
        table.add_row(
            name,
            str(mesh["meshes"]),
            str(mesh["processes_per_mesh"]),
            str(mesh["threads_per_process"]),
            mesh["device"],
            mesh["runs"],
        )
    out.print(table)
    gpus = plan["gpus"]
    present = "" if gpus["present"] is None else f", {gpus['present']} present"
    out.print(f"GPUs    {gpus['needed']} needed{present}", markup=False)
    for host in plan["hosts"]:
        out.print(f"Host    {host}", markup=False)
    out.print(f"Cores   {plan['cores']}", markup=False)
    for each in plan["placement"]:
        kind = "gpus" if each["gpus"] else "cores"
        own = ", ".join(map(str, each[kind]))
        out.print(f"        {each['mesh']} rank {each['rank']}: {kind} {own} of {each['host']}")
    if plan["unbound"] is not None:
        out.print(f"        no process is bound to cores: {plan['unbound']}", markup=False)
    if plan["parameters"] is not None:
        out.print(f"Model   {plan['parameters'] / 1e9:.3g} billion parameters", markup=False)
    if plan["needs"]:
        out.print(_needs(plan["needs"]))
    else:
        out.print("Memory  unknown until the model is downloaded: give model.shape", markup=False)
    out.print(f"A step trains on {plan['episodes_per_step']} episodes.\n", markup=False)
    out.print(Text(yaml.safe_dump(plan["config"], sort_keys=False).rstrip()))
    out.print("\nNothing was started.", markup=False)


def _needs(needs: list[dict[str, Any]]) -> Table:
    """Estimates, each with what it is made of."""
    table = Table("needs about", "GiB", "has", "of which")
    for need in needs:
        available = need["available_bytes"]
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in need["parts_bytes"].items())
        table.add_row(
            need["name"],
            _gib(need["bytes"]),
            "?" if available is None else _gib(available),
            parts,
        )
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
