"""One stem per op in every folder: no op without a reference, test and benchmark, no orphans."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsae import _dispatch, _library, ops, reference

ROOT = Path(__file__).parents[2]
# the row-sparse result of sparse_grad_weight is an op of its own in the same files
STEMS = sorted({op.removesuffix("_rows") for op in _dispatch.OPS})


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_its_files(stem):
    for pattern in (
        "fastsae/ops/{}.py",
        "fastsae/reference/{}.py",
        "csrc/cpu/{}.cpp",
        "tests/ops/test_{}.py",
        "benchmarks/bench_{}.py",
    ):
        assert (ROOT / pattern.format(stem)).is_file(), pattern.format(stem)
    assert callable(getattr(ops, stem)) and callable(getattr(reference, stem))


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_notes_that_open_with_what_holds(stem):
    title, _, heading, _, *rest = (ROOT / f"benchmarks/notes/{stem}.md").read_text().split("\n")
    assert (title, heading) == (f"# {stem}", "## What holds now")
    holds = rest[: rest.index("")]
    assert len(holds) <= 5
    assert holds[0].startswith("- CPU") and any(line.startswith("- GPU: ") for line in holds)


def test_every_op_has_a_triton_kernel():
    """A file, or a folder where it has several designs."""
    missing = set(STEMS) - {p.stem for p in (ROOT / "triton_kernels").glob("[!_]*")}
    assert not missing, f"no triton_kernels/<op>.py for {missing}"


@pytest.mark.parametrize(
    "folder,pattern", [("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu"), ("triton_kernels", "[!_]*")]
)
def test_no_kernel_file_is_an_orphan(folder, pattern):
    orphans = [p.name for p in (ROOT / folder).glob(pattern) if p.stem not in STEMS]
    assert not orphans


def test_every_kernel_file_registers_its_op():
    for folder, pattern in (("cpu", "*.cpp"), ("cuda", "*.cu")):
        for path in (ROOT / "csrc" / folder).glob(pattern):
            call = rf'm\.impl\(\s*"{path.stem}(_record)?_{folder}"'
            assert re.search(call, path.read_text()), path.name


def test_private_and_public_schemas_cover_the_same_ops():
    public = {op.removesuffix("_") for op in _library.PUBLIC_SCHEMAS}  # steer_ is steer in place
    assert public == set(_library.PRIVATE_SCHEMAS) == set(_dispatch.ORDER)


def test_every_op_has_known_answers():
    """Without them no kernel of an op is ever trusted."""
    from fastsae.verify.answers import ANSWERS

    missing = set(_dispatch.OPS) - set(ANSWERS)
    assert not missing, f"add {missing} to ANSWERS in fastsae/verify/answers.py"


DEFINE_OR_CHECK = (
    "_dispatch", "_explain", "_library", "_verified", "bench", "reference", "triton_kernels",
    "verify",
)  # fmt: skip


def words_of(node):
    """What a piece of a program names: attributes, texts, imports with where they come from."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return set(node.value.split("."))
    if isinstance(node, ast.ImportFrom):
        names, parts = {a.name for a in node.names}, set((node.module or "").split("."))
        found = {f"reference.{n}" for n in names if "reference" in parts}
        return names | parts | found | {f"all of {n}" for n in names}
    return set()


def test_only_dispatch_chooses_a_backend():
    """No other file names an implementation of an op, but those that define, check and time each.
    One asks which was chosen, to do the same in a single C++ call."""
    forms = ("{}_cpu", "{}_cuda", "reference.{}")
    kernels = {form.format(op) for op in _dispatch.OPS for form in forms}
    kernels |= {"triton_kernels", "all of reference"}
    wrong, asking = [], set()
    for path in sorted((ROOT / "fastsae").rglob("*.py")):
        name = path.relative_to(ROOT / "fastsae").with_suffix("").as_posix()
        if name.split("/")[0] in DEFINE_OR_CHECK:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            words = words_of(node)
            wrong += [f"{name}: {word}" for word in words & kernels]
            if words & {"backend_of", "CPU_FUNCTIONS"} and name != "info":
                asking.add(name)
    assert not wrong and asking == {"ops/steer"}


# Imports only go down this list; what stands in one row does not import one another.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"quickstart", "serve", "bench"},
    {"steer"},
    {"features"},
    {"integrations"},
    {"train"},
    {"lm"},
    {"nn"},
    {"optim"},
    {"verify"},
    {"ops"},
    {"info"},
    {"_explain"},
    {"_dispatch"},
    {"reference", "triton_kernels", "_verified", "_isolated"},
    {"_library", "_files", "_config", "_errors", "_memory", "_capture", "_stamp"},
    {"_steer_codes", "_version", "_warnings", "_waiting", "_waits", "_install"},
)
# Laws of their own: what a part may not know, although it lies below.
UNKNOWN = {
    "steer": {"train"},
    "features": {"train"},
    "serve": {"train", "features", "quickstart"},
    "lm": {"train"},
    "nn": {"lm"},
}


