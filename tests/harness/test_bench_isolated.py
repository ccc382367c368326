"""`fastsae bench` in processes of its own: what crashes, hangs or raises costs its own row."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from fastsae import _isolated
from fastsae.bench import isolated, run
from fastsae.bench.cases import Size
from fastsae.bench.isolated import Job, measured
from fastsae.bench.machine import has_onednn_in_fp32
from fastsae.bench.timing import Contender, measure

SIZE = Size(24, 16, 256, 4)
LIBRARIES = 2 if has_onednn_in_fp32() else 1
PLAN = run.Plan(backends=("reference",), rounds=2, seconds=0.2)
ROOT = Path(__file__).parents[2]

# what the children find before they begin: a reference that is not well
SPOILED = """
import os, time
import fastsae.reference as reference
right, calls = reference.{op}, []
def spoiled(*args):
    calls.append(1)
    if len(calls) > {after}:
        {fault}
    return right(*args)
reference.{op} = spoiled
"""
CRASH = "os.kill(os.getpid(), 11)"


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    started = []
    original = _isolated.rows

    def rows(*args, **options):
        started.append(1)
        return original(*args, **options)

    monkeypatch.setattr(_isolated, "rows", rows)

    def into(op, fault=CRASH, after=0):
        (tmp_path / "sitecustomize.py").write_text(SPOILED.format(op=op, fault=fault, after=after))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
        return started

    return into


def rows_of(ops, plan=PLAN, **options):
    found = []
    measured([Job(SIZE, op) for op in ops], plan, found.append, **options)
    return found


def by_name(rows):
    assert len({(r["op"], r["backend"]) for r in rows}) == len(rows), "a row twice"
    return {(r["op"], r["backend"]): r for r in rows}


def test_without_a_fault_one_process_measures_everything(spoil):
    started = spoil("sparse_decode", "pass")
    found = by_name(rows_of(["topk_encode", "sparse_decode"]))
    assert len(started) == 1 and len(found) == 3 + LIBRARIES
    assert all(r["verified"] and r["ms"] > 0 for r in found.values())


@pytest.mark.parametrize("after", [0, 2], ids=["verified", "timed"])
def test_a_crash_costs_its_own_row(spoil, after):
    started = spoil("topk", after=after)
    plan = run.Plan(backends=("reference",), rounds=2, seconds=0.2)
    found = by_name(rows_of(["sparse_decode", "topk", "sparse_grad_values"], plan))
    crashed = found.pop(("topk", "reference"))
    assert "killed by SIGSEGV" in crashed["error"] and "ms" not in crashed
    assert {("sparse_decode", "reference"), ("topk", "eager")} <= set(found)
    assert ("sparse_grad_values", "reference") in found
    assert all(r["verified"] and r["ms"] > 0 for r in found.values())
    assert len(started) == (2 if after == 0 else 4)  # one for each of the op's, one for the rest


def test_a_hang_costs_its_own_row(spoil):
    spoil("topk", "time.sleep(600)")
    start = time.monotonic()
    found = by_name(rows_of(["topk", "sparse_decode"], limit_s=20.0))
    assert time.monotonic() - start < 120
    assert "nothing came for 20 s" in found.pop(("topk", "reference"))["error"]
    assert all(r["verified"] for r in found.values()) and len(found) == 2 + LIBRARIES


def test_a_product_that_crashes_ends_its_jobs_and_not_the_run(spoil, tmp_path):
    spoil("topk", "pass")
    with (tmp_path / "sitecustomize.py").open("a") as f:
        f.write("import fastsae.bench.run as run\nmake = run.product\n")
        f.write(f"def broken(*a): {CRASH}\n")
        f.write("run.product = lambda *a: run.Case(broken, None, 1.0, 1.0)\n")
    found = by_name(rows_of(["topk", "sparse_decode"]))
    assert set(found) == {("topk", "eager"), ("topk", "reference"), ("sparse_decode", "reference")}
    assert all("SIGSEGV" in r["error"] for r in found.values())


def test_a_child_that_cannot_begin_is_an_error(spoil, tmp_path):
    spoil("topk")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fastsae.bench.run'] = 0")
    with pytest.raises(RuntimeError, match="could not begin"):
        rows_of(["topk"])


def test_the_command_goes_on_and_its_status_says_so(spoil):
    typer_testing = pytest.importorskip("typer.testing")
    from fastsae.cli.app import app

    spoil("topk")
    options = ["--shapes", "24x16x256", "--k", "4", "--quick", "--backends", "reference"]
    options += ["--ops", "topk,sparse_decode"]
    result = typer_testing.CliRunner().invoke(app, ["bench", *options])
    assert (
        result.exit_code == 1 and f"1 of {3 + LIBRARIES} rows are wrong or failed" in result.stderr
    )
    assert "killed by SIGSEGV" in result.stdout and "ceilings" in result.stdout


# ---- a GPU's plan, with children that are only told ---------------------------------------------


@pytest.fixture
def children(monkeypatch):
    """Stands for the children; `fail` says how the one with a contender ends: when, and why."""
    started, fail = [], {}

    def rows(module, arguments, on_row, *, limit_s, env=None):
        work = json.loads(arguments[0])
        (job,) = work["jobs"]  # a process for each
        (name,) = job["names"]
        started.append((job["op"], name))
        when, why = fail.get((job["op"], name), ("", None))
        for what in ("the device", "torch", name, "time"):
            on_row({"doing": what})
            if what == when:
                return why
        size = Size(**{**job["size"], "dtype": getattr(torch, job["size"]["dtype"])})
        done = {"verified": True, "note": "", "ms": 1.0}
        on_row({"rows": [run.row_of(op, b, size) | done for op, b in
                         (("product", "torch"), (job["op"], name))]})  # fmt: skip
        return why

    monkeypatch.setattr(_isolated, "rows", rows)
    return started, fail


def test_on_a_gpu_every_contender_is_a_process(children):
    started, fail = children
    size = Size(24, 16, 256, 4, torch.bfloat16, "cuda")
    fail["topk_encode", "triton fused"] = "time", "killed by SIGABRT"
    fail["topk", "cuda"] = "the device", "ended with status 1: CUDA error"
    fail["sparse_decode", "cuda"] = "at its end", "ended with status 1: an illegal memory access"
    names = ("eager", "cuda", "triton fused", "triton")
    jobs = [Job(size, "topk_encode", names), Job(size, "topk", ("cuda", "triton"))]
    jobs += [Job(size, "sparse_decode", ("cuda", "triton"))]
    found = []
    measured(jobs, run.Plan(device="cuda"), found.append)
    assert started == [(job.op, name) for job in jobs for name in job.names]
    found = by_name(found)
    assert len(found) == 9 and ("product", "torch") in found  # once
    errors = {name: r["error"] for name, r in found.items() if "error" in r}
    assert set(errors) == set(fail) and "illegal memory access" in errors["sparse_decode", "cuda"]
    assert all("ms" in r for name, r in found.items() if name not in fail)


# ---- in one process -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [AssertionError("no"), RecursionError("deep"), KeyError("x")])
@pytest.mark.parametrize("after", [0, 1, 3], ids=["verified", "warmed up", "timed"])
def test_whatever_a_contender_raises_is_its_own(error, after):
    calls = []

    def fails(i):
        calls.append(i)
        if len(calls) > after:
            raise error

    contenders = [Contender(n, lambda i: None) for n in "ac"]
    contenders.insert(1, Contender("b", fails))
    a, b, c = measure(contenders, rounds=4, seconds=5.0)
    assert type(error).__name__ in b.failed and not b.times
    assert not a.failed and not c.failed and len(a.times) == len(c.times) >= 3


def test_jobs_are_read_as_they_were_written():
    for names in (None, ("eager", "triton fused")):
        job = Job(Size(3, 4, 5, 2, torch.bfloat16, "cuda"), "topk", names)
        assert isolated._read(json.loads(json.dumps(isolated._written(job)))) == job
