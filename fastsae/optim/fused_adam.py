"""FusedAdam: Adam that trains an SAE's weights without ever holding their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adam import adam as torch_adam

from .._stamp import stamp
from ..ops import _factors
from ..ops._factors import Factor, has_unit_norm
from ..ops.sparse_adam_step import sparse_adam_step
from ..reference import moments
from ..reference.moments import Moments
from ._state import (
    has_master,
    has_moments,
    loaded,
    moments_of,
    new_master,
    new_state,
    slices,
    stored_as,
    wide_dtype,
)
from ._sums import add_to_grad, exchange, merge

_OWN_OPTIONS = {"lazy": False, "moments": "fp32", "master_weights": False, "capturable": False}


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
        params: parameters or groups. Options per group: lr, betas, eps, weight_decay, lazy,
            moments, master_weights, capturable.
        lr: a float, or with capturable a tensor on the parameters' device; schedulers work.
        weight_decay: L2 as in `torch.optim.Adam`, not decoupled.
        lazy: rows of latents that did not occur since the last step keep their moments and stay
            put (`torch.optim.SparseAdam`); a dense gradient in `p.grad` still moves every row.
        moments: how the moments of 2-D weights are stored: "fp32" (8 bytes a weight), "bf16" (4) or
            "8bit" (2.06: a byte each and a scale for each 128). The last two are rounded at random
            without bias, repeatably: `fastsae.reference.moments`. Others are fp32.
        master_weights: bf16 and fp16 parameters are rounded copies of fp32 masters in the state.
            Without them small updates round away. A parameter that somebody else writes (a loaded
            checkpoint, a renormalisation) passes its new values on to its master; what is written
            into `p.data` in place is not seen, and a captured graph does not look.
        capturable: step count and a tensor lr stay on the device and `step()` never waits for it,
            so that a CUDA graph can capture it (not with a process_group).
        process_group: exact data parallelism. Ranks exchange factors and average ordinary
            gradients in `step()`, so the step is that of the whole batch with the loss averaged
            over ranks, as under DDP; every rank must step together, starting from equal weights.
            Do not wrap the module in DistributedDataParallel as well: its hooks would wait for
            gradients that never come (`fastsae.nn` modules refuse this).

    `state_dict()` has the layout of `torch.optim.Adam`, and either loads the other's (but 8-bit
    moments, which torch does not know). moments, master_weights and capturable stay what they were
    here: a state in another format is converted. The newest optimizer owns a parameter; stepping an
    older one raises. When it is collected, or on `release()`, parameters get ordinary gradients
    again. What works on gradients before the optimizer does not see recorded
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
        moments: str = "fp32",
        master_weights: bool = False,
        capturable: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group = process_group
        self._written: dict[torch.Tensor, tuple[int, int]] = {}  # stamps of masters' parameters
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lazy": lazy,
            "moments": moments, "master_weights": master_weights, "capturable": capturable,
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
            self._written = {}
            for group in self.param_groups:  # a pickle of an older version
                for option, default in _OWN_OPTIONS.items():
                    group.setdefault(option, default)
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

        With capturable it writes into the tensors that are there, which a captured graph uses.

        Raises:
            ValueError: the state is of a variant that this is not (amsgrad, maximize, AdamW), its
                moments are not of a parameter's shape, or as in torch.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize", "decoupled_weight_decay"):
                if group.get(option):
                    raise ValueError(f"FusedAdam: the saved state has {option}, which it has not")
        own = [{name: g[name] for name in _OWN_OPTIONS} for g in self.param_groups]
        own_lr = [g["lr"] for g in self.param_groups]
        before = dict(self.state)
        # torch would cast moments and codes to the parameter's dtype, all of them before the first
        # is ours: bf16 loses digits, codes in fp32 take four times their memory
        states = {i: {} if has_moments(s) else s for i, s in state_dict["state"].items()}
        super().load_state_dict(state_dict | {"state": states})
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for group, options, lr in zip(self.param_groups, own, own_lr, strict=True):
            group |= options | {"lazy": group.get("lazy", False)}
            if isinstance(lr, torch.Tensor):  # what a captured graph reads
                group["lr"] = lr.copy_(torch.as_tensor(group["lr"], dtype=torch.float64))
            else:
                group["lr"] = float(group["lr"])
            for param in group["params"]:
                state = state_dict["state"].get(next(saved), {})
                if has_moments(state):
                    self.state[param] = loaded(param, group, state, before.pop(param, {}))
        self._written.clear()

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
                work.append((param, group, merge(param, recorded), recorded))
        if self.process_group is not None:
            merged = exchange(self.process_group, [(p, f) for p, _, f, _ in work])
            work = [(p, g, f, r) for (p, g, _, r), f in zip(work, merged, strict=True)]
        ordinary: dict[int, list[torch.Tensor]] = {}
        for param, group, total, recorded in work:
            if param.grad is None and total is not None:
                self._fused(param, group, total)
            elif param.grad is not None:
                if param.grad.is_sparse:
                    raise TypeError("FusedAdam: torch.sparse gradients are not supported")
                if total is not None:
                    add_to_grad(param, total)
                ordinary.setdefault(id(group), []).append(param)
            recorded.clear()
        for group in self.param_groups:
            self._ordinary(ordinary.get(id(group), []), group)

    def _state(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, made at its first step. Where somebody else wrote the parameter,
        its master takes the new values over."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state |= new_state(param, group)
        if not has_master(param, group):
            state.pop("master", None)  # of a parameter that was in 16 bits
        elif "master" not in state:
            state["master"] = new_master(param)
        elif self._written.get(param) != stamp(param):
            for at in slices(param):
                master, now = state["master"][at], param[at]
                master.copy_(torch.where(master.to(now.dtype) == now, master, now.float()))
        return state

    def _fused(self, param: torch.Tensor, group: dict[str, Any], factor: Factor) -> None:
        state = self._state(param, group)
        stored = moments_of(param, group, state)
        state["step"] += 1
        before = param._version
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        on_device = group["capturable"]
        sparse_adam_step(
            param,
            stored.exp_avg,
            stored.exp_avg_sq,
            factor.values,
            factor.indices,
            factor.rows,
            lr=lr if on_device and isinstance(lr, torch.Tensor) else float(lr),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"] if on_device else int(state["step"]),
            lazy=group["lazy"],
            unit_norm=has_unit_norm(param),
            exp_avg_scale=stored.exp_avg_scale,
            exp_avg_sq_scale=stored.exp_avg_sq_scale,
            master=state.get("master"),
        )
        if param._version == before:  # so that a backward through the old weight is refused
            torch.autograd.graph.increment_version(param)
        if "master" in state:
            self._written[param] = stamp(param)

    def _ordinary(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Adam on `p.grad`, by torch's own implementation, in the precision of wide moments."""
        lists: dict[tuple[Any, ...], list[_Dense]] = {}
        for param in params:
            assert param.grad is not None
            state = self._state(param, group)
            if stored_as(param, group) != "fp32":
                self._ordinary_in_parts(param, group, state)
                continue
            acc, unit = wide_dtype(param), has_unit_norm(param)
            wide = state.get("master", param).to(acc)
            grad = _projected(wide, param.grad.to(acc)) if unit else param.grad.to(acc)
            dense = _Dense(param, wide, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            lists.setdefault((param.device, acc, unit), []).append(dense)
        for (_, _, unit), dense_list in lists.items():
            _dense_adam(dense_list, group, unit)
        for param in params:
            if "master" in self.state[param]:
                self._written[param] = stamp(param)

    def _ordinary_in_parts(
        self, param: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """The same with moments in few bits, which are wide for some rows at a time."""
        assert param.grad is not None
        stored, fmt = moments_of(param, group, state), stored_as(param, group)
        unit = has_unit_norm(param)
        state["step"] += 1
        for at in slices(param):
            rows = torch.arange(at.start, at.stop, device=param.device)
            part = Moments(*(None if t is None else t[at] for t in stored))  # type: ignore[arg-type]
            m, v = moments.load(part)
            wide = state["master"][at] if "master" in state else param[at].float()
            grad = param.grad[at].float()
            grad = _projected(wide, grad) if unit else grad
            dense = _Dense(param[at], wide, grad, m, v, state["step"] - 1)
            _dense_adam([dense], group, unit)
            new = moments.store(m, v, fmt, state["step"], rows)
            for old, rounded in zip(part, new, strict=True):
                if old is not None:
                    assert rounded is not None
                    old.copy_(rounded)


class _Dense(NamedTuple):
    """A parameter with an ordinary gradient; wide is the parameter, its master or a copy."""

    param: torch.Tensor
    wide: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor


def _dense_adam(dense: list[_Dense], group: dict[str, Any], unit: bool) -> None:
    fused = dense[0].param.device.type == "cpu"  # which of torch's own: there is no kernel here
    lr, capturable = group["lr"], group["capturable"] and not fused
    torch_adam(
        [d.wide for d in dense],
        [d.grad for d in dense],
        [d.exp_avg for d in dense],
        [d.exp_avg_sq for d in dense],
        [],
        [d.step for d in dense],
        foreach=not fused,
        fused=fused,
        capturable=capturable,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr if capturable else float(lr),
        weight_decay=0.0 if unit else group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for param, wide, *_ in dense:
        if unit:
            norm = wide.norm(dim=1, keepdim=True)
            wide.div_(norm.where(norm > 0, 1))
        if wide is not param:
            param.copy_(wide)


def _projected(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient without its component along each row of the weight."""
    square = weight.square().sum(1, keepdim=True)
    along = (grad * weight).sum(1, keepdim=True) / square
    return grad - torch.where(square > 0, along, 0) * weight


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, value, ok in (
        ("lr", group["lr"], float(group["lr"]) >= 0),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", group["eps"], group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
        ("moments", group["moments"], group["moments"] in moments.FORMATS),
    ):
        if not ok:
            raise ValueError(f"FusedAdam: {name} is out of range, got {value}")
    for param in group["params"]:
        if param.dtype == torch.float64 and group["moments"] != "fp32" and param.dim() == 2:
            raise ValueError(
                f"FusedAdam: moments={group['moments']!r} is not for float64 parameters"
            )
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
