"""`python -m fastsae.verify.worker`: runs checks one after the other, a JSON object per row.

A row names its check: once when it begins ("running"), once when it has ended. The first check that
does not pass ends the process, since what it left behind on the device may spoil the next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import torch

from .._verified import FAILED, PASSED, RUNNING, UNKNOWN, Check
from . import checks

WRONG = "wrong: "  # how the reason of a wrong result begins
# What kernels do not cause: memory that others hold, compilers that are missing.
_SURROUNDINGS = ("out of memory", "allocate memory", "c compiler", "cannot find -l")


def verdict(check: Check, device: torch.device, **how: Any) -> tuple[str, float, str]:
    """State, seconds and reason of one check, in this process."""
    begin = time.perf_counter()
    try:
        with torch.no_grad():
            checks.run(check, device, **how)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except checks.WrongError as error:
        state, reason = FAILED, f"{WRONG}{error}"
    except (torch.OutOfMemoryError, MemoryError, OSError, ImportError) as error:
        state, reason = UNKNOWN, f"{type(error).__name__}: {_first_line(error)}"
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        state = UNKNOWN if any(what in reason.lower() for what in _SURROUNDINGS) else FAILED
    else:
        state, reason = PASSED, ""
    return state, round(time.perf_counter() - begin, 3), reason


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def _tell(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Exit status 0 when every check passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("checks", nargs="*", help="op:backend:design:dtype")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from .interpreter import repair

        repair()
    torch.zeros(1, device=device)  # a device that cannot be had is told apart from a failed check
    _tell({"ready": True})
    for text in given.checks:
        check = Check(*text.split(":"))
        _tell({"check": check, "state": RUNNING})
        state, seconds, reason = verdict(check, device, scale=given.scale, repeat=given.repeat)
        _tell({"check": check, "state": state, "seconds": seconds, "reason": reason})
        if state != PASSED:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
