"""TopKSAE: the k-sparse autoencoder of Gao et al. 2024 on the fused operators."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._memory import advise_huge_pages
from ..ops import _factors, sparse_decode, topk_encode
from ..optim import set_unit_norm
from . import _files

_FORMAT = "fastsae.TopKSAE"


class TopKSAE(nn.Module):
    r"""A sparse autoencoder with exactly k active latents per token.

    .. math::
        values, indices = act(\operatorname{top}_k((x - b_{dec}) W_{enc}^T + b_{enc})), \quad
        \hat x = values \cdot W_{dec}[indices] + b_{dec}

    Train it with `fastsae.optim.FusedAdam` (no weight gradient is ever stored and the decoder's
    rows stay at norm 1), or with any other optimizer (then call `normalize_decoder_()` after its
    step).

    Args:
        d_in: D, width of the activations.
        d_sae: F, number of latents.
        k: active latents per token, 1 <= k <= F.
        apply_b_dec_to_input: encode x - b_dec; otherwise x.
        normalize_decoder: rows of W_dec have norm 1; `FusedAdam` keeps them so.
        activation: "relu" after the selection (then fewer than k may be positive), or "identity".
        rank_by_decoder_norm: select by pre-activation times the decoder row's norm. The same
            selection while those norms are 1.
        dtype, device: of the parameters; fp32 unless there is a reason.
        seed: of the initial directions; None draws from torch's global generator.

    Parameters: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D]. Buffers, for dead latents:
    tokens_seen [] and last_fired [F] int64, updated by `encode` in training mode only, once a
    batch also under activation checkpointing.

    Initially W_dec has random unit rows, W_enc is the same scaled down, biases are zero;
    `initialize_from_data` starts much closer.

    A token's code and reconstruction do not depend on the other tokens of the call nor on the
    number of threads, to the bit.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """

    tokens_seen: torch.Tensor
    last_fired: torch.Tensor
    filter: str = "exact"  # of `encode`, see `fastsae.ops.topk_encode`; not saved

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        apply_b_dec_to_input: bool = True,
        normalize_decoder: bool = True,
        activation: str = "relu",
        rank_by_decoder_norm: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"TopKSAE: d_in and d_sae must be positive, got {d_in} and {d_sae}")
        if not 1 <= k <= d_sae:
            raise ValueError(f"TopKSAE: k must lie in [1, {d_sae}] (d_sae), got {k}")
        if activation not in ("relu", "identity"):
            raise ValueError(
                f"TopKSAE: activation must be 'relu' or 'identity', got {activation!r}"
            )
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.normalize_decoder = normalize_decoder
        self.activation = activation
        self.rank_by_decoder_norm = rank_by_decoder_norm
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(advise_huge_pages(torch.empty(d_sae, d_in, **like)))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **like))
        self.W_dec = nn.Parameter(advise_huge_pages(torch.empty(d_sae, d_in, **like)))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **like))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("last_fired", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.reset_parameters(seed)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}, activation={self.activation!r}"

    # -- initialisation -----------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Random unit decoder rows, the encoder tied to them, zero biases. In place."""
        device = self.W_dec.device
        if device.type == "meta":
            return
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.W_dec.normal_(generator=generator)
        _normalize_rows_(self.W_dec)
        # k of F random directions, taken for their products c/sqrt(D) with x, c^2 ~ 2 ln(F/k),
        # overlap: the best common scale of the code is 1 / (1 + k c^2 / D)
        c2 = 2 * math.log(max(self.d_sae / self.k, math.e))
        self.W_enc.copy_(self.W_dec).mul_(1 / (1 + self.k * c2 / self.d_in))
        self.b_enc.zero_()
        self.b_dec.zero_()
        self.tokens_seen.zero_()
        self.last_fired.zero_()

    @torch.no_grad()
    def initialize_from_data(
        self, x: torch.Tensor, *, directions: str = "data", seed: int | None = None
    ) -> None:
        """Starts from a sample of activations instead of from random directions.

        b_dec becomes the geometric median, decoder rows become directions of data points seen from
        there, and the encoder is tied to them with the one scale that reconstructs the sample best.

        Args:
            x: [..., D] a sample, some thousands of tokens or more. Points are repeated with noise
                when there are fewer than F.
            directions: "data", or "random" to keep the present rows of W_dec and set only b_dec and
                the encoder's scale.
            seed: of the choice of points; None draws from torch's global generator.

        Raises:
            ValueError: the sample is empty, of another width, not finite, or `directions` unknown.
        """
        if directions not in ("data", "random"):
            raise ValueError(
                f"initialize_from_data: directions must be 'data' or 'random', got {directions!r}"
            )
        if x.dim() < 1 or x.shape[-1] != self.d_in or x.numel() == 0:
            raise ValueError(
                f"initialize_from_data: x must be [..., {self.d_in}] and not empty, got "
                f"{list(x.shape)}"
            )
        device = self.W_dec.device
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        generator = torch.Generator(device).manual_seed(seed)
        x = x.reshape(-1, self.d_in)
        n = x.shape[0]
        some = torch.randperm(n, generator=generator, device=device)[:16384]
        sample = x[some.to(x.device)].to(device=device, dtype=torch.float32)
        if not sample.isfinite().all():
            raise ValueError("initialize_from_data: x holds NaN or inf")
        median = geometric_median(sample)
        self.b_dec.copy_(median)
        if directions == "data":
            for i in range(0, self.d_sae, 65536):  # no second copy of a large decoder
                rows = self.W_dec[i : i + 65536]
                # a permutation while points last, so that no point is taken twice
                if self.d_sae <= n:
                    if i == 0:
                        order = torch.randperm(n, generator=generator, device=device)
                    at = order[i : i + len(rows)]
                else:
                    at = torch.randint(n, (len(rows),), generator=generator, device=device)
                points = x[at.to(x.device)].to(device=device, dtype=torch.float32) - median
                if self.d_sae > n:
                    spread = points.norm(dim=1, keepdim=True) / self.d_in**0.5
                    noise = torch.empty_like(points).normal_(generator=generator)
                    points += 0.3 * spread * noise
                rows.copy_(points)
            _normalize_rows_(self.W_dec, generator)
        self.b_enc.zero_()
        self.W_enc.copy_(self.W_dec)
        mode = self.training
        self.eval()
        values, indices = self.encode(sample)
        code = sparse_decode(values, indices, self.W_dec).float()
        self.train(mode)
        # argmin_s |x - b_dec - s code|^2; the selection does not depend on s
        scale = (code * (sample - median)).sum() / code.square().sum().clamp_min(1e-30)
        if scale.isfinite() and scale > 0:
            self.W_enc.mul_(scale)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scales the rows of W_dec to norm 1 (`FusedAdam` does it in its step)."""
        _normalize_rows_(self.W_dec)

    # -- the autoencoder ----------------------------------------------------------------------

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k active latents of every token.

        Args:
            x: [..., D], cast to the parameters' dtype.

        Returns:
            values [..., k] descending and indices [..., k] int32, as `fastsae.ops.topk_encode`.
        """
        if not torch.compiler.is_compiling():
            self._refuse_ddp()
        values, indices = topk_encode(
            self._center(x),
            self.W_enc,
            self.b_enc,
            self.k,
            activation=self.activation,
            rank_scale=self._rank_scale(),
            filter=self.filter,
        )
        if self.training and not _recomputing():
            self._track(values.detach(), indices)
        return values, indices

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """[..., D] reconstruction from values and indices [..., K] (any K)."""
        return sparse_decode(values, indices, self.W_dec, self.b_dec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction of x [..., D], in the parameters' dtype."""
        return self.decode(*self.encode(x))

    def _center(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != self.b_dec.shape:
            raise ValueError(f"TopKSAE: x must be [..., {self.d_in}], got {list(x.shape)}")
        x = x.to(self.W_enc.dtype)
        # not x - b_dec: the same to the bit, but its backward negates a [N, D] gradient first
        return x + (-self.b_dec) if self.apply_b_dec_to_input else x

    def _rank_scale(self) -> torch.Tensor | None:
        return self.W_dec.detach().norm(dim=1) if self.rank_by_decoder_norm else None

    def _refuse_ddp(self) -> None:
        if _factors.factors(self.W_enc) is not None and (
            torch.distributed.is_available()
            and DistributedDataParallel._get_active_ddp_module() is not None
        ):
            raise RuntimeError(
                "TopKSAE: FusedAdam keeps no gradients that DistributedDataParallel could reduce; "
                "train the bare module with FusedAdam(..., process_group=group), or keep DDP and "
                "use a torch optimizer"
            )

    # -- dead latents -------------------------------------------------------------------------

    @torch.no_grad()
    def _track(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        """Notes at which token count each latent last fired. O(N k), no host sync on a GPU."""
        self.tokens_seen += indices.shape[:-1].numel()
        fired = torch.where(values > 0, self.tokens_seen, 0)
        self.last_fired.scatter_reduce_(0, indices.reshape(-1).long(), fired.reshape(-1), "amax")

    def tokens_since_fired(self) -> torch.Tensor:
        """[F] int64: training tokens since each latent was last positive."""
        return self.tokens_seen - self.last_fired

    def dead_latents(self, dead_after: int = 10_000_000) -> torch.Tensor:
        """[M] int64, ascending: latents that did not fire in the last `dead_after` tokens."""
        return (self.tokens_since_fired() >= dead_after).nonzero().squeeze(1)

    def aux_loss(
        self,
        x: torch.Tensor,
        reconstruction: torch.Tensor,
        *,
        k_aux: int = 256,
        dead_after: int = 10_000_000,
        capacity: int | None = None,
    ) -> torch.Tensor:
        r"""AuxK: how badly the dead latents alone reconstruct what the others left over.

        .. math::
            e = \operatorname{stop}(x - \hat x), \quad
            L = \frac{\sum \|e - decode_{dead}(x)\|^2}{\sum \|e - \bar e\|^2}

        The k_aux best of the dead latents per token are used (all, if fewer are dead), without
        b_dec. Add it to the loss times a small coefficient, 1/32 in the source. Its gradients reach
        W_enc, b_enc and W_dec of dead latents, and b_dec through the encoder's input.

        Args:
            x: [..., D] the batch; reconstruction: [..., D] what `forward(x)` gave.
            k_aux: the source takes 256; about D / 2 is common.
            dead_after: tokens without firing.
            capacity: None reads the number of dead latents, for which the host waits on a GPU.
                Given a number, it does not, and a CUDA graph can hold the call: that many latents,
                those longest without firing, are looked at, and the dead ones among them compete.
                The same result as with None while no more than `capacity` are dead; always with
                d_sae, at the price of another product over all latents. `fastsae.train` gives a
                bound that the host knows. With FusedAdam(lazy=True), latents that fill the
                capacity may count as touched.

        Returns:
            A scalar; zero when no latent is dead.

        Source: Gao et al. 2024, appendix A.2.
        """
        bias: torch.Tensor = self.b_enc
        scale = self._rank_scale()
        competing: torch.Tensor | None
        if capacity is None:
            competing = self.dead_latents(dead_after)
            size = competing.numel()
        else:
            since = self.tokens_since_fired()
            size = min(capacity, self.d_sae)
            # in ascending order, which settles ties
            competing = since.topk(size).indices.sort().values if size < self.d_sae else None
            dead = since >= dead_after
            bias = torch.where(dead, bias, -torch.inf)
            scale = None if scale is None else torch.where(dead, scale, 1)  # -inf * 0 is NaN
        if size == 0:
            return reconstruction.new_zeros(())
        residual = (x.to(reconstruction.dtype) - reconstruction).detach()
        values, indices = topk_encode(
            self._center(x),
            self.W_enc,
            bias,
            min(k_aux, size),
            activation=self.activation,
            rank_scale=scale,
            latents=competing,
        )
        if capacity is not None:
            values = torch.where(dead[indices.long()], values, 0)
        found = sparse_decode(values, indices, self.W_dec)
        flat = residual.reshape(-1, self.d_in)
        variance = (flat - flat.mean(0)).float().square().sum().clamp_min(1e-12)
        loss = (found - residual).float().square().sum() / variance
        return loss if capacity is None else loss * dead.any()

    # -- parameters ---------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, recorded factors included."""
        super().zero_grad(set_to_none)
        for param in self.parameters():
            recorded = _factors.factors(param)
            if recorded is not None:
                recorded.clear()

    # The unit-norm mark that FusedAdam reads is an attribute of the parameter object. New objects
    # come from assignment and load_state_dict(assign=True), deepcopy and unpickling, and `.to`.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, *args: Any, **kwargs: Any) -> TopKSAE:
        super()._apply(*args, **kwargs)
        self._mark()
        return self

    def _mark(self) -> None:
        param = self._parameters.get("W_dec")
        if param is not None:
            set_unit_norm(param, self.normalize_decoder)

    # -- files --------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without dtype, device and seed."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_decoder": self.normalize_decoder,
            "activation": self.activation,
            "rank_by_decoder_norm": self.rank_by_decoder_norm,
        }

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and sae.safetensors, each atomically, into `directory`.

        Only the four parameters; training state (dead latents, optimizer) belongs to
        `fastsae.train`.
        """
        _files.save(directory, _FORMAT, {"config": self.config()}, dict(self.named_parameters()))

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> TopKSAE:
        """Reads what `save_pretrained` wrote, in the dtype it was saved in, in eval mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, inconsistent or of a future version; the
                message names the file and the reason.
        """
        header, tensors = _files.load(directory, _FORMAT, device)
        where = os.path.join(os.fspath(directory), _files.CONFIG)
        config = header.get("config")
        known = ("d_in", "d_sae", "k")
        if not isinstance(config, dict) or not all(isinstance(config.get(k), int) for k in known):
            raise ValueError(f"{where}: 'config' must hold the integers {', '.join(known)}")
        try:
            sae = cls(**config, device="meta")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        where = os.path.join(os.fspath(directory), _files.WEIGHTS)
        expected = {name: list(p.shape) for name, p in sae.named_parameters()}
        found = {name: list(t.shape) for name, t in tensors.items()}
        if found != expected:
            raise ValueError(f"{where}: tensors are {found}, config.json needs {expected}")
        for name, tensor in tensors.items():
            setattr(sae, name, nn.Parameter(tensor))
        sae.tokens_seen = torch.zeros((), dtype=torch.int64, device=device)
        sae.last_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        return sae.eval()


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass: `torch.utils.checkpoint` doing it again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _normalize_rows_(weight: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Rows to norm 1, in place; with a generator, zero rows become random directions."""
    with torch.no_grad():
        norm = weight.norm(
            dim=1, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32)
        )
        zero = (norm == 0).squeeze(1)
        if generator is not None and zero.any():
            count = int(zero.sum())
            fresh = torch.randn(
                count, weight.shape[1], generator=generator, dtype=norm.dtype, device=weight.device
            )
            weight[zero] = fresh.to(weight.dtype)
            norm[zero] = fresh.norm(dim=1, keepdim=True).to(norm.dtype)
        weight.div_(norm.where(norm > 0, 1))


@torch.no_grad()
def geometric_median(x: torch.Tensor, *, steps: int = 50, tolerance: float = 1e-4) -> torch.Tensor:
    """The point [D] of least mean distance to the rows of x [N, D] (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-8)
        previous, median = median, (x * weight).sum(0) / weight.sum()
        if (median - previous).norm() <= tolerance * median.norm():
            break
    return median
