"""Whether a CUDA graph is being captured: then nothing may wait for the device."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """On the current stream of a GPU; elsewhere False."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
