"""sparse_grad_values in plain PyTorch, some tokens at a time so that [N, K, D] never exists."""

from __future__ import annotations

import torch

from ._common import acc_dtype, check_range, full_precision

_ELEMENTS = 1 << 22  # of the rows gathered at a time: 16 MB in fp32


def sparse_grad_values(
    grad_out: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    """See `fastsae.ops.sparse_grad_values`."""
    index = check_range("sparse_grad_values", indices, W_dec.shape[0])
    n, k = index.shape
    acc = acc_dtype(W_dec.dtype)
    grad = grad_out.to(acc)[:, :, None]  # [N, D, 1]
    out = torch.empty(n, k, 1, dtype=acc, device=grad_out.device)
    size = max(1, _ELEMENTS // max(1, k * W_dec.shape[1]))
    with full_precision():
        for at in (slice(begin, begin + size) for begin in range(0, n, size)):
            rows, given = W_dec[index[at]].to(acc), grad[at]
            if len(rows) == 1:  # a product of one is another kernel, which sums in another order
                rows, given = rows.expand(2, -1, -1), given.expand(2, -1, -1)
            out[at] = (rows @ given)[: out[at].shape[0]]
    return out[:, :, 0].to(W_dec.dtype)
