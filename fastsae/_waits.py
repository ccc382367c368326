"""How long this process's threads waited for a core: what a time that was measured is worth."""

from __future__ import annotations

import os

BUSY = 0.25  # share of waiting above which a time says more of other work than of this


class Waits:
    """Counts from when it is made. Where the system does not tell (not Linux), nothing waited."""

    def __init__(self) -> None:
        self._begin = _threads()

    def share(self) -> float:
        """Of the time that threads could run, the part in which other work held the cores."""
        ran, waited = 0, 0
        for thread, (run, wait) in _threads().items():
            before = self._begin.get(thread, (0, 0))
            ran, waited = ran + run - before[0], waited + wait - before[1]
        return waited / (ran + waited) if ran + waited > 0 else 0.0


def _threads() -> dict[str, tuple[int, int]]:
    """Nanoseconds that each thread ran, and that it could have run but for the cores."""
    found = {}
    try:
        names = os.listdir("/proc/self/task")
    except OSError:
        return {}
    for name in names:
        try:
            with open(f"/proc/self/task/{name}/schedstat") as file:
                ran, waited, _ = file.read().split()
        except (OSError, ValueError):  # it has ended, or a kernel without these figures
            continue
        found[name] = int(ran), int(waited)
    return found


def told(share: float) -> str:
    """A clause for beside a speed: "" where little waited."""
    return f"threads waited for a core {share:.0%} of the time" if share > BUSY else ""
