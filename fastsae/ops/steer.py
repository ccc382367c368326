"""steer: edits of an activation by latents and directions, without running the SAE."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch.autograd import forward_ad

from .. import _dispatch, _library
from .._steer_codes import NORMS
from ..reference._common import acc_dtype
from ..reference.steer import edits
from . import _common
from .topk_member import Selection

_OP = "steer"
_PARAMS, _CODES = 6, 3


def steer(
    x: torch.Tensor,
    enc: torch.Tensor,
    dec: torch.Tensor,
    param: torch.Tensor,
    code: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None = None,
    member: torch.Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""Every sequence's own list of edits applied to its tokens, in one pass.

    .. math:: x' = x + s(x)^{-1} \sum_j \delta_j(x) \, d_j

    which is the SAE with activations f_j changed to f_j + delta_j and its error term kept: all that
    is not touched cancels. With u(x) the SAE's normalised input and p_j = <enc_j, u> (<enc_j, x>
    for a RAW entry, which also writes without the factor 1/s),

    .. math:: f_j = [p_j + bias_j > \theta_j] \, \max(gain_j p_j + offset_j, 0)

    (no max for a SIGNED entry; 0 where a MEMBER entry's `member` is false or not given). All f_j
    are read from the same x, the edits are summed. delta_j by opcode, v the entry's value:

    ======================  ======================================================
    CLAMP                   v - f
    MIN_CLAMP               max(v - f, 0)
    CLAMP_IF_ACTIVE         [f > 0] (v - f)
    SCALE                   (v - 1) f          (ablation is v = 0)
    ADD                     v                  (its enc row is not read: p = 0)
    PROBE                   0: only read, as another entry's gate
    END                     the list ends before this entry
    ======================  ======================================================

    times [f_gate > tau] when the entry names a gate, the position of an entry of its list (one that
    is not in the list never opens).

    Args:
        x: [B, ..., D] fp32, bf16, fp16 (fp64 on the CPU).
        enc, dec: [S, O, D] dtype of x: S lists (slots) of O entries, rows e_j and d_j. What the SAE
            subtracts from its input is folded into the bias.
        param: [S, O, 6] fp32 (fp64 for fp64): bias, theta, gain, offset, v, tau. ReLU is theta = 0,
            gain = 1, offset = bias; JumpReLU and a BatchTopK threshold set theta; Gated has all.
        code: [S, O, 3] int32: opcode, flags (RAW 1, SIGNED 2, MEMBER 4), gate or -1.
            The constants are in `fastsae._steer_codes`.
        slots: [B] int32: each sequence's list; -1 leaves it alone.
        mask: [B, ...] bool or None: tokens to edit.
        member: [B, ..., O] bool or None: is the entry's latent among its token's K selected?
        norm: "none"; "layer_norm", u = (x - mean) / (std + eps) and 1/s = std, with D - 1 degrees
            of freedom; "constant_norm", u = x sqrt(D) / |x| and 1/s = |x| / sqrt(D).

    Returns:
        The shape and dtype of x. Sums in fp32 (fp64 for fp64), rounded once; a token whose deltas
        are all zero is bit-exactly x; repeatable. A token's output does not depend on the other
        tokens and sequences of the call nor on the number of threads.

    Gradients reach x, enc, dec and param (a vector or a strength can be trained).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        RuntimeError: a slot out of range (found on the CPU; a GPU leaves such a sequence alone).

    Source: clamping as in Templeton et al. 2024, "Scaling Monosemanticity"; `constant_norm` and
    `layer_norm` as SAELens normalises activations.
    """
    if forward_ad._current_level < 0 and _common.unobserved(x, enc, dec, param):
        steered: torch.Tensor = _run(x, enc, dec, param, code, slots, mask, member, norm, eps)
        return steered
    _common.refuse_transforms(_OP, x, enc, dec, param)
    out: torch.Tensor = torch.ops.fastsae.steer(
        x, enc, dec, param, code, slots, mask, member, norm, eps
    )
    return out


def steer_(
    x: torch.Tensor,
    enc: torch.Tensor,
    dec: torch.Tensor,
    param: torch.Tensor,
    code: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None = None,
    member: torch.Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-5,
) -> torch.Tensor:
    """`steer` in place: x is contiguous and needs no gradient. Returns x."""
    _common.refuse_transforms(_OP, x, enc, dec, param)
    torch.ops.fastsae.steer_(x, enc, dec, param, code, slots, mask, member, norm, eps)
    return x


