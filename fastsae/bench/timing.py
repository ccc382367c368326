"""Verify, then time interleaved.

A round runs every contender once (A B C A B C ...), so that a disturbance of the machine hits all
of them; a reported ratio is the median over the rounds of the ratio within a round (the ratio of
the medians where too few rounds are shared). Every call takes the next set of the rotated inputs:
with one set for a whole round, the first contender would load it for those after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .machine import product_library

PRODUCT_DEFAULT = "product, default"
PRODUCT_ONEDNN = "product, oneDNN"
WRONG = "wrong"  # how the verdict on a wrong result begins
CALM = 0.05  # share of the CPUs that other processes may take in a round that counts


class WrongError(Exception):
    """A contender's result failed its check: it is not timed."""


@dataclass
class Contender:
    """One thing to time. `run(i)` works on the i-th set of rotated inputs, returns its result."""

    name: str
    run: Callable[[int], Any]
    # takes run(0)'s result; returns a note for the table, raises WrongError
    check: Callable[[Any], str] | None = None
    library: str = "default"  # torch's fp32 products: "default" or "onednn"
    every: int = 1  # runs in every n-th round only, for contenders that take seconds


@dataclass
class Measurement:
    name: str
    note: str = ""
    failed: str = ""
    others: float = 0.0
    peak_mb: float | None = None  # memory above the level before the first call
    times: dict[int, float] = field(default_factory=dict)  # round -> seconds

    def ms(self, q: float = 0.5) -> float:
        ordered = sorted(self.times.values())
        return 1e3 * ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.times.values())

    def ratio(self, unit: Measurement | None) -> float | None:
        if unit is None or not self.times or not unit.times:
            return None
        shared = self.times.keys() & unit.times.keys()
        if len(shared) < min(5, len(self.times), len(unit.times)):
            return self.median_ms() / unit.median_ms()
        return statistics.median(self.times[r] / unit.times[r] for r in shared)


class WallClock:
    """Times one call on the CPU."""

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak_of(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        """The result, and by how many MB resident memory rose above its level before the call.

        Scratch that an earlier call in this process left behind is not counted again.
        """
        if not Path("/proc/self/clear_refs").exists():
            return run(), None
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed counts as free
        kept: list[Any] = []
        mb = peak_extra_mb(lambda: kept.append(run()))
        return kept[0], mb

    def used(self) -> tuple[float, float]:
        """CPU seconds used by everything on this machine, and by this process."""
        return _cpu_seconds()


class EventClock:
    """Times one call on a GPU by events on the current stream, after flushing the L2 cache.

    The flush also keeps the device busy while the host enqueues the call, so that the launches of
    a short kernel are not part of its time. Unverified on a GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(max(256 << 20, 4 * cache), dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def peak_of(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = run()
        torch.cuda.synchronize(self.device)
        return result, (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def used(self) -> tuple[float, float]:
        return 0.0, 0.0  # what other processes do to the CPUs does not disturb the device


Clock = WallClock | EventClock


def verify(contender: Contender, peaks: Clock | None = None) -> Measurement:
    """One untimed run and its check; with a clock, the memory that the run took as well.

    Whatever it raises is its own failure: an assertion, a kernel that does not compile, a lost
    device.
    """
    m = Measurement(contender.name)
    try:
        with product_library(contender.library):
            if peaks is None:
                result = contender.run(0)
            else:
                result, m.peak_mb = peaks.peak_of(lambda: contender.run(0))
        if contender.check is not None:
            m.note = contender.check(result)
    except WrongError as error:
        m.failed = f"{WRONG}, not timed: {error}"
    except Exception as error:
        m.failed = _told(error)
    return m


def _told(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}"


def _attempt(m: Measurement, call: Callable[[], Any]) -> Any:
    """The call's result; None when it raised, which ends this contender alone."""
    try:
        return call()
    except Exception as error:
        m.failed, m.times = _told(error), {}
        return None


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds used on this machine by everything, and by this process."""
    own = os.times()
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(v) for v in fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, own.user + own.system


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float,
    warmup: int = 1,
    clock: Clock | None = None,
    begin: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Verifies every contender, then times the right ones in interleaved rounds.

    Stops after `rounds` undisturbed rounds, or after `seconds` once three rounds are complete.
    A round is disturbed when other processes took more than 5% of the CPUs during it: those
    rounds are dropped, as long as five remain, otherwise the calmest half is kept. The share that
    others took in the rounds kept is in every row. Given a clock, it also measures each contender's
    memory. A contender that raises is left out from then on. `begin` hears a contender's name
    before it is verified, and "time" before the rounds.
    """
    peaks, clock = clock, clock or WallClock()
    results = []
    for c in contenders:
        begin(c.name)
        results.append(verify(c, peaks))
    begin("time")
    for contender, m in zip(contenders, results):
        if m.failed or contender.every > 1:
            continue
        with product_library(contender.library):
            for i in range(warmup):
                _attempt(m, partial(contender.run, i))
    others: dict[int, float] = {}  # round -> share of the CPUs that other processes took
    turn = itertools.count(1)  # of the rotated inputs
    start = time.perf_counter()
    for r in range(4 * rounds):
        elapsed = time.perf_counter() - start
        calm = sum(share <= CALM for share in others.values())
        if calm >= rounds or (r >= 3 and elapsed > seconds):
            break
        round_begin, (busy, own) = time.perf_counter(), clock.used()
        for contender, m in zip(contenders, results):
            if m.failed or r % contender.every:
                continue
            with product_library(contender.library):
                call = partial(contender.run, next(turn))
                took = _attempt(m, lambda call=call: clock.seconds(call))  # type: ignore[misc]
                if took is not None:
                    m.times[r] = took
        busy_after, own_after = clock.used()
        wall = (time.perf_counter() - round_begin) * (os.cpu_count() or 1)
        others[r] = max(0.0, (busy_after - busy) - (own_after - own)) / wall
    for m in results:
        if not m.times:
            continue
        ran = sorted(m.times, key=lambda r: others[r])
        calm = sum(others[r] <= CALM for r in ran)
        kept = ran[: calm if calm >= 5 else max(calm, 3, len(ran) // 2)]
        m.times = {r: m.times[r] for r in sorted(kept)}
        m.others = statistics.mean(others[r] for r in m.times)
    return results


def products(x: Sequence[torch.Tensor], w: Sequence[torch.Tensor]) -> list[Contender]:
    """The two units: torch's product x @ W_enc.T, nothing else."""

    def run(i: int) -> torch.Tensor:
        return x[i % len(x)] @ w[i % len(w)].T

    def check(got: torch.Tensor) -> str:
        rows = slice(0, 64)
        truth = x[0][rows].double() @ w[0].double().T
        error = (got[rows].double() - truth).abs().max().item()
        if x[0].dtype == torch.float32 and error > 1e-4 * truth.abs().max().item():
            raise WrongError(f"max error {error:.1e} is not fp32 accuracy")
        return f"max error {error:.1e}"

    return [
        Contender(PRODUCT_DEFAULT, run, check),
        Contender(PRODUCT_ONEDNN, run, check, library="onednn"),
    ]


def _status_mb(field_name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}")


def peak_extra_mb(run: Callable[[], Any]) -> float:
    """High-water mark of this process's resident memory during run(), above its start, in MB.

    The result's own memory is part of it. Call it in a fresh process, after a small warm-up call.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mb("VmRSS")
    kept = run()
    peak = _status_mb("VmHWM")
    del kept
    return max(0.0, peak - before)


def rss_mb() -> float:
    return _status_mb("VmRSS")


def peak_mb() -> float:
    return _status_mb("VmHWM")
