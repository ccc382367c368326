"""topk_encode: the exact top-k of an SAE encoder, without the dense [N, F] activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _dispatch
from . import _common, _factors

_OP = "topk_encode"
_ACTIVATIONS = ("relu", "identity")


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    rank_scale: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    design: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The k largest latents of every token, `act(top_k(x W_enc^T + b_enc))`.

    .. math::
        h_{nf} = \langle x_n, W_{enc,f} \rangle + b_{enc,f}, \quad
        indices_n = \operatorname{argtopk}_f (h_{nf} \cdot scale_f), \quad
        values_n = act(h_{n, indices_n})

    Args:
        x: [..., D] activations, any leading shape, fp32, bf16, fp16 (fp64 on the CPU).
        W_enc: [F, D], one row per latent, dtype of x. Row-major; another layout is copied.
        b_enc: [F] or None.
        k: 1 <= k <= F.
        activation: "relu" (applied after the selection, so fewer than k values may be positive) or
            "identity".
        rank_scale: [F] or None. Latents are ranked by `h * rank_scale` (e.g. the decoder's row
            norms); the returned values are not scaled. It gets no gradient.
        latents: [M] integer or None. Only these latents compete (k <= M); the indices returned are
            still those of W_enc. Their M rows are gathered.
        design: the name of a way of computing it, or None for the best one that selects exactly,
            takes the call and has passed its check on the device. `fastsae.explain` lists them and
            says why each is taken or not. Those with names are the Triton kernels', whichever
            backend is forced: "hopper", "fused", "bounded", "chunked" and "fp8". The C++ kernels
            choose for themselves, among ways that give one result to the bit.

            "fp8", which is taken by its name only, needs a GPU of sm_89 or later and k up to 1024:
            products of fp8 copies choose candidates by a margin of 2 standard deviations of
            independent roundings, bounded from above, which are then scored in fp32.
            Values and order are exact; a latent can be missed. Emulated
            (`benchmarks/fp8_recall.py`), 2,930 of 901 million pairs exceeded the margin, and none
            of 2.88 million latents was missed: below 1.1e-6 at 95% confidence (2.56 million of them
            with weights trained on MiniLM, the others random); none of 384,000 where three places
            of x are 100 to 1000 times larger, whatever W has there. Where x alone has such places,
            most rows keep more candidates than they have room for and are scored in fp32 as they
            go: right and slow. Unverified on a GPU.

    Returns:
        values [..., k] in the dtype of x, and indices [..., k] int32.

        Sums run in fp32 (fp64 for fp64), the selection is exact in that precision, and values are
        rounded once. Order is canonical on every backend: by rank descending, ties by lowest index
        (by position in `latents` when given). NaN ranks above +inf, as in `torch.topk`; a row with
        NaN or inf still gets k distinct in-range indices. Runs are repeatable bit for bit, and a
        token's values and indices do not depend on the other tokens of the call nor on the number
        of threads.

    Gradients reach x, W_enc and b_enc through the selected latents only. Inside autocast, x is cast
    to the dtype of W_enc. Under `torch.vmap` a batch of x is one call; torch.func's gradient
    transforms are refused. No backend but `reference` allocates anything of size N x F.

    Raises:
        ValueError: a shape, device, k or activation does not fit; there is no such design.
        TypeError: dtypes differ or are not supported.
        RuntimeError: the design that was named cannot run this call here; the message says why.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", eq. 3; `rank_scale` is
    SAELens's `rescale_acts_by_decoder_norm`.
    """
    _common.refuse_transforms(_OP, x, W_enc, b_enc)
    if _factors.is_recorded(W_enc):
        values, indices = torch.ops.fastsae.topk_encode(
            x, W_enc.detach(), b_enc, k, activation, rank_scale, latents, design
        )
        relu = activation == "relu"
        return _factors.record_encode(values, W_enc, indices, x.to(W_enc.dtype), relu), indices
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.fastsae.topk_encode(
        x, W_enc, b_enc, k, activation, rank_scale, latents, design
    )
    return result


