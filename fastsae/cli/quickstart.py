"""`fastsae quickstart`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import check_writable, fail, fail_missing
from .progress import progress_bars

if TYPE_CHECKING:
    from ..quickstart.pipeline import Result


def quickstart(
    model: str | None = typer.Option(
        None, help="Hub id or local folder of a causal language model.", show_default="embedded"
    ),
    out: Path = typer.Option(Path("quickstart"), help="Folder for the page, report and SAE."),  # noqa: B008
    device: str = typer.Option("cpu", help="Torch device, such as cuda."),
    seed: int = typer.Option(0, help="The same seed gives the same report on a machine."),
    layer: int | None = typer.Option(
        None, help="Block whose output is read, from 0.", show_default="the middle one"
    ),
    hook: str | None = typer.Option(None, help="Dotted path of a module instead of --layer."),
    tokens: int | None = typer.Option(None, min=1, help="Activations to train on."),
    steps: int | None = typer.Option(
        None, min=1, help="Training steps.", show_default="600, fewer on a slow or busy machine"
    ),
    latents: int | None = typer.Option(None, min=1, help="Latents.", show_default="8 x width"),
    k: int | None = typer.Option(None, min=1, help="Active latents per token."),
) -> None:
    """Train a TopK SAE on a language model, read its features, steer with one, write a page."""
    try:
        import jinja2  # noqa: F401
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        fail_missing(error)
    from .._errors import UserError
    from ..quickstart.pipeline import run, write
    from ..quickstart.settings import Settings

    if layer is not None and hook is not None:
        fail("give --layer or --hook, not both")
    check_writable(out)
    given = {"tokens": tokens, "steps": steps, "d_sae": latents, "k": k}
    settings = Settings(
        model=model, out=out, device=device, seed=seed, layer=layer, hook=hook,
        train_s=Settings.train_s if steps is None else None,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        with progress_bars() as progress:
            result = run(settings, progress)
        page = write(result)
    except UserError as error:
        fail(str(error))
    _summary(result, page)


def _summary(result: Result, page: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    report = result.report()
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "SAE": f"{report['d_sae']} latents, k={report['k']}, at {report['hook']} of "
        f"{report['model']}",
        "training": f"{report['tokens']:,} tokens at {report['tokens_per_s']:,.0f}/s; the step is "
        f"{report['speedup_vs_torch']:.1f}x as fast as plain PyTorch's"
        + (f" ({report['busy']})" if report["busy"] else ""),
        "FVU": f"{report['fvu']:.3f} held out, L0 {report['l0']:.1f}, "
        f"{100 * report['dead_fraction']:.1f}% dead",
        "loss": f"{report['ce_clean']:.3f} nats clean, {report['ce_spliced']:.3f} spliced, "
        f"{report['ce_zero_ablated']:.3f} ablated: {100 * report['loss_recovered']:.1f}% recovered",
    }
    if report["steps"] < report["steps_planned"]:
        rows["steps"] = (
            f"{report['steps']} of {report['steps_planned']}, because this machine is slow or busy "
            f"now; --steps {report['steps_planned']} trains for all of them"
        )
    steering = report["steering"]
    if steering is not None:
        effect, seen = steering["effect"], " ".join(repr(t) for t in steering["own_tokens"][:6])
        rows["steering"] = (
            f"latent {steering['feature']} ({seen}), by {steering['method']} at "
            f"{steering['strength']:g}x its maximum: "
            f"its tokens go from {100 * effect['share_before']:.1f}% to "
            f"{100 * effect['share_after']:.1f}% of the text"
        )
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)
    console.print(f"[bold]Page:[/] {escape(str(page))}", soft_wrap=True, highlight=False)
