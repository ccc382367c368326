"""What slow compilers made, kept between runs under a name formed of all that it depends on.

The folder is $FASTSAE_TEST_CACHE, else ~/.cache/fastsae/tests: outside the checkout, so that the
next clone has them too. What no run has asked for in 30 days goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

DAYS = 30


def folder() -> Path:
    """Where artefacts lie."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTSAE_TEST_CACHE") or Path(home) / "fastsae" / "tests")


def digest(*parts: Path | str) -> str:
    """Of the contents of files and of text, in this order."""
    total = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()[:24]


@cache
def version(*command: str) -> str:
    """What a compiler says of itself: two of one name make different code."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def kept(path: str, make: Callable[[Path], None]) -> Path:
    """The artefact of this name; made by one process while the others wait."""
    artefact = folder() / path
    artefact.parent.mkdir(parents=True, exist_ok=True)
    with artefact.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends
        if artefact.exists():
            os.utime(artefact)  # the last time that it was asked for
            return artefact
        with tempfile.TemporaryDirectory(dir=folder()) as temporary:
            made = Path(temporary) / artefact.name
            make(made)
            os.replace(made, artefact)
        tidy(artefact.parent)
    return artefact


def tidy(among: Path) -> None:
    for old in among.iterdir():
        with suppress(FileNotFoundError):  # another process tidies too
            if old.stat().st_mtime < time.time() - DAYS * 86400:
                old.unlink()
