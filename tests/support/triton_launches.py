"""What a launch of an interpreted kernel would be on a device: checked at once, and recorded.

The interpreter ignores warps, stages, the grid's limits and alignment. Here every launch is held
against them, and has to be one that tests/triton/test_compile.py compiles: an entry of its module's
`configurations()`, or of triton_launches.json beside this file, which holds the small tiles of the
tests.

    FASTSAE_LAUNCHES=build/launches python -m pytest tests   records what is launched, refuses none
    python tests/support/triton_launches.py build/launches   writes triton_launches.json of it
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("triton_launches.json")
RECORDS = os.environ.get("FASTSAE_LAUNCHES")
_MAX_GRID = (2**31 - 1, 65535, 65535)
_DTYPES = {
    "float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "bool": "i1",
    "float8_e4m3fn": "fp8e4nv", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8",
}  # fmt: skip
_PACKAGE = "fastsae.triton_kernels."
_seen: set[str] = set()


def modules(folder: Path) -> list[str]:
    """Names of the modules in the folder of the kernels and in those below, from it on."""
    found = [p.relative_to(folder).with_suffix("").parts for p in folder.rglob("*.py")]
    names = (".".join(p[:-1] if p[-1] == "__init__" else p) for p in found)
    return sorted(name for name in names if name)


def kind_of(value: Any, specialized: bool) -> str:
    """The type that a launch gives an argument, as `Configuration.signature` writes it; "=..." for
    what becomes a constant."""
    if hasattr(value, "block_shape"):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_DTYPES[str(value.base.dtype).removeprefix('torch.')]}[{block}]>"
    if hasattr(value, "data_ptr"):
        return "*" + _DTYPES[str(value.dtype).removeprefix("torch.")]
    if value is None or isinstance(value, bool):
        return f"={value}"
    if isinstance(value, int):
        if specialized and value == 1:
            return "=1"
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"an argument of type {type(value).__name__}"
    return "fp32"


def check_grid(grid: tuple[int, ...]) -> None:
    """A grid that a device can launch."""
    for size, limit in zip(grid, _MAX_GRID):
        assert 0 < size <= limit, f"grid {grid}: a device takes at most {_MAX_GRID}"


def _check_descriptor(value: Any) -> None:
    """What cuTensorMapEncodeTiled asks for beyond what the class asserts."""
    assert all(0 < size <= 256 for size in value.block_shape), value.block_shape
    assert value.block_shape[-1] * value.base.element_size() >= 16, value.block_shape
    assert all(size < 2**32 for size in value.shape), value.shape


@functools.cache
def _parameters(fn: Any) -> tuple[inspect.Signature, frozenset[str]]:
    signature = inspect.signature(fn)
    constants = {n for n, p in signature.parameters.items() if "constexpr" in str(p.annotation)}
    return signature, frozenset(constants)


def describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A launch by what decides its code."""
    signature, constants = _parameters(kernel.fn)
    options = {n: v for n, v in kwargs.items() if n not in signature.parameters}
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    assert not options, f"{kernel.__name__}: options {options} are not compiled offline"
    assert isinstance(warps, int) and warps in (1, 2, 4, 8, 16, 32), f"num_warps = {warps}"
    assert isinstance(stages, int) and stages >= 1, f"num_stages = {stages}"
    bound = signature.bind(*args, **{n: v for n, v in kwargs.items() if n in signature.parameters})
    bound.apply_defaults()
    kept = kernel.kwargs.get("do_not_specialize") or ()
    signature_of, constexprs = {}, {}
    for i, (name, value) in enumerate(bound.arguments.items()):
        if name in constants:
            constexprs[name] = value
            continue
        if hasattr(value, "block_shape"):
            _check_descriptor(value)
        kind = kind_of(value, name not in kept and i not in kept)
        if kind.startswith("="):
            constexprs[name] = value
        else:
            signature_of[name] = kind
    return {
        "module": kernel.fn.__module__.removeprefix(_PACKAGE), "kernel": kernel.__name__,
        "signature": signature_of, "constexprs": constexprs,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def key_of(launch: dict[str, Any]) -> str:
    """What a compiled entry has to share with a launch: all but the types of pointers and which
    integers are 1 (`triton_offline.py --ones` compiles those)."""
    constants = _parameters(_kernel(launch).fn)[1]
    kept = {n: v for n, v in launch["constexprs"].items() if n in constants or v is None}
    blocks = {n: k.partition("[")[2] for n, k in launch["signature"].items() if "[" in k}
    parts = launch["module"], launch["kernel"], launch["num_warps"], launch["num_stages"]
    return json.dumps([*parts, kept, blocks], sort_keys=True)


def _kernel(launch: dict[str, Any]) -> Any:
    module = importlib.import_module(_PACKAGE + launch["module"])
    return getattr(module, launch["kernel"])


def listed() -> list[dict[str, Any]]:
    """The launches of the tests that no module declares."""
    return json.loads(LIST.read_text())


def _launch_of(c: Any) -> dict[str, Any]:
    """What a Configuration compiles, as `describe` writes it."""
    defaults = {n: p.default for n, p in _parameters(c.kernel.fn)[0].parameters.items()}
    given = {n: v for n, v in defaults.items() if v is not inspect.Parameter.empty}
    given = {n: v for n, v in given.items() if n not in c.signature}
    return {
        "module": c.kernel.fn.__module__.removeprefix(_PACKAGE), "kernel": c.kernel.__name__,
        "signature": c.signature, "constexprs": given | c.constexprs,
        "num_warps": c.num_warps, "num_stages": c.num_stages,
    }  # fmt: skip


@functools.cache
def compiled() -> frozenset[str]:
    """Keys of everything that tests/triton/test_compile.py compiles."""
    package = importlib.import_module("fastsae.triton_kernels")
    found = {key_of(launch) for launch in listed()}
    for name in modules(Path(package.__file__).parent):
        module = importlib.import_module(_PACKAGE + name)
        if hasattr(module, "configurations"):
            found |= {key_of(_launch_of(c)) for c in module.configurations()}
    return frozenset(found)


def check(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises where a device would refuse the launch, or where no test compiles it."""
    launch = describe(kernel, args, kwargs)
    check_grid(tuple(grid(launch["constexprs"]) if callable(grid) else grid))
    if not kernel.fn.__module__.startswith("fastsae."):
        return  # a kernel of a test
    key = key_of(launch)
    if key in _seen:
        return
    if RECORDS is not None:
        Path(RECORDS).mkdir(parents=True, exist_ok=True)
        with (Path(RECORDS) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(launch) + "\n")
    else:
        assert key in compiled(), (
            f"no test compiles this launch: {launch}\nAdd it to the module's configurations(), or "
            "for small tiles of a test record it (tests/support/triton_launches.py says how)."
        )
    _seen.add(key)


def install() -> None:
    """Every launch of this process is checked before it is interpreted."""
    from triton.runtime import interpreter

    run = interpreter.InterpretedFunction.run
    compiled()  # now: a test that patches a module's tiles would be asked for its declarations

    def checked(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            check(self, grid, args, kwargs)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = checked


@contextlib.contextmanager
def dry() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Launches are checked and not run: kernel and grid of each. For tensors without memory."""
    from triton.runtime import interpreter

    grids: list[tuple[str, tuple[int, ...]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        check(self, grid, args, kwargs)
        grids.append((self.__name__, tuple(grid)))

    before, interpreter.InterpretedFunction.run = interpreter.InterpretedFunction.run, run
    try:
        yield grids
    finally:
        interpreter.InterpretedFunction.run = before


def main() -> None:
    """Writes the list anew: what was recorded and no module declares."""
    os.environ["TRITON_INTERPRET"] = "1"
    LIST.write_text("[]")
    declared, found = compiled(), {}
    for path in sorted(Path(sys.argv[1]).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            launch = json.loads(line)
            key = key_of(launch)
            if key not in declared and (key not in found or line < found[key]):
                found[key] = line
    LIST.write_text("[\n" + ",\n".join(found[key] for key in sorted(found)) + "\n]\n")
    print(f"{len(found)} launches in {LIST}")


if __name__ == "__main__":
    main()