class Site:
    """The tables of `steer`, membership included, for a hook that runs at every token of a model:
    one C++ call where that can be (plain eager CPU tensors), else None, and `steer` is due.

    Between two tokens the model's weights go through the caches, so what a call touches is cold: a
    check of 2 us in a loop is one of 20 us there, and passing nine tensors to an operator takes 40.
    So an operator checks the tables once and makes an object of them, which is freed with this one.

    Tables and lists may be written to in place. The object keeps aliases of them: after
    `.data = ...` or `Module.to` it reads the memory that was there before, until another site is
    made. Memory that `share_memory_` moves is followed.

    Args:
        enc, dec, param, code, slots, norm, eps: as in `steer`, contiguous, without gradients.
        selection: the weights whose k best decide about MEMBER entries.
        wanted: [B, O] int32: the latents of each sequence's entries, -1 where membership does not
            matter. Read at every call.
        centre: [D] or None: what the SAE subtracts from x before W_enc.
    """

    def __init__(
        self,
        enc: torch.Tensor,
        dec: torch.Tensor,
        param: torch.Tensor,
        code: torch.Tensor,
        slots: torch.Tensor,
        norm: str = "none",
        eps: float = 1e-5,
        selection: Selection | None = None,
        wanted: torch.Tensor | None = None,
        centre: torch.Tensor | None = None,
    ) -> None:
        tables = (enc, dec, param, code, slots)
        _check(Arguments(enc.new_empty(len(slots), 0, enc.shape[-1]), *tables, norm=norm))
        if not all(t.is_contiguous() and not t.requires_grad for t in tables):
            raise ValueError(f"{_OP}: a site's tables must be contiguous and need no gradient")
        self._tables, self._norm, self._eps = tables, norm, eps
        self._dtype, self._device = enc.dtype, enc.get_device()
        self._sequences, self._width = len(slots), enc.shape[2]
        self.selection, self._wanted, self._centre = selection, wanted, centre
        self._make()

    def _make(self) -> None:
        self._backend = _dispatch.forced()
        self._site = self._made()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process and to these tensors' addresses."""
        own = ("_site", "_backend", "_movable", "_addresses")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make()

    def _made(self) -> Any:
        """The C++ object; None where `steer` and `topk_member` are to serve."""
        functions, selection, wanted = _library.CPU_FUNCTIONS, self.selection, self._wanted
        enc, *_, slots = self._tables
        ops: list[str] = [_OP]
        tensors: list[torch.Tensor | None] = [*self._tables, *[None] * 7]
        k, positive = 1, False
        if selection is not None:
            ops.append("topk_member")
            centre = None if self._centre is None else self._centre.detach().contiguous()
            screen = selection.screen or (None, None)
            tensors = [*self._tables, wanted, centre, *selection.weights, *screen]
            k, positive = selection.k, selection.positive
            # an SAE that normalises, or of another dtype, selects by operators
            floats = [t for t in (centre, *selection.weights) if t is not None]
            if self._norm != "none" or any(t.dtype != enc.dtype for t in floats):
                return None
        given = [t for t in tensors if t is not None]
        if (
            functions is None
            or not len(slots)
            or any(t.device != enc.device or t.is_neg() for t in given)
            or any(_dispatch.backend_of(op, enc) != "cpu" for op in ops)
        ):
            return None
        # Aliases, whose memory no `.data = ...` takes away. share_memory_ moves that of all tables
        # or of the whole SAE at once: two addresses tell.
        kept = [None if t is None else t.detach() for t in tensors]
        table = enc.detach()
        self._movable = table, table if selection is None else selection.weights[0]
        self._addresses = [t.data_ptr() for t in self._movable]
        tables, members = kept[:5], kept[5:]
        return functions.owned(
            torch.ops.fastsae._steer_site(
                *tables, NORMS.index(self._norm), self._eps, *members, k, positive
            )
        )

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """x steered; None where that is left to `steer`: another kind of call, or so many tokens
        that membership is better found by selecting."""
        shape = x.shape
        if (
            self._site is None
            or torch._C._is_tracing()
            or type(x) not in _common.PLAIN
            or x.dtype is not self._dtype
            or not x.is_contiguous()
            or (x.requires_grad and torch.is_grad_enabled())
            or len(shape) < 2
            or shape[0] != self._sequences
            or shape[-1] != self._width
            or x.get_device() != self._device
            or x.is_neg()
            or torch._C._len_torch_dispatch_stack()
            or forward_ad._current_level >= 0
            or _dispatch.forced() is not self._backend
            or not (mask is None or self._flags(mask, shape[:-1]))
        ):
            return None
        try:
            data = x.data_ptr()
        except RuntimeError:  # wrapped by a transform
            return None
        if not data:  # no tokens
            return None
        table, weights = self._movable
        if table.data_ptr() != self._addresses[0] or weights.data_ptr() != self._addresses[1]:
            self._site = self._made()
        out = torch.empty_like(x)
        flags = 0 if mask is None else mask.data_ptr()
        tokens = x.numel() // self._width
        functions = _library.CPU_FUNCTIONS
        return out if functions.steer(self._site, data, flags, tokens, out.data_ptr()) else None

    def _flags(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
        return tensor.is_contiguous() and _flags(tensor, shape, self._device)


class Arguments(NamedTuple):
    """Of `steer` and `steer_`."""

    x: torch.Tensor
    enc: torch.Tensor
    dec: torch.Tensor
    param: torch.Tensor
    code: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None = None
    member: torch.Tensor | None = None
    norm: str = "none"
    eps: float = 1e-5


def _check(a: Arguments) -> None:
    x, enc, dec, param, code, slots, mask, member, norm, _ = a
    tokens, table, dtype, device = x.shape, enc.shape, x.dtype, x.get_device()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fits = (  # the common case in 2 us: this runs for every token that a model generates
        len(table) == 3
        and dec.shape == table
        and len(tokens) > 1
        and tokens[-1] == table[2]
        and table[0] > 0
        and table[1] > 0
        and param.shape == (table[0], table[1], _PARAMS)
        and code.shape == (table[0], table[1], _CODES)
        and slots.shape == tokens[:1]
        and dtype in _common.FLOATS
        and enc.dtype == dtype
        and dec.dtype == dtype
        and param.dtype == wide
        and code.dtype == torch.int32
        and slots.dtype == torch.int32
        and enc.get_device() == device
        and dec.get_device() == device
        and param.get_device() == device
        and code.get_device() == device
        and slots.get_device() == device
        and (mask is None or _flags(mask, tokens[:-1], device))
        and (member is None or _flags(member, (*tokens[:-1], table[1]), device))
        and norm in NORMS
    )
    if not fits:
        _refuse(a, wide)


def _flags(tensor: torch.Tensor, shape: tuple[int, ...], device: int) -> bool:
    fits = tensor.shape == shape and tensor.dtype == torch.bool
    return fits and tensor.get_device() == device


def _refuse(a: Arguments, wide: torch.dtype) -> NoReturn:
    """Says what does not fit."""
    x, enc, dec, param, code, slots, mask, member, norm, _ = a
    _common.check_floats(_OP, x=x, enc=enc, dec=dec)
    if enc.dim() != 3 or enc.shape != dec.shape or enc.numel() == 0:
        raise ValueError(
            f"{_OP}: enc {_common.shape(enc)} and dec {_common.shape(dec)} must be [S, O, D] with "
            "a slot and an entry"
        )
    n_slots, n_ops, D = enc.shape
    if x.dim() < 2 or x.shape[-1] != D:
        raise ValueError(f"{_OP}: x must be [B, ..., D] with D = {D}, got {_common.shape(x)}")
    for name, tensor, shape, dtype in (
        ("param", param, (n_slots, n_ops, _PARAMS), wide),
        ("code", code, (n_slots, n_ops, _CODES), torch.int32),
        ("slots", slots, x.shape[:1], torch.int32),
        ("mask", mask, x.shape[:-1], torch.bool),
        ("member", member, (*x.shape[:-1], n_ops), torch.bool),
    ):
        if tensor is None:
            continue
        if tensor.shape != torch.Size(shape):
            raise ValueError(
                f"{_OP}: {name} must be {list(shape)} for x {_common.shape(x)} and tables "
                f"{_common.shape(enc)}, got {_common.shape(tensor)}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{_OP}: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device} and x on {x.device}")
    raise ValueError(f"{_OP}: norm must be one of {', '.join(NORMS)}, got {norm!r}")


def _launch(a: Arguments, x: torch.Tensor, out: torch.Tensor) -> None:
    """Contiguous x into `out`, which may be x."""
    _, enc, dec, param, code, slots, mask, member, norm, eps = a
    _dispatch.select(_OP, x)(
        x,
        enc.contiguous(),
        dec.contiguous(),
        param.contiguous(),
        code.contiguous(),
        slots.contiguous(),
        None if mask is None else mask.contiguous(),
        None if member is None else member.contiguous(),
        NORMS.index(norm),
        eps,
        out,
    )


def _compute(a: Arguments) -> torch.Tensor:
    x = a.x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _launch(a, x, out)
    return out


def _fake(a: Arguments) -> torch.Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Through the definition: edits are few rows a token, and training through them is rare."""
    saved = ctx.saved_tensors
    _common.refuse_double_backward(_OP, (grad, *saved))
    leaves = [t.detach().requires_grad_(n) for t, n in zip(saved[:4], ctx.needs_input_grad)]
    mask, member = (None if t is None else t.flatten(0, -1 - i) for i, t in enumerate(saved[6:]))
    (x, enc, dec, param), (code, slots) = leaves, saved[4:6]
    with torch.enable_grad():
        rows = _common.flat(x).to(acc_dtype(x.dtype))
        # of the sum: a strength of 0, which touches nothing, is where training one begins
        moved, _ = edits(rows, enc, dec, param, code, slots, mask, member, ctx.norm, ctx.eps)
        out = rows + moved
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, _common.flat(grad).to(out.dtype)))
    return *(next(found) if t.requires_grad else None for t in leaves), *[None] * 6


def _autocast(a: Arguments) -> Arguments:
    return a._replace(x=a.x.to(a.enc.dtype))


def _check_in_place(a: Arguments) -> None:
    _check(a)
    if not a.x.is_contiguous():
        raise ValueError(f"{_OP}: x is written in place and must be contiguous")


def _compute_in_place(a: Arguments) -> None:
    if a.x.numel():
        _launch(a, a.x, a.x)


_run = _common.register(
    _OP, Arguments, check=_check, compute=_compute, fake=_fake, autocast=_autocast,
    backward=_backward, setup_context=_setup_context,
)  # fmt: skip
_run_ = _common.register(_OP + "_", Arguments, check=_check_in_place, compute=_compute_in_place)
