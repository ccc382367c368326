"""SAELens (package sae_lens), read from its objects: nothing of it is imported here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..nn import Description

_NORMS = {
    "none": "none",
    "constant_norm_rescale": "constant_norm",
    "layer_norm": "layer_norm",
}


def description_of(sae: Any) -> Description:
    """The description of a standard, TopK, JumpReLU or Gated SAE.

    Raises:
        NotImplementedError: an option whose activations cannot be read row by row.
    """
    cfg = sae.cfg
    kind = cfg.architecture()
    norms = getattr(cfg, "normalize_activations", "none")
    if kind not in ("standard", "topk", "jumprelu", "gated"):
        raise NotImplementedError(f"describe: SAELens architecture {kind!r}")
    if norms == "expected_average_only_in":
        raise NotImplementedError(
            "describe: SAELens normalize_activations='expected_average_only_in' is a scale that "
            "the SAE does not hold; fold it first: sae.fold_activation_norm_scaling_factor(factor)"
        )
    if norms not in _NORMS:
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
    b_mag = sae.b_mag.detach() if gated else None
    if _is_centred(cfg):
        # <w, x - mean(x)> = <w - mean(w), x>; what b_dec is multiplied with stays as it was
        centred = W_enc - W_enc.mean(1, keepdim=True)
        if cfg.apply_b_dec_to_input:
            shift = (centred - W_enc) @ sae.b_dec.detach()
            b_enc = b_enc + shift
            b_mag = None if b_mag is None else b_mag + sae.r_mag.detach().exp() * shift
        W_enc = centred
    described = Description(
        W_enc,
        b_enc,
        W_dec,
        sae.b_dec.detach(),
        {"standard": "relu"}.get(kind, kind),
        subtract_b_dec=bool(cfg.apply_b_dec_to_input),
        threshold=sae.threshold.detach() if kind == "jumprelu" else None,
        k=int(cfg.k) if kind == "topk" else None,
        gain=sae.r_mag.detach().exp() if gated else None,
        offset=b_mag,
        norm=_NORMS[norms],
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


def _is_centred(cfg: Any) -> bool:
    """Whether the SAE was trained on activations without their mean over D, as TransformerLens
    makes a model's by centring the weights that write to them."""
    metadata = getattr(cfg, "metadata", None)
    options = getattr(metadata, "model_from_pretrained_kwargs", None)
    return isinstance(options, dict) and options.get("center_writing_weights") is True
