"""What a way of computing topk_encode says of itself: a row of the table in `__init__`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .chunked import CHUNKS, Chunks


def _anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Design:
    """One way of computing the op: what it takes, and what it is chosen for."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    # (x, W_enc, b_enc, k, rank_scale, chunks): keys [R, >= k] with the k best in order in front
    select: Callable[..., torch.Tensor]
    rows_that_fit: Callable[[Chunks, int, int], int]  # (chunks, k, D): tokens of a pass, by memory
    chunks: Chunks = CHUNKS
    most_k: int | None = None
    tma: bool = False  # it reads rows of D by TMA, from 16 bytes on
    unavailable: Callable[[torch.device], str | None] = _anywhere  # why a device cannot run it
    # What follows is for a call that names no design.
    asked_for: str | None = None  # why it is taken by name only
    least_d: int = 1
    least_f_of_k: int = 1  # F is at least so many times k

    def refuses(self, x: torch.Tensor, W_enc: torch.Tensor, k: int) -> str | None:
        """Why it cannot take a call; None when it can. Of x it looks at dtype and device alone."""
        if x.dtype not in self.dtypes:
            return f"it does not take {x.dtype}"
        if self.most_k is not None and k > self.most_k:
            return f"it takes k up to {self.most_k}, not {k}"
        if self.tma and (W_enc.shape[1] % 8 or W_enc.data_ptr() % 16):
            return "a row of W_enc does not begin on 16 bytes"
        return self.unavailable(x.device)

    def why_not(self, x: torch.Tensor, W_enc: torch.Tensor, k: int) -> str | None:
        """Why a call that names no design does not take it; None when it may."""
        if self.asked_for is not None:
            return f"only by its name: {self.asked_for}"
        if (why := self.refuses(x, W_enc, k)) is not None:
            return why
        (f, d), least = W_enc.shape, self.least_f_of_k * k
        if d < self.least_d or f < least:
            return f"it pays from D = {self.least_d} and F = {least} on, not at {d} and {f}"
        return None

    def rows_at_once(self, n: int, k: int, d: int) -> int:
        """Tokens of a pass."""
        return max(1, min(n, self.chunks.rows, self.rows_that_fit(self.chunks, k, d)))
