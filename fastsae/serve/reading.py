"""Which latents fire on a text: the model up to the site, then the SAE from its description."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..lm.harvest import activations_at
from ..lm.sites import device_of
from ..nn import Description
from ..ops.topk_encode import topk_encode
from ..reference.steer import normalised

_ELEMENTS = 1 << 24  # of activations that exist at a time


class Reader:
    """Runs the model up to the site, from any thread and while the engine runs the model too.

    It has modules of its own on the same weights, so what is attached to the model's later does
    not act here: make it first.
    """

    def __init__(self, model: nn.Module, site: str) -> None:
        weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._model = copy.deepcopy(model, weights)
        self._module = self._model.get_submodule(site)
        self._one = threading.Lock()  # a hook on the module takes what it puts out

    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """What the site puts out for each token, [T, D].

        Raises:
            ValueError: it puts out something that is no row for each token.
        """
        tokens = torch.tensor([list(ids)], device=device_of(self._model))
        with self._one:
            return activations_at(self._model, self._module, tokens)[0]


class Fired(NamedTuple):
    """The strongest latents of every token.

    Attributes:
        values, latents: [T, M], by value; those that do not fire have value 0.
        fires: [T], how many latents do.
    """

    values: torch.Tensor
    latents: torch.Tensor
    fires: torch.Tensor


@torch.no_grad()
def fired(sae: Description, x: torch.Tensor, most: int) -> Fired:
    """The `most` strongest latents of each row of x [T, D], by the formula of `Description`.

    Raises:
        NotImplementedError: the SAE reads activations of another width.
    """
    n_latents, width = sae.W_enc.shape
    if x.shape[-1] != width:
        raise NotImplementedError(
            f"the SAE reads activations {width} wide, and the model has {x.shape[-1]} here"
        )
    u = normalised(x.to(sae.W_enc.dtype), sae.norm, sae.eps)[0] * sae.input_scale
    if sae.subtract_b_dec:
        u = u - sae.b_dec
    most = min(most, n_latents)
    if sae.exact_membership:
        assert sae.k is not None
        scores, latents = topk_encode(
            u, sae.W_enc, sae.b_enc, sae.k, activation="identity", rank_scale=sae.rank_scale
        )
        at = latents.long()
        values = _activations(sae, scores.float() - sae.b_enc[at].float(), at)
        return _strongest(values, at, most)
    weights = sae.W_enc.float().T
    parts = [
        _strongest(_activations(sae, rows.float() @ weights, None), None, most)
        for rows in u.split(max(1, _ELEMENTS // n_latents))
    ]
    return Fired(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _activations(sae: Description, p: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """f of the products p: of the latents `at`, all of them selected, or of every latent."""

    def of(vector: torch.Tensor) -> torch.Tensor:
        return vector.float() if at is None or vector.dim() == 0 else vector.float()[at]

    f = p if sae.gain is None else p * of(sae.gain)
    f = f + of(sae.b_enc if sae.offset is None else sae.offset)
    if not sae.identity:
        f = f.clamp(min=0)
    if at is None:
        threshold = 0.0 if sae.threshold is None else sae.threshold
        f = torch.where(p + sae.b_enc.float() > threshold, f, 0.0)
    return f.nan_to_num(0.0)


def _strongest(values: torch.Tensor, at: torch.Tensor | None, most: int) -> Fired:
    best, order = values.topk(min(most, values.shape[1]), dim=1)
    return Fired(best, order if at is None else at.gather(1, order), (values != 0).sum(1))
