"""From the residual stream to the logits."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from .sites import device_of


@torch.no_grad()
def logit_effect(model: Any, directions: torch.Tensor) -> torch.Tensor:
    """What each direction of the residual stream adds to the logits, on the direct path.

    The final norm is taken at its scale (gamma; centred first for LayerNorm), its division by the
    token's own norm left out, and the mean over the vocabulary subtracted, since softmax ignores
    it. Later blocks are not in it. Scale and centring are measured on the module that feeds the
    unembedding, whatever its class and parameterisation are.

    Args:
        directions: [M, D], rows of W_dec.

    Returns:
        [M, V] float32.

    Raises:
        NotImplementedError: the readout is not one matrix [V, D], or what stands before it is a
            normalisation of another kind.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    width = directions.shape[-1]
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.shape[1] != width:
        shape = "none" if weight is None else list(weight.shape)
        raise NotImplementedError(
            f"logit_effect: the readout of {type(model).__name__} is no matrix [V, {width}] from "
            f"the residual stream to the logits: {shape}"
        )
    d = directions.float()
    norm = final_norm_of(model)
    if norm is not None:
        centred, gamma = measured(norm, width)
        d = (d - d.mean(-1, keepdim=True) if centred else d) * gamma
    effect = d @ weight.float().T
    return effect - effect.mean(-1, keepdim=True)


@torch.no_grad()
def final_norm_of(model: Any) -> nn.Module | None:
    """The normalisation whose output the unembedding is given, found by running one token; None
    where there is none."""
    head = model.get_output_embeddings()
    made: dict[int, nn.Module] = {}
    kept: list[torch.Tensor] = []  # so that no memory is given out twice
    given: list[torch.Tensor] = []

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kept.append(output)
            # the innermost module comes first
            made.setdefault(output.untyped_storage().data_ptr(), module)

    handles = [m.register_forward_hook(after) for m in model.modules() if m is not head]
    handles.append(head.register_forward_pre_hook(lambda _m, args: given.append(args[0])))
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
        model(input_ids=token, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = made.get(given[0].untyped_storage().data_ptr()) if given else None
    return found if found is not None and _normalises(found, given[0].shape[-1]) else None


def _points(width: int, like: torch.Tensor) -> torch.Tensor:
    """[2, D], no coordinate near 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, width, generator=generator, dtype=torch.float32) + 0.5
    return (x * (torch.rand(2, width, generator=generator) - 0.5).sign()).to(like.device)


def _in_fp32(module: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    copied = deepcopy(module).float().eval()
    return copied, next(iter(copied.parameters()), torch.zeros(()))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-2 * float(b.norm())


def _normalises(module: nn.Module, width: int) -> bool:
    """Whether it takes [..., D] to [..., D] and does not see how long its input is."""
    copied, like = _in_fp32(module)
    x = _points(width, like)
    try:
        y, twice = copied(x[None]), copied(8 * x[None])
    except Exception:  # a block needs more than its input
        return False
    same = isinstance(y, torch.Tensor) and y.shape == x[None].shape
    return same and _close(y, twice)


def measured(norm: nn.Module, width: int) -> tuple[bool, torch.Tensor]:
    """Whether a normalisation subtracts the mean, and its scale gamma [D] in fp32.

    Raises:
        NotImplementedError: it is neither a LayerNorm nor an RMSNorm, whatever it is called.
    """
    copied, like = _in_fp32(norm)
    x = _points(width, like)

    def odd(points: torch.Tensor) -> torch.Tensor:  # without the bias
        return (copied(points[None])[0] - copied(-points[None])[0]) / 2

    y = odd(x)
    centred = _close(odd(x + 3), y)
    base = x - x.mean(-1, keepdim=True) if centred else x
    base = base / base.square().mean(-1, keepdim=True).sqrt()
    at = base.abs().argmax(0)  # of the two points the one that says more
    gamma = (y.gather(0, at[None]) / base.gather(0, at[None]))[0]
    if not _close(gamma * base, y):
        raise NotImplementedError(
            f"logit_effect: {type(norm).__name__} before the readout is no LayerNorm and no RMSNorm"
        )
    return centred, gamma
