"""From the residual stream to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def final_norm_of(model: nn.Module) -> nn.Module | None:
    """The norm before the unembedding, where the families of transformers keep it."""
    for path in (
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.norm",
        "model.language_model.norm",
        "model.decoder.final_layer_norm",
    ):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


@torch.no_grad()
def logit_effect(model: Any, directions: torch.Tensor) -> torch.Tensor:
    """What each direction of the residual stream adds to the logits, on the direct path.

    The final norm is taken at its scale (gamma; centred first for LayerNorm), its division by the
    token's own norm left out, and the mean over the vocabulary subtracted, since softmax ignores
    it. Later blocks are not in it.

    Args:
        directions: [M, D], rows of W_dec.

    Returns:
        [M, V] float32.
    """
    unembedding = model.get_output_embeddings().weight.float()  # [V, D]
    d = directions.float()
    norm = final_norm_of(model)
    weight = getattr(norm, "weight", None)
    if norm is not None and "RMS" not in type(norm).__name__:
        d = d - d.mean(-1, keepdim=True)
    if weight is not None:
        gamma = weight.float()
        # Gemma's RMSNorm multiplies by 1 + weight.
        d = d * (1 + gamma if "Gemma" in type(norm).__name__ else gamma)
    effect = d @ unembedding.T
    return effect - effect.mean(-1, keepdim=True)
