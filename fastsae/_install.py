"""How to install more of this package from where it came from."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

NAME = "fastsae-kernels"


def pip_install(extra: str) -> str:
    """The command that adds an extra: from the folder or address it was installed from (PEP 610),
    else from an index."""
    try:
        about = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        about = {}
    url = about.get("url", "")
    if "dir_info" in about:
        folder = unquote(urlparse(url).path)
        editable = "-e " if about["dir_info"].get("editable") else ""
        if Path(folder, "pyproject.toml").exists():
            return f'pip install --no-build-isolation {editable}"{folder}[{extra}]"'
        return f'pip install --no-build-isolation ".[{extra}]" in the source folder of fastsae'
    if "vcs_info" in about:
        return f'pip install "{NAME}[{extra}] @ {about["vcs_info"]["vcs"]}+{url}"'
    return f'pip install "{NAME}[{extra}]"'
