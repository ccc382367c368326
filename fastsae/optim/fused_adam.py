"""FusedAdam: Adam that trains an SAE's weights without ever holding their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adam import adam as torch_adam

from .._memory import advise_huge_pages
from ..ops import _factors
from ..ops._factors import Factor
from ..ops.sparse_adam_step import sparse_adam_step
from ..ops.sparse_grad_weight import sparse_grad_weight

_UNIT_NORM = "_fastsae_unit_norm"


def set_unit_norm(param: torch.Tensor, value: bool = True) -> None:
    """Marks a [F, D] parameter whose rows `FusedAdam` keeps at norm 1.

    The mark is an attribute of the parameter object; `fastsae.nn` modules set it again on the
    parameters that deepcopy, `.to` or `load_state_dict(assign=True)` create.
    """
    setattr(param, _UNIT_NORM, value)


def has_unit_norm(param: torch.Tensor) -> bool:
    """Whether `set_unit_norm` marked this parameter."""
    return bool(getattr(param, _UNIT_NORM, False))


class FusedAdam(torch.optim.Optimizer):
    """`torch.optim.Adam` for SAEs; gradients of the sparse ops' weights exist only as factors.

    While it lives, it owns every 2-D parameter it was given: the backward passes of
    `fastsae.ops.topk_encode` and `sparse_decode` record (values, indices, rows) of such a weight
    instead of forming [F, D], and `step()` forms each gradient row, applies Adam to it and drops
    it, in one pass over weight and moments (`fastsae.ops.sparse_adam_step`). Several backward calls
    before a step add up. Everything that arrives in `p.grad` (biases, other layers, any weight
    under torch.compile) takes an ordinary Adam step; a weight with both gets their sum. A parameter
    without either is skipped, as in torch.

        sae = fastsae.nn.TopKSAE(768, 24576, 32)
        opt = fastsae.optim.FusedAdam(sae.parameters(), lr=1e-3)
        for x in batches:
            loss = (sae(x) - x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()

    Equal to `torch.optim.Adam` to rounding, plus the projection where a parameter is marked by
    `set_unit_norm` (there the gradient's component along the row is removed first, so weight decay
    has no effect, and rows have norm 1 afterwards).

    Args:
        params: parameters or groups. Options per group: lr, betas, eps, weight_decay, lazy.
        lr: a float; learning-rate schedulers work.
        weight_decay: L2 as in `torch.optim.Adam`, not decoupled.
        lazy: rows of latents that did not occur since the last step keep their moments and stay
            put (`torch.optim.SparseAdam`); a dense gradient in `p.grad` still moves every row.
        process_group: exact data parallelism. Ranks exchange factors and average ordinary
            gradients in `step()`, so the step is that of the whole batch with the loss averaged
            over ranks, as under DDP; every rank must step together, starting from equal weights.
            Do not wrap the module in DistributedDataParallel as well: its hooks would wait for
            gradients that never come (`fastsae.nn` modules refuse this).

    Moments are fp32 (fp64 for fp64) also for bf16 and fp16 parameters. `state_dict()` has the
    layout of `torch.optim.Adam`, and either loads the other's. The newest optimizer owns a
    parameter; stepping an older one raises. When it is collected, or on `release()`, parameters get
    ordinary gradients again. What works on gradients before the optimizer does not see recorded
    factors: `clip_grad_norm_` leaves them as they are, hooks on an owned weight do not run,
    `torch.autograd.grad` refuses it as unused, and a `GradScaler` is refused by `step()`.
    `zero_grad()` of this optimizer or of a `fastsae.nn` module discards factors; that of a module
    around it, and `p.grad = None`, do not.

    Raises:
        ValueError, TypeError: an option or parameter does not fit.
        RuntimeError: at `step()`, a recorded tensor was modified in place after backward, another
            FusedAdam took a parameter over, or a GradScaler drives the step.
    """

    # GradScaler.step then hands its scale over instead of touching p.grad alone: see `step`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lazy: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group = process_group
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lazy": lazy,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._track()

    # -- ownership ----------------------------------------------------------------------------

    def _track(self) -> None:
        self._sinks: list[tuple[weakref.ref[torch.Tensor], list[Factor]]] = []
        self._finalizer = weakref.finalize(self, _release, self._sinks)
        for group in self.param_groups:
            self._own(group)

    def _own(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.dim() != 2 or not param.is_floating_point():
                continue
            _factors.disown(param)  # the newest optimizer owns
            _factors.own(param)
            sink = _factors.factors(param)
            assert sink is not None
            self._sinks.append((weakref.ref(param), sink))

    def release(self) -> None:
        """Gives every owned parameter ordinary gradients again; recorded factors are dropped."""
        _release(self._sinks)
        self._sinks.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group that is refused leaves the optimizer as it was."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if "_sinks" in self.__dict__:  # the constructor owns once all groups are accepted
            self._own(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_sinks" not in self.__dict__:  # unpickled or deep-copied: new parameters, new owner
            self._track()
            self.__dict__.setdefault("process_group", None)

    # -- the optimizer ------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears `p.grad` and the recorded factors."""
        super().zero_grad(set_to_none)
        for _, sink in self._sinks:
            sink.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads its own or `torch.optim.Adam`'s state; moments keep the precision they came in.

        Raises:
            ValueError: the state is of a variant that this is not (amsgrad, maximize, AdamW), or as
                in torch.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize", "decoupled_weight_decay"):
                if group.get(option):
                    raise ValueError(f"FusedAdam: the saved state has {option}, which it has not")
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        mine = chain.from_iterable(g["params"] for g in self.param_groups)
        for key, param in zip(saved, mine, strict=True):
            state = self.state.get(param)
            if state and "exp_avg" in state:
                # torch casts moments to the parameter's dtype, which loses them in bf16
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = (
                        state_dict["state"][key][name]
                        .to(device=param.device, dtype=_moment_dtype(param), copy=True)
                        .contiguous()
                    )
                state["step"] = torch.tensor(float(state_dict["state"][key]["step"]))
        for group in self.param_groups:
            group.setdefault("lazy", False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Applies and clears what backward recorded. `closure` as in every torch optimizer."""
        if self.__dict__.pop("found_inf", None) is not None:  # set by GradScaler.step
            self.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "FusedAdam: GradScaler cannot unscale recorded factors; train in bfloat16 autocast "
                "without a scaler, or use torch.optim.Adam"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        work: list[tuple[torch.Tensor, dict[str, Any], Factor | None, list[Factor]]] = []
        for ref, sink in self._sinks:
            param = ref()
            if param is not None and _factors.factors(param) is not sink:
                raise RuntimeError(
                    "FusedAdam: another FusedAdam took this optimizer's parameters over (the "
                    "newest owns them); keep one per parameter"
                )
        for group in self.param_groups:
            for param in group["params"]:
                recorded = _factors.factors(param) or []
                for factor in recorded:
                    factor.check_unchanged()
                work.append((param, group, _merge(param, recorded), recorded))
        if self.process_group is not None:
            merged = _exchange(self.process_group, [(p, f) for p, _, f, _ in work])
            work = [(p, g, f, r) for (p, g, _, r), f in zip(work, merged, strict=True)]
        ordinary: dict[int, list[torch.Tensor]] = {}
        for param, group, total, recorded in work:
            if param.grad is None and total is not None:
                self._fused(param, group, total)
            elif param.grad is not None:
                if param.grad.is_sparse:
                    raise TypeError("FusedAdam: torch.sparse gradients are not supported")
                if total is not None:
                    _add_to_grad(param, total)
                ordinary.setdefault(id(group), []).append(param)
            recorded.clear()
        for group in self.param_groups:
            self._ordinary(ordinary.get(id(group), []), group)

    def _state(self, param: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            like: dict[str, Any] = {
                "dtype": _moment_dtype(param),
                "memory_format": torch.contiguous_format,
            }
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = advise_huge_pages(torch.empty_like(param, **like)).zero_()
        return state

    def _fused(self, param: torch.Tensor, group: dict[str, Any], factor: Factor) -> None:
        state = self._state(param)
        state["step"] += 1
        before = param._version
        beta1, beta2 = group["betas"]
        sparse_adam_step(
            param,
            state["exp_avg"],
            state["exp_avg_sq"],
            factor.values,
            factor.indices,
            factor.rows,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            lazy=group["lazy"],
            unit_norm=has_unit_norm(param),
        )
        if param._version == before:  # so that a backward through the old weight is refused
            torch.autograd.graph.increment_version(param)

    def _ordinary(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Adam on `p.grad`, by torch's own implementation, in the moments' precision."""
        lists: dict[tuple[Any, ...], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        for param in params:
            assert param.grad is not None
            acc = _moment_dtype(param)
            wide, grad = param.to(acc), param.grad.to(acc)
            unit = has_unit_norm(param)
            if unit:
                square = wide.square().sum(1, keepdim=True)
                along = (grad * wide).sum(1, keepdim=True) / square
                grad = grad - torch.where(square > 0, along, 0) * wide
            lists.setdefault((param.device, acc, unit), []).append((param, wide, grad))
        for (device, _, unit), triples in lists.items():
            states = [self._state(p) for p, _, _ in triples]
            steps = [s["step"] for s in states]
            fused = device.type == "cpu"
            torch_adam(
                [w for _, w, _ in triples],
                [g for _, _, g in triples],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                steps,
                foreach=not fused,
                fused=fused,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=0.0 if unit else group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for param, wide, _ in triples:
                if unit:
                    norm = wide.norm(dim=1, keepdim=True)
                    wide.div_(norm.where(norm > 0, 1))
                if wide is not param:
                    param.copy_(wide)


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, value, ok in (
        ("lr", group["lr"], float(group["lr"]) >= 0),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", group["eps"], group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
    ):
        if not ok:
            raise ValueError(f"FusedAdam: {name} is out of range, got {value}")
    for param in group["params"]:
        if has_unit_norm(param) and param.dim() != 2:
            raise ValueError(
                f"FusedAdam: only [F, D] parameters can have unit-norm rows, got "
                f"{list(param.shape)}"
            )


def _release(sinks: list[tuple[weakref.ref[torch.Tensor], list[Factor]]]) -> None:
    for ref, sink in sinks:
        param = ref()
        if param is not None and _factors.factors(param) is sink:
            _factors.disown(param)


def _moment_dtype(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _widen(factor: Factor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices with K = k: pairs of value 0 with a latent the row has anyway."""
    n, extra = factor.values.shape[0], k - factor.values.shape[1]
    if extra == 0:
        return factor.values, factor.indices
    return (
        torch.cat([factor.values, factor.values.new_zeros(n, extra)], 1),
        torch.cat([factor.indices, factor.indices[:, :1].expand(n, extra)], 1),
    )


def _merge(param: torch.Tensor, recorded: list[Factor]) -> Factor | None:
    """One factor of the sum; None when nothing was recorded."""
    recorded = [f for f in recorded if f.values.shape[1] > 0]
    if len(recorded) < 2:
        return recorded[0] if recorded else None
    # same rows (one input, several selections): join along K, rows are not repeated
    joined: dict[tuple[int, ...], list[Factor]] = {}
    for f in recorded:
        joined.setdefault((f.rows.data_ptr(), *f.rows.shape, *f.rows.stride()), []).append(f)
    parts = [
        fs[0]
        if len(fs) == 1
        else Factor(
            torch.cat([f.values for f in fs], 1),
            torch.cat([f.indices for f in fs], 1),
            fs[0].rows,
        )
        for fs in joined.values()
    ]
    if len(parts) == 1:
        return parts[0]
    # Factors of one width: AuxK selects another number of latents than the SAE. Padding a narrow
    # one costs pairs of value zero, cutting a wide one costs copies of its rows (about two pairs).
    width = min(
        {f.values.shape[1] for f in parts},
        key=lambda w: sum(-(-f.values.shape[1] // w) * f.values.shape[0] * (w + 2) for f in parts),
    )
    values, indices, rows = zip(*(_cut(f, width) for f in parts), strict=True)
    return Factor(torch.cat(values), torch.cat(indices), torch.cat(rows))


def _cut(factor: Factor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same sum with K = width, over copies of the rows."""
    n, k = factor.values.shape
    pieces = -(-k // width)
    values, indices = (
        t.view(n, pieces, width).transpose(0, 1).reshape(-1, width)
        for t in _widen(factor, pieces * width)
    )
    return values, indices, factor.rows.repeat(pieces, 1)


def _add_to_grad(param: torch.Tensor, factor: Factor) -> None:
    latents, grads = sparse_grad_weight(
        factor.values, factor.indices, factor.rows, param.shape[0], layout="rows"
    )
    assert param.grad is not None
    param.grad.index_add_(0, latents.long(), grads.to(param.grad.dtype))


def _exchange(
    group: dist.ProcessGroup, work: list[tuple[torch.Tensor, Factor | None]]
) -> list[Factor | None]:
    """Factors of all ranks joined, divided by their number; ordinary gradients averaged."""
    world = dist.get_world_size(group)
    device = work[0][0].device
    # N, K (0: nothing was recorded, not even an empty batch), and whether there is a gradient
    shape = torch.tensor(
        [[*((0, 0) if f is None else f.values.shape), p.grad is not None] for p, f in work],
        dtype=torch.int64,
        device=device,
    )
    shapes = [torch.empty_like(shape) for _ in range(world)]
    dist.all_gather(shapes, shape, group=group)
    sizes = torch.stack(shapes).cpu()  # [world, params, 3]
    out: list[Factor | None] = []
    for i, (param, factor) in enumerate(work):
        if sizes[:, i, 2].any():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            dist.all_reduce(param.grad, group=group)
            param.grad.div_(world)
        tokens = sizes[:, i, 0].tolist()
        n, k = max(tokens), int(sizes[:, i, 1].max())
        if k == 0:
            out.append(None)
            continue
        values = param.new_zeros(n, k)
        indices = torch.zeros(n, k, dtype=torch.int32, device=param.device)
        rows = param.new_zeros(n, param.shape[1])
        if factor is not None:
            here = factor.values.shape[0]
            values[:here], indices[:here] = _widen(factor, k)
            values.div_(world)
            rows[:here] = factor.rows
        gathered = []
        for tensor in (values, indices, rows):
            parts = [torch.empty_like(tensor) for _ in range(world)]
            if n > 0:  # else a step without gradient on every rank: moments decay alike
                dist.all_gather(parts, tensor, group=group)
            gathered.append(torch.cat([p[:t] for p, t in zip(parts, tokens, strict=True)]))
        out.append(Factor(*gathered))
    return out
