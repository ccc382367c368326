"""The command line, `fastsae`. One file per command; needs the `cli` extra."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from .._install import pip_install

NEEDED = ("typer", "rich", "transformers", "jinja2", "tokenizers", "tqdm", "matplotlib")
SERVE = ("fastapi", "uvicorn", "pydantic", "starlette")


def main() -> None:
    """Entry point. Exit code 2 and one line when something the user can put right is wrong."""
    try:
        app = importlib.import_module("fastsae.cli.app").app
    except ImportError as error:
        fail_missing(error)
    app()


def fail_missing(error: ImportError) -> NoReturn:
    """Ends with a line that says how to get a missing package of the extra."""
    package = (error.name or "").split(".")[0]
    if package in SERVE:
        fail(f"`fastsae serve` needs {package}, which is not installed: {pip_install('serve')}")
    if package not in NEEDED:
        raise error
    fail(f"the command line needs {error.name}, which is not installed: {pip_install('cli')}")


def fail(message: str) -> NoReturn:
    """Ends with `message` on stderr and exit code 2."""
    sys.stderr.write(f"fastsae: {message}\n")
    raise SystemExit(2)


def check_writable(folder: Path) -> None:
    """Ends before minutes of work when `folder`, which may not exist yet, cannot be written."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")
