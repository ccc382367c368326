"""Every example runs, offline, and shows what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example in a folder of its own; what it printed."""

    def run(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_train_topk_sae(run, tmp_path):
    pytest.importorskip("transformers")
    out = run("train_topk_sae.py")
    assert 0 < float(re.search(r"held out: FVU ([\d.]+), 16 latents", out)[1]) < 0.4
    from fastsae.nn import TopKSAE

    assert TopKSAE.from_pretrained(tmp_path / "my-sae").d_sae == 1024


def test_fused_ops(run):
    out = run("fused_ops.py")
    assert float(re.search(r"of a gradient: (\S+)", out)[1]) < 1e-7
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0] / 10


def test_steer_a_model(run):
    pytest.importorskip("transformers")
    before, after = re.findall(r"--- \w+: (\d+) times 'import'", run("steer_a_model.py"))
    assert int(after) > int(before) + 2


def test_steer_with_a_vector(run):
    pytest.importorskip("transformers")
    found = re.findall(r"--- [\w ]+: 'raise' in (\d+) of 16", run("steer_with_a_vector.py"))
    unsteered, added, taken_off = map(int, found)
    assert taken_off < unsteered < added and added >= 12


def test_no_example_goes_untested():
    tests = Path(__file__).read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"]
    assert len(files) >= 4 and all(f'run("{name}")' in tests for name in files)
