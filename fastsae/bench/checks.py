"""Whether a result is right: every check compares with fp64, raises WrongError or returns a note.

Rows (tokens, or latents for weight gradients) are sampled where all of them would take long; the
note says how many were looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..reference import moments
from .timing import WrongError

Check = Callable[..., str]
SLAB = 1 << 27  # elements of an fp64 copy made at a time


def sample(n: int, most: int) -> torch.Tensor:
    """At most `most` of n rows: the first, the last, and evenly between."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long().unique()


def _within(error: float, bound: float) -> None:
    if not error <= bound:  # NaN is an error too
        raise WrongError(f"off by {error:.1e}, {bound:.1e} is allowed")


def _shaped(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise WrongError(f"the result is {list(tensor.shape)}, not {list(shape)}")
    return tensor


def note(error: float, looked: int, of: int, what: str = "rows") -> str:
    return f"max error {error:.1e}" + (f", {looked} of {of} {what}" if looked < of else "")


def fp64_top(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted indices of the fp64 top k per row, and the k-th value; in slabs of both sides."""
    indices, kth = [], []
    step = max(k, SLAB // w.shape[1])
    for rows in x.double().split(256):
        best = rows.new_empty(len(rows), 0)
        where = torch.empty(len(rows), 0, dtype=torch.int64, device=x.device)
        for begin in range(0, len(w), step):
            pre = rows @ w[begin : begin + step].double().T
            if b is not None:
                pre += b[begin : begin + step].double()
            top = pre.topk(min(k, pre.shape[1]), dim=-1)
            both = torch.cat([best, top.values], 1)
            best, order = both.topk(min(k, both.shape[1]), dim=-1)
            where = torch.cat([where, top.indices + begin], 1).gather(1, order)
        indices.append(where.sort(dim=-1).values)
        kth.append(best[:, -1])
    return torch.cat(indices), torch.cat(kth)


def selection(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, k: int, most: int | None = None
) -> Check:
    """A check of topk_encode's (values, indices); the fp64 truth is computed once.

    A row is wrong when a selected pre-activation falls short of the fp64 k-th best by more than
    rounding, `roundings` times over where scores are kept in x's dtype. The note counts the rows
    with exactly the fp64 set.
    """
    n, f = len(x), len(w)
    picked = sample(n, most or n).to(x.device)
    truth: list[torch.Tensor] = []

    def check(result: Any, roundings: int = 1) -> str:
        rows = x[picked]
        if not truth:
            truth.extend(fp64_top(rows, w, b, k))
        best, kth = truth
        values, indices = (_shaped(t, n, k)[picked] for t in result[:2])
        indices = indices.long()
        if indices.min() < 0 or indices.max() >= f:
            raise WrongError("an index is out of range")
        exact = (indices.sort(dim=-1).values == best).all(dim=-1)
        eps = torch.finfo(x.dtype).eps
        for i in (~exact).nonzero().squeeze(1).tolist():
            row, chosen = rows[i].double(), w[indices[i]].double()
            pre = chosen @ row
            if b is not None:
                pre += b[indices[i]].double()
            # rounding of a fp32 dot product of D terms, relative to the terms' own size
            slack = 8 * torch.finfo(torch.float32).eps * float((chosen.abs() @ row.abs()).max()) + (
                roundings * eps * float(kth[i].abs()) if x.dtype != torch.float32 else 0.0
            )
            if len(set(indices[i].tolist())) < k or not pre.min() >= kth[i] - slack:
                raise WrongError(
                    f"row {int(picked[i])} misses a better latent by {kth[i] - pre.min():.2e}"
                )
        few = slice(0, 64)
        pre = torch.einsum("nd,nkd->nk", rows[few].double(), w[indices[few]].double())
        if b is not None:
            pre += b[indices[few]].double()
        error = (values[few].double() - pre.relu()).abs().max().item()
        if not error <= 64 * eps * max(1.0, pre.abs().max().item()):
            raise WrongError(f"values are off by {error:.1e}")
        sampled = "" if len(picked) == n else f", {len(picked)} of {n} looked at"
        return f"{int(exact.sum())}/{len(picked)} rows exact{sampled}"

    return check


def members(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    latents: torch.Tensor,
    k: int,
    most: int = 64,
) -> Check:
    """A check of topk_member's [N, J]; at the k-th best, to rounding, either is right."""
    n, j = latents.shape
    picked = sample(n, most).to(x.device)

    def check(got: Any) -> str:
        rows, wanted = x[picked].double(), latents[picked].long()
        kth = fp64_top(x[picked], w, b, k)[1][:, None]
        pre = torch.einsum("nd,njd->nj", rows, w[wanted].double())
        if b is not None:
            pre += b[wanted].double()
        slack = 64 * torch.finfo(torch.float32).eps * pre.abs().amax(1, keepdim=True).clamp(min=1)
        wrong = (_shaped(got, n, j)[picked] != (pre >= kth)) & ((pre - kth).abs() > slack)
        if wrong.any():
            raise WrongError(f"{int(wrong.sum())} of {wrong.numel()} memberships are wrong")
        return f"{len(picked)} of {n} rows" if len(picked) < n else f"{n} rows exact"

    return check


def largest(x: torch.Tensor, k: int, most: int = 32) -> Check:
    """A check of topk's (values, indices); whether ties come in the canonical order is noted."""
    picked = sample(len(x), most).to(x.device)

    def check(result: Any) -> str:
        values, indices = (_shaped(t, len(x), k)[picked] for t in result[:2])
        truth = x[picked].double().sort(dim=1, descending=True, stable=True)
        if not torch.equal(values.double(), truth.values[:, :k]):
            raise WrongError("values are not the k largest, in order")
        same = torch.equal(indices.long(), truth.indices[:, :k])
        return "canonical" if same else "ties in another order"

    return check


def decoded(values: torch.Tensor, indices: torch.Tensor, w: torch.Tensor, most: int = 64) -> Check:
    """A check of sparse_decode's output."""
    n, d = len(values), w.shape[1]
    picked = sample(n, most).to(w.device)

    def check(got: Any) -> str:
        chosen = w[indices[picked].long()].double()
        truth = torch.einsum("nk,nkd->nd", values[picked].double(), chosen)
        error = (_shaped(got, n, d)[picked].double() - truth).abs().max().item()
        _within(error, 32 * torch.finfo(w.dtype).eps * max(1.0, truth.abs().max().item()))
        return note(error, len(picked), n)

    return check


def clamped(
    x: torch.Tensor, enc: torch.Tensor, dec: torch.Tensor, target: float, most: int = 64
) -> Check:
    """A check of steer's output: the latents of `enc` [O, D] at a ReLU SAE, clamped to `target`."""
    n, d = x.shape
    picked = sample(n, most).to(x.device)

    def check(got: Any) -> str:
        rows = x[picked].double()
        truth = rows + (target - (rows @ enc.double().T).relu()) @ dec.double()
        error = (_shaped(got, n, d)[picked].double() - truth).abs().max().item()
        _within(error, 32 * torch.finfo(x.dtype).eps * max(1.0, truth.abs().max().item()))
        return note(error, len(picked), n)

    return check


def grad_values(
    grad: torch.Tensor, indices: torch.Tensor, w: torch.Tensor, most: int = 64
) -> Check:
    """A check of sparse_grad_values' output."""
    n, k = indices.shape
    picked = sample(n, most).to(w.device)

    def check(got: Any) -> str:
        chosen = w[indices[picked].long()].double()
        truth = torch.einsum("nd,nkd->nk", grad[picked].double(), chosen)
        error = (_shaped(got, n, k)[picked].double() - truth).abs().max().item()
        _within(error, 32 * torch.finfo(w.dtype).eps * max(1.0, truth.abs().max().item()))
        return note(error, len(picked), n)

    return check


def _some_latents(indices: torch.Tensor, f: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The busiest, the median and the rarest latents (16 each), and all latents' counts."""
    counts = torch.bincount(indices.flatten().long(), minlength=f)
    order = counts.argsort(descending=True, stable=True)
    return torch.cat([order[:16], order[f // 2 :][:16], order[-16:]]).unique(), counts


def _true_row(
    latent: int, values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    where = indices == latent
    tokens = where.any(1)
    return (values * where).sum(1)[tokens].double() @ rows[tokens].double()


def grad_weight(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, f: int) -> Check:
    """A check of a dense weight gradient, or of (latents, grads)."""
    some, counts = _some_latents(indices, f)

    def check(got: Any) -> str:
        if isinstance(got, tuple):
            latents, grads = got
            if not torch.equal(latents.long(), counts.nonzero().squeeze(1)):
                raise WrongError("the latents are not those that occur")
            place = torch.full((f,), -1, device=rows.device)
            place[latents.long()] = torch.arange(len(latents), device=rows.device)
            zero = grads.new_zeros(1, grads.shape[1])
            got = torch.cat([grads[place[some].clamp(min=0)], zero])
            got = got[torch.where(place[some] < 0, len(some), torch.arange(len(some)).to(place))]
        else:
            got = _shaped(got, f, rows.shape[1])[some]
        worst = 0.0
        for i, latent in enumerate(some.tolist()):
            truth = _true_row(latent, values, indices, rows)
            error = (got[i].double() - truth).abs().max().item()
            terms = max(1.0, float(counts[latent]) ** 0.5) * rows.abs().max().item()
            _within(error, 16 * torch.finfo(rows.dtype).eps * terms)
            worst = max(worst, error)
        return note(worst, len(some), f, "latents")

    return check


def fresh_moments(param: torch.Tensor, fmt: str) -> moments.Moments:
    """Zeros."""
    zeros = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
    latents = torch.arange(len(param), device=param.device)
    return moments.store(zeros, zeros.clone(), fmt, 1, latents)


def adam(
    step: Callable[..., Any],
    param: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    fmt: str = "fp32",
) -> Check:
    """A check of `step(param, exp_avg, exp_avg_sq, values, indices, rows, lr=, step=1)`, with the
    scales of 8-bit moments.

    One dense step from fresh moments in format `fmt`, against torch.optim.Adam in fp64 on the same
    gradient. The weights are as exact in every format, which rounds what it keeps.
    """
    some, _ = _some_latents(indices, len(param))
    start = param[some].double()

    def check(_: Any) -> str:
        got = param.clone()
        state = fresh_moments(param, fmt)
        step(
            got, *state[:2], values, indices, rows, lr=lr, step=1,
            exp_avg_scale=state[2], exp_avg_sq_scale=state[3],
        )  # fmt: skip
        truth = start.clone().requires_grad_()
        truth.grad = torch.stack([_true_row(i, values, indices, rows) for i in some.tolist()])
        # the sign of a gradient that is rounding alone is anybody's: such elements move by lr
        decided = truth.grad.abs() > 1e-5 * truth.grad.abs().max()
        decided |= truth.grad == 0
        mean = (moments.load(state)[0][some].double() - 0.1 * truth.grad).abs().max().item()
        step_of = {"fp32": 1e-4, "bf16": 2.0**-7, "8bit": 2.0 / 127}[fmt]  # of the largest
        _within(mean, step_of * 0.1 * truth.grad.abs().max().item())
        torch.optim.Adam([truth], lr=lr).step()
        error = ((got[some].double() - truth.detach()).abs() * decided).max().item()
        slack = 0.0 if param.dtype == torch.float32 else torch.finfo(param.dtype).eps
        # fp32 rounds the weight itself when it is stored
        slack += torch.finfo(torch.float32).eps
        _within(error, 0.02 * lr + slack * start.abs().max().item())
        return note(error, len(some), len(param), "latents")

    return check