def imported():
    """(file, its part, the part it imports), relative imports of the package."""
    for path in sorted((ROOT / "fastsae").rglob("*.py")):
        parts = path.relative_to(ROOT / "fastsae").with_suffix("").parts
        if parts[0] in ("triton_kernels", "__init__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                inside = parts[: len(parts) - node.level]
                full = [*inside, *(node.module or "").split(".")] if node.module else [*inside]
                for name in [full[0]] if full else [a.name for a in node.names]:
                    if name != parts[0]:
                        yield "/".join(parts), parts[0], name


def test_imports_go_down():
    floor = {part: i for i, parts in enumerate(FLOORS) for part in parts}
    # a check in a process of its own, looked up when one is due
    found = [(f, a, b) for f, a, b in imported() if (a, b) != ("_dispatch", "verify")]
    assert len(found) > 100
    wrong = [f"{f} imports {b}" for f, a, b in found if floor[a] >= floor[b]]
    wrong += [f"{f} imports {b}" for f, a, b in found if b in UNKNOWN.get(a, ())]
    wrong += [f for f, _, b in found if b == "quickstart" and f != "cli/quickstart"]
    assert not wrong


def test_training_and_commands_know_no_architecture():
    for folder in ("train", "cli", "serve", "steer"):
        for path in (ROOT / "fastsae" / folder).glob("*.py"):
            assert path.name == "plain.py" or "TopKSAE" not in path.read_text(), path


def test_only_the_bridges_know_other_libraries():
    from fastsae.integrations import PEERS

    bridges = {p.stem for p in (ROOT / "fastsae/integrations").glob("*.py")} - {"__init__"}
    assert bridges == set(PEERS.values())
    names = re.compile(r"\b(sae_lens|sparsify|dictionary_learning)\b")
    folders = ("fastsae", "triton_kernels", "csrc", "tools")
    for path in (p for name in folders for p in (ROOT / name).rglob("*")):
        if path.suffix in (".py", ".h", ".inl", ".cpp", ".cu", ".cuh"):
            assert path.parent.name == "integrations" or not names.search(path.read_text()), path


def test_the_package_imports_itself_by_relative_names():
    """Which `test_imports_go_down` reads."""
    for path in (ROOT / "fastsae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            assert "fastsae" not in [name.split(".")[0] for name in found], path


def test_every_architecture_has_a_file_of_its_own():
    from fastsae.nn import ARCHITECTURES

    files = {kind.__module__: kind for kind in ARCHITECTURES.values()}
    assert len(files) == len(ARCHITECTURES)
    for tag, kind in ARCHITECTURES.items():
        assert kind.config_class.architecture == tag
        file = ROOT / (kind.__module__.replace(".", "/") + ".py")
        assert len(file.read_text().splitlines()) <= 300, f"{file.name} has more than 300 lines"
        assert (ROOT / f"tests/nn/test_{file.name}").is_file(), f"no tests/nn/test_{file.name}"


@pytest.mark.parametrize("op", _library.PUBLIC_SCHEMAS)
def test_arguments_are_those_of_the_schema(op):
    """Each op's arguments are stated once in Python: names, order, defaults and kinds."""
    module = importlib.import_module(f"fastsae.ops.{op.removesuffix('_rows').removesuffix('_')}")
    found = []
    for name, kind in module.Arguments.__annotations__.items():
        default = module.Arguments._field_defaults.get(name, "none given")
        found.append((name, str(getattr(kind, "__forward_arg__", kind)), default))
    wanted = []
    for a in getattr(torch.ops.fastsae, op).default._schema.arguments:
        kind = str(a.type).replace("Tensor", "torch.Tensor").replace("SymInt", "int")
        kind = re.sub(r"Optional\[(.*)\]", r"\1 | None", kind)
        wanted.append((a.name, kind, a.default_value if a.has_default_value() else "none given"))
    assert found == wanted


def test_triton_kernels_refuses_the_top_level_name():
    """Another, widely used package owns the import name `triton_kernels`."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import triton_kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "ImportError" in run.stderr
    assert "fastsae.triton_kernels" in run.stderr


OPTIONAL = (
    "fastapi", "httpx", "hypothesis", "jinja2", "matplotlib", "openai", "rich", "tokenizers",
    "tqdm", "transformers", "triton", "typer", "uvicorn", "websockets", "xdist",
)  # fmt: skip


def test_the_tests_load_without_any_optional_package():
    """An installation has torch, NumPy, safetensors and pytest; what needs more skips."""
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import pytest; "
    code += "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only']))"
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    assert "could not import 'transformers'" in run.stdout
