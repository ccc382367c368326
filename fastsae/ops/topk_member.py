"""topk_member: is a latent among the k that topk_encode selects?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _dispatch
from .._memory import advise_huge_pages
from .._stamp import stamp
from . import _common

_OP = "topk_member"

_SCREEN_ROWS = 4096  # quantised at a time, in fp64
_PARTS = 254  # of a step: what the second codes count
_LARGEST = 2.0**60  # rows whose fp32 sums cannot overflow before they cancel; of x too, in C++


def topk_member(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    latents: torch.Tensor,
    k: int,
    rank_scale: torch.Tensor | None = None,
    positive: bool = False,
    screen: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""Membership of single latents among a token's k best.

    .. math:: member_{nj} = |\{i : s_{ni} \succ s_{n, latents_{nj}}\}| < k, \quad
        s_n = rank\_scale \odot (W_{enc} x_n + b_{enc})

    in the canonical order of `topk_encode` (value descending, ties by lowest index, NaN first).
    On a CPU tokens are answered by counting, which stops at k, so that most latents that are not
    selected cost a part of one pass over W_enc; where many tokens stay undecided, by `topk_encode`
    of those. On a GPU by `topk_encode` of all: one pass over W_enc, and the answer is that of
    `topk_encode` to the bit, however many tokens there are. [N, F] is never allocated.

    Args:
        x: [..., D]; W_enc: [F, D]; b_enc: [F] or None; rank_scale: [F] or None: as in
            `topk_encode`. fp32, bf16, fp16 (fp64 on the CPU).
        latents: [..., J] int32 or int64 in [-1, F); -1 is no latent, and no member.
        k: 1 <= k <= F.
        positive: a latent whose pre-activation is <= 0 counts as no member (its activation after
            ReLU is 0 either way). That settles it from its own row.
        screen: `topk_screen(W_enc)`, of this very W_enc: the C++ kernels then read a quarter of the
            bytes of fp32 weights, with the same result. Other backends do not look at it.

    Returns:
        [..., J] bool. Exact up to the rounding of fp32 scores (fp64 for fp64): where two scores are
        closer than that, `topk_encode` of another backend may choose the other; of the same
        backend and device it chooses as this op says. A token's members do not depend on the other
        tokens of the call nor on the number of threads. No gradient.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        RuntimeError: a latent out of range (found on the CPU; on a GPU it is no member).

    Source: the counting form of TopK membership; the activation is Gao et al. 2024's.
    """
    codes, bounds = (None, None) if screen is None else screen
    if _common.unobserved(x, W_enc):
        member: torch.Tensor = _run(
            x, W_enc, b_enc, latents, k, rank_scale, positive, codes, bounds
        )
        return member
    _common.refuse_transforms(_OP, x, W_enc, b_enc, latents)
    out: torch.Tensor = torch.ops.fastsae.topk_member(
        x, W_enc, b_enc, latents, k, rank_scale, positive, codes, bounds
    )
    return out


