"""Compiles every Triton kernel for GPUs that this machine does not have, and looks at the code.

    python tests/support/triton_offline.py                      every module, every target
    python tests/support/triton_offline.py sparse_decode --target sm_90

Needs no GPU and no driver, only the ptxas and nvdisasm inside the Triton package. Must not run
under TRITON_INTERPRET. Prints one row per kernel, configuration and target; `--json` prints them
for tests/triton/test_compile.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import triton_branches
import triton_launches

KERNELS = Path(__file__).parents[2] / "triton_kernels"
# Shared memory that one block may have, in bytes.
SHARED_LIMIT = {
    "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536,
}  # fmt: skip
# The fastest tensor cores of a target, not merely some; those for e4m3, which are not everywhere.
_MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "MFMA"}
FP8_MMA = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA"}
# Small spills that ptxas takes by itself for one more block on a multiprocessor (at 40 to 128
# registers of 255), by Triton version; another kernel, or a larger spill, is a problem. None under
# 3.7 and 3.8.
KNOWN_SPILLS = {
    "3.6": {
        ("_sparse_adam_step_kernel", "bf16 D=16384 unit_norm pass 1", "sm_100"): 8,
        ("_sparse_adam_step_kernel", "bf16 D=16384 unit_norm pass 2", "sm_90"): 16,
        ("_sparse_adam_step_kernel", "bf16 D=16384 unit_norm pass 2", "sm_100"): 16,
        ("_sparse_adam_step_kernel", "fp16 D=4096 lazy", "sm_100"): 8,
        ("_sparse_adam_step_kernel", "fp16 D=16384 unit_norm pass 1", "sm_100"): 8,
        ("_sparse_adam_step_kernel", "fp16 D=16384 unit_norm pass 2", "sm_100"): 16,
        (
            "_sparse_adam_step_kernel",
            "bf16 D=16384 unit_norm 16-bit moments master, schedule pass 1",
            "sm_100",
        ): 8,
        (
            "_sparse_adam_step_kernel",
            "bf16 D=16384 unit_norm 16-bit moments master, schedule pass 2",
            "sm_100",
        ): 16,
        ("_sparse_adam_step_kernel", "fp32 D=4096 unit_norm 8-bit moments", "sm_80"): 16,
        ("_sparse_grad_weight_kernel", "bf16 D=4096", "sm_80"): 16,
        ("_steer_kernel", "fp32 D=2304 O=32 norm=1", "sm_80"): 8,
        ("_selected_values_kernel", "fp32", "sm_80"): 16,
        ("_sparse_grad_values_kernel", "fp32", "sm_90"): 12,
    },
    "3.9": {
        ("_bounds_kernel", "k=64 bias, scale", "sm_90"): 12,
        ("_bounds_kernel", "k=64 odd D", "sm_90"): 12,
        ("_sparse_adam_step_kernel", "fp32 D=769 unit_norm lazy 16-bit moments", "sm_80"): 8,
    },
}
_TENSOR = re.compile(r"HGMMA|HMMA|IMMA|QMMA|QGMMA|UTC\w*MMA")


def modules() -> list[str]:
    """Modules of triton_kernels/ that launch something; "topk_encode.keys" lies in a folder."""
    return sorted(name for name in triton_launches.modules(KERNELS) if launched(name))


def file_of(module: str) -> Path:
    """The file of a module of triton_kernels/."""
    path = KERNELS.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def sources(module: str) -> list[Path]:
    """The module's file and those of triton_kernels/ that it imports, and those they import."""
    found, ahead = set(), [module]
    while ahead:
        path = file_of(ahead.pop())
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                inside = path.relative_to(KERNELS).parts[: -node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                ahead += [".".join([*inside, name]) for name in names]
    return sorted(found)


def launched(module: str) -> set[str]:
    """Names launched in a module: every call of the form name[grid](...)."""
    calls = (
        node.func.value
        for node in ast.walk(ast.parse(file_of(module).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    )
    return {name.id for name in calls if isinstance(name, ast.Name)}


def _tool(name: str) -> Path:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: this build of Triton cannot be checked offline")
    return path


def _compile(configuration: Any, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = configuration.kernel
    constants = {p.name: p.default for p in kernel.params if p.has_default}
    constants = {n: v for n, v in constants.items() if n not in configuration.signature}
    constants |= configuration.constexprs
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else configuration.signature[name]
        kind, _, aligned = kind.partition(":")
        signature[name] = kind
        if kind.startswith("*") or aligned == "16":
            attributes[(i,)] = [["tt.divisibility", 16]]
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=options)


def _nvidia(compiled: Any, target: str) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    name = re.search(r"\.target\s+(\w+)", ptx)[1]
    ptxas = (
        importlib.import_module("triton.backends.nvidia.compiler")
        .get_ptxas(int(target.removeprefix("sm_")))
        .path
    )  # which of its assemblers the compiler used: 3.9 takes the newer one for sm_90 too
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "out"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    ops = Counter(
        re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.M)
    )
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "instructions": sum(ops.values()),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "tensor": dict(_families(ops, _TENSOR)),
        "tma": sum(n for op, n in ops.items() if op.startswith("UTMALDG")),
        "adds": len(re.findall(r"\badd\.(?:rn\.)?f32", ptx)),
        # vector width of global loads, in bits: narrow ones are where bandwidth is lost
        "loads": dict(Counter({_width(op): n for op, n in ops.items() if op.startswith("LDG")})),
        "unordered": _unordered(ptx) if compiled.metadata.num_warps > 1 else [],
        "notes": [line for line in log.splitlines() if "serializ" in line.lower()],
    }


def _unordered(ptx: str) -> list[str]:
    """Stores to an address loaded before, no barrier between. Every warp loads a scalar and one
    thread stores it: a late warp may load what was stored. A thread's own elements are no race."""
    loaded: set[str] = set()
    found = []
    for line in ptx.splitlines():
        if "bar.sync" in line:
            loaded.clear()
        elif access := re.search(r"(ld|st)\.global\S* .*(\[ %rd\d+ \+ \d+ \])", line):
            if access[1] == "ld":
                loaded.add(access[2])
            elif access[2] in loaded:
                found.append(line.strip())
    return found


def _families(ops: Counter[str], pattern: re.Pattern[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for op, count in ops.items():
        if match := pattern.match(op):
            found[match[0]] += count
    return found


def _width(op: str) -> str:
    match = re.search(r"\.(64|128|256|U8|U16|S8|S16)\b", op)
    return match[1] if match else "32"


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    loads = Counter(re.findall(r"(?:global|buffer)_load_(\w+)", text))
    return {
        "registers": field("vgpr_count"),
        "spill_bytes": 4 * field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "tensor": {"MFMA": n} if (n := len(re.findall(r"\bv_mfma", text))) else {},
        "tma": 0,
        "loads": dict(loads),
        "notes": [],
    }


def small_launches(name: str) -> list[Any]:
    """What the tests launch of a module beyond what it declares, in small tiles."""
    module = importlib.import_module(f"fastsae.triton_kernels.{name}")
    kind = importlib.import_module("fastsae.triton_kernels._configuration").Configuration
    return [
        kind(
            getattr(module, x["kernel"]), f"{n} small", x["signature"], x["constexprs"],
            x["num_warps"], x["num_stages"], targets=("sm_90",),
        )
        for n, x in enumerate(triton_launches.listed()) if x["module"] == name
    ]  # fmt: skip


def rows(names: list[str], targets: list[str], small: bool = False) -> list[dict[str, Any]]:
    """One row per configuration and target, with `error` where it does not compile."""
    import triton

    result = []
    for name in names:
        module = importlib.import_module(f"fastsae.triton_kernels.{name}")
        for configuration in small_launches(name) if small else module.configurations():
            for target in configuration.targets:
                if target not in targets:
                    continue
                row = {
                    "triton": triton.__version__,
                    "small": small,
                    "module": name,
                    "kernel": configuration.kernel.__name__,
                    "label": configuration.label,
                    "target": target,
                    "expects_tensor_cores": configuration.tensor_cores,
                    "expects_tma": configuration.tma and target in ("sm_90", "sm_100"),
                }
                begin = time.perf_counter()
                try:
                    compiled = _compile(configuration, target)
                    row["shared"] = compiled.metadata.shared
                    row["changing"] = triton_branches.changing(compiled.asm["ttir"])
                    if not small:
                        row |= _amd(compiled) if target[:3] == "gfx" else _nvidia(compiled, target)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"
                row["seconds"] = round(time.perf_counter() - begin, 2)
                result.append(row)
    return result


def problems(results: list[dict[str, Any]]) -> list[str]:
    """What is wrong with rows, each with where."""
    return [
        f"{r['kernel']} {r['label']} {r['target']}: {why}" for r in results for why in _wrong(r)
    ]


def _wrong(r: dict[str, Any]) -> list[str]:
    if "error" in r:
        return [r["error"]]
    found = []
    if r["shared"] > SHARED_LIMIT[r["target"]]:
        found.append(f"{r['shared']} bytes of shared memory")
    if r["changing"]:
        found.append(f"branches on what other programs write: {r['changing']}")
    if r["small"]:
        return found
    known = KNOWN_SPILLS.get(r["triton"].rpartition(".")[0], {})
    if r["spill_bytes"] > known.get((r["kernel"], r["label"], r["target"]), 0):
        found.append(f"{r['spill_bytes']} bytes spilled, {r['registers']} registers")
    kind = (FP8_MMA if "fp8" in r["kernel"] else _MMA).get(r["target"], "")
    if r["expects_tensor_cores"] and not any(name.startswith(kind) for name in r["tensor"]):
        found.append(f"tensor-core instructions are {r['tensor']}")
    if r["expects_tma"] and not r["tma"]:
        found.append("no TMA loads")
    if r["kernel"] == "_fp8_product_kernel" and r["adds"] < 128 * 128 // 256:
        found.append("the sum over D is left to the tensor cores")
    if r["kernel"] == "_reselect_kernel" and r.get("unordered"):
        found.append(f"stores that other warps' loads may see: {r['unordered']}")
    return found + _slow(r)


def _slow(r: dict[str, Any]) -> list[str]:
    """What decides the time of kernels that look at every score, counted where it was lost before:
    scores passed through shared memory in 40 instructions each, or too few loads in flight."""
    if r["target"] != "sm_90" or tuple(map(int, r["triton"].split(".")[:2])) < (3, 7):
        return []
    if r["kernel"] == "_record_kernel" and r["instructions"] > 1600:  # 128 scores a thread
        return [f"{r['instructions']} instructions"]
    if r["kernel"] == "_filter_kernel" and r["label"].startswith("k=64"):
        found = [] if r["registers"] <= 128 else [f"{r['registers']} registers"]
        return found if "128" in r["loads"] else [*found, f"loads {r['loads']}"]
    return []


def ones(names: list[str]) -> list[str]:
    """What does not compile when a single integer is 1: a launch then makes it a constant."""
    problems, seen = [], set()
    for name in names:
        module = importlib.import_module(f"fastsae.triton_kernels.{name}")
        for c in module.configurations():
            if c.kernel in seen:
                continue
            seen.add(c.kernel)
            kept = {c.kernel.arg_names.index(n) if isinstance(n, str) else n
                    for n in c.kernel.do_not_specialize or ()}  # fmt: skip
            for argument, kind in c.signature.items():
                if kind[0] != "i" or c.kernel.arg_names.index(argument) in kept:
                    continue
                signature = {n: k for n, k in c.signature.items() if n != argument}
                one = dataclasses.replace(
                    c, signature=signature, constexprs=c.constexprs | {argument: 1}
                )
                try:
                    _compile(one, "sm_90" if "sm_90" in c.targets else c.targets[0])
                except Exception as error:
                    problems.append(f"{c.kernel.__name__} {argument}=1: {error}")
    return problems


def table(results: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'kernel':<38} {'configuration':<26} {'target':<7} {'regs':>4} {'spill':>5} {'smem':>7}"
    )
    lines = [f"{head} {'tma':>3}  tensor cores, loads"]
    for r in results:
        start = f"{r['kernel']:<38} {r['label']:<26} {r['target']:<7}"
        if "error" in r:
            lines.append(f"{start} {r['error'][:300]}")
            continue
        lines.append(
            f"{start} {r['registers']:>4} {r['spill_bytes']:>5} {r['shared']:>7} {r['tma']:>3}  "
            f"{r['tensor'] or ''} {r['loads']} {' '.join(r['notes'])}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compiles and prints."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=[])
    parser.add_argument("--target", action="append", choices=list(SHARED_LIMIT))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ones", action="store_true", help="compile with each integer at 1")
    parser.add_argument("--small", action="store_true", help="the tests' small tiles instead")
    arguments = parser.parse_args()
    if arguments.ones:
        json.dump(ones(arguments.modules or modules()), sys.stdout)
        return
    targets = arguments.target or list(SHARED_LIMIT)
    results = rows(arguments.modules or modules(), targets, arguments.small)
    json.dump(results, sys.stdout) if arguments.json else print(table(results))


if __name__ == "__main__":
    main()
