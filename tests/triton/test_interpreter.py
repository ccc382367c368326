"""The repaired interpreter computes in bf16 what torch does; unrepaired, each of these fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import randn

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

M = 64
BF16 = torch.bfloat16


@triton.jit
def _arithmetic(a_ptr, b_ptr, out_ptr, M: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, M)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "scaled":
        out = a * 0.3
    elif OP == "neg":
        out = -a
    elif OP == "abs":
        out = tl.abs(a)
    elif OP == "max":
        out = tl.maximum(a, b)
    elif OP == "select":
        out = tl.where(a < b, a, b)
    elif OP == "full":
        out = tl.full((M,), 1.1, tl.bfloat16)
    tl.store(out_ptr + i, out)


EXPECTED = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "scaled": lambda a, b: a * torch.tensor(0.3, dtype=BF16),
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "max": torch.maximum,
    "select": torch.minimum,
    "full": lambda a, b: torch.full_like(a, 1.1),
}


@triton.jit
def _cast(in_ptr, out_ptr, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.store(out_ptr + i, tl.load(in_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr):
    i = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _order(in_ptr, out_ptr, M: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, M)
    x = tl.load(in_ptr + i)
    if OP == "sort":
        out = tl.sort(x)
    elif OP == "topk":
        out = tl.join(tl.topk(x, M // 2), tl.topk(-x, M // 2)).reshape(M)
    elif OP == "max":
        out = tl.max(x) + tl.zeros((M,), tl.float32)
    elif OP == "sum":
        out = tl.sum(x) + tl.zeros((M,), tl.float32)
    elif OP == "reduce":
        out = tl.reduce(x, 0, _larger) + tl.zeros((M,), tl.float32)
    elif OP == "cumsum":
        out = tl.cumsum(x)
    tl.store(out_ptr + i, out)


@triton.jit
def _count(out_ptr, end, M: tl.constexpr):
    i = tl.arange(0, M)
    total = tl.zeros((M,), tl.float32)
    for _ in range(0, end, 3):
        total += 1
    tl.store(out_ptr + i, total)


ORDERED = {
    "sort": lambda x: x.sort().values,
    "topk": lambda x: torch.stack([x.topk(M // 2).values, (-x).topk(M // 2).values], 1).flatten(),
    "max": lambda x: x.max().expand(M),
    "sum": lambda x: x.float().sum().to(BF16).expand(M),
    "reduce": lambda x: x.max().expand(M),
    "cumsum": lambda x: x.float().cumsum(0).to(BF16),
}


def test_a_loop_to_a_bound_that_is_an_argument():
    """Triton 3.6 fails at it under NumPy 2.4."""
    out = torch.zeros(M)
    _count[(1,)](out, 7, M)
    assert torch.equal(out, torch.full((M,), 3.0))


@pytest.mark.parametrize("op", EXPECTED)
def test_arithmetic(op):
    a, b = randn(M, dtype=BF16), randn(M, dtype=BF16, seed=1)
    out = torch.empty_like(a)
    _arithmetic[(1,)](a, b, out, M, op)
    assert torch.equal(out, EXPECTED[op](a, b))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32, BF16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32, BF16])
def test_casts_round_to_nearest_even(source, target):
    x = randn(M, seed=2) * 300
    x[:4] = torch.tensor([1.00390625, 1.01171875, -0.0, 3.3e-39])  # two ties, a subnormal
    x = x.to(source)
    out = torch.empty(M, dtype=target)
    _cast[(1,)](x, out, M)
    assert torch.equal(out, x.to(target))


def test_not_finite_casts():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38] * 16)
    out = torch.empty(M, dtype=BF16)
    _cast[(1,)](x, out, M)
    assert torch.equal(out.nan_to_num(7.0), x.to(BF16).nan_to_num(7.0))


def test_dot():
    a, b = randn(16, 16, dtype=BF16), randn(16, 16, dtype=BF16, seed=1)
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("op", ORDERED)
def test_sort_reduce_and_scan(op):
    x = randn(M, dtype=BF16, seed=3)
    out = torch.empty_like(x)
    _order[(1,)](x, out, M, op)
    assert torch.equal(out, ORDERED[op](x))


def failures() -> list[str]:
    """The operations that come out wrong in this process."""
    checks = {op: lambda op=op: test_arithmetic(op) for op in EXPECTED}
    checks |= {op: lambda op=op: test_sort_reduce_and_scan(op) for op in ORDERED}
    checks |= {
        "dot": test_dot,
        "cast": lambda: test_casts_round_to_nearest_even(torch.float32, BF16),
    }
    wrong = []
    for name, check in checks.items():
        try:
            check()
        except (AssertionError, triton.runtime.errors.InterpreterError):
            wrong.append(name)
    return wrong


def test_without_the_repair_these_are_wrong():
    """The tests above can fail; when a new Triton passes them unrepaired, the repair can go."""
    code = (
        "from fastsae.verify import interpreter; interpreter.repair = lambda: None\n"
        "import test_interpreter as t; print(*t.failures())"
    )
    here = Path(__file__).parent
    paths = [str(here.with_name("support")), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    needed = {"add", "sub", "mul", "scaled", "neg", "full", "dot", "cast"}
    needed |= {"sort", "topk", "reduce", "cumsum"}
    assert needed <= set(run.stdout.split()), run.stdout + run.stderr
    assert failures() == []
