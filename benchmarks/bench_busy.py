"""A training step and an encode beside a neighbour that wants every core, and without one.

    python benchmarks/bench_busy.py [--shape 2048x384x12288] [--k 32] [--rounds 15]

The neighbour is one process per core that only computes. Each state is measured in a process of its
own, once with threads that spin while they wait (OpenMP's default) and once with threads that sleep
(`OMP_WAIT_POLICY=passive`, what fastsae's commands ask for). fastsae and plain PyTorch take turns,
and ratios are of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

RESULT = Path(__file__).resolve().parent / "results" / "cpu" / "busy.json"
POLICIES = ("spin", "sleep")
STATES = ("alone", "busy")
PLAIN, STEP, PRODUCT, ENCODE = "plain step", "fastsae step", "product", "fastsae encode"


def cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def neighbours() -> Iterator[None]:
    """One process on each core that never waits."""
    code = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores()]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def contenders(n: int, d: int, f: int, k: int) -> dict[str, Callable[[int], Any]]:
    import torch
    from bench_training_step import batches, own_model, own_step

    from fastsae.train.plain import PlainTopKStep

    xs = batches(n, d)
    sae, optimizer = own_model(d, f, k)
    step = own_step(sae, optimizer)
    other, _ = own_model(d, f, k)
    plain = PlainTopKStep(other.W_enc, other.b_enc, other.W_dec, other.b_dec, k, 1e-3)
    W = sae.W_enc.detach().clone()

    @torch.no_grad()
    def encode(i: int) -> Any:
        return sae.encode(xs[i % len(xs)])

    return {
        PLAIN: lambda i: plain(xs[i % len(xs)]),
        STEP: lambda i: step(xs[i % len(xs)]),
        PRODUCT: lambda i: xs[i % len(xs)] @ W.T,
        ENCODE: encode,
    }


def measure(sizes: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round; the first two warm up."""
    calls = contenders(*sizes)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call(i)
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def isolated(sizes: tuple[int, ...], rounds: int, policy: str) -> dict[str, list[float]]:
    """`measure` in a process with this policy."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT",)}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy == "sleep":
        environment["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, __file__, "--measure", json.dumps([*sizes, rounds])]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048x384x12288", help="tokens x width x latents")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        *sizes, rounds = json.loads(args.measure)
        print(json.dumps(measure(tuple(sizes), rounds)))
        return
    sizes = (*map(int, args.shape.split("x")), args.k)
    rows = []
    for policy in POLICIES:
        found = {}
        found["alone"] = isolated(sizes, args.rounds, policy)
        with neighbours():
            found["busy"] = isolated(sizes, args.rounds, policy)
        for own, beside in ((STEP, PLAIN), (ENCODE, PRODUCT)):
            row: dict[str, Any] = {"threads": policy, "what": own, "beside": beside}
            for state in STATES:
                row[f"{state}_ms"] = round(statistics.median(found[state][own]), 2)
                row[f"{state}_beside_ms"] = round(statistics.median(found[state][beside]), 2)
                row[f"{state}_times"] = round(ratio(found[state], beside, own), 3)
            rows.append(row)
            print(
                f"threads that {policy}: {own} {row['alone_ms']} ms alone, {row['busy_ms']} busy; "
                f"{beside} {row['alone_beside_ms']} and {row['busy_beside_ms']}; "
                f"x {row['alone_times']} alone, x {row['busy_times']} busy",
                flush=True,
            )
    if not args.no_save:
        from fastsae.bench.machine import machine

        about = {**machine(), "op": "busy", "shape": args.shape, "K": args.k}
        lines = ",\n".join("  " + json.dumps({**about, **row}) for row in rows)
        RESULT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