class Arguments(NamedTuple):
    """Of `topk_encode`."""

    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor | None
    k: int
    activation: str = "relu"
    rank_scale: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    design: str | None = None


def _check(a: Arguments) -> None:
    _common.check_floats(_OP, W_enc=a.W_enc, x=a.x, b_enc=a.b_enc, rank_scale=a.rank_scale)
    _common.check_matrix(_OP, "W_enc", a.W_enc, "[F, D]")
    f, d = a.W_enc.shape
    if d == 0:
        raise ValueError(f"{_OP}: W_enc must have D >= 1, got {_common.shape(a.W_enc)}")
    _common.check_last(_OP, "x", a.x, d, "D")
    _common.check_vector(_OP, "b_enc", a.b_enc, f, "F")
    _common.check_vector(_OP, "rank_scale", a.rank_scale, f, "F")
    if a.activation not in _ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {_ACTIVATIONS}, got {a.activation!r}")
    competing, name = f, "F"
    if a.latents is not None:
        if a.latents.dim() != 1:
            raise ValueError(f"{_OP}: latents must be [M], got {_common.shape(a.latents)}")
        _common.check_indices(_OP, a.latents, a.W_enc, "W_enc", "latents")
        competing, name = a.latents.shape[0], "M, the number of latents"
    if not 1 <= a.k <= competing:
        raise ValueError(f"{_OP}: k must lie in [1, {competing}] ({name}), got {a.k}")


def _compute(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    x, W_enc, b_enc, k, activation, rank_scale, latents, design = a
    if latents is not None:
        chosen = latents.long()
        W_enc = W_enc.index_select(0, chosen)
        b_enc = None if b_enc is None else b_enc.index_select(0, chosen)
        rank_scale = None if rank_scale is None else rank_scale.index_select(0, chosen)
    W_enc = W_enc.contiguous()
    if design is None:
        run = _dispatch.select(_OP, x)
    else:
        run = _dispatch.required(_OP, design, x, W_enc, k)
    values, indices = run(
        _common.flat(x),
        W_enc,
        None if b_enc is None else b_enc.contiguous(),
        k,
        activation == "relu",
        None if rank_scale is None else rank_scale.contiguous(),
    )
    if latents is not None:
        indices = latents.to(torch.int32)[indices.long()]
    return _common.unflat(values, x), _common.unflat(indices, x)


def _fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    size = (*a.x.shape[:-1], a.k)
    return a.x.new_empty(size), a.x.new_empty(size, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, W_enc, b_enc, _, activation, *_ = inputs
    values, indices = output
    ctx.relu = activation == "relu"
    ctx.has_bias = b_enc is not None
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, W_enc, values, indices)


def _backward(
    ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * len(Arguments._fields)
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing frees what was unpacked
    _common.refuse_double_backward(_OP, (grad, *saved))
    x, W_enc, values, indices = saved
    grad_pre = grad * (values > 0) if ctx.relu else grad
    f = W_enc.shape[0]
    dx = dW_enc = db_enc = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.fastsae.sparse_decode(grad_pre, indices, W_enc)
    if ctx.needs_input_grad[1]:
        dW_enc = torch.ops.fastsae.sparse_grad_weight(grad_pre, indices, x, f)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        ones = grad_pre.new_ones(*grad_pre.shape[:-1], 1)
        db_enc = torch.ops.fastsae.sparse_grad_weight(grad_pre, indices, ones, f).squeeze(1)
    return dx, dW_enc, db_enc, None, None, None, None, None


def _autocast(a: Arguments) -> Arguments:
    return a._replace(x=a.x.to(a.W_enc.dtype))


_run = _common.register(
    _OP, Arguments, check=_check, compute=_compute, fake=_fake, autocast=_autocast,
    backward=_backward, setup_context=_setup_context, vmap_batched=1,
)  # fmt: skip
