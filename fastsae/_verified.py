"""What has been proved on this device: the record of known-answer checks that dispatch consults.

A record belongs to one device with its driver, torch, Triton and kernels: a change of any of them
begins a new one. `fastsae.verify` runs the checks and writes it; nothing here runs a kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._version import __version__

PASSED, FAILED, RUNNING, UNKNOWN = "passed", "failed", "running", "unknown"


class Check(NamedTuple):
    """One known-answer check. On a CPU a design is an instruction-set level."""

    op: str
    backend: str
    design: str
    dtype: str  # "float32", ...

    def __str__(self) -> str:
        return f"{self.op} {self.backend}/{self.design} {self.dtype}"


@dataclass
class Result:
    """How a check ended; `reason` says why it did not pass."""

    state: str
    seconds: float = 0.0
    reason: str = ""
    when: str = ""


def cache_dir() -> Path:
    """Where records are kept: $FASTSAE_CACHE, else the user's cache folder."""
    chosen = os.environ.get("FASTSAE_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):  # no home
        return Path(tempfile.gettempdir()) / f"fastsae-{getattr(os, 'getuid', int)()}"
    return Path(base) / "fastsae"


def _digest(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0")
        with contextlib.suppress(OSError):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _kernels(kind: str) -> str:
    """Changes with the kernels that run on this kind of device."""
    home = Path(__file__).parent
    if kind == "cpu":
        return _digest([home / "_cpu.abi3.so"])
    folder = home / "triton_kernels"
    if not folder.exists():  # a checkout has it beside the package
        folder = home.parent / "triton_kernels"
    sources = sorted(folder.rglob("*.py"))
    return _digest([home / "_cuda.abi3.so", *sources])


def _processor() -> str:
    """The CPU's name, stepping, microcode and instruction sets."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags",
              "Features", "CPU implementer", "CPU part")  # fmt: skip
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = dict(line.partition(":")[::2] for line in block)
    lines = {name.strip(): value.strip() for name, value in found.items()}
    return "; ".join(f"{name} {lines[name]}" for name in wanted if name in lines)


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


_TRUTH = ("verify/*.py", "reference/*.py")  # what kernels are compared with


@cache
def key(device: torch.device) -> dict[str, str]:
    """What a record belongs to."""
    found = {
        "fastsae": __version__,
        "kernels": _kernels(device.type),
        "checks": _digest(sorted(p for f in _TRUTH for p in Path(__file__).parent.glob(f))),
        "torch": torch.__version__,
    }
    if device.type == "cpu":
        return {**found, "device": _processor()}
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "triton": triton,
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        "driver": _driver(),
        "device": properties.name,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
    }


class Record:
    """The checks of one device: read once, written through."""

    def __init__(self, device: torch.device) -> None:
        self.key = key(device)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]
        self.path = cache_dir() / "verified" / f"{digest}.json"
        self.results = self._read()

    def _read(self) -> dict[Check, Result]:
        try:
            rows = json.loads(self.path.read_text())["checks"]
            found = {
                Check(*(r[name] for name in Check._fields)): Result(
                    **{name: r[name] for name in Result.__dataclass_fields__}
                )
                for r in rows
            }
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found

    def __getitem__(self, check: Check) -> Result:
        return self.results.get(check, Result(UNKNOWN))

    def refresh(self) -> None:
        """Takes up what other processes have written since."""
        self.results |= self._read()

    def write(self, results: dict[Check, Result]) -> None:
        """Adds results and keeps them for later processes, where the folder can be written to."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for result in results.values():
            result.when = now
        self.results |= results
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                every = self._read() | results
                rows = [{**c._asdict(), **asdict(r)} for c, r in sorted(every.items())]
                text = json.dumps({"key": self.key, "checks": rows}, indent=1) + "\n"
                handle, name = tempfile.mkstemp(dir=self.path.parent)
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                os.replace(name, self.path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file; without fcntl (not on Linux) nothing is held."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def record(device: torch.device) -> Record:
    """The record of a device, as this process knows it."""
    return Record(device)


def lock(device: torch.device) -> Any:
    """Held while a device is checked, so that the processes of one job check it once."""
    path = record(device).path.with_suffix(".checking")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return contextlib.nullcontext()
    return _locked(path)
