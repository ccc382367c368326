"""Operator schemas and the compiled library.

Python defines every schema (public and private), the compiled libraries only implement: two
libraries that both define the same namespace would crash. `Library.define` and `Library.impl` cost
about 3 us a call where `torch.library.custom_op` costs about 12.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

lib = torch.library.Library("fastsae", "DEF")

_STEER = (
    "Tensor enc, Tensor dec, Tensor param, Tensor code, Tensor slots, Tensor? mask=None, "
    "Tensor? member=None"
)
PUBLIC_SCHEMAS = {
    "topk": "(Tensor x, SymInt k) -> (Tensor values, Tensor indices)",
    "topk_encode": (
        "(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, str activation='relu', "
        "Tensor? rank_scale=None, Tensor? latents=None, str? design=None) "
        "-> (Tensor values, Tensor indices)"
    ),
    "topk_member": (
        "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor latents, SymInt k, "
        "Tensor? rank_scale=None, bool positive=False, Tensor? codes=None, Tensor? bounds=None) "
        "-> Tensor"
    ),
    "sparse_decode": (
        "(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec=None) -> Tensor"
    ),
    "sparse_grad_values": "(Tensor grad_out, Tensor indices, Tensor W_dec) -> Tensor",
    "sparse_grad_weight": (
        "(Tensor values, Tensor indices, Tensor rows, SymInt n_latents) -> Tensor"
    ),
    "sparse_grad_weight_rows": (
        "(Tensor values, Tensor indices, Tensor rows, SymInt n_latents) "
        "-> (Tensor latents, Tensor grads)"
    ),
    "sparse_adam_step": (
        "(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor values, "
        "Tensor indices, Tensor rows, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, int step, bool lazy, bool unit_norm, Tensor(d!)? exp_avg_scale=None, "
        "Tensor(e!)? exp_avg_sq_scale=None, Tensor(f!)? master=None, Tensor? schedule=None) -> ()"
    ),
    "steer": f"(Tensor x, {_STEER}, str norm='none', float eps=1e-5) -> Tensor",
    "steer_": f"(Tensor(a!) x, {_STEER}, str norm='none', float eps=1e-5) -> ()",
}

# The compiled backends take what the Python side has already checked, flattened and made
# contiguous: x [N, D], values and indices [N, K], indices int32.
PRIVATE_SCHEMAS = {
    "topk": "(Tensor x, int k) -> (Tensor, Tensor)",
    "topk_encode": (
        "(Tensor x, Tensor W_enc, Tensor? b_enc, int k, bool relu, Tensor? rank_scale) "
        "-> (Tensor, Tensor)"
    ),
    "topk_member": (
        "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor latents, int k, Tensor? rank_scale, "
        "bool positive, Tensor? codes, Tensor? bounds) -> Tensor"
    ),
    "sparse_decode": "(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec) -> Tensor",
    "sparse_grad_values": "(Tensor grad_out, Tensor indices, Tensor W_dec) -> Tensor",
    "sparse_grad_weight": "(Tensor values, Tensor indices, Tensor rows, int n_latents) -> Tensor",
    "sparse_grad_weight_rows": (
        "(Tensor values, Tensor indices, Tensor rows, int n_latents) -> (Tensor, Tensor)"
    ),
    "sparse_adam_step": PUBLIC_SCHEMAS["sparse_adam_step"],
    "steer": (
        f"(Tensor x, {_STEER.replace('=None', '')}, int norm, float eps, Tensor(a!) out) -> ()"
    ),
}

for _op, _schema in PUBLIC_SCHEMAS.items():
    lib.define(_op + _schema)
for _op, _schema in PRIVATE_SCHEMAS.items():
    for _backend in ("cpu", "cuda"):
        lib.define(f"{_op}_{_backend}{_schema}")
lib.define("_cpu_level() -> str")
lib.define("_cpu_levels() -> str")
lib.define("_set_cpu_level(str level) -> ()")
lib.define("_cuda_image(int device) -> str")
lib.define("_topk_encode_stats() -> Tensor")
lib.define("_topk_encode_design(Tensor x, int F, int k) -> str")
lib.define(  # a part of topk_encode: see csrc/cuda/topk_encode.cu
    "topk_encode_record_cuda(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? rank_scale, "
    "Tensor threshold, int begin, int end, Tensor(a!) scores, Tensor(b!) columns, "
    "Tensor(c!) recorded) -> ()"
)
lib.define(  # the address of a steered site's C++ object: see csrc/cpu/steer_site.h
    f"_steer_site({_STEER.partition(', Tensor? mask')[0]}, int norm, float eps, Tensor? wanted, "
    "Tensor? centre, Tensor? W_enc, Tensor? b_enc, Tensor? rank_scale, Tensor? codes, "
    "Tensor? bounds, int k, bool positive) -> int"
)
lib.define("_topk_encode_bounds(Tensor x, Tensor W_enc, Tensor b_enc) -> (Tensor, Tensor, Tensor)")


_REINSTALL = (
    "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder "
    "(with FASTSAE_BUILD=1 a build that fails shows why, with FASTSAE_CUDA=1 also the CUDA one)"
)


def _not_built() -> dict[str, str]:
    """What setup.py left out and why: a library, or a source of the CUDA library."""
    path = Path(__file__).with_name("_not_built.json")
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return found


NOT_BUILT = _not_built()


def _load(name: str, kernels: str, how: str) -> str | None:
    """Loads a compiled library; returns why not, or None when its kernels are there."""
    path = Path(__file__).with_name(f"{name}.abi3.so")
    if not path.exists():
        why = NOT_BUILT.get(name, "the library is not there")
        return f"the {kernels} kernels were not built: {why}. To get them: {how}, then {_REINSTALL}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return (
            f"the {kernels} kernels at {path.name} do not load under torch {torch.__version__}: "
            f"{error}"
        )
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return _load("_cuda", "CUDA", f"install nvcc of CUDA {torch.version.cuda}")


CPU_MISSING = _load("_cpu", "C++", "install a C++ compiler and torch")
CUDA_MISSING = _load_cuda()


def cuda_missing(op: str) -> str:
    """Why an op has no CUDA C++ kernel here."""
    why = NOT_BUILT.get(f"csrc/cuda/{op.removesuffix('_rows')}.cu")
    if CUDA_MISSING is None and why is not None:
        return f"the CUDA kernel of {op} was not built: {why}. To get it: {_REINSTALL}"
    return CUDA_MISSING or f"no CUDA C++ kernel for {op}"


def _functions() -> Any:
    """The C++ library as a Python module; None where it was built without Python.h."""
    try:
        return None if CPU_MISSING else importlib.import_module("fastsae._cpu")
    except ImportError:
        return None


CPU_FUNCTIONS = _functions()
