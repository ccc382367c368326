"""What steering needs to know of an SAE, whoever trained it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import integrations
from ..nn import Description, MaxActivations, SparseCoder


def describe(sae: Any, max_activation: MaxActivations | None = None) -> Description:
    """The description of a `SparseCoder`, of another library's SAE, or of a description itself.

    Raises:
        TypeError: not known; make a `Description` of its weights.
        NotImplementedError: an option of that library whose activations cannot be read row by row.
    """
    if isinstance(sae, Description):
        return sae if max_activation is None else replace(sae, max_activation=max_activation)
    if isinstance(sae, SparseCoder):
        return replace(sae.describe(), max_activation=max_activation)
    found = integrations.description_of(sae)
    if found is not None:
        return replace(found, max_activation=max_activation)
    raise TypeError(
        f"describe: do not know {type(sae).__name__}; describe it as "
        "fastsae.nn.Description(W_enc, b_enc, W_dec, b_dec, activation, ...)"
    )
