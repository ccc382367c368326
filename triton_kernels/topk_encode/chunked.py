"""topk_encode in chunks of columns: each a product into a slab that stays in the L2 cache, followed
by a kernel that keeps every row's k best so far. Any k, F, D and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from .keys import MAX_SORTED, BestKeys, MergedKeys
from .product import Product


@dataclass(frozen=True)
class Chunks:
    """Sizes of the chunked path."""

    rows: int = 4096  # tokens per pass over W
    slab: int = 1 << 23  # scores held at once: 32 MB of fp32, of the 50 MB of L2 of an H100 or H200
    keys_bytes: int = 160 << 20  # with the slab below 256 MB
    copy_bytes: int = 32 << 20  # bf16 copies of W_enc held at once, for fp32 inputs

    def columns(self, rows: int, f: int) -> int:
        """Width of a chunk: as equal as they can be, so that every product is the same call."""
        count = triton.cdiv(f, max(1, self.slab // rows))
        return min(f, triton.cdiv(triton.cdiv(f, count), 16) * 16)


CHUNKS = Chunks()


def select(
    x: torch.Tensor,  # [R, D]
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
) -> torch.Tensor:
    """See `Design.select`."""
    rows, f = len(x), len(W_enc)
    columns = chunks.columns(rows, f)
    slab = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    if k <= MAX_SORTED:
        best = BestKeys(rows, k, x.device)
        add_columns(best, slab, x, W_enc, b_enc, rank_scale)
        return best.finish()
    merged, product = MergedKeys(rows, k, columns, x.device), Product(x, W_enc)
    for first, fresh, last in chunks_of(f, columns):
        product(slab, first)
        merged.add(slab, b_enc, rank_scale, first, fresh, last)
    return merged.keys


def rows_that_fit(chunks: Chunks, k: int, d: int) -> int:
    """Tokens of a pass whose keys there is room for."""
    if k <= MAX_SORTED:
        return chunks.keys_bytes // BestKeys.bytes_per_row(k)
    # a chunk's keys are 8 bytes a score
    return (chunks.keys_bytes - 8 * chunks.slab) // MergedKeys.bytes_per_row(k)


def chunks_of(f: int, columns: int) -> Iterator[tuple[int, int, bool]]:
    """First column, how many of it have been seen, whether it is the last chunk."""
    for begin in range(0, f, columns):
        first = min(begin, f - columns)  # the last chunk overlaps: all have one shape
        yield first, begin - first, begin + columns >= f


def add_columns(
    best: BestKeys,
    slab: torch.Tensor,  # [R, columns] fp32
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    only: torch.Tensor | None = None,
) -> None:
    product = Product(x, W_enc)
    for first, fresh, _ in chunks_of(len(W_enc), slab.shape[1]):
        product(slab, first, only)
        best.add(slab, b_enc, rank_scale, first, fresh, only)
