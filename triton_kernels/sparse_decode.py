"""sparse_decode: each token gathers and sums the rows of its active latents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device, row_block
from ._configuration import Configuration

# Rows gathered at once: 8 loads of 16 bytes in flight per thread hide the latency of HBM.
_BLOCK_K = 8


@triton.jit
def _sparse_decode_kernel(
    values_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    W_ptr,  # [F, D]
    b_ptr,  # [D] or None
    out_ptr,  # [N, D]
    K,
    F,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if b_ptr is not None:
        acc = tl.load(b_ptr + d, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK_D]
    else:
        acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        latent = tl.load(indices_ptr + n * K + k, mask=k < K, other=-1)  # [BLOCK_K]
        present = (latent >= 0) & (latent < F)
        value = tl.load(values_ptr + n * K + k, mask=present, other=0.0).to(tl.float32)
        w = tl.load(
            W_ptr + latent.to(tl.int64)[:, None] * D + d[None, :],
            mask=present[:, None] & in_row[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_D]
        acc += tl.sum(value[:, None] * w.to(tl.float32), axis=0)
    tl.store(out_ptr + n * D + d, acc.to(out_ptr.dtype.element_ty), mask=in_row)


def sparse_decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None,
) -> torch.Tensor:
    """See `fastsae.ops.sparse_decode`. An index out of range adds nothing (no sync to raise)."""
    (n, k), (f, d) = values.shape, W_dec.shape
    out = W_dec.new_empty(n, d)
    if out.numel() == 0:
        return out
    block_d, warps = row_block(d, W_dec.element_size())
    with on_device(out):
        _sparse_decode_kernel[(n, triton.cdiv(d, block_d))](
            values, indices, W_dec, b_dec, out, k, f, d,
            BLOCK_K=_BLOCK_K, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return out


def configurations() -> list[Configuration]:
    """Both row widths that matter, aligned and not, each dtype."""
    result = []
    for dtype, pointer in POINTERS.items():
        for d, bias in ((4096, True), (768, False), (769, True)):
            block_d, warps = row_block(d, dtype.itemsize)
            aligned = "i32:16" if d % 16 == 0 else "i32"
            signature = dict(
                values_ptr=pointer, indices_ptr="*i32", W_ptr=pointer, b_ptr=pointer,
                out_ptr=pointer, K="i32", F="i32", D=aligned,
            )  # fmt: skip
            constants = dict(BLOCK_K=_BLOCK_K, BLOCK_D=block_d)
            if not bias:
                constants["b_ptr"] = None
            label = f"{pointer[1:]} D={d}" + ("" if bias else " no bias")
            result.append(
                Configuration(_sparse_decode_kernel, label, signature, constants, num_warps=warps)
            )
    return result
