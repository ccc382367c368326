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
import triton_branches
import triton_launches
import triton_offline

# Triton exists for Linux only; there, a check that cannot run is a failure.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" and importlib.util.find_spec("triton") is None,
    reason="Triton is not available for this system",
)


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SCRIPT = triton_offline.__file__


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
    targets = triton_offline.FP8_MMA if module == "topk_encode.fp8" else ARCHITECTURES
    assert {r["target"] for r in results} == set(targets)
    problems = triton_offline.problems(results)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({x["module"] for x in triton_launches.listed()}))
def test_small_tiles_of_the_tests_compile(module):
    """The interpreter runs them whatever their warps are: here with the launch's own."""
    problems = triton_offline.problems(compiled(module, "--small", "--json"))
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("module", triton_offline.modules())
def test_compiles_when_an_integer_is_one(module):
    """k = 1, one token, one latent: launches turn the 1 into a constant of another type."""
    assert compiled(module, "--ones", "--json") == []


BRANCHES = """
import sys
sys.path.insert(0, "tests/support")
import triton, triton.language as tl, triton_branches, triton_offline
from fastsae.triton_kernels._configuration import Configuration

@triton.jit
def kernel(counts, own, out, K, ATOMIC: tl.constexpr, SHARED: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    at = i if SHARED else i * tl.num_programs(1) + j
    total = 0
    for k in range(0, K):  # through a loop, as a threshold is
        total += tl.load(own + at)
    if ATOMIC:
        total += tl.load(counts + i)
        tl.atomic_add(counts + i, 1)
    if total < K:
        tl.store(out + i * tl.num_programs(1) + j, total)
    tl.store(own + at, total)

for atomic, shared in ((False, False), (False, True), (True, False)):
    c = Configuration(kernel, "", dict(counts="*i32", own="*i32", out="*i32", K="i32"),
                      dict(ATOMIC=atomic, SHARED=shared))
    print(*triton_branches.changing(triton_offline._compile(c, "sm_90").asm["ttir"]), sep="; ")
"""


def test_a_branch_on_what_other_programs_write_is_found(tmp_path):
    file = tmp_path / "branches.py"
    file.write_text(BRANCHES)
    assert run([str(file)]).splitlines() == [
        "", "%own: programs ['y'] share it", "%counts: written by atomics",
    ]  # fmt: skip


def compiled(module: str, *options: str) -> list:
    """What triton_offline.py prints: once for these sources, this Triton and these options."""
    script = Path(SCRIPT)
    spec = importlib.util.find_spec("triton")
    assert spec is not None, "Triton is not installed"
    version = Path(spec.origin)  # this file names it
    name = artefacts.digest(
        *(Path(m.__file__) for m in (triton_offline, triton_launches, triton_branches)),
        *triton_offline.sources(module),
        triton_launches.LIST,
        version,
        *options,
    )

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
