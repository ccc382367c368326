"""Clamps latents of an SAE inside a running language model, the reconstruction error kept.

The least that the quickstart needs: one latent per sequence, clamped at every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..train.activations import edited
from ..train.evaluate import SparseCoder


def clamp_edit(
    sae: SparseCoder, x: torch.Tensor, latent: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    r"""x with latent j's activation set to c, everything else as it was.

    .. math:: x' = SAE(x)|_{f_j = c} + (x - SAE(x)) = x + (c - f_j(x)) \, d_j

    Args:
        sae: `encode(x) -> (values, indices)` and `W_dec` [F, D].
        x: [B, T, D] activations, any float dtype.
        latent: [B] int64, latent j of each sequence; -1 leaves a sequence bit-exact as it is.
        value: [B] float, c.

    Returns:
        [B, T, D] in the dtype of x. f_j(x) is exact: the encoder's own value when j is among the
        token's active latents, else 0. The difference is taken in the SAE's dtype.
    """
    values, indices = sae.encode(x.to(sae.W_enc.dtype))
    on = latent >= 0
    mine = indices == latent[:, None, None]
    f = (values * mine).sum(-1)  # [B, T]
    delta = value.to(f.dtype)[:, None] - f
    direction = sae.W_dec[latent.clamp(min=0)]  # [B, D]
    steered = x + (delta[..., None] * direction[:, None]).to(x.dtype)
    return torch.where(on[:, None, None], steered, x)


@contextmanager
def clamped(
    module: nn.Module,
    sae: SparseCoder,
    latent: int | torch.Tensor,
    value: float | torch.Tensor,
) -> Iterator[None]:
    """Inside the block, `module`'s output has the latent clamped, at every token of every call.

    Prompt and generated tokens, with and without the KV cache, are treated alike: the edit
    depends on the token's own activation alone.

    Args:
        latent: j, or [B] one for each sequence of the batch (-1: leave it alone).
        value: c in the SAE's own units, or [B].

    Raises:
        ValueError: a latent out of range, or the batch has another size than `latent`.
    """
    n_latents = sae.W_dec.shape[0]
    latents = torch.as_tensor(latent, dtype=torch.long, device=sae.W_dec.device).reshape(-1)
    values = torch.as_tensor(value, dtype=torch.float32, device=sae.W_dec.device).reshape(-1)
    if bool(((latents < -1) | (latents >= n_latents)).any()):
        raise ValueError(
            f"clamped: latent must lie in [0, {n_latents - 1}], got {latents.tolist()}"
        )

    def edit(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[0]
        if len(latents) not in (1, size) or len(values) not in (1, size):
            raise ValueError(
                f"clamped: {len(latents)} latents and {len(values)} values for a batch of {size}"
            )
        with torch.no_grad():
            return clamp_edit(sae, x, latents.expand(size), values.expand(size))

    with edited(module, edit):
        yield


@contextmanager
def added(module: nn.Module, vector: torch.Tensor) -> Iterator[None]:
    """Inside the block, `vector` [D] is added to `module`'s output at every token."""
    with edited(module, lambda x: x + vector.to(device=x.device, dtype=x.dtype)):
        yield
