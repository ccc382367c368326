"""Fixtures of the tests of verified kernels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from verified import BUILT, CPU

from fastsae import _dispatch, _verified
from fastsae.verify import run


@pytest.fixture
def records(monkeypatch, tmp_path):
    """An empty cache folder, and a dispatch that has chosen nothing yet."""
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTSAE_CPU_LEVEL", raising=False)
    monkeypatch.setattr(_dispatch, "_warned", set())
    _verified.record.cache_clear()
    _dispatch.forget()
    level = torch.ops.fastsae._cpu_level() if BUILT else None
    yield tmp_path
    _verified.record.cache_clear()
    _dispatch.forget()
    if level is not None:
        torch.ops.fastsae._set_cpu_level(level)


@pytest.fixture
def workers(monkeypatch, records):
    """Checks in a worker with the faults given."""
    monkeypatch.setattr(run, "WORKER", "faulty_worker")
    folders = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))

    def start(wanted, faults, **how):
        monkeypatch.setenv("FAULTS", json.dumps(faults))
        return run.isolated(wanted, CPU, scale="small", **how)

    return start
