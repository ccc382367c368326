"""topk_encode: selection while the scores are formed; no [N, F] in memory.

There are several ways to compute it: the rows of DESIGNS, whose kernels lie in files beside this
one. All but "fp8" select the same.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from .._blocks import POINTERS, on_device
from .._configuration import Configuration
from . import bounded, chunked, fp8, fused
from .design import Design
from .keys import MAX_SORTED, decode_keys

_ALL = (torch.float32, torch.bfloat16, torch.float16)
_LOW = (torch.bfloat16, torch.float16)

# The best first: the first that can take a call, is trusted and has not to be asked for takes it.
# Never by the number of tokens: designs differ in a score's bits, and a token's result must not
# depend on its neighbours. Predictions, unverified on a GPU (benchmarks/notes/topk_encode.md):
# "hopper" takes 1.07 to 1.24 of the library's product, "fused" 1.21 to 1.5. In fp32 bf16 products
# are some twenty times faster, and pay unless most latents are near the k-th. "chunked" takes all.
DESIGNS = (
    Design(
        "hopper", _LOW, partial(fused.select, hopper=True), chunked.rows_that_fit,
        chunks=fused.CHUNKS, most_k=fused.MAX_K, tma=True, unavailable=fused.hopper_unavailable,
        asked_for="it has not run on a GPU, where a fault in it could hang",
    ),
    Design(
        "fused", _LOW, fused.select, chunked.rows_that_fit,
        chunks=fused.CHUNKS, most_k=fused.MAX_K, tma=True, unavailable=fused.unavailable,
    ),
    Design(
        "bounded", (torch.float32,), bounded.select, bounded.rows_that_fit,
        most_k=MAX_SORTED, least_d=64, least_f_of_k=24,
    ),
    Design("chunked", _ALL, chunked.select, chunked.rows_that_fit),
    Design(
        "fp8", _ALL, fp8.select, bounded.rows_that_fit,
        most_k=MAX_SORTED, unavailable=fp8.unavailable, asked_for="it can miss a latent",
    ),
)  # fmt: skip


def named(name: str) -> Design:
    """The design of this name; KeyError where there is none."""
    return {d.name: d for d in DESIGNS}[name]


def design_of(
    x: torch.Tensor, W_enc: torch.Tensor, k: int, trusted: frozenset[str] | None = None
) -> Design | None:
    """The design that takes a call, None where none can.

    trusted: the designs that may be used; None: all.
    """
    for design in DESIGNS:
        if (trusted is None or design.name in trusted) and design.why_not(x, W_enc, k) is None:
            return design
    return None


@triton.jit
def _selected_values_kernel(
    x_ptr,  # [R, D]
    W_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    indices_ptr,  # [R, K]
    values_ptr,  # [R, K]
    K,
    D,
    RELU: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)  # of a pass, which are few
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    latent = tl.load(indices_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(W_ptr + latent[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        acc += x[None, :] * w.to(tl.float32)
    value = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + latent).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    tl.store(values_ptr + row * K + k, value.to(values_ptr.dtype.element_ty), mask=k < K)


def _selected_values(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    indices: torch.Tensor,
    values: torch.Tensor,
    relu: bool,
) -> None:
    (rows, k), d = indices.shape, x.shape[1]
    _selected_values_kernel[(triton.cdiv(k, 8), rows)](
        x, W_enc, b_enc, indices, values, k, d, RELU=relu, BLOCK_K=8, BLOCK_D=512
    )


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    relu: bool,
    rank_scale: torch.Tensor | None,
    design: str | None = None,
    trusted: frozenset[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.topk_encode`. No host sync; unverified on a GPU.

    design: the name of one of DESIGNS; None lets `design_of` choose among those that are trusted.

    Raises:
        RuntimeError: the design cannot take the call, or no trusted one can.
    """
    n = x.shape[0]
    values = x.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    if n == 0:
        return values, indices
    if design is not None:
        taken = named(design)
        if (why := taken.refuses(x, W_enc, k)) is not None:
            raise RuntimeError(
                f"topk_encode: design {design!r} was asked for and cannot run: {why}"
            )
    elif (taken := design_of(x, W_enc, k, trusted)) is None:
        raise RuntimeError(
            f"topk_encode: none of the trusted designs ({', '.join(sorted(trusted or ()))}) can "
            f"take {x.dtype}, D = {x.shape[1]}, F = {len(W_enc)}, k = {k} on {x.device}"
        )
    if x.data_ptr() % 16:
        x = (
            x.clone()
        )  # TMA reads from 16 bytes on; not another kernel, which might sum in its order
    with on_device(x):
        step = taken.rows_at_once(n, k, x.shape[1])
        for begin in range(0, n, step):
            some = slice(begin, begin + step)
            keys = taken.select(x[some], W_enc, b_enc, k, rank_scale, taken.chunks)
            if rank_scale is None:
                decode_keys(keys, values[some], indices[some], relu)
            else:  # a key holds the scaled score, which the value cannot be had from
                decode_keys(keys, None, indices[some], relu)
                _selected_values(x[some], W_enc, b_enc, indices[some], values[some], relu)
    return values, indices


def configurations() -> list[Configuration]:
    """The values of ranked latents, each dtype."""
    result = []
    for pointer in POINTERS.values():
        for d in ("i32:16", "i32"):
            signature = dict(
                x_ptr=pointer, W_ptr=pointer, bias_ptr=pointer, indices_ptr="*i32",
                values_ptr=pointer, K="i32", D=d,
            )  # fmt: skip
            constants = dict(RELU=True, BLOCK_K=8, BLOCK_D=512)
            label = pointer[1:] + (" odd D" if d == "i32" else "")
            result.append(Configuration(_selected_values_kernel, label, signature, constants))
    return result
