"""What the references share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BLOCK = 128  # tokens a product
_SCORES = 1 << 24  # held at once: 64 MB in fp32


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 are summed in fp32, whatever torch's settings allow (tf32, bf16)."""
    libraries = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, setting in zip(libraries, before):
            library.fp32_precision = setting


def check_range(op: str, indices: torch.Tensor, n_latents: int) -> torch.Tensor:
    """Indices as int64, refused when one is outside [0, n_latents).

    On a GPU the check would cost a host sync; PyTorch's own indexing asserts there.
    """
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= n_latents:
            outside = ((indices < 0) | (indices >= n_latents)).flatten().nonzero()
            raise RuntimeError(
                f"{op}: indices must lie in [0, {n_latents}), and {len(outside)} of "
                f"{indices.numel()} do not, the first at place {int(outside[0])}"
            )
    return indices.long()


def score_blocks(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """x @ W_enc.T + b_enc for some tokens at a time: their slice and scores [tokens, F], which the
    next ones overwrite.

    Every product has one shape, whatever N is: a BLAS chooses its kernel, and with it the order of
    a sum, by the number of rows, and a token's scores must not depend on how many others came with
    it. That its place in the block does not matter either is how every BLAS that we know works.
    """
    f, d = W_enc.shape
    acc = acc_dtype(x.dtype)
    size = max(16, min(_BLOCK, _SCORES // f))
    weight = W_enc.to(acc).T
    block = torch.zeros(size, d, dtype=acc, device=x.device)
    blocks = max(1, min(_SCORES // (size * f), -(-x.shape[0] // size)))
    slab = torch.empty(blocks * size, f, dtype=acc, device=x.device)
    for begin in range(0, x.shape[0], blocks * size):
        some = x[begin : begin + blocks * size]
        with full_precision():
            for i in range(0, len(some), size):
                rows = some[i : i + size]
                block[: len(rows)] = rows
                torch.mm(block, weight, out=slab[i : i + size])
        scores = slab[: len(some)]
        if b_enc is not None:
            scores += b_enc.to(acc)
        yield slice(begin, begin + len(some)), scores


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [N, k] of the k largest of each row: descending, ties by lowest column, NaN first."""
    # fp64 is what everything is compared with: there the definition itself runs. On a GPU to look
    # for ties would cost a host sync.
    if scores.dtype == torch.float64 or scores.device.type != "cpu":
        return _best_by_definition(scores, k)
    n_latents = scores.shape[1]
    largest, columns = scores.topk(min(k + 1, n_latents), dim=1)  # torch's order among ties is free
    columns = columns[:, :k].sort(dim=1).values
    found = scores.gather(1, columns)
    columns = columns.gather(1, found.sort(dim=1, descending=True, stable=True).indices)
    if k < n_latents:  # where the next one is as large, another set may come first
        tied = (~(largest[:, k] < largest[:, k - 1])).nonzero()[:, 0]
        if len(tied):
            columns[tied] = _best_by_definition(scores[tied], k)
    return columns


def _best_by_definition(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def weighted_sums(
    table: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[S, D]: row s sums weights[p] * table[rows[p]] over offsets[s] <= p < offsets[s + 1].

    table [T, D] and weights [P] in one dtype, rows [P] and offsets [S + 1] int64; in order of p.
    """
    if rows.numel() == 0 or table.numel() == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return torch.nn.functional.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
