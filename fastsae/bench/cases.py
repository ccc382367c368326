"""One case per operator: its inputs, its floor in FLOPs and bytes, its check.

The floor is what no implementation can avoid: each input read once, each result written once, and
the rows that K indices a token name (N·K·D elements) read each time they are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from .. import ops
from .._steer_codes import CLAMP
from . import checks, inputs
from .timing import WrongError

LR = 1e-4
ALL_ROWS = 1 << 34  # N·F·D up to which every row is compared with fp64; 64 rows above
SAMPLE = 64


@dataclass(frozen=True)
class Size:
    """N tokens of width D, F latents, K of them active."""

    n: int
    d: int
    f: int
    k: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.n}x{self.d}x{self.f} k={self.k}"

    def at(self, *, n: int | None = None, f: int | None = None) -> Size:
        return replace(self, n=n or self.n, f=f or self.f)

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    @property
    def pairs(self) -> int:
        """Bytes of values and indices."""
        return self.n * self.k * (self.item + 4)

    @property
    def gathered(self) -> int:
        """Bytes of the rows that the indices name."""
        return self.n * self.k * self.d * self.item


class Inputs:
    """Tensors of one size, made when a case first asks, then shared by the cases.

    On a CPU small tensors come in several sets that are used in turn, so that they are not simply
    found in the cache; on a GPU the clock flushes it.

    Args:
        size: what they are for.
        every_row: selections of every token are compared with fp64, however many there are.
    """

    def __init__(self, size: Size, every_row: bool = False) -> None:
        self.size, self.every_row = size, every_row

    def _sets(self, make: Callable[[int], Any], bytes_per_set: int) -> list[Any]:
        count = 1 if self.size.device != "cpu" else inputs.rotations(bytes_per_set, most=4)
        if bytes_per_set > inputs.CACHE_BYTES:
            count = 1
        return [make(seed) for seed in range(count)]

    def _normal(self, seed: int, columns: int) -> torch.Tensor:
        s = self.size
        return inputs.normal(s.n, columns, seed=seed, dtype=s.dtype, device=s.device)

    @cached_property
    def x(self) -> list[torch.Tensor]:
        s = self.size
        return self._sets(lambda seed: self._normal(seed, s.d), s.n * s.d * s.item)

    @cached_property
    def scores(self) -> list[torch.Tensor]:
        s = self.size
        return self._sets(lambda seed: self._normal(seed, s.f), s.n * s.f * s.item)

    @cached_property
    def w(self) -> list[torch.Tensor]:
        s = self.size
        return self._sets(
            lambda seed: inputs.unit_rows(
                s.f, s.d, seed=100 + seed, dtype=s.dtype, device=s.device
            ),
            s.f * s.d * s.item,
        )

    @cached_property
    def b(self) -> torch.Tensor:
        s = self.size
        return inputs.normal(s.f, seed=7, dtype=s.dtype, device=s.device) * 0.01

    @cached_property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        s = self.size

        def make(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = inputs.random_pairs(s.n, s.k, s.f, seed=seed, dtype=s.dtype)
            return values.to(s.device), indices.to(s.device)

        return self._sets(make, s.gathered)


@dataclass(frozen=True)
class Case:
    """`run(i)` works on the i-th set of inputs; FLOPs and bytes are the floor of one call."""

    run: Callable[[int], Any]
    check: checks.Check
    flops: float
    bytes: float


def turn(sets: list[Any], i: int) -> Any:
    return sets[i % len(sets)]


def topk_encode(size: Size, given: Inputs) -> Case:
    x, w, b, k = given.x, given.w, given.b, size.k
    few = SAMPLE if size.n * size.f * size.d > ALL_ROWS and not given.every_row else None
    return Case(
        lambda i: ops.topk_encode(turn(x, i), turn(w, i), b, k),
        checks.selection(x[0], w[0], b, k, few),
        2.0 * size.n * size.d * size.f,
        (size.n + size.f) * size.d * size.item + size.f * size.item + size.pairs,
    )


def topk_member(size: Size, given: Inputs) -> Case:
    """One latent of every token, its middle one: nothing is settled before the last latent."""
    x, w, b, k = given.x, given.w, given.b, size.k
    middle = [ops.topk_encode(x[0], rows, b, k)[1][:, k // 2 : k // 2 + 1] for rows in w]
    return Case(
        lambda i: ops.topk_member(x[0], turn(w, i), b, turn(middle, i), k),
        checks.members(x[0], w[0], b, middle[0], k, SAMPLE),
        2.0 * size.n * size.d * size.f,
        (size.n + size.f) * size.d * size.item + size.f * size.item + 5 * size.n,
    )


def topk(size: Size, given: Inputs) -> Case:
    scores, k = given.scores, size.k
    return Case(
        lambda i: ops.topk(turn(scores, i), k),
        checks.largest(scores[0], k, SAMPLE),
        0.0,
        size.n * size.f * size.item + size.pairs,
    )


def sparse_decode(size: Size, given: Inputs) -> Case:
    pairs, w = given.pairs, given.w
    return Case(
        lambda i: ops.sparse_decode(turn(pairs, i)[0], turn(pairs, i)[1], turn(w, i)),
        checks.decoded(*pairs[0], w[0], SAMPLE),
        2.0 * size.n * size.k * size.d,
        size.gathered + size.n * size.d * size.item + size.pairs,
    )


def sparse_grad_values(size: Size, given: Inputs) -> Case:
    pairs, w, grad = given.pairs, given.w, given.x
    return Case(
        lambda i: ops.sparse_grad_values(turn(grad, i), turn(pairs, i)[1], turn(w, i)),
        checks.grad_values(grad[0], pairs[0][1], w[0], SAMPLE),
        2.0 * size.n * size.k * size.d,
        size.gathered + size.n * size.d * size.item + size.pairs,
    )


def sparse_grad_weight(size: Size, given: Inputs) -> Case:
    pairs, rows, f = given.pairs, given.x, size.f

    def run(i: int) -> Any:
        values, indices = turn(pairs, i)
        return ops.sparse_grad_weight(values, indices, turn(rows, i), f)

    return Case(
        run,
        checks.grad_weight(*pairs[0], rows[0], f),
        2.0 * size.n * size.k * size.d,
        size.gathered + size.f * size.d * size.item + size.pairs,
    )


def sparse_grad_weight_rows(size: Size, given: Inputs) -> Case:
    pairs, rows, f = given.pairs, given.x, size.f
    used = len(pairs[0][1].unique())

    def run(i: int) -> Any:
        values, indices = turn(pairs, i)
        return ops.sparse_grad_weight(values, indices, turn(rows, i), f, layout="rows")

    return Case(
        run,
        checks.grad_weight(*pairs[0], rows[0], f),
        2.0 * size.n * size.k * size.d,
        size.gathered + used * (size.d * size.item + 4) + size.pairs,
    )


def sparse_adam_step(size: Size, given: Inputs) -> Case:
    pairs, rows = given.pairs, given.x
    start = given.w[0]
    param = start.clone()
    mean, square = (torch.zeros_like(start, dtype=torch.float32) for _ in range(2))

    def run(i: int) -> None:
        values, indices = turn(pairs, i)
        ops.sparse_adam_step(param, mean, square, values, indices, turn(rows, i), lr=LR, step=i + 1)

    return Case(
        run,
        checks.adam(ops.sparse_adam_step, start, *pairs[0], rows[0], LR),
        2.0 * size.n * size.k * size.d + 12.0 * size.f * size.d,
        size.gathered + 2 * size.f * size.d * (size.item + 8) + size.pairs,
    )


def steer(size: Size, given: Inputs) -> Case:
    """K latents of every token clamped at a ReLU SAE: one list, one sequence."""
    x, w, k = given.x, given.w, size.k
    wide = torch.float64 if size.dtype == torch.float64 else torch.float32
    param = torch.zeros(1, k, 6, dtype=wide, device=size.device)
    param[..., 2], param[..., 4] = 1.0, 3.0  # gain, and the target of the clamp
    code = torch.tensor([[[CLAMP, 0, -1]] * k], dtype=torch.int32, device=size.device)
    slots = torch.zeros(1, dtype=torch.int32, device=size.device)
    tables = [(rows[None, :k], rows[None, -k:]) for rows in w]

    def run(i: int) -> Any:
        enc, dec = turn(tables, i)
        return ops.steer(turn(x, i)[None], enc, dec, param, code, slots)[0]

    return Case(
        run,
        checks.clamped(x[0], tables[0][0][0], tables[0][1][0], 3.0, SAMPLE),
        4.0 * size.n * k * size.d,
        2 * (size.n + k) * size.d * size.item,
    )


CASES: dict[str, Callable[[Size, Inputs], Case]] = {
    "topk_encode": topk_encode,
    "topk": topk,
    "topk_member": topk_member,
    "sparse_decode": sparse_decode,
    "sparse_grad_values": sparse_grad_values,
    "sparse_grad_weight": sparse_grad_weight,
    "sparse_grad_weight_rows": sparse_grad_weight_rows,
    "sparse_adam_step": sparse_adam_step,
    "steer": steer,
}


def product(size: Size, given: Inputs) -> Case:
    """The unit: torch's product x @ W.T, nothing else."""
    x, w = given.x, given.w

    def check(got: Any) -> str:
        rows = checks.sample(size.n, SAMPLE).to(size.device)
        latents = slice(0, min(size.f, 1 << 15))
        truth = x[0][rows].double() @ w[0][latents].double().T
        error = (got[rows][:, latents].double() - truth).abs().max().item()
        eps = 1e-4 if size.dtype == torch.float32 else 8 * torch.finfo(size.dtype).eps
        if not error <= eps * truth.abs().max().item():
            raise WrongError(f"max error {error:.1e} is not {size.dtype} accuracy")
        return checks.note(error, len(rows), size.n)

    return Case(
        lambda i: turn(x, i) @ turn(w, i).T,
        check,
        2.0 * size.n * size.d * size.f,
        ((size.n + size.f) * size.d + size.n * size.f) * size.item,
    )


def eager(op: str, size: Size, given: Inputs) -> Callable[[int], Any] | None:
    """What one writes without fastsae, beside the ops that it makes sense for."""
    if op == "topk":
        return lambda i: torch.topk(turn(given.scores, i), size.k)
    if op == "topk_encode":

        def run(i: int) -> Any:
            scores = torch.nn.functional.linear(turn(given.x, i), turn(given.w, i), given.b)
            return scores.relu().topk(size.k, dim=-1)

        return run
    return None


def largest_tensors(op: str, size: Size) -> int:
    """Bytes that an op's inputs, results and check need, roughly: more than this is not tried."""
    weight = size.f * size.d * size.item
    if op == "topk":
        return 2 * size.n * size.f * size.item
    if op in ("product", "eager"):
        return weight + (1 if op == "product" else 2) * size.n * size.f * size.item
    if op == "sparse_adam_step":
        return 4 * weight + 4 * size.f * size.d * 4  # two of them, with the check's own moments
    return 2 * weight + size.n * size.d * size.item * 2
