"""Bridges to other SAE libraries, a file for each, imported where one of its objects comes.

Nothing else in the package knows their names.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..nn import Description

PEERS = {"sae_lens": "saelens"}  # the package of an object, the file that reads it


def description_of(sae: Any) -> Description | None:
    """The description of another library's SAE; None where the library is not known.

    Raises:
        NotImplementedError: the library is known, this SAE's option is not.
    """
    file = PEERS.get(type(sae).__module__.partition(".")[0])
    if file is None:
        return None
    found: Description = import_module(f"{__name__}.{file}").description_of(sae)
    return found
