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
    out.print(f"GPUs    {gpus['needed']} needed, {gpus['present']} present", markup=False)
    out.print(f"Cores   {plan['cores']}", markup=False)
    out.print(f"A step trains on {plan['episodes_per_step']} episodes.\n", markup=False)
    out.print(Text(yaml.safe_dump(plan["config"], sort_keys=False).rstrip()))
    out.print("\nNothing was started.", markup=False)