class Selection:
    """The weights of `topk_member` with their screen, for a hook that runs at every token.

    W_enc must not be written to (`stamp` is that of the weights that the screen is of): that
    needs another one.
    """

    def __init__(
        self,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor | None,
        k: int,
        rank_scale: torch.Tensor | None = None,
        positive: bool = False,
    ) -> None:
        # for the C++ kernels, where they are chosen; the others do not look at it
        screened = W_enc.device.type == "cpu" and W_enc.dtype != torch.float64
        self.screen = topk_screen(W_enc) if screened else None
        none = W_enc.new_empty(0, W_enc.shape[1])
        no_latents = none.new_empty(0, 1, dtype=torch.int32)
        rest = (no_latents, k, rank_scale, positive, *(self.screen or ()))
        _check(Arguments(none, W_enc, b_enc, *rest))
        self.W_enc, self.stamp = W_enc, stamp(W_enc)
        b_enc, rank_scale = (
            None if t is None else t.detach().contiguous() for t in (b_enc, rank_scale)
        )
        self.weights = (W_enc.detach().contiguous(), b_enc, rank_scale)
        self.k, self.positive = k, positive

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.stamp = stamp(self.W_enc)  # a copy counts its writes anew

    def __call__(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """x [P, ..., D], latents [P, J] int32, a list for each of the P: [P, ..., J] bool."""
        W_enc, b_enc, rank_scale = self.weights
        lists = spread(latents, x)
        return topk_member(x, W_enc, b_enc, lists, self.k, rank_scale, self.positive, self.screen)


def spread(latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Lists [P, J] of x [P, ..., D] as a list for each token, [P, ..., J]."""
    lists = latents.view(len(latents), *[1] * (x.dim() - 2), -1)
    return lists.expand(*x.shape[:-1], -1)


def topk_screen(W_enc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""int8 codes of W_enc's rows in two parts, and what they leave out, for `topk_member`.

    .. math:: | step_i \langle codes_{0i}, x \rangle - \langle w_i, x \rangle |
        \le margin_i |x|, \quad
        | step_i \langle codes_{0i} + codes_{1i} / 254, x \rangle - \langle w_i, x \rangle |
        \le fine_i |x|

    hold for every x, with the rounding of fp32 sums on both sides in the margins.

    Args:
        W_enc: [F, D] fp32, bf16 or fp16.

    Returns:
        codes [2, F, D] int8 and bounds [4, F] fp32: step, margin, fine, and size, which is at least
        the norm of either approximation. A row that is not finite or larger than 2^60 has margins
        inf: it is always scored from W_enc.
    """
    _common.check_floats(_OP, W_enc=W_enc)
    _check_weights(W_enc)
    if W_enc.dtype == torch.float64:
        raise TypeError(f"{_OP}: a screen bounds fp32 scores; fp64 weights need none")
    F, D = W_enc.shape
    codes = advise_huge_pages(torch.empty(2, F, D, dtype=torch.int8, device=W_enc.device))
    bounds = torch.empty(4, F, dtype=torch.float32, device=W_enc.device)
    rounding = 2.0 * (D + 32) * 2.0**-23
    for i in range(0, F, _SCREEN_ROWS):
        w = W_enc.detach()[i : i + _SCREEN_ROWS].double()
        step = (w.abs().amax(1) / 127).to(torch.float32)
        exact_step = step.double()[:, None]
        unit = exact_step.clamp(min=2.0**-149)
        code = (w / unit).round().clamp(-127, 127).nan_to_num(0.0)
        left = w - code * exact_step
        rest = (left / unit * _PARTS).round().clamp(-127, 127).nan_to_num(0.0)
        finer = left - rest * exact_step / _PARTS
        norm, off, fine_off = w.norm(dim=1), left.norm(dim=1), finer.norm(dim=1)
        size = norm + off + fine_off

        def up(bound: torch.Tensor, known: torch.Tensor = size <= _LARGEST) -> torch.Tensor:
            # tiny rows: squares that underflow in fp32 scores, steps that are subnormal
            bound = (bound * (1 + 2.0**-20)).to(torch.float32)
            return torch.where(known, bound * (1 + 2.0**-20) + 2.0**-100, torch.inf)

        rows = slice(i, i + len(w))
        codes[0, rows], codes[1, rows] = code.to(torch.int8), rest.to(torch.int8)
        bounds[0, rows] = step.nan_to_num(0.0, 0.0, 0.0)
        bounds[1, rows] = up(off + rounding * (norm + off))
        bounds[2, rows] = up(fine_off + rounding * (norm + off))
        bounds[3, rows] = up(size)
    return codes, bounds


def _check_weights(W_enc: torch.Tensor) -> None:
    _common.check_matrix(_OP, "W_enc", W_enc, "[F, D]")
    if W_enc.shape[1] == 0:
        raise ValueError(f"{_OP}: W_enc must have D >= 1, got {_common.shape(W_enc)}")


class Arguments(NamedTuple):
    """Of `topk_member`."""

    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor | None
    latents: torch.Tensor
    k: int
    rank_scale: torch.Tensor | None = None
    positive: bool = False
    codes: torch.Tensor | None = None
    bounds: torch.Tensor | None = None


def _check(a: Arguments) -> None:
    x, W_enc, latents = a.x, a.W_enc, a.latents
    _common.check_floats(_OP, x=x, W_enc=W_enc, b_enc=a.b_enc, rank_scale=a.rank_scale)
    _check_weights(W_enc)
    F, D = W_enc.shape
    _common.check_last(_OP, "x", x, D, "D")
    _common.check_vector(_OP, "b_enc", a.b_enc, F, "F")
    _common.check_vector(_OP, "rank_scale", a.rank_scale, F, "F")
    _common.check_indices(_OP, latents, x, "x", "latents")
    if latents.dim() < 1 or latents.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{_OP}: latents {_common.shape(latents)} must be [..., J] with the leading dimensions "
            f"of x {_common.shape(x)}"
        )
    if F >= 2**31 or not 1 <= a.k <= F:
        raise ValueError(f"{_OP}: k must lie in [1, {F}] (F), got {a.k}")
    if a.codes is None and a.bounds is None:
        return
    if x.dtype == torch.float64:
        raise TypeError(f"{_OP}: a screen bounds fp32 scores; fp64 takes none")
    for name, part, size, dtype in (
        ("codes", a.codes, (2, F, D), torch.int8),
        ("bounds", a.bounds, (4, F), torch.float32),
    ):
        if part is None or part.shape != size or part.dtype != dtype or part.device != x.device:
            raise ValueError(
                f"{_OP}: the screen's {name} do not fit; make it by topk_screen(W_enc)"
            )


def _compute(a: Arguments) -> torch.Tensor:
    x, W_enc, b_enc, latents, k, rank_scale, positive, codes, bounds = a
    F = W_enc.shape[0]
    if latents.dtype == torch.int64:
        # clamped, not wrapped: a latent that int32 cannot hold stays out of range
        latents = latents.clamp(-2, F).to(torch.int32)
    wanted = _common.flat(latents)
    out: torch.Tensor = _dispatch.select(_OP, x)(
        x.contiguous(),
        W_enc.contiguous(),
        None if b_enc is None else b_enc.contiguous(),
        wanted,
        k,
        None if rank_scale is None else rank_scale.contiguous(),
        positive,
        None if codes is None else codes.contiguous(),
        None if bounds is None else bounds.contiguous(),
    )
    return _common.unflat(out, latents)


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty(a.latents.shape, dtype=torch.bool)


_run = _common.register(_OP, Arguments, check=_check, compute=_compute, fake=_fake)
