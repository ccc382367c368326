"""Every Triton kernel compiles for every architecture, without spills and within its memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import artefacts
import pytest
import triton_offline

# Triton exists for Linux only; there, a check that cannot run is a failure.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" and importlib.util.find_spec("triton") is None,
    reason="Triton is not available for this system",
)


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Tensor cores for e4m3: the filter is refused elsewhere.
FP8 = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA"}


def test_every_launched_kernel_is_in_a_configuration():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module('fastsae.triton_kernels.' + name)\n"
        "    print(name, *{c.kernel.__name__ for c in module.configurations()})"
    )
    names = triton_offline.modules()
    output = run(["-c", code, *names])
    configured = {line.split()[0]: set(line.split()[1:]) for line in output.splitlines()}
    assert configured == {name: triton_offline.launched(name) for name in names}


# `make test` compiles one module, which shows that this machine can; the others depend on none.
@pytest.mark.parametrize(
    "module",
    [
        m if m == "sparse_decode" else pytest.param(m, marks=pytest.mark.slow)
        for m in triton_offline.modules()
    ],
)
def test_compiles_for_every_target(module):
    results = compiled(module, "--json")
    print(triton_offline.table(results))
    targets = FP8 if module == "_topk_encode_fp8" else ARCHITECTURES
    assert {r["target"] for r in results} == set(targets)
    problems = []
    for r in results:
        where = f"{r['kernel']} {r['label']} {r['target']}: "
        if "error" in r:
            problems.append(where + r["error"])
            continue
        if r["spill_bytes"]:
            problems.append(where + f"{r['spill_bytes']} bytes spilled")
        if r["shared"] > triton_offline.SHARED_LIMIT[r["target"]]:
            problems.append(where + f"{r['shared']} bytes of shared memory")
        if r["expects_tensor_cores"] and not expected_mma(r):
            problems.append(where + f"tensor-core instructions are {r['tensor']}")
        if r["expects_tma"] and not r["tma"]:
            problems.append(where + "no TMA loads")
        if r["kernel"] == "_fp8_product_kernel" and r["adds"] < 128 * 128 // 256:
            problems.append(where + "the sum over D is left to the tensor cores")
        if r["kernel"] == "_reselect_kernel" and r.get("unordered"):
            problems.append(where + f"stores that other warps' loads may see: {r['unordered']}")
        problems += [where + why for why in too_slow(r)]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("module", triton_offline.modules())
def test_compiles_when_an_integer_is_one(module):
    """k = 1, one token, one latent: launches turn the 1 into a constant of another type."""
    assert compiled(module, "--ones", "--json") == []


def too_slow(row: dict) -> list[str]:
    """What decides the time of kernels that look at every score, counted where it was lost before:
    scores passed through shared memory in 40 instructions each, or too few loads in flight."""
    if row["target"] != "sm_90":
        return []
    if row["kernel"] == "_record_kernel" and row["instructions"] > 1600:  # 128 scores a thread
        return [f"{row['instructions']} instructions"]
    if row["kernel"] == "_filter_kernel" and row["label"].startswith("k=64"):
        problems = [] if row["registers"] <= 128 else [f"{row['registers']} registers"]
        return problems if "128" in row["loads"] else [*problems, f"loads {row['loads']}"]
    return []


def expected_mma(row: dict) -> bool:
    """The fastest kind that the target has, not merely some kind."""
    kinds = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "MFMA"}
    kind = (FP8 if "fp8" in row["kernel"] else kinds)[row["target"]]
    return any(name.startswith(kind) for name in row["tensor"])


def compiled(module: str, *options: str) -> list:
    """What triton_offline.py prints: once for these sources, this Triton and these options."""
    script = Path(__file__).with_name("triton_offline.py")
    spec = importlib.util.find_spec("triton")
    assert spec is not None, "Triton is not installed"
    version = Path(spec.origin)  # this file names it
    name = artefacts.digest(script, *triton_offline.sources(module), version, *options)

    def compile_to(path: Path) -> None:
        path.write_text(run([str(script), module, *options]))

    return json.loads(artefacts.kept(f"triton/{module}-{name}.json", compile_to).read_text())


def run(arguments: list[str]) -> str:
    """A Python process in which Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
