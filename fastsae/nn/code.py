"""What a sparse coder finds in a batch, and what it costs."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Code(NamedTuple):
    """The active latents of a batch of tokens. A latent fires where its value is not 0.

    Attributes:
        values: [..., K] a fixed number per token, or [M] of all tokens (ragged).
        indices: the same shape, int32: which latents.
        offsets: None when fixed; else [N + 1] int64, token n has the pairs offsets[n] up to
            offsets[n + 1], tokens flattened.
    """

    values: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor | None = None


class Loss(NamedTuple):
    """A training loss with its parts.

    Attributes:
        total: scalar, what is minimised.
        terms: the named scalars that it is made of, without their coefficients.
        code: of the batch.
        reconstruction: [..., D_out].
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    code: Code
    reconstruction: torch.Tensor


def fvu(x: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    r"""Fraction of variance unexplained, :math:`\sum \|x - \hat x\|^2 / \sum \|x - \bar x\|^2`.

    Over all tokens of x [..., D], a scalar in fp32 or wider; differentiable.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    x = x.reshape(-1, x.shape[-1]).to(acc)
    error = (x - reconstruction.reshape(x.shape)).square().sum()
    return error / (x - x.mean(0)).square().sum().clamp_min(1e-12)
