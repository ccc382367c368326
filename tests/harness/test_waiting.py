"""Idle threads of a command sleep, unless the user chose; a program that imports fastsae keeps its
own setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastsae._waiting import SETTINGS

pytest.importorskip("typer")

COMMAND = "from fastsae.cli import main; main()"
LIBRARY = "import json, fastsae; print(json.dumps(fastsae.info()))"


def waiting(*command, **environment):
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS} | environment
    run = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)["waiting"]


def test_a_command_waits_passively(tmp_path):
    script = tmp_path / "fastsae"
    script.write_text(COMMAND)
    for command in (str(script),), ("-m", "fastsae"):
        assert waiting(*command, "info", "--json") == "OMP_WAIT_POLICY=passive"
    for choice in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        ((name, value),) = choice.items()
        assert waiting("-m", "fastsae", "info", "--json", **choice) == f"{name}={value}"


def test_a_program_keeps_its_own():
    assert waiting("-c", LIBRARY) is None
    assert waiting("-c", "import torch; " + LIBRARY) is None
