"""`fastsae info`: what this installation can do."""

from __future__ import annotations

import json
from typing import Any

import typer


def _waits(setting: str | None) -> str:
    return f"wait by {setting}" if setting else "spin for a while"


def info(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead."),
) -> None:
    """Print versions, devices, and the backend that every operator takes, with the reasons."""
    from .. import info as collect

    found = collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    kernels = found["cpu_kernels"]
    rows: dict[str, Any] = {
        "fastsae": found["fastsae"],
        "torch": found["torch"],
        "triton": found["triton"] or "not installed",
        "Python": found["python"],
        "platform": found["platform"],
        "threads": f"{found['threads']}, idle ones {_waits(found['waiting'])}",
        "GPUs": ", ".join(found["gpus"]) or "none",
        "C++ kernels": (
            f"{kernels['level']} (this CPU has {', '.join(kernels['levels'])})"
            + ("" if kernels["hooks"] else "; without Python.h: steering hooks are slower")
            if kernels["built"]
            else kernels["missing"]
        ),
    }
    for level, state in kernels["checked"].items():
        rows[f"  {level}"] = "never checked on this processor" if state == "never" else state
    rows["CUDA kernels"] = found["cuda_kernels"]["missing"] or "built"
    for device, path in found["records"].items():
        rows[f"checks of {device}"] = path
    rows.update(found["environment"])
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"[bold]{escape(name)}[/]", escape(str(value)))
    console.print(table)
    ops = Table(title="Backends", title_justify="left")
    for column in ("operator", "device", "takes", "others"):
        ops.add_column(column)
    alike: dict[tuple[str, str, str], list[str]] = {}  # operators of one row
    for op, devices in found["ops"].items():
        for device, choice in devices.items():
            others = "\n".join(
                f"{name}: {why}"
                for name, why in choice["others"].items()
                if name != choice["backend"] or why != "usable"  # forced, and cannot run
            )
            designs = choice["designs"].get(choice["backend"], {}) if device != "cpu" else {}
            takes = "\n".join([choice["backend"], *(f"  {d}: {s}" for d, s in designs.items())])
            alike.setdefault((device, takes, others), []).append(op)
    for (device, takes, others), names in alike.items():
        ops.add_row("\n".join(names), device, escape(takes), escape(others))
    console.print(ops)
