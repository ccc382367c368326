"""What the commands print about themselves."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from typer.testing import CliRunner

from fastsae.cli.app import app

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default(name):
    """Square brackets in a help text are markup, and vanish."""
    wide = {"COLUMNS": "250", "TERMINAL_WIDTH": "250"}
    shown = CliRunner().invoke(app, [name, "--help"], env=wide).output
    for option in COMMANDS[name].params:
        assert "[" not in (option.help or ""), option.name
        if isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})]" in shown, shown


def test_info_says_a_reason_once():
    wide = {"COLUMNS": "250", "TERMINAL_WIDTH": "250"}
    shown = CliRunner().invoke(app, ["info"], env=wide).output
    assert shown.count("sparse_decode") == 1
    assert shown.count("the cuda kernels need a GPU") <= 1


def test_redirected_progress_shows_a_line_now_and_then(monkeypatch, capsys):
    from fastsae.cli import progress

    now = iter([0.0, 10.0, 16.0, 20.0, 31.5, 40.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    with progress._lines("Reading", 200) as advance:
        for n in (20, 30, 40, 60):
            advance(n)
    assert capsys.readouterr().err.splitlines() == [
        "Reading: 25% in 16 s", "Reading: 75% in 32 s", "Reading: 40.0 s",
    ]  # fmt: skip
