"""How long threads waited for a core."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from fastsae import _waits

ON_LINUX = os.path.exists("/proc/self/schedstat")


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.skipif(not ON_LINUX, reason="Linux tells it")
def test_a_neighbour_on_the_same_core_is_seen():
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    try:
        time.sleep(0.3)
        waits = _waits.Waits()
        spin(1.0)
        share = waits.share()
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()
    assert share > 0.5  # three of four
    assert _waits.told(share) == f"threads waited for a core {share:.0%} of the time"


def test_nothing_is_told_of_little_waiting(monkeypatch):
    monkeypatch.setattr(_waits, "_threads", lambda: {"1": (100, 7)})
    waits = _waits.Waits()
    monkeypatch.setattr(_waits, "_threads", lambda: {"1": (200, 17), "2": (50, 0)})
    assert waits.share() == pytest.approx(10 / 160) and _waits.told(waits.share()) == ""
    monkeypatch.setattr(_waits, "_threads", dict)  # not Linux
    assert _waits.Waits().share() == 0.0
