"""Choosing, forcing and explaining backends; what `import fastsae` costs and pulls in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import fastsae
from fastsae import _dispatch, _library, ops

BUILT = _library.CPU_MISSING is None


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )


def test_forced_backend_runs_or_says_why():
    x, W = torch.randn(3, 4), torch.randn(8, 4)
    with fastsae.use_backend("reference"):
        assert "reference (forced)" in fastsae.explain("topk_encode", x, W)
        ops.topk_encode(x, W, None, 2)
    with fastsae.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda.*need a GPU tensor"):
        ops.topk_encode(x, W, None, 2)
    with pytest.raises(ValueError, match="unknown backend 'gpu', one of reference, cpu"):
        fastsae.use_backend("gpu")
    assert "forced" not in fastsae.explain("topk_encode", x, W)


def test_use_backend_holds_without_a_block_and_restores_after_an_error():
    fastsae.use_backend("reference")
    try:
        assert _dispatch._forced == "reference"
        with pytest.raises(KeyError), fastsae.use_backend("auto"):
            raise KeyError(_dispatch._forced)
        assert _dispatch._forced == "reference"
    finally:
        fastsae.use_backend(None)


def test_environment_variable():
    code = "import fastsae; print(fastsae.explain('sparse_decode'))"
    assert "reference (forced)" in python(code, FASTSAE_BACKEND="reference").stdout
    wrong = python(code, FASTSAE_BACKEND="fast")
    assert wrong.returncode != 0 and "FASTSAE_BACKEND: unknown backend 'fast'" in wrong.stderr


def test_explain_names_every_backend_and_copies():
    text = fastsae.explain("topk_encode", torch.zeros(3, 4), torch.zeros(4, 8).T)
    for backend in _dispatch.BACKENDS:
        assert f"  {backend}: " in text
    assert "copied first, not contiguous: (8, 4)" in text
    with pytest.raises(ValueError, match="unknown op 'encode'"):
        fastsae.explain("encode")


def designs_told(*args, **kwargs):
    """What explain says of each design under the forced Triton kernels."""
    if _dispatch._missing("topk_encode", "triton", "cpu", torch.float32) is not None:
        pytest.skip("the Triton kernels are not interpreted here")
    with fastsae.use_backend("triton"):
        lines = fastsae.explain("topk_encode", *args, **kwargs).splitlines()
    found = [line.strip().split(": ", 1) for line in lines if line.startswith("    ")]
    return {name: why for name, why in found if not why.startswith(("unknown", "passed"))}


def test_explain_says_of_each_design_whether_a_call_takes_it():
    x, W = torch.zeros(3, 64), torch.zeros(800, 64)
    told = designs_told(x, W, None, 4)
    assert list(told) == ["hopper", "fused", "bounded", "chunked", "fp8"]
    assert told["fused"] == "it does not take torch.float32"
    assert told["bounded"] == "takes this call"
    assert told["chunked"] == "bounded comes before it"
    assert told["fp8"] == "only by its name: it can miss a latent"
    few = designs_told(x, W, None, k=4, latents=torch.arange(95))
    assert few["bounded"] == "it pays from D = 64 and F = 96 on, not at 64 and 95"
    assert few["chunked"] == "takes this call"
    low, wide = x.bfloat16(), W.bfloat16()
    assert designs_told(low, wide, None, 4)["fused"] == "takes this call"
    assert designs_told(low, wide, None, 300)["fused"] == "it takes k up to 256, not 300"
    odd = wide.flatten()[1:-63].view(799, 64)
    assert designs_told(low, odd, None, 4)["fused"] == "a row of W_enc does not begin on 16 bytes"
    copied = wide.T.contiguous().T  # the kernel gets rows
    assert designs_told(low, copied, None, 4)["fused"] == "takes this call"
    assert not designs_told(x, W)  # without k nothing can be said


def test_explain_of_a_design_that_is_asked_for():
    x, W = torch.zeros(3, 64), torch.zeros(800, 64)
    told = fastsae.explain("topk_encode", x, W, None, 4, design="fused")
    assert "float32: design 'fused' was asked for and cannot run: " in told
    with pytest.raises(RuntimeError, match="topk_encode: design 'fused' was asked for and cannot"):
        ops.topk_encode(x, W, None, 4, design="fused")


def test_info_is_json_and_names_every_op():
    info = json.loads(json.dumps(fastsae.info()))
    assert set(info["ops"]) == set(_dispatch.OPS)
    assert info["fastsae"] == fastsae.__version__ and info["torch"] == torch.__version__


@pytest.mark.skipif(not BUILT, reason=str(_library.CPU_MISSING))
def test_cpu_kernels_are_the_default_and_bad_levels_are_named():
    assert fastsae.info()["ops"]["topk_encode"]["cpu"]["backend"] == "cpu"
    levels = torch.ops.fastsae._cpu_levels().split()
    assert levels[0] == "portable" and torch.ops.fastsae._cpu_level() in levels
    with pytest.raises(RuntimeError, match="portable"):
        torch.ops.fastsae._set_cpu_level("sse9")
    code = "import torch, fastsae; print(torch.ops.fastsae._cpu_level())"
    assert python(code, FASTSAE_CPU_LEVEL="portable").stdout.strip() == "portable"


def test_import_is_light():
    """Under 0.3 s beyond torch (a loose bound here: CI machines are busy), and no heavy imports."""
    code = (
        "import torch, time, sys; t = time.perf_counter(); import fastsae; "
        "print(time.perf_counter() - t); "
        "print([m for m in ('transformers', 'matplotlib', 'typer', 'fastsae.cli', 'rich', "
        "'jinja2') if m in sys.modules])"
    )
    runs = [python(code).stdout.split("\n") for _ in range(3)]
    assert min(float(r[0]) for r in runs) < 0.3
    assert runs[0][1] == "[]"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_triton_takes_cpu_tensors_only_when_interpreted():
    code = "import torch, fastsae; print(fastsae.explain('sparse_decode', torch.zeros(2)))"
    plain = python(code, TRITON_INTERPRET="0").stdout
    assert "triton: the triton kernels need a GPU tensor, got cpu" in plain
    interpreted = python(code, TRITON_INTERPRET="1").stdout
    assert "triton: usable" in interpreted
    assert "torch.float32: triton" not in interpreted  # never the default on a CPU


@pytest.mark.skipif(fastsae._library.CPU_MISSING is not None, reason="the C++ kernels")
def test_explain_names_the_design_of_the_cpu():
    W = torch.randn(4096, 64)
    for n, design in ((1, "stream"), (129, None)):
        values, _ = fastsae.ops.topk_encode(torch.randn(n, 64), W, None, 8)
        taken = ("stream", "plain", "bounded", "bounded")[torch.ops.fastsae._topk_encode_stats()[0]]
        assert design in (None, taken) and values.shape == (n, 8)
        told = fastsae.explain("topk_encode", torch.randn(n, 64), W, None, 8)
        assert f"C++ design: {taken} (" in told
