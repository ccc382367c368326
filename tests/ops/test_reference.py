"""The reference as a fallback: the same selection by a quicker way, no token on another's account,
said once, and no slower than dense PyTorch."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
from common import randn

import fastsae
from fastsae import reference
from fastsae.nn import TopKSAE
from fastsae.optim import FusedAdam
from fastsae.reference._common import _best_by_definition, best
from fastsae.train.plain import PlainTopKStep

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 7, 8, 63, 64])
def test_the_quick_selection_is_the_definition(dtype, k):
    x = randn(40, 64, seed=k)
    x[:10] = (x[:10] * 2).round()  # ties at every rank
    x[10:14] = torch.tensor([0.0, -0.0, -INF, INF])[:, None]  # nothing but ties
    x[14:18, ::3] = NAN
    x[18] = NAN
    x[19, ::2], x[19, 1::2] = 0.0, -0.0
    x[20, 5:9] = INF
    x[21, 60:] = NAN  # as many as k = 1, fewer than k = 7
    x[22] = torch.arange(64) // 8
    x = x.to(dtype)
    assert torch.equal(best(x, k), _best_by_definition(x, k))


def test_the_quick_selection_sorts_no_row_without_a_tie(monkeypatch):
    sorted_rows = []
    definition = _best_by_definition

    def noted(scores, k):
        sorted_rows.append(len(scores))
        return definition(scores, k)

    monkeypatch.setattr("fastsae.reference._common._best_by_definition", noted)
    x = torch.randperm(30 * 500, generator=torch.Generator().manual_seed(0)).view(30, 500).float()
    best(x, 9)
    assert sorted_rows == []
    x[[3, 8]] = 1.0
    best(x, 9)
    assert sorted_rows == [2]
    best(x.double(), 9)  # what all else is compared with
    assert sorted_rows == [2, 30]


@pytest.mark.parametrize("n,d,f", [(37, 65, 517), (300, 48, 2048), (130, 384, 4096)])
def test_a_token_does_not_depend_on_the_others(n, d, f):
    """Bit for bit: alone, among some, in another order."""
    x, W, b = randn(n, d, seed=1), randn(f, d, seed=2), randn(f, seed=3)
    latents = torch.arange(n, dtype=torch.int32)[:, None] % f
    slots = torch.zeros(1, dtype=torch.int32)
    code = torch.tensor([[[0, 0, -1]]], dtype=torch.int32)
    param = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 3.0, 0.0]]])

    def results(rows):
        taken = x[rows].contiguous()
        values, indices = reference.topk_encode(taken, W, b, 16, True, None)
        products = reference.sparse_grad_values(taken, indices, W)
        steered = torch.empty_like(taken)[None]
        reference.steer(
            taken[None], W[None, :1], W[None, :1], param, code, slots, None, None, 0, 1e-5, steered
        )
        return (
            values, indices, products, reference.sparse_decode(values, indices, W, x[0]),
            reference.topk_member(taken, W, b, latents[rows], 16, None, False, None, None),
            *reference.topk(taken @ W[:64].T if len(rows) == n else (x @ W[:64].T)[rows], 5),
            steered[0],
        )  # fmt: skip

    whole = results(torch.arange(n))
    for rows in (
        *(torch.arange(m) for m in (1, 2, 3, 5, 8, 13, 16, 17, 33)),
        torch.tensor([n - 1]), torch.arange(n - 7, n), torch.arange(n).flip(0), torch.arange(3, n),
    ):  # fmt: skip
        for one, all_of_them in zip(results(rows), whole, strict=True):
            assert torch.equal(one, all_of_them[rows])


def test_a_training_step_is_no_slower_than_dense_code(request):
    """In turns, so that what else the machine does hits both; on one thread, because where another
    process holds a core two only wait for each other. At 2048, 384, 12288 it is 3 times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    n, d, f, k = 512, 256, 8192, 32
    x = randn(n, d)
    sae = TopKSAE(d, f, k, seed=0)
    dense = PlainTopKStep(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k, 1e-3)
    optimizer = FusedAdam(sae.parameters(), lr=1e-3)

    def own(x):
        with fastsae.use_backend("reference"):
            loss = torch.nn.functional.mse_loss(sae(x), x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    ratios = []
    for _ in range(7):
        start = time.perf_counter()
        ours = own(x)
        middle = time.perf_counter()
        theirs = dense(x)
        ratios.append((middle - start) / (time.perf_counter() - middle))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert statistics.median(ratios[1:]) < 1, ratios


# ---- the warning --------------------------------------------------------------------------------

# what an installation without compiled kernels does, whether this one has them or not
USE = """
import warnings
import torch
import fastsae
from fastsae import _dispatch, _library
_library.CPU_MISSING = "the C++ kernels were not built: install a compiler"
_library.CPU_FUNCTIONS = None
warnings.simplefilter("always")
x, W = torch.ones(3, 4), torch.ones(8, 4)
def use():
    v, i = fastsae.ops.topk_encode(x, W, None, 2)
    fastsae.ops.sparse_decode(v, i, W)
"""


def warnings_of(code, **environment):
    env = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", USE + code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "SlowFallbackWarning:" in line]


def test_a_slow_fallback_is_said_once_with_the_cure():
    (line,) = warnings_of("use(); use(); fastsae.ops.topk(x, 2)")
    assert "topk_encode on cpu runs in plain PyTorch" in line
    assert "the C++ kernels were not built: install a compiler" in line
    assert "fastsae.SlowFallbackWarning" in line and "fastsae.explain('topk_encode')" in line


@pytest.mark.parametrize(
    "code",
    [
        "fastsae.explain('topk_encode'); fastsae.info()",
        "warnings.simplefilter('ignore', fastsae.SlowFallbackWarning); use()",
        "with fastsae.use_backend('reference'): use()",
        "x, W = x.to('meta'), W.to('meta'); use()",
        "from torch._subclasses import FakeTensorMode\n"
        "with FakeTensorMode(allow_non_fake_inputs=True) as mode:\n"
        "    x, W = mode.from_tensor(x), mode.from_tensor(W); use()",
    ],
    ids=["looking", "silenced", "asked for", "meta", "fake"],
)
def test_no_warning(code):
    assert warnings_of(code) == []


def test_no_warning_where_the_environment_asks_for_the_reference():
    assert warnings_of("use()", FASTSAE_BACKEND="reference") == []


def test_no_warning_where_kernels_run():
    if fastsae._library.CPU_MISSING is not None:
        pytest.skip(fastsae._library.CPU_MISSING)
    assert warnings_of("_library.CPU_MISSING = None; use()") == []
