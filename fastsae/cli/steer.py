"""`fastsae steer`: one latent turned up or down, the text before and after side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import fail, fail_missing
from .subject import ANY_MODEL, MODEL, SAE, load_saved

if TYPE_CHECKING:
    import torch


def steer(
    sae: Path = SAE,
    feature: int = typer.Option(..., min=0, help="The latent."),
    strength: float = typer.Option(..., help="What it is clamped to, in --unit."),
    prompt: str = typer.Option(..., help="The text that both continue."),
    model: str | None = MODEL,
    layer: int | None = typer.Option(None, help="Block whose output is edited, from 0."),
    hook: str | None = typer.Option(None, help="Dotted path of a module instead of --layer."),
    unit: str = typer.Option("raw", help="raw, or max: times the latent's maximum activation."),
    tokens: int = typer.Option(64, min=1, help="Tokens to generate."),
    temperature: float = typer.Option(0.8, min=0.0, help="0: the likeliest token every time."),
    seed: int = typer.Option(0, help="Of the sampling."),
    device: str = typer.Option("cpu", help="Torch device."),
    any_model: bool = ANY_MODEL,
) -> None:
    """Clamp one latent while the model writes; its error term is kept. Unsteered text beside it."""
    try:
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        fail_missing(error)
    import torch

    from ..lm.tokens import encoded
    from ..steer import attach, clamp, describe

    saved = load_saved(sae, model, layer, hook, device, any_model)
    trained, statistics = saved.sae, saved.statistics
    if feature >= trained.d_sae:
        fail(f"--feature {feature}: the SAE has {trained.d_sae} latents")
    try:
        subject = saved.load_model()
        ids = torch.tensor([encoded(subject.tokenizer, prompt)], device=device)
        if ids.shape[1] == 0:
            fail("--prompt is empty")
        context = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and ids.shape[1] + tokens > context:
            fail(
                f"--tokens {tokens} after a prompt of {ids.shape[1]} is more than the {context} "
                "that the model can hold"
            )
        steerer = attach(subject.model, describe(trained, statistics), hook=subject.site)
        program = [clamp(feature, strength, unit=unit)]
        largest = None if statistics is None else float(statistics.values[feature])
        with steerer.steer([None, program]):
            _show(
                subject,
                ids,
                prompt,
                tokens,
                temperature,
                seed,
                f"latent {feature} at {_amount(strength, unit, largest)}",
            )
    except (ValueError, NotImplementedError) as error:
        fail(str(error))


def _amount(strength: float, unit: str, largest: float | None) -> str:
    """A strength as it is and in the latent's maximum activation, where that is known."""
    if largest is None or largest <= 0:
        return f"{strength:g}"
    raw, times = (strength * largest, strength) if unit == "max" else (strength, strength / largest)
    return f"{raw:.4g}, {times:.3g} times its maximum"


def _show(
    subject: Any,
    ids: Any,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    title: str,
) -> None:
    """Generates both texts in one batch, shown as they grow where stdout is a terminal."""
    import torch
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
    from transformers.generation.streamers import BaseStreamer

    console = Console()

    def table(rows: list[list[int]]) -> Table:
        made = Table(expand=True)
        for name, row in zip(("before", title), rows):
            text = Text(prompt, style="dim")
            text.append(subject.tokenizer.decode(row, skip_special_tokens=True), style="default")
            made.add_column(name, ratio=1, overflow="fold")
            cells.append(text)
        made.add_row(*cells[-2:])
        return made

    cells: list[Text] = []
    rows: list[list[int]] = [[], []]

    class Both(BaseStreamer):  # type: ignore[misc]
        """Called with the prompts first, then with one token for each sequence."""

        started = False

        def put(self, value: torch.Tensor) -> None:
            if self.started:
                for row, token in zip(rows, value.tolist()):
                    row.append(token)
                live.update(table(rows))
            self.started = True

        def end(self) -> None:
            return None

    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 0.95}
    both = ids.repeat(2, 1)
    with Live(table(rows), console=console, refresh_per_second=8) as live, torch.no_grad():
        subject.model.generate(
            both, attention_mask=torch.ones_like(both), streamer=Both(),
            max_new_tokens=tokens, min_new_tokens=tokens,
            pad_token_id=subject.tokenizer.pad_token_id or subject.tokenizer.eos_token_id or 0,
            **options,
        )  # fmt: skip
