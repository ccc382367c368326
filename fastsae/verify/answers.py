"""Known answers: calls of the kernels whose right result is one, whatever the order of summation.

Data are small integers (and powers of two where a kernel divides), so that every product and every
partial sum is an fp32 number; the answer comes from the reference in fp64 on the CPU. Only what a
division or a square root rounds is compared with a tolerance, named in the answer.

The shapes are those of production tiles with rests at every edge. `small` ones take milliseconds on
a CPU: they cover every path of the C++ kernels. `tiny` ones are for Triton's interpreter, where a
token is what costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import reference
from .._steer_codes import ADD, CLAMP, CLAMP_IF_ACTIVE, MEMBER, MIN_CLAMP, RAW, SCALE, SIGNED
from ..reference import moments

NAN, INF = float("nan"), float("inf")
SCALES = ("tiny", "small", "production")


@dataclass
class Answer:
    """One call and what is right. Tensors lie on the CPU.

    args: the private schema's arguments, in order. A call may write to those in `written`.
    expected: what it returns, then the written arguments, in order.
    ulps: units in the last place by which floating-point results may be off.
    shifted: arguments that are also tried as views which do not begin on 16 bytes.
    refused: the CPU kernels refuse these arguments (an index out of range), GPU kernels cannot.
    """

    label: str
    args: tuple[Any, ...]
    expected: tuple[torch.Tensor, ...]
    written: tuple[int, ...] = ()
    ulps: int = 0
    shifted: tuple[int, ...] = ()
    refused: bool = False


def whole(*shape: int, seed: int, most: int = 4, dtype: torch.dtype) -> torch.Tensor:
    """Integers in [-most, most]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def _indices(n: int, k: int, f: int, seed: int) -> torch.Tensor:
    """[N, K] with repeats, the first and last latents, and latent 1 in every token."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, f, (n, k), generator=generator, dtype=torch.int32)
    found[:, 0] = min(1, f - 1)
    if n > 1 and k > 1:
        found[0, 1], found[-1, -1] = 0, f - 1
    return found


def _wide(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


# ---- topk, topk_encode, topk_member -----------------------------------------------------------


def topk(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """A filter's and a radix selection's shapes; ties, NaN and infinities; k = M."""
    rows, m = (130, 5003) if scale == "production" else (5, 700)
    shapes = [(rows, m, 33), (3, 257, 257), (1, m, 1)]
    if scale == "production":
        shapes += [(3, 70_001, 64), (2, 9001, 4099)]
    for n, columns, k in shapes:
        x = whole(n, columns, seed=columns, most=120, dtype=dtype)
        x[0, : columns // 2] = 7
        if n > 2:
            x[1, columns // 3], x[1, columns - 1], x[2, 0], x[2, 5] = NAN, INF, -INF, NAN
        values, indices = reference.topk(x.double(), k)
        yield Answer(f"{n}x{columns} k={k}", (x, k), (values.to(dtype), indices), shifted=(0,))


def _encode(
    label: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, k: int,
    relu: bool = True, rank_scale: torch.Tensor | None = None,
) -> Answer:  # fmt: skip
    x64, w64, b64, s64 = _wide(x, w, b, rank_scale)
    assert x64 is not None and w64 is not None
    values, indices = reference.topk_encode(x64, w64, b64, k, relu, s64)
    expected = (values.to(x.dtype), indices)
    return Answer(label, (x, w, b, k, relu, rank_scale), expected, shifted=(0, 1))


def topk_encode(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """Ties (integers tie often), an order in which every latent beats all before it, so that every
    buffer overflows, equal rows, NaN and infinities, ranks that are not the values, k = F."""
    n, d, f = {"tiny": (5, 40, 300), "small": (35, 72, 700), "production": (300, 200, 5003)}[scale]
    x, w = whole(n, d, seed=1, dtype=dtype), whole(f, d, seed=2, dtype=dtype)
    b = whole(f, seed=3, dtype=dtype)
    for k in (8,) if scale == "tiny" else (1, 8, 64):
        yield _encode(f"{n}x{d}x{f} k={k}", x, w, b, k)
    yield _encode(f"few tokens {d}x{f}", x[:3].clone(), w, b, 8)
    yield _encode(f"one token {d}x{f}", x[:1].clone(), w, None, 33)
    powers = 2.0 ** whole(f, seed=4, most=3, dtype=torch.float64)
    yield _encode("ranked by scale", x, w, b, 16, False, powers.to(dtype))
    steps = torch.arange(f, dtype=torch.float64)
    rising = torch.zeros(f, d, dtype=torch.float64)
    rising[:, 0], rising[:, 1] = steps // 128, steps % 128
    ones = torch.zeros(n, d, dtype=torch.float64)
    ones[:, 0], ones[:, 1] = 128, 1
    ones[1::2] *= -1  # falling scores in every other token
    yield _encode("every latent beats the last", ones.to(dtype), rising.to(dtype), None, 32, False)
    yield _encode("equal latents", x, w[:1].expand(f, d).contiguous(), None, 32)
    yield _encode("nothing but zeros", torch.zeros_like(x), w, None, 32)
    odd = x.clone()
    odd[0, 0], odd[1, 3], odd[2, 2], odd[3] = NAN, INF, -INF, 0
    yield _encode("NaN and infinities", odd, w, b, 16)
    some = w[: max(f // 10, 65), : d - 3].contiguous()
    narrow = x[:, : d - 3].contiguous()
    yield _encode("k = F, odd D", narrow[:9].contiguous(), some, None, len(some))
    if dtype == torch.float32:  # more digits than bf16 has, so that a filter's bounds are not zero
        yield _encode("14 bits", whole(n, d, seed=5, most=7, dtype=dtype),
                      whole(f, d, seed=6, most=8191, dtype=dtype), b, 32)  # fmt: skip
    if scale == "production":
        yield _encode("k beyond the sorted", x[:33], w, b, 1500)
        # several chunks of columns, the last overlapping the one before
        many = whole(4100, 64, seed=7, dtype=dtype)
        yield _encode("chunks", many, whole(6007, 64, seed=8, dtype=dtype), b[:1].expand(6007), 32)
        yield _encode("phases", x[:140, :64].contiguous(),
                      whole(70_001, 64, seed=9, dtype=dtype), None, 64)  # fmt: skip


def topk_encode_fp8(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """Powers of two, which fp8 codes hold exactly."""
    n, d, f = (300, 256, 5003) if scale == "production" else (5, 64, 300)

    def powers(*shape: int, seed: int) -> torch.Tensor:
        sign = whole(*shape, seed=seed, most=1, dtype=torch.float64)
        return (sign * 2.0 ** whole(*shape, seed=seed + 1, most=2, dtype=torch.float64)).to(dtype)

    x, w = powers(n, d, seed=21), powers(f, d, seed=31)
    for k in (8, 64):
        yield _encode(f"fp8 {n}x{d}x{f} k={k}", x, w, whole(f, seed=3, dtype=dtype), k)
    yield _encode("fp8 equal latents", x, w[:1].expand(f, d).contiguous(), None, 32)


def topk_member(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """The k-th and the next latent of every token, one that is far off, none, and ties."""
    n, d, f = {"tiny": (3, 40, 300), "small": (6, 72, 700), "production": (65, 200, 5003)}[scale]
    x, w = whole(n, d, seed=1, dtype=dtype), whole(f, d, seed=2, dtype=dtype)
    b, k = whole(f, seed=3, dtype=dtype), 32
    powers = (2.0 ** whole(f, seed=4, most=2, dtype=torch.float64)).to(dtype)
    for label, rank_scale, positive in (("by value", None, False), ("by rank", powers, True)):
        x64, w64, b64, s64 = _wide(x, w, b, rank_scale)
        assert x64 is not None and w64 is not None
        best = reference.topk_encode(x64, w64, b64, k + 1, False, s64)[1]
        far = torch.full((n, 1), f // 2, dtype=torch.int32)
        latents = torch.cat([best[:, [0, k - 1, k]], far, far * 0 - 1], 1).contiguous()
        member = reference.topk_member(
            x64, w64, b64, latents, k, s64, positive, None, None
        )  # fmt: skip
        for screened in (False, True):
            if screened and (dtype == torch.float64 or scale != "small"):
                continue  # only the CPU kernels read a screen
            screen = _screen(w) if screened else (None, None)
            args = (x, w, b, latents, k, rank_scale, positive, *screen)
            yield Answer(f"{label}{', screened' if screened else ''}", args, (member,))


def _screen(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from ..ops.topk_member import topk_screen

    return topk_screen(w)


# ---- decode and gradients ---------------------------------------------------------------------


def _decoding(scale: str) -> list[tuple[int, int, int, int]]:
    """N, K, D, F: rows on 16 bytes and odd ones, one active latent, one token."""
    if scale != "production":
        return [(7, 5, 72, 50), (5, 33, 37, 40), (1, 1, 1, 1)]
    return [(130, 33, 768, 5003), (65, 7, 1029, 300), (4, 64, 4096, 700), (1, 1, 1, 1)]


def sparse_decode(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """Repeated latents, values of 0, with and without bias, indices that lead nowhere."""
    for n, k, d, f in _decoding(scale):
        values = whole(n, k, seed=1, most=3, dtype=dtype)
        indices = _indices(n, k, f, seed=2)
        w, b = whole(f, d, seed=3, dtype=dtype), whole(d, seed=4, dtype=dtype)
        for bias in (None, b):
            v64, _, w64, b64 = _wide(values, None, w, bias)
            assert v64 is not None and w64 is not None
            out = reference.sparse_decode(v64, indices, w64, b64).to(dtype)
            label = f"{n}x{k} {f}x{d}" + ("" if bias is None else " with bias")
            yield Answer(label, (values, indices, w, bias), (out,), shifted=(0, 2))
        lost, kept = _lost(indices, f), values.double()
        kept = torch.where((lost < 0) | (lost >= f), 0.0, kept)
        out = reference.sparse_decode(kept, lost.clamp(0, f - 1), w.double(), None).to(dtype)
        yield Answer(f"{n}x{k}: indices out of range", (values, lost, w, None), (out,),
                     refused=True)  # fmt: skip


def _lost(indices: torch.Tensor, f: int) -> torch.Tensor:
    lost = indices.clone()
    lost[0, -1] = f
    if len(lost) > 1:
        lost[-1, 0], lost[-1, -1] = -1, -(2**31)
    return lost


def sparse_grad_values(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    for n, k, d, f in _decoding(scale):
        grad, w = whole(n, d, seed=1, dtype=dtype), whole(f, d, seed=3, dtype=dtype)
        indices = _indices(n, k, f, seed=2)
        out = reference.sparse_grad_values(grad.double(), indices, w.double()).to(dtype)
        yield Answer(f"{n}x{k} {f}x{d}", (grad, indices, w), (out,), shifted=(0, 2))
        lost = _lost(indices, f)
        none = (lost < 0) | (lost >= f)
        yield Answer(f"{n}x{k}: indices out of range", (grad, lost, w),
                     (torch.where(none, 0, out),), refused=True)  # fmt: skip


def _gradients(dtype: torch.dtype, scale: str) -> Iterator[tuple[str, Any, int]]:
    for n, k, d, f in [
        *_decoding(scale),
        (3000, 16, 64, 40) if scale == "production" else (40, 3, 8, 5),
    ]:
        values = whole(n, k, seed=1, most=2, dtype=dtype)
        values[:, -1] = 1
        rows, indices = whole(n, d, seed=3, most=2, dtype=dtype), _indices(n, k, f, seed=2)
        yield f"{n}x{k} {f}x{d}", (values, indices, rows), f


def sparse_grad_weight(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """Latents of every token, and such as occur in none."""
    for label, (values, indices, rows), f in _gradients(dtype, scale):
        out = reference.sparse_grad_weight(values.double(), indices, rows.double(), f).to(dtype)
        yield Answer(label, (values, indices, rows, f), (out,), shifted=(0, 2))


def sparse_grad_weight_rows(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    for label, (values, indices, rows), f in _gradients(dtype, scale):
        latents, grads = reference.sparse_grad_weight_rows(
            values.double(), indices, rows.double(), f
        )
        expected = (latents, grads.to(dtype))
        yield Answer(label, (values, indices, rows, f), expected, shifted=(0, 2))


def sparse_adam_step(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """beta1 = 1/2, beta2 = 3/4 and eps = 0 from moments of zero: the update is lr times a sign, all
    powers of two. Every format of moments, masters, lazy rows; with unit norm to a few ulps."""
    n, k, d, f = (300, 9, 264, 777) if scale == "production" else (9, 3, 136, 15)
    fp64 = dtype == torch.float64
    state = torch.float64 if fp64 else torch.float32
    for fmt in ("fp32",) if fp64 else moments.FORMATS:
        for lazy in (False, True):
            for unit in (False, True):
                masters = dtype in (torch.bfloat16, torch.float16) and lazy
                values = whole(n, k, seed=1, most=1, dtype=dtype)
                rows = whole(n, d, seed=2, most=2, dtype=dtype)
                indices = _indices(n, k, f, seed=3)
                param = whole(f, d, seed=4, most=3, dtype=dtype) / 4
                master = param.to(torch.float32) if masters else None
                zero = torch.zeros(f, d, dtype=state)
                start = moments.store(zero, zero.clone(), fmt, 1, torch.arange(f))
                numbers = (0.125, 0.5, 0.75, 2.0**-20, 0.0, 1)
                args: list[Any] = [
                    param, *start[:2], values, indices, rows, *numbers, lazy, unit, *start[2:],
                    master, None,
                ]  # fmt: skip
                written = [i for i in (0, 1, 2, 14, 15, 16) if args[i] is not None]
                truth: list[Any] = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                reference.sparse_adam_step(*truth)
                label = f"{fmt}{' lazy' * lazy}{' unit norm' * unit}{' masters' * masters}"
                yield Answer(label, tuple(args), tuple(truth[i] for i in written), tuple(written),
                             ulps=64 if unit else 4)  # fmt: skip


# ---- steering ---------------------------------------------------------------------------------


def steer(dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """Every operation, gates, slots of no one, a mask and memberships, and both norms on rows whose
    norm (or deviation) is a power of two."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    length, d, n_ops = (33, 772, 12) if scale == "production" else (3, 68, 6)
    codes = [CLAMP, MIN_CLAMP, CLAMP_IF_ACTIVE, SCALE, ADD, CLAMP] * (n_ops // 6)
    flags = [0, SIGNED, 0, RAW, 0, MEMBER] * (n_ops // 6)
    gates = [-1, 0, -1, 1, -1, n_ops - 1] * (n_ops // 6)
    code = torch.tensor([list(zip(codes, flags, gates))] * 3, dtype=torch.int32)
    code[1, 3:] = 0  # a shorter list
    slots = torch.tensor([0, 1, -1, 2], dtype=torch.int32)
    param = whole(3, n_ops, 6, seed=1, most=3, dtype=wide)
    param[..., 2] = param[..., 2].abs() + 1
    enc = whole(3, n_ops, d, seed=2, most=1, dtype=dtype)
    dec = whole(3, n_ops, d, seed=3, most=1, dtype=dtype)
    mask = whole(4, length, seed=5, most=1, dtype=torch.float32) >= 0
    member = whole(4, length, n_ops, seed=6, most=1, dtype=torch.float32) > 0
    powers = 2.0 ** whole(4, length, 1, seed=7, most=1, dtype=torch.float64)
    signs = torch.where(torch.arange(d) % 2 == 0, 1.0, -1.0).double()
    # a mean of 0 and squares that sum to 4 (D - 1), for an even D
    spread = torch.tensor([3.0, -3, 1, -1, 0, 0, *[2, -2] * (d // 2 - 3)], dtype=torch.float64)
    for norm, x in (
        (0, whole(4, length, d, seed=4, most=3, dtype=torch.float64)),
        (1, powers * spread),  # layer_norm
        (2, powers * signs),  # constant_norm: the norm of a row is its power of two
    ):
        x = x.to(dtype)
        out = torch.zeros_like(x)
        args = (x, enc, dec, param, code, slots, mask, member, norm, 0.0)
        truth = torch.empty_like(x).double()
        call: list[Any] = [*_wide(*args[:8]), norm, 0.0, truth]
        reference.steer(*call)
        yield Answer(f"norm {norm}", (*args, out), (truth.to(dtype),), (10,),
                     ulps=4 if norm else 0, shifted=(0,))  # fmt: skip


ANSWERS: dict[str, Callable[[torch.dtype, str], Iterator[Answer]]] = {
    "topk": topk,
    "topk_encode": topk_encode,
    "topk_member": topk_member,
    "sparse_decode": sparse_decode,
    "sparse_grad_values": sparse_grad_values,
    "sparse_grad_weight": sparse_grad_weight,
    "sparse_grad_weight_rows": sparse_grad_weight_rows,
    "sparse_adam_step": sparse_adam_step,
    "steer": steer,
}


def answers(op: str, design: str, dtype: torch.dtype, scale: str) -> Iterator[Answer]:
    """The known answers of an op; the design "fp8" has its own."""
    if design == "fp8":
        return topk_encode_fp8(dtype, scale)
    return ANSWERS[op](dtype, scale)
