"""The warnings of the package, each with a category of its own, so that it can be silenced."""

from __future__ import annotations

import threading
import warnings

import torch


class KernelCheckWarning(UserWarning):
    """A kernel failed its known-answer check on this device, or could not be checked there."""


class SlowFallbackWarning(UserWarning):
    """No compiled kernel can run here, so an operator runs in plain PyTorch, several times slower.

    Given once a process, by the first operator that is run so, and not where the reference was
    asked for (`fastsae.use_backend("reference")`). To silence it::

        warnings.simplefilter("ignore", fastsae.SlowFallbackWarning)
    """


_lock = threading.Lock()
_given = False


def warn_slow(op: str, device: torch.device, reason: str) -> None:
    """Warns that `op` takes the reference on this device, if nothing did so before.

    Args:
        reason: why the best backend cannot run, with the cure where there is one.
    """
    global _given
    with _lock:
        if _given:
            return
        _given = True
    warnings.warn(
        f"{op} on {device.type} runs in plain PyTorch, several times slower than compiled kernels: "
        f"{reason}. fastsae.explain({op!r}) tells it for every backend; "
        'warnings.simplefilter("ignore", fastsae.SlowFallbackWarning) silences this.',
        SlowFallbackWarning,
        stacklevel=3,
    )
