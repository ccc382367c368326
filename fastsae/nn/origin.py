"""Where a coder's activations come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """The language model and the site that a coder was trained on, kept in its folder.

    Attributes:
        model: hub id or path; "" when not known, "embedded" for the one inside fastsae.
        revision: the hub's commit, "" for a folder.
        fingerprint: of the model's weights (`fastsae.lm.load.fingerprint`), "" when not known.
        site: the module's path.
    """

    model: str = ""
    revision: str = ""
    fingerprint: str = ""
    site: str = ""
