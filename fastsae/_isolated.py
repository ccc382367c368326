"""Work in a process of its own: a kernel that crashes, hangs or poisons the device ends only that.

The child prints a JSON object per line of its standard output; `rows` hands them over as they come.
It ends with its parent, however that ends: its standard input is the parent's, and closes then.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The child finds what its parent finds: a folder named fastsae where it happens to run, or a module
# called like one of Python's own, is not it. (-c looks there first, so nothing is imported before.)
_BOOT = """
import sys
sys.path[:] = eval(sys.argv[1])
from fastsae import _isolated
_isolated.run_as_child(*sys.argv[2:4])
"""
_HOME = Path(__file__).resolve().parent


def _search_path() -> list[str]:
    """This process's, the folder that "" stood for when this package was imported included."""
    root = str(_HOME.parent)
    paths = [p for p in sys.path if isinstance(p, str)]  # imports pass over all else
    known = any(p and Path(p).resolve() == _HOME.parent for p in paths)
    return [p or root for p in paths if p or not known]


def rows(
    module: str,
    arguments: Sequence[str],
    on_row: Callable[[dict[str, Any]], None],
    *,
    limit_s: float,
    env: Mapping[str, str] | None = None,
) -> str | None:
    """Runs `python -m module arguments`; calls `on_row` with every JSON object that it prints.

    Args:
        limit_s: seconds that may pass until the next row, or until the end after the last one; then
            the child and all that it started are killed.
        env: variables set in addition to this process's.

    Returns:
        None when the child ended with status 0, else why not: the time limit, the signal, or the
        status with the end of its standard error.

    Raises:
        OSError: no process can be started here.
    """
    if not sys.executable:
        raise OSError("this Python does not know its own executable (sys.executable is empty)")
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", _BOOT, repr(_search_path()), str(_HOME), module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, **(env or {})}, start_new_session=True,
        )  # fmt: skip
        lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_read, args=(child, lines), daemon=True).start()
        try:
            late = _hand_over(lines, on_row, limit_s)
            if not late:
                try:
                    child.wait(limit_s)
                except subprocess.TimeoutExpired:
                    late = True
        finally:
            if child.poll() is None:
                _kill(child)
            assert child.stdin is not None
            child.stdin.close()
        if late or child.returncode is None:
            return f"nothing came for {limit_s:g} s; stopped"
        if child.returncode == 0:
            return None
        errors.seek(0)
        tail = errors.read().decode(errors="replace").strip()[-2000:]
        if child.returncode < 0:
            how = f"killed by {signal.Signals(-child.returncode).name}"
        else:
            how = f"ended with status {child.returncode}"
        return f"{how}: {tail}" if tail else how


def _read(child: subprocess.Popen[bytes], lines: queue.Queue[bytes | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _hand_over(
    lines: queue.Queue[bytes | None], on_row: Callable[[dict[str, Any]], None], limit_s: float
) -> bool:
    """Whether the limit passed before the child closed its output."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return True
        if line is None:
            return False
        if line.startswith(b"{"):
            on_row(json.loads(line))
            deadline = time.monotonic() + limit_s


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
        child.wait(30)


def _end_with_parent() -> None:
    """Waits for the end of the standard input; then kills this process and what it started."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def run_as_child(home: str, module: str) -> None:
    """What the child does: the module with the arguments behind it, while its parent lives."""
    if str(_HOME) != home:
        raise SystemExit(f"the process found another fastsae, {_HOME}, not {home}")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
