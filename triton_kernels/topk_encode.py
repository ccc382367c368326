"""topk_encode: selection while the scores are formed; no [N, F] in memory.

"chunked": columns in chunks of a slab that stays in the L2 cache, each a product followed by a
kernel that keeps every row's k best so far. Any k, F, D and dtype. "bounded": fp32 inputs are
filtered by products of bf16 copies with a proven error bound (`_topk_encode_bounds`). "fused": the
filter in the epilogue of a persistent product (`_topk_encode_fused`), bf16 and fp16, sm_90 and
later. "hopper": that with a product in CUDA C++ (csrc/cuda/topk_encode.cu), sm_90. All select the
same. "fp8", never chosen by itself: products of fp8 copies with a
statistical margin (`_topk_encode_fp8`), which can miss a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from ._blocks import POINTERS, on_device
from ._configuration import Configuration
from ._topk_encode_bounds import BoundedKeys, round_rows
from ._topk_encode_fp8 import Fp8Rows, LikelyKeys, fp8_product, unavailable
from ._topk_encode_fused import MAX_FUSED, FusedConfig, fused_config, fused_keys
from ._topk_encode_keys import MAX_SORTED, BestKeys, MergedKeys, decode_keys
from ._topk_encode_product import Product


@dataclass(frozen=True)
class Chunks:
    """Sizes of the chunked path."""

    rows: int = 4096  # tokens per pass over W
    slab: int = 1 << 23  # scores held at once: 32 MB of fp32, of the 50 MB of L2 of an H100 or H200
    keys_bytes: int = 160 << 20  # with the slab below 256 MB
    copy_bytes: int = 32 << 20  # bf16 copies of W_enc held at once, for fp32 inputs

    def columns(self, rows: int, f: int) -> int:
        """Width of a chunk: as equal as they can be, so that every product is the same call."""
        count = triton.cdiv(f, max(1, self.slab // rows))
        return min(f, triton.cdiv(triton.cdiv(f, count), 16) * 16)


def select_chunked(
    x: torch.Tensor,  # [R, D]
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
) -> torch.Tensor:
    """Keys [R, >= k] with the k best in order in front."""
    rows, f = len(x), len(W_enc)
    columns = chunks.columns(rows, f)
    slab = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    if k <= MAX_SORTED:
        best = BestKeys(rows, k, x.device)
        _add_columns(best, slab, x, W_enc, b_enc, rank_scale)
        return best.finish()
    merged, product = MergedKeys(rows, k, columns, x.device), Product(x, W_enc)
    for first, fresh, last in _chunks_of(f, columns):
        product(slab, first)
        merged.add(slab, b_enc, rank_scale, first, fresh, last)
    return merged.keys


def _chunks_of(f: int, columns: int) -> Iterator[tuple[int, int, bool]]:
    """First column, how many of it have been seen, whether it is the last chunk."""
    for begin in range(0, f, columns):
        first = min(begin, f - columns)  # the last chunk overlaps: all have one shape
        yield first, begin - first, begin + columns >= f


def _add_columns(
    best: BestKeys,
    slab: torch.Tensor,  # [R, columns] fp32
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    only: torch.Tensor | None = None,
) -> None:
    product = Product(x, W_enc)
    for first, fresh, _ in _chunks_of(len(W_enc), slab.shape[1]):
        product(slab, first, only)
        best.add(slab, b_enc, rank_scale, first, fresh, only)


def select_fused(
    x: torch.Tensor,  # [R, D] bf16 or fp16
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
    config: FusedConfig | None = None,
    hopper: bool = False,
) -> torch.Tensor:
    """The same by the fused product; k up to MAX_FUSED. Rows that overflowed are then taken through
    the chunks, by launches that find nothing to do where there are none."""
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        capability = torch.cuda.get_device_capability(x.device)
    else:
        programs, capability = 3, (9, 0)  # interpreted: what this Triton compiles for sm_90
    config = config or fused_config(capability) or FusedConfig()
    best, overflow = fused_keys(x, W_enc, b_enc, k, rank_scale, config, programs, hopper)
    columns = chunks.columns(len(x), len(W_enc))
    slab = torch.empty(len(x), columns, dtype=torch.float32, device=x.device)
    _add_columns(best, slab, x, W_enc, b_enc, rank_scale, overflow)
    return best.finish()


def select_bounded(
    x: torch.Tensor,  # [R, D] fp32
    W_enc: torch.Tensor,  # [F, D] fp32
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
) -> torch.Tensor:
    """The same by the bounds of bf16 scores; k up to MAX_SORTED. A chunk of W_enc is copied to bf16
    just before its product."""
    (rows, d), f = x.shape, W_enc.shape[0]
    columns = chunks.columns(rows, f)
    columns = min(columns, max(16, chunks.copy_bytes // (2 * d) // 16 * 16))
    best = BoundedKeys(x, W_enc, b_enc, rank_scale, k)
    slab = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    copy = torch.empty(columns, d, dtype=torch.bfloat16, device=x.device)
    norms = torch.empty(2, columns, dtype=torch.float32, device=x.device)
    product = Product(best.rounded, copy)
    for first, fresh, _ in _chunks_of(f, columns):
        round_rows(W_enc[first : first + columns], copy, norms)
        product(slab)
        best.add(slab, norms, first, fresh)
    return best.finish()


def select_likely(
    x: torch.Tensor,  # [R, D]
    W_enc: torch.Tensor,  # [F, D]
    b_enc: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    chunks: Chunks,
) -> torch.Tensor:
    """The same by fp8 products with a statistical margin: a latent can be missed. k up to
    MAX_SORTED."""
    (rows, d), f = x.shape, W_enc.shape[0]
    columns = chunks.columns(rows, f)
    columns = min(columns, max(16, chunks.copy_bytes // d // 16 * 16))
    best = LikelyKeys(x, W_enc, b_enc, rank_scale, k)
    # Whole blocks, and none of them seen twice: what a row misses then does not depend on the
    # width of chunks, which depends on the number of rows.
    block = best.config.block
    columns = min(f, triton.cdiv(columns, block) * block)
    slab = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    copy = Fp8Rows(columns, d, x.device)
    for first in range(0, f, columns):
        some = min(columns, f - first)
        if some < columns:  # the last
            copy, slab = Fp8Rows(some, d, x.device), slab[:, :some]
        copy.round(W_enc[first : first + some])
        fp8_product(best.codes, copy, slab)
        best.add(slab, copy.norms, first, 0)
    return best.finish()


# Few launches rather than a slab in L2: where no row overflowed, all of them are empty.
_FUSED_CHUNKS = Chunks(rows=4096, slab=1 << 25)


@dataclass(frozen=True)
class Preference:
    """A design and the shapes that it is chosen for."""

    design: str
    d: int = 1  # D at least
    f_of_k: int = 1  # F at least so many times k
    named: bool = False  # only where `trusted` names it, which dispatch does for none yet


# Exact designs, the best first: the first that can run, is trusted and has the shape takes a call.
# Never by the number of tokens: designs differ in a score's bits, and a token's result must not
# depend on its neighbours. Predictions, unverified on a GPU (benchmarks/notes/topk_encode.md).
PREFERENCES = (
    # 1.07 to 1.24 of the library's product; a fault in it could hang, so it must have been checked
    Preference("hopper", named=True),
    # 1.21 to 1.5; W_enc passes once and no score is stored
    Preference("fused"),
    # fp32: bf16 products are some twenty times faster; pays unless most latents are near the k-th
    Preference("bounded", d=64, f_of_k=24),
    # any shape and dtype
    Preference("chunked"),
)
DESIGNS = tuple(p.design for p in PREFERENCES)  # exact; "fp8" must be asked for


def offered(design: str, device: torch.device) -> bool:
    """Whether a device has what a design needs: there its kernels can be checked."""
    if design == "fp8":
        return unavailable(device) is None
    if design in ("chunked", "bounded"):
        return True
    if design == "hopper" and not _has_hopper(device.type):
        return False
    if device.type != "cuda":
        return True  # interpreted
    if torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if design == "hopper":
        return capability == (9, 0)
    return fused_config(capability) is not None


def runs(design: str, x: torch.Tensor, W_enc: torch.Tensor, k: int) -> bool:
    """Whether a design can take a call. It depends on no other property of x than width, dtype and
    device. The fused products need TMA and rows of W_enc on 16 bytes."""
    if not offered(design, x.device):
        return False
    if design == "chunked":
        return True
    if design == "fp8":
        return k <= MAX_SORTED
    if design == "bounded":
        return x.dtype == torch.float32 and k <= MAX_SORTED
    aligned = x.shape[1] % 8 == 0 and W_enc.data_ptr() % 16 == 0
    return x.dtype != torch.float32 and k <= MAX_FUSED and aligned


def _has_hopper(device: str) -> bool:
    """Whether the CUDA library is loaded; tests build it for the CPU (support/cuda_host.py)."""
    op = "fastsae::topk_encode_record_cuda"
    return device in ("cuda", "cpu") and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper())
    )


def design_of(
    x: torch.Tensor, W_enc: torch.Tensor, k: int, trusted: frozenset[str] | None = None
) -> str | None:
    """Which of the designs takes a call: the first of PREFERENCES that can.

    trusted: the designs that may be used; None: all but those that have to be named. None comes
    back when no trusted design can take the call.
    """
    f, d = W_enc.shape
    for p in PREFERENCES:
        allowed = not p.named if trusted is None else p.design in trusted
        if allowed and d >= p.d and f >= p.f_of_k * k and runs(p.design, x, W_enc, k):
            return p.design
    return None


def _rows_at_once(n: int, k: int, chunks: Chunks, bounded_d: int = 0) -> int:
    """Tokens of a pass; bounded_d: D where scores are bounds, 0 where they are exact."""
    if bounded_d:
        fit = (chunks.keys_bytes - chunks.copy_bytes) // BoundedKeys.bytes_per_row(k, bounded_d)
    elif k <= MAX_SORTED:
        fit = chunks.keys_bytes // BestKeys.bytes_per_row(k)
    else:  # a chunk's keys are 8 bytes a score
        fit = (chunks.keys_bytes - 8 * chunks.slab) // MergedKeys.bytes_per_row(k)
    return max(1, min(n, chunks.rows, fit))


@triton.jit
def _selected_values_kernel(
    x_ptr,  # [R, D]
    W_ptr,  # [F, D]
    bias_ptr,  # [F] or None
    indices_ptr,  # [R, K]
    values_ptr,  # [R, K]
    K,
    D,
    RELU: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)  # of a pass, which are few
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    latent = tl.load(indices_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(W_ptr + latent[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        acc += x[None, :] * w.to(tl.float32)
    value = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + latent).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    tl.store(values_ptr + row * K + k, value.to(values_ptr.dtype.element_ty), mask=k < K)


def _selected_values(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    indices: torch.Tensor,
    values: torch.Tensor,
    relu: bool,
) -> None:
    (rows, k), d = indices.shape, x.shape[1]
    _selected_values_kernel[(triton.cdiv(k, 8), rows)](
        x, W_enc, b_enc, indices, values, k, d, RELU=relu, BLOCK_K=8, BLOCK_D=512
    )


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    relu: bool,
    rank_scale: torch.Tensor | None,
    design: str | None = None,
    trusted: frozenset[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastsae.ops.topk_encode`. No host sync; unverified on a GPU.

    design: one of DESIGNS, for tests and benchmarks, or "fp8"; None lets `design_of` choose among
    those that are trusted, and raises RuntimeError where there is none.
    """
    n = x.shape[0]
    values = x.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    if n == 0:
        return values, indices
    design = design or design_of(x, W_enc, k, trusted)
    if design is None:
        raise RuntimeError(
            f"topk_encode: none of the trusted designs ({', '.join(sorted(trusted or ()))}) can "
            f"take {x.dtype}, D = {x.shape[1]}, F = {len(W_enc)}, k = {k} on {x.device}"
        )
    if x.data_ptr() % 16:
        x = (
            x.clone()
        )  # TMA reads from 16 bytes on; not another kernel, which might sum in its order
    chunks = _FUSED_CHUNKS if design in ("fused", "hopper") else Chunks()
    select = dict(
        chunked=select_chunked, bounded=select_bounded, fused=select_fused,
        hopper=partial(select_fused, hopper=True), fp8=select_likely,
    )[design]  # fmt: skip
    if design == "fp8" and (why := unavailable(x.device)) is not None:
        raise RuntimeError(f"topk_encode: filter='fp8' cannot run: {why}")
    with on_device(x):
        step = _rows_at_once(n, k, chunks, x.shape[1] if design in ("bounded", "fp8") else 0)
        for begin in range(0, n, step):
            some = slice(begin, begin + step)
            keys = select(x[some], W_enc, b_enc, k, rank_scale, chunks)
            if rank_scale is None:
                decode_keys(keys, values[some], indices[some], relu)
            else:  # a key holds the scaled score, which the value cannot be had from
                decode_keys(keys, None, indices[some], relu)
                _selected_values(x[some], W_enc, b_enc, indices[some], values[some], relu)
    return values, indices


def configurations() -> list[Configuration]:
    """The values of ranked latents, each dtype."""
    result = []
    for pointer in POINTERS.values():
        for d in ("i32:16", "i32"):
            signature = dict(
                x_ptr=pointer, W_ptr=pointer, bias_ptr=pointer, indices_ptr="*i32",
                values_ptr=pointer, K="i32", D=d,
            )  # fmt: skip
            constants = dict(RELU=True, BLOCK_K=8, BLOCK_D=512)
            label = pointer[1:] + (" odd D" if d == "i32" else "")
            result.append(Configuration(_selected_values_kernel, label, signature, constants))
    return result
