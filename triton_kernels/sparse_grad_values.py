"""sparse_grad_values: inner products of a token's gradient with the rows of its active latents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration

# 8 rows share one load of the gradient; 8 x 512 products are 32 accumulators per thread.
_BLOCK_K, _BLOCK_D, _WARPS = 8, 512, 4
_MOST_K = 65535 * _BLOCK_K  # of a launch: the grid's second dimension ends there


@triton.jit
def _sparse_grad_values_kernel(
    grad_ptr,  # [N, D]
    indices_ptr,  # [N, K]
    W_ptr,  # [F, D]
    out_ptr,  # [N, K]
    K,
    F,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    latent = tl.load(indices_ptr + n * K + k, mask=k < K, other=-1)  # [BLOCK_K]
    present = (latent >= 0) & (latent < F)
    row = W_ptr + latent.to(tl.int64)[:, None] * D  # [BLOCK_K, 1]
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_row = d < D
        grad = tl.load(grad_ptr + n * D + d, mask=in_row, other=0.0).to(tl.float32)
        w = tl.load(row + d[None, :], mask=present[:, None] & in_row[None, :], other=0.0)
        acc += grad[None, :] * w.to(tl.float32)
    # an absent row gives 0, also where the gradient is not finite
    dot = tl.where(present, tl.sum(acc, axis=1), 0.0)
    tl.store(out_ptr + n * K + k, dot.to(out_ptr.dtype.element_ty), mask=k < K)


def sparse_grad_values(
    grad_out: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    """See `fastsae.ops.sparse_grad_values`. An index out of range gives 0 (no sync to raise)."""
    (n, k), (f, d) = indices.shape, W_dec.shape
    out = W_dec.new_empty(n, k)
    if out.numel() == 0:
        return out
    if k > _MOST_K:
        parts = [part.contiguous() for part in indices.split(_MOST_K, dim=1)]
        return torch.cat([sparse_grad_values(grad_out, part, W_dec) for part in parts], dim=1)
    with on_device(out):
        _sparse_grad_values_kernel[(n, triton.cdiv(k, _BLOCK_K))](
            grad_out, indices, W_dec, out, k, f, d,
            BLOCK_K=_BLOCK_K, BLOCK_D=_BLOCK_D, num_warps=_WARPS,
        )  # fmt: skip
    return out


def configurations() -> list[Configuration]:
    """Aligned and unaligned rows, each dtype."""
    result = []
    for pointer in POINTERS.values():
        for aligned in (True, False):
            signature = dict(
                grad_ptr=pointer, indices_ptr="*i32", W_ptr=pointer, out_ptr=pointer,
                K="i32", F="i32", D="i32:16" if aligned else "i32",
            )  # fmt: skip
            constants = dict(BLOCK_K=_BLOCK_K, BLOCK_D=_BLOCK_D)
            label = pointer[1:] + ("" if aligned else " odd D")
            kernel = _sparse_grad_values_kernel
            result.append(Configuration(kernel, label, signature, constants, num_warps=_WARPS))
    return result
