"""What steering needs to know of an SAE, whoever trained it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..nn import _files
from ..nn.topk_sae import TopKSAE

MAX_ACTIVATION = "max_activation"  # the statistics' folder inside an SAE's
_FORMAT = "fastsae.MaxActivations"
_ABOUT = {"tokens": int, "data": str, "special_tokens": bool, "site": str}
ACTIVATIONS = ("relu", "jumprelu", "gated", "topk")


@dataclass(frozen=True)
class MaxActivations:
    """A latent's largest activation, and over what: it is a statistic, not a constant.

    Attributes:
        values: [F].
        tokens: how many tokens were looked at.
        data: what text they came from.
        special_tokens: were BOS and padding among them?
        site: the module's path, "" when not known.
    """

    values: torch.Tensor
    tokens: int
    data: str
    special_tokens: bool = False
    site: str = ""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the statistics into a directory of their own, atomically."""
        about = {name: getattr(self, name) for name in _ABOUT}
        _files.save(directory, _FORMAT, about, {"values": self.values})

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> MaxActivations:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: missing, truncated or foreign; the file is named.
        """
        header, tensors = _files.load(directory, _FORMAT, "cpu")
        if set(tensors) != {"values"} or not all(
            isinstance(header.get(name), kind) for name, kind in _ABOUT.items()
        ):
            raise ValueError(f"{directory}: not the statistics of an SAE's maximum activations")
        return cls(tensors["values"], **{name: header[name] for name in _ABOUT})


@dataclass(frozen=True)
class SAEDescription:
    r"""Weights and activation function of an SAE, in the parameterisation that is steered in.

    .. math:: p = W_{enc} (u(x) \cdot input\_scale - [subtract] \, b_{dec}), \quad
        f = [p + b_{enc} > \theta] \, \max(gain \cdot p + offset, 0), \quad
        \hat x = s(x)^{-1} (W_{dec}^T f + b_{dec}) / input\_scale

    Attributes:
        W_enc, W_dec: [F, D], one row per latent (views are fine).
        b_enc: [F].
        b_dec: [D].
        activation: "relu"; "jumprelu" (also a BatchTopK SAE with its threshold); "gated"; "topk".
        subtract_b_dec: is b_dec taken off the input?
        threshold: [F] or a float, theta of "jumprelu"; for "gated", f is on where p + b_enc > 0.
            For "topk" it makes f on where p + b_enc > theta in place of membership among the k:
            approximate, little off for a large clamp and much for ablation and scaling.
        k: of "topk".
        identity: "topk" without ReLU after the selection.
        rank_scale: [F], "topk" selects by pre-activation times this.
        gain, offset: [F], of "gated" (exp(r_mag) and b_mag) and of activations that carry the
            decoder's norms; None means 1 and b_enc.
        norm: "none", "layer_norm" or "constant_norm", u(x) as in `ops.steer`.
        eps: of layer_norm.
        input_scale: a constant that the input is multiplied by.
        max_activation: for unit="max".
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    activation: str
    subtract_b_dec: bool = False
    threshold: torch.Tensor | float | None = None
    k: int | None = None
    identity: bool = False
    rank_scale: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    norm: str = "none"
    eps: float = 1e-5
    input_scale: float = 1.0
    max_activation: MaxActivations | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"SAEDescription: activation must be one of {', '.join(ACTIVATIONS)}, got "
                f"{self.activation!r}"
            )
        F, D = self.W_dec.shape
        if self.W_enc.shape != (F, D) or self.b_enc.shape != (F,) or self.b_dec.shape != (D,):
            raise ValueError(
                f"SAEDescription: W_enc {list(self.W_enc.shape)}, b_enc {list(self.b_enc.shape)} "
                f"and b_dec {list(self.b_dec.shape)} do not fit W_dec {[F, D]}"
            )
        if self.activation == "topk" and (self.k is None or not 1 <= self.k <= F):
            raise ValueError(f"SAEDescription: topk needs k in [1, {F}], got {self.k}")
        if self.activation == "jumprelu" and self.threshold is None:
            raise ValueError("SAEDescription: jumprelu needs threshold")
        if self.max_activation is not None and self.max_activation.values.shape != (F,):
            raise ValueError(
                f"SAEDescription: maximum activations {list(self.max_activation.values.shape)} of "
                f"another SAE, this one has {F} latents"
            )

    @property
    def exact_membership(self) -> bool:
        """Does an activation depend on the other latents?"""
        return self.activation == "topk" and self.threshold is None


