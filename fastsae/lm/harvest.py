"""Activations of a language model, streamed window by window.

`stream_activations` runs the model up to a module and yields what it puts out; `collect` keeps a
bounded number of them for training. Works with any causal language model of transformers whose
blocks are found by path, and with any module named by `hook`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .sites import by_token, device_of, output_of, refuse_encoder_decoder
from .tokens import encoded, head


class _Reached(Exception):  # noqa: N818
    """Raised by the hook: the rest of the model is not needed."""


def activations_at(model: nn.Module, module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The module's output [B, T, D] for `tokens` [B, T]; the model stops running after it."""
    refuse_encoder_decoder(model, "activations_at")
    caught: list[torch.Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(by_token(output_of(output), tokens.shape, type(module).__name__))
        raise _Reached

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    raise ValueError(f"the model's forward pass does not run {type(module).__name__}")


@dataclass(frozen=True)
class Windows:
    """Text cut into windows of one length, every window from one document.

    Attributes:
        tokens: [W, T] int64 token ids.
        documents: W names, the document that each window is from.
        skip_first: positions at the start of every window that are left out everywhere: harvested,
            spliced, counted or shown. The first token of a text often has an activation of another
            size than all others, which says nothing of the text.

    Raises:
        ValueError: nothing is left of a window.
    """

    tokens: torch.Tensor
    documents: list[str]
    skip_first: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.skip_first < self.tokens.shape[1]:
            raise ValueError(
                f"Windows: skip_first must lie in [0, {self.tokens.shape[1] - 1}] for windows of "
                f"{self.tokens.shape[1]} tokens, got {self.skip_first}"
            )

    @property
    def kept(self) -> torch.Tensor:
        """[W, T - skip_first], the tokens that are not left out."""
        return self.tokens[:, self.skip_first :]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, chosen: Sequence[int] | torch.Tensor) -> Windows:
        """Some of the windows, in the order given."""
        order = torch.as_tensor(chosen, dtype=torch.long)
        names = [self.documents[i] for i in order.tolist()]
        return Windows(self.tokens[order], names, self.skip_first)


def windows_of(
    documents: Iterable[tuple[str, str]],
    tokenizer: Any,
    length: int,
    max_windows: int | None = None,
    *,
    per_document: int | None = None,
    skip_first: int = 1,
    bos: bool = True,
) -> Windows:
    """Tokenises `(name, text)` pairs and cuts them into windows of `length` tokens.

    Every window starts with the tokenizer's BOS, when it has one (`encoded`). A document's last,
    shorter piece is dropped.

    Args:
        max_windows: stop here.
        per_document: at most this many windows of one document, spread over it.
        skip_first: see `Windows`.
        bos: False: windows begin with the text's own tokens.

    Raises:
        ValueError: the text is too short for one window.
    """
    first = head(tokenizer) if bos else []
    body = length - len(first)
    if body < 1:
        raise ValueError(f"windows_of: length must be at least 2, got {length}")
    rows: list[list[int]] = []
    names: list[str] = []
    for name, text in documents:
        ids = encoded(tokenizer, text, bos=bos)[len(first) :]
        count = len(ids) // body
        taken = range(count)
        if per_document is not None and count > per_document:
            taken = range(0, count, -(-count // per_document))
        for i in taken:
            rows.append(first + ids[i * body : (i + 1) * body])
            names.append(name)
        if max_windows is not None and len(rows) >= max_windows:
            break
    if not rows:
        raise ValueError(f"windows_of: no document is as long as one window of {length} tokens")
    rows, names = rows[:max_windows], names[:max_windows]
    return Windows(torch.tensor(rows, dtype=torch.long), names, skip_first)


@dataclass(frozen=True)
class Batch:
    """Activations of some windows.

    Attributes:
        activations: [B, T, D], on the model's device.
        first: index of the first of these windows among all.
        tokens: [B, T], on the CPU.
    """

    activations: torch.Tensor
    first: int
    tokens: torch.Tensor


def stream_activations(
    model: nn.Module,
    module: nn.Module,
    windows: Windows,
    *,
    batch_windows: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """Yields the module's output for `windows`, a batch of windows at a time, in order.

    One batch exists at a time. `progress(n)` is told of every n tokens done.
    """
    device = device_of(model)
    for first in range(0, len(windows), batch_windows):
        tokens = windows.tokens[first : first + batch_windows]
        yield Batch(activations_at(model, module, tokens.to(device)), first, tokens)
        if progress is not None:
            progress(tokens.numel())


@dataclass(frozen=True)
class Store:
    """Activations kept for training.

    Attributes:
        activations: [N, D]; row n is token `skip_first + n % P` of window `n // P`, where
            P = T - skip_first.
        windows: the windows they come from, so that token ids and text can be found again.
    """

    activations: torch.Tensor
    windows: Windows

    def __len__(self) -> int:
        return self.activations.shape[0]


def collect(
    model: nn.Module,
    module: nn.Module,
    windows: Windows,
    *,
    max_bytes: int = 1 << 30,
    dtype: torch.dtype = torch.float32,
    batch_windows: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Store:
    """Runs the model over `windows` and keeps the activations, at most `max_bytes` of them.

    Windows beyond that bound are not run at all (see `Store.windows`), and the positions that
    windows leave out are not kept.
    """
    kept = windows.kept.shape[1]
    out: torch.Tensor | None = None
    at = 0
    used = windows
    for batch in stream_activations(
        model, module, windows, batch_windows=batch_windows, progress=progress
    ):
        x = batch.activations[:, windows.skip_first :]
        rows = x.reshape(-1, x.shape[-1])
        if out is None:
            per_window = kept * x.shape[-1] * dtype.itemsize
            fits = max(1, min(len(windows), max_bytes // per_window))
            used = windows.select(range(fits))
            out = torch.empty(fits * kept, x.shape[-1], dtype=dtype, device=x.device)
        rows = rows[: out.shape[0] - at]
        out[at : at + rows.shape[0]] = rows
        at += rows.shape[0]
        if at == out.shape[0]:
            break
    assert out is not None
    return Store(out, used)
