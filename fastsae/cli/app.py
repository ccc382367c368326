"""The typer application, put together from the commands."""

from __future__ import annotations

import typer

from .bench import bench
from .compare import compare_steering
from .info import info
from .quickstart import quickstart
from .serve import serve
from .steer import steer
from .verify import verify

app = typer.Typer(
    name="fastsae",
    help="Fused kernels for sparse autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(quickstart)
app.command()(steer)
app.command()(serve)
app.command("compare-steering")(compare_steering)
app.command()(info)
app.command()(verify)
app.command()(bench)


@app.callback(invoke_without_command=True)
def version(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    """Fused kernels for sparse autoencoders."""
    if version:
        from .._version import __version__

        typer.echo(__version__)
        raise typer.Exit
