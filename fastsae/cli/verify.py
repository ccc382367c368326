"""`fastsae verify`: known-answer checks of every kernel on the devices of this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from . import check_writable, fail


def verify(
    op: list[str] = typer.Option([], help="Operators, separated by commas.", show_default="all"),  # noqa: B008
    device: str | None = typer.Option(
        None, help="cpu, cuda, cuda:1.", show_default="all there are"
    ),
    repeat: int = typer.Option(1, min=1, help="Times every call is made: races may show in one."),
    json: Path | None = typer.Option(None, help="Write the rows to this file."),  # noqa: B008
    in_process: bool = typer.Option(
        False,
        "--in-process",
        help="All checks in this process, unfenced and unrecorded: for compute-sanitizer.",
    ),
) -> None:
    """Run every kernel on data whose result is known to the bit, each design in its own process.

    The record that it leaves (fastsae info shows where) decides which kernels are used: one that
    failed, crashed or hung on this device is not. On a CPU every instruction-set level is checked,
    and the Triton kernels in Triton's interpreter (minutes). Exit code 1 when a check fails.
    """
    from ..verify.report import report

    if json is not None:
        check_writable(json.parent)
    names = [part for text in op for part in text.replace(",", " ").split()]
    try:
        status = report(names, device, repeat, json, in_process)
    except ValueError as error:
        fail(f"verify: {error}")
    raise typer.Exit(status)
