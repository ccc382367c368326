"""Tensors and their config on disk: config.json and sae.safetensors, written atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
VERSION = 1


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, syncs it to disk, then renames it.

    Whoever reads `path` sees the old file or the whole new one, also after a crash.
    """
    write_all({path: write})


def write_all(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """`write_atomic` of several files of a folder: none changes before all are written."""
    made: dict[Path, Path] = {}  # temporary -> file
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            made[temporary] = path
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)  # mkstemp makes the file private; give it the usual mode
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        for temporary, path in made.items():
            os.replace(temporary, path)
    finally:
        for temporary in made:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_atomic` of one UTF-8 text."""
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def json_text(report: dict[str, Any]) -> str:
    """A report as JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(
    directory: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Writes both files. `load` finds a crash between the two renames: the save ids differ.

    One tensor under several names is written once and is one again when loaded. What can fail fails
    before anything in the directory changes.

    Raises:
        TypeError: `config` holds what JSON cannot.
        ValueError: two tensors share a part of their memory, or one holds no values.
    """
    from safetensors.torch import save_file

    save_id = uuid.uuid4().hex
    kept, tied = _tied(tensors)
    header = {"format": kind, "format_version": VERSION, "save_id": save_id, **config}
    if tied:
        header["tied"] = tied
    text = json.dumps(header, indent=2) + "\n"
    where = Path(directory)
    metadata = {"format": kind, "format_version": str(VERSION), "save_id": save_id}
    write_all(
        {
            where / WEIGHTS: lambda p: save_file(kept, p, metadata=metadata),
            where / CONFIG: lambda p: _write_text(p, text),
        }
    )


def _tied(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor once, contiguous; and which further names stand for which."""
    kept: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"save: {name} holds no values (device meta)")
        for other in kept:
            first = tensors[other]
            if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                continue
            if not tensor.numel() or not first.numel():
                continue
            if (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) == (
                first.data_ptr(), first.shape, first.stride(), first.dtype,
            ):  # fmt: skip
                tied[name] = other
                break
            raise ValueError(
                f"save: {name} and {other} share memory but are not the same tensor; clone one"
            )
        else:
            kept[name] = tensor.detach().contiguous()
    return kept, tied


def load(
    directory: str | os.PathLike[str], kinds: str | tuple[str, ...], device: str | torch.device
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config, with its "format", and the tensors of a directory that `save` wrote.

    Args:
        kinds: formats that are taken, the newest first.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, of another format, of a newer version, or the two are from
            different saves; the message names the file and the reason.
    """
    from safetensors import SafetensorError, safe_open

    kinds = (kinds,) if isinstance(kinds, str) else kinds
    where = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (where / name).is_file():
            raise FileNotFoundError(
                f"{where / name}: no such file; {kinds[0]} needs {CONFIG}, {WEIGHTS}"
            )
    path = where / CONFIG
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated or not JSON: {error}") from error
    kind = header.get("format") if isinstance(header, dict) else type(header).__name__
    if not isinstance(header, dict) or kind not in kinds:
        raise ValueError(
            f"{path}: format is {kind!r}, expected {kinds[0]!r}: not a {kinds[0]} checkpoint"
        )
    version = header.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path}: format_version is {version!r}, this fastsae reads up to {VERSION}; "
            "a newer fastsae wrote it: upgrade"
        )
    path = where / WEIGHTS
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from error
    if metadata.get("format") != kind or metadata.get("save_id") != header.get("save_id"):
        raise ValueError(
            f"{path}: not the weights that {CONFIG} describes (another format, or an interrupted "
            "save)"
        )
    for key in ("format_version", "save_id"):
        header.pop(key, None)
    for name, other in header.pop("tied", {}).items():
        if other not in tensors:
            raise ValueError(f"{where / CONFIG}: ties {name!r} to {other!r}, which is not there")
        tensors[name] = tensors[other]
    return header, tensors
