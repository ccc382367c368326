"""An SAE's weights and activation function as plain data, whoever trained it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .. import _files

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
class Description:
    r"""Weights and activation function of an SAE, in the parameterisation that is steered in.

    .. math:: p = W_{enc} (u(x) \cdot input\_scale - [subtract] \, b_{dec}), \quad
        f = [p + b_{enc} > \theta] \, \max(gain \cdot p + offset, 0), \quad
        \hat x = s(x)^{-1} (W_{dec}^T f + b_{dec}) / input\_scale

    Attributes:
        W_enc: [F, D_in]; W_dec: [F, D_out]; one row per latent (views are fine).
        b_enc: [F].
        b_dec: [D_out].
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
                f"Description: activation must be one of {', '.join(ACTIVATIONS)}, got "
                f"{self.activation!r}"
            )
        F, D = self.W_dec.shape
        if (
            self.W_enc.dim() != 2
            or self.W_enc.shape[0] != F
            or self.b_enc.shape != (F,)
            or self.b_dec.shape != (D,)
        ):
            raise ValueError(
                f"Description: W_enc {list(self.W_enc.shape)}, b_enc {list(self.b_enc.shape)} "
                f"and b_dec {list(self.b_dec.shape)} do not fit W_dec {[F, D]}"
            )
        if self.activation == "topk" and (self.k is None or not 1 <= self.k <= F):
            raise ValueError(f"Description: topk needs k in [1, {F}], got {self.k}")
        if self.activation == "jumprelu" and self.threshold is None:
            raise ValueError("Description: jumprelu needs threshold")
        if self.max_activation is not None and self.max_activation.values.shape != (F,):
            raise ValueError(
                f"Description: maximum activations {list(self.max_activation.values.shape)} of "
                f"another SAE, this one has {F} latents"
            )

    @property
    def exact_membership(self) -> bool:
        """Does an activation depend on the other latents?"""
        return self.activation == "topk" and self.threshold is None
