"""A saved SAE and the language model that it belongs to, for the commands that steer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import fail

if TYPE_CHECKING:
    from ..lm.load import Subject
    from ..nn import SparseCoder
    from ..steer import MaxActivations

SAE = typer.Option(..., help="Folder of a saved SAE, such as quickstart/sae.")
MODEL = typer.Option(None, help="Hub id or folder.", show_default="the one the SAE was trained on")
ANY_MODEL = typer.Option(
    False, "--any-model", help="Steer a model whose weights are not those the SAE was trained on."
)


@dataclass
class Saved:
    """An SAE's folder, read. `load_model` then loads what it belongs to."""

    folder: Path
    sae: SparseCoder
    statistics: MaxActivations | None
    model: str | None
    layer: int | None
    hook: str | None
    device: str
    any_model: bool

    def load_model(self) -> Subject:
        """The model, which must be of the SAE's width and, unless any will do, its own.

        Raises:
            UserError: it cannot be loaded, or is another one.
        """
        from .._errors import UserError
        from ..lm.load import load_subject

        origin = self.sae.origin
        subject = load_subject(
            self.model, device=self.device, layer=self.layer, hook=self.hook, width=self.sae.d_in
        )
        known = origin.fingerprint if origin is not None else ""
        found = subject.origin.fingerprint
        if known and found and found != known and not self.any_model:
            assert origin is not None
            its = origin.model + (f" ({origin.revision[:12]})" if origin.revision else "")
            raise UserError(
                f"{self.folder} was trained on {its}, and {subject.name} has other weights; "
                "--any-model steers it all the same"
            )
        return subject


def load_saved(
    folder: Path, model: str | None, layer: int | None, hook: str | None, device: str,
    any_model: bool,
) -> Saved:  # fmt: skip
    """The SAE with its statistics when they are there; model and site are its own by default."""
    from ..lm.load import EMBEDDED
    from ..nn import SparseCoder
    from ..nn.description import MAX_ACTIVATION, MaxActivations

    if layer is not None and hook is not None:
        fail("give --layer or --hook, not both")
    try:
        sae = SparseCoder.from_pretrained(folder, device=device)
        where = folder / MAX_ACTIVATION
        statistics = MaxActivations.load(where) if where.is_dir() else None
    except (OSError, ValueError) as error:
        fail(str(error))
    origin = sae.origin
    if layer is None and hook is None:
        hook = (origin.site if origin else "") or (statistics.site if statistics else "") or None
        if hook is None:
            fail(f"{folder} does not say where it belongs: give --layer or --hook")
    if model is None and origin is not None and origin.model not in ("", EMBEDDED):
        model = origin.model
    return Saved(folder, sae, statistics, model, layer, hook, device, any_model)