def describe(sae: Any, max_activation: MaxActivations | None = None) -> SAEDescription:
    """The description of a `TopKSAE`, of a SAELens SAE, or of a description itself.

    Raises:
        TypeError: not known; make an `SAEDescription` of its weights.
        NotImplementedError: an SAELens option whose activations cannot be read row by row.
    """
    if isinstance(sae, SAEDescription):
        return sae if max_activation is None else replace(sae, max_activation=max_activation)
    if isinstance(sae, TopKSAE):
        return SAEDescription(
            sae.W_enc.detach(),
            sae.b_enc.detach(),
            sae.W_dec.detach(),
            sae.b_dec.detach(),
            "topk",
            subtract_b_dec=sae.apply_b_dec_to_input,
            k=sae.k,
            identity=sae.activation == "identity",
            rank_scale=sae.W_dec.detach().norm(dim=1) if sae.rank_by_decoder_norm else None,
            max_activation=max_activation,
        )
    if type(sae).__module__.partition(".")[0] == "sae_lens":
        return _saelens(sae, max_activation)
    raise TypeError(
        f"describe: do not know {type(sae).__name__}; describe it as "
        "fastsae.steer.SAEDescription(W_enc, b_enc, W_dec, b_dec, activation, ...)"
    )


_SAELENS_NORMS = {
    "none": "none",
    "expected_average_only_in": "none",
    "constant_norm_rescale": "constant_norm",
    "layer_norm": "layer_norm",
}


def _saelens(sae: Any, max_activation: MaxActivations | None) -> SAEDescription:
    cfg = sae.cfg
    kind = cfg.architecture()
    norms = getattr(cfg, "normalize_activations", "none")
    if kind not in ("standard", "topk", "jumprelu", "gated"):
        raise NotImplementedError(f"describe: SAELens architecture {kind!r}")
    if norms not in _SAELENS_NORMS:
        raise NotImplementedError(f"describe: SAELens normalize_activations={norms!r}")
    if getattr(cfg, "reshape_activations", "none") != "none":
        raise NotImplementedError(
            f"describe: SAELens reshape_activations={cfg.reshape_activations!r}"
        )
    W_enc, W_dec = sae.W_enc.detach().T, sae.W_dec.detach()
    if kind == "topk":  # membership reads all of it, row by row: [D, F] is transposed once, here
        W_enc = W_enc.contiguous()
    gated = kind == "gated"
    b_enc = (sae.b_gate if gated else sae.b_enc).detach()
    described = SAEDescription(
        W_enc,
        b_enc,
        W_dec,
        sae.b_dec.detach(),
        {"standard": "relu"}.get(kind, kind),
        subtract_b_dec=bool(cfg.apply_b_dec_to_input),
        threshold=sae.threshold.detach() if kind == "jumprelu" else None,
        k=int(cfg.k) if kind == "topk" else None,
        gain=sae.r_mag.detach().exp() if gated else None,
        offset=sae.b_mag.detach() if gated else None,
        norm=_SAELENS_NORMS[norms],
        max_activation=max_activation,
    )
    if kind == "topk" and getattr(cfg, "rescale_acts_by_decoder_norm", False):
        # its activations carry the decoder's norms, and are divided by them again to decode
        size = W_dec.norm(dim=1)
        described = replace(
            described,
            rank_scale=size,
            gain=size,
            offset=b_enc * size,
            W_dec=W_dec / size[:, None],
        )
    return described
