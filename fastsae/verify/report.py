"""`fastsae verify`, also as `python -m fastsae.verify` where the command line is not installed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _dispatch, _verified
from .._verified import FAILED, PASSED, Check, Result
from . import run, worker

_COLUMNS = (("op", 24), ("backend", 8), ("design", 12), ("dtype", 9), ("passed", 7), ("seconds", 8))


def devices(name: str | None) -> list[torch.device]:
    """The devices to verify: the one named, else the CPU and every GPU.

    Raises:
        ValueError: torch has no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no torch device") from None
    if device.type == "cuda":
        if (device.index or 0) >= count:
            raise ValueError(f"torch {torch.__version__} finds no {name} on this machine")
        return [torch.device("cuda", device.index or 0)]
    if device.type != "cpu":
        raise ValueError(f"only cpu and cuda devices have kernels, not {name}")
    return [device]


def _line(check: Check, result: Result) -> str:
    passed = {PASSED: "yes", FAILED: "NO"}.get(result.state, "unknown")
    cells = (*check, passed, f"{result.seconds:.2f}")
    text = "  ".join(str(c).ljust(width) for c, (_, width) in zip(cells, _COLUMNS))
    return f"{text}  {result.reason}".rstrip()


def _row(device: torch.device, check: Check, result: Result, interpreted: bool) -> dict[str, Any]:
    return {
        "device": str(device),
        "interpreted": interpreted,
        **check._asdict(),
        "passed": result.state == PASSED,
        "state": result.state,
        "seconds": result.seconds,
        "reason": result.reason,
    }


def report(
    ops: Sequence[str],
    device: str | None = None,
    repeat: int = 1,
    json_file: Path | None = None,
    in_process: bool = False,
) -> int:
    """Runs and prints the checks; returns the exit status: 0, or 1 when one did not pass.

    Raises:
        ValueError: an unknown op or device.
    """
    for op in ops:
        if op not in _dispatch.OPS:
            raise ValueError(f"unknown op {op!r}, one of {', '.join(_dispatch.OPS)}")
    rows: list[dict[str, Any]] = []
    targets = devices(device)
    for target in targets:
        key = _verified.key(target)
        print(f"{target}: {key['device'].partition('; flags')[0]}")
        print("  ".join(name.ljust(width) for name, width in _COLUMNS) + "  reason", flush=True)

        def tell(check: Check, result: Result, target: torch.device = target) -> None:
            interpreted = target.type == "cpu" and check.backend == "triton"
            rows.append(_row(target, check, result, interpreted))
            print(_line(check, result) + (" (interpreted)" if interpreted else ""), flush=True)

        wanted = list(ops) or list(_dispatch.OPS)
        if in_process:
            for check in run.checks(target, wanted):
                if target.type == "cpu" and check.backend == "triton":
                    continue
                scale = "production" if target.type == "cuda" else "small"
                found = worker.verdict(check, target, scale=scale, repeat=repeat, bands=False)
                tell(check, Result(*found))
        else:
            run.verify(target, wanted, repeat=repeat, on_result=tell)
        for backend in _dispatch.BACKENDS[1:]:
            why = {_missing(op, backend, target) for op in wanted}
            if not any(r["backend"] == backend and r["device"] == str(target) for r in rows):
                print(f"{backend}: no checks here: {'; '.join(sorted(why))}")
    passed = sum(r["passed"] for r in rows)
    print(f"{passed} of {len(rows)} checks passed")
    if not in_process:
        for target in targets:
            print(f"recorded in {_verified.record(target).path}")
    if json_file is not None:
        keys = {str(t): _verified.key(t) for t in targets}
        json_file.write_text(json.dumps({"devices": keys, "checks": rows}, indent=1) + "\n")
    return 0 if rows and passed == len(rows) else 1


def _missing(op: str, backend: str, device: torch.device) -> str:
    return _dispatch._missing(op, backend, device, torch.float32) or "nothing to check"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line without typer."""
    parser = argparse.ArgumentParser(prog="python -m fastsae.verify")
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--device")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", action="store_true")
    given = parser.parse_args(arguments)
    try:
        return report(given.op, given.device, given.repeat, given.json, given.in_process)
    except ValueError as error:
        sys.stderr.write(f"fastsae verify: {error}\n")
        return 2
