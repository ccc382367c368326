"""TopKSAE: the k-sparse autoencoder of Gao et al. 2024 on the fused operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import sparse_decode, topk_encode
from .base import CoderConfig, SparseCoder
from .code import Code, Loss, fvu
from .description import Description
from .initial import normalize_rows_


@dataclass(frozen=True)
class TopKConfig(CoderConfig):
    """`CoderConfig` and what TopK has besides.

    Attributes:
        k: active latents per token, 1 <= k <= F.
        activation: "relu" after the selection (then fewer than k may be positive), or "identity".
        rank_by_decoder_norm: select by pre-activation times the decoder row's norm. The same
            selection while those norms are 1.
        aux_coefficient: of AuxK in the loss; 0 leaves it out.
        k_aux: dead latents per token in AuxK; the source takes 256, about D / 2 is common.
    """

    k: int
    activation: str = "relu"
    rank_by_decoder_norm: bool = False
    aux_coefficient: float = 1 / 32
    k_aux: int = 256

    architecture: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.d_sae:
            self.refuse(f"k must lie in [1, {self.d_sae}] (d_sae), got {self.k}")
        if self.activation not in ("relu", "identity"):
            self.refuse(f"activation must be 'relu' or 'identity', got {self.activation!r}")
        if self.k_aux < 1:
            self.refuse(f"k_aux must be positive, got {self.k_aux}")
        if not self.aux_coefficient >= 0:
            self.refuse(f"aux_coefficient must be 0 or more, got {self.aux_coefficient}")


class TopKSAE(SparseCoder):
    r"""A sparse autoencoder with exactly k active latents per token.

    .. math::
        values, indices = act(\operatorname{top}_k((x - b_{dec}) W_{enc}^T + b_{enc})), \quad
        \hat x = values \cdot W_{dec}[indices] + b_{dec}

    .. math:: L = FVU + aux\_coefficient \cdot AuxK

    Train it with `fastsae.optim.FusedAdam` (no weight gradient is ever stored and the decoder's
    rows stay at norm 1), or with any other optimizer (then call `normalize_decoder_()` after its
    step).

    Args:
        d_in, d_sae, k and options: the fields of `TopKConfig`; or one such config.
        dtype, device, seed: as `SparseCoder`.

    Initially W_dec has random unit rows, W_enc is the same scaled down, biases are zero;
    `initialize_from_data` starts much closer.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders".
    """

    config_class = TopKConfig
    config: TopKConfig
    design: str | None = None  # of `encode`, see `fastsae.ops.topk_encode`; not saved

    @property
    def k(self) -> int:
        """Active latents per token."""
        return self.config.k

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Random unit decoder rows, the encoder tied to them, zero biases. In place."""
        device = self.W_dec.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.W_dec.normal_(generator=generator)
        normalize_rows_(self.W_dec)
        if self.d_in == self.d_out:
            self.W_enc.copy_(self.W_dec)
        else:
            self.W_enc.normal_(generator=generator)
            normalize_rows_(self.W_enc)
        # k of F random directions, taken for their products c/sqrt(D) with x, c^2 ~ 2 ln(F/k),
        # overlap: the best common scale of the code is 1 / (1 + k c^2 / D)
        c2 = 2 * math.log(max(self.d_sae / self.k, math.e))
        self.W_enc.mul_(1 / (1 + self.k * c2 / self.d_in))
        self.b_enc.zero_()
        self.b_dec.zero_()
        self.tokens_seen.zero_()
        self.last_fired.zero_()

    def encode(self, x: torch.Tensor) -> Code:
        """The k active latents of every token.

        Args:
            x: [..., D_in], cast to the parameters' dtype.

        Returns:
            values [..., k] descending and indices [..., k] int32, as `fastsae.ops.topk_encode`.
        """
        values, indices = topk_encode(
            self._input(x),
            self.W_enc,
            self.b_enc,
            self.k,
            activation=self.config.activation,
            rank_scale=self._rank_scale(),
            design=self.design,
        )
        return self._tracked(Code(values, indices))

    def _rank_scale(self) -> torch.Tensor | None:
        return self.W_dec.detach().norm(dim=1) if self.config.rank_by_decoder_norm else None

    def loss(
        self, x: torch.Tensor, target: torch.Tensor | None = None, *, most_dead: int | None = None
    ) -> Loss:
        """FVU of the batch plus AuxK; see `SparseCoder.loss`."""
        code = self.encode(x)
        reconstruction = self.decode(code)
        target = self._target(x, target)
        error = fvu(target, reconstruction)
        terms = {"fvu": error}
        total = error
        if self.config.aux_coefficient:
            terms["aux"] = self.aux_loss(x, reconstruction, target, most_dead=most_dead)
            total = error + self.config.aux_coefficient * terms["aux"]
        return Loss(total, terms, code, reconstruction)

    def aux_loss(
        self,
        x: torch.Tensor,
        reconstruction: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        most_dead: int | None = None,
    ) -> torch.Tensor:
        r"""AuxK: how badly the dead latents alone reconstruct what the others left over.

        .. math::
            e = \operatorname{stop}(x - \hat x), \quad
            L = \frac{\sum \|e - decode_{dead}(x)\|^2}{\sum \|e - \bar e\|^2}

        The `config.k_aux` best of the dead latents per token are used (all, if fewer are dead),
        without b_dec. Its gradients reach W_enc, b_enc and W_dec of dead latents, and b_dec through
        the encoder's input.

        Args:
            x: [..., D_in] the batch; reconstruction: [..., D_out] what `forward(x)` gave.
            target: [..., D_out]; x when None.
            most_dead: None reads the number of dead latents, for which the host waits on a GPU.
                Given a number, it does not, and a CUDA graph can hold the call: that many latents,
                those longest without firing, are looked at, and the dead ones among them compete.
                The same result as with None while no more than `most_dead` are dead; always with
                d_sae, at the price of another product over all latents. `fastsae.train` gives a
                bound that the host knows. With FusedAdam(lazy=True), latents that fill up the
                number may count as touched.

        Returns:
            A scalar; zero when no latent is dead.

        Source: Gao et al. 2024, appendix A.2.
        """
        bias: torch.Tensor = self.b_enc
        scale = self._rank_scale()
        competing: torch.Tensor | None
        if most_dead is None:
            competing = self.dead_latents()
            size = competing.numel()
        else:
            since = self.tokens_since_fired()
            size = min(most_dead, self.d_sae)
            # in ascending order, which settles ties
            competing = since.topk(size).indices.sort().values if size < self.d_sae else None
            dead = since >= self.config.dead_after
            bias = torch.where(dead, bias, -torch.inf)
            scale = None if scale is None else torch.where(dead, scale, 1)  # -inf * 0 is NaN
        if size == 0:
            return reconstruction.new_zeros(())
        target = self._target(x, target)
        residual = (target.to(reconstruction.dtype) - reconstruction).detach()
        values, indices = topk_encode(
            self._input(x),
            self.W_enc,
            bias,
            min(self.config.k_aux, size),
            activation=self.config.activation,
            rank_scale=scale,
            latents=competing,
        )
        if most_dead is not None:
            values = torch.where(dead[indices.long()], values, 0)
        found = sparse_decode(values, indices, self.W_dec)
        flat = residual.reshape(-1, self.d_out)
        variance = (flat - flat.mean(0)).float().square().sum().clamp_min(1e-12)
        loss = (found - residual).float().square().sum() / variance
        return loss if most_dead is None else loss * dead.any()

    def describe(self) -> Description:
        """See `SparseCoder.describe`."""
        return Description(
            self.W_enc.detach(),
            self.b_enc.detach(),
            self.W_dec.detach(),
            self.b_dec.detach(),
            "topk",
            subtract_b_dec=self.config.apply_b_dec_to_input,
            k=self.k,
            identity=self.config.activation == "identity",
            rank_scale=self._rank_scale(),
        )
