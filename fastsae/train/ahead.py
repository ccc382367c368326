"""What lets the host run ahead of a GPU: batches copied beside the training, counts read late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .._errors import not_a_tensor

_STEPS = 2  # that a GPU has not finished while the host prepares more: each holds a batch
_HORIZON = 8  # steps for which a count of latents that may die holds


class Copies:
    """Copies to a GPU through pinned memory, on a stream of their own. Unverified on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """The copy of a CPU tensor, which may not have arrived."""
        # also of a pinned one, which its owner may write to before the copy is over
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True)

    def hand_over(self, copied: torch.Tensor) -> None:
        """What comes next on the current stream sees all copies that were started."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copied.record_stream(current)

    def mark(self) -> Any:
        """Has `synchronize`: until the work so far on the current stream is done."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def _activations(x: Any) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"batches: {not_a_tensor(x)}")
    return x


def is_finite(x: torch.Tensor) -> bool:
    """No NaN and no infinity. One pass over x; on a GPU it waits."""
    # a sum that is finite has only finite terms; one that is not may have run over
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def _not_finite(x: torch.Tensor) -> LateCount:
    return LateCount((~x.isfinite()).any().int())


def prefetched(
    batches: Iterable[torch.Tensor],
    device: torch.device,
    *,
    copies: Copies | None = None,
    refuse: Callable[[], None] | None = None,
) -> Iterator[torch.Tensor | None]:
    """The batches on the device, in their order, each as it was when the iterable gave it.

    On a GPU the next batch is taken and its copy started before one is handed out, so that it
    arrives while that one is trained on; the host stays at most two steps ahead. Batches that are
    on the device already pass through.

    Args:
        copies: how to copy; None takes pinned memory and a second stream on a GPU, and nothing of
            the kind on a CPU.
        refuse: called for a batch that holds NaN or an infinity, before it would be handed out.
            Then None takes its place, unless it raises. None looks at no batch. One on the CPU is
            looked at there; one on a GPU by a kernel behind which a step more is waiting.
    """
    if copies is None and device.type == "cuda":
        copies = Copies(device)
    if copies is None:
        for x in map(_activations, batches):
            if refuse is not None and not is_finite(x):
                refuse()
                yield None
                continue
            yield x.to(device)
        return
    source = map(_activations, batches)
    ended: deque[Any] = deque()

    def take() -> tuple[torch.Tensor, bool, Callable[[], bool]] | None:
        """The next one, whether it is being copied, and whether it is to be refused."""
        x = next(source, None)
        if x is None:
            return None
        if x.device.type == "cpu":
            bad = refuse is not None and not is_finite(x)
            return copies.start(x), True, lambda: bad
        x = x.to(device)
        late = _not_finite(x) if refuse is not None else None
        return x, False, lambda: late is not None and late.value() > 0

    ahead = take()
    while ahead is not None:
        batch, copied, is_refused = ahead
        if copied:
            copies.hand_over(batch)
        if is_refused():
            assert refuse is not None
            refuse()
            ahead = take()
            yield None
            continue
        ahead = take()
        yield batch
        ended.append(copies.mark())
        if len(ended) > _STEPS:
            ended.popleft().synchronize()


class LateCount:
    """A number on the device, on its way to the host."""

    def __init__(self, count: torch.Tensor) -> None:
        pinned = count.device.type == "cuda"
        self._host = torch.empty((), dtype=count.dtype, pin_memory=pinned)
        self._host.copy_(count, non_blocking=True)
        self._event = torch.cuda.Event() if pinned else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(count.device))

    def is_there(self) -> bool:
        return self._event is None or bool(self._event.query())

    def value(self) -> int:
        """Waits where it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)


class DeadBound:
    """At most how many latents are dead, known to the host without waiting for the device.

    A latent that is dead at most h tokens from now has gone without firing for dead_after - h
    tokens by now. Those are counted every step, and a count that has arrived bounds the dead ones
    of the next h tokens.
    """

    def __init__(self, dead_after: int) -> None:
        self._dead_after = dead_after
        self._counts: deque[tuple[int, int, LateCount]] = deque()  # from when, until when

    def update(self, tokens_since_fired: torch.Tensor, tokens: int, n: int) -> int:
        """The bound for this step.

        Args:
            tokens_since_fired: [F], this step's batch included.
            tokens: trained on, this step's batch included; n: of this batch.
        """
        h = _HORIZON * n
        late = LateCount((tokens_since_fired >= self._dead_after - h).sum())
        self._counts.append((tokens, tokens + h, late))
        while self._counts[0][1] < tokens:
            self._counts.popleft()
        # the newest that is there; else the oldest that still holds, which has been on its way for
        # most of the horizon
        for _, _, count in reversed(self._counts):
            if count.is_there():
                return count.value()
        return self._counts[0][2].value()


def rounded(bound: int, n_latents: int) -> int:
    """A bound as a capacity: a few sizes in all, so that shapes stay the same for many steps."""
    return 0 if bound == 0 else min(n_latents, max(256, 1 << (bound - 1).bit_length()))
