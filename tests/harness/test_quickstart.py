"""The quickstart end to end, at a small size, and what the command line says when it cannot run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("jinja2")

from fastsae._errors import UserError
from fastsae.lm.load import EMBEDDED_MODEL, load_subject
from fastsae.nn import TopKSAE
from fastsae.quickstart import pipeline
from fastsae.quickstart.charts import Series, line_chart, ticks
from fastsae.quickstart.page import chip, flow, render
from fastsae.quickstart.pipeline import TIMING_KEYS, run, write
from fastsae.quickstart.settings import Settings
from fastsae.steer import MaxActivations

NEEDED = {
    "tokens", "tokens_per_s", "speedup_vs_torch", "fvu", "l0", "dead_fraction", "ce_clean",
    "ce_spliced", "ce_zero_ablated", "loss_recovered", "features", "steering",
}  # fmt: skip


@contextmanager
def silent(_title: str, _total: int) -> Iterator[Any]:
    yield lambda n: None


pytestmark = pytest.mark.usefixtures("one_thread")


def small(out: Path) -> Settings:
    return Settings(
        out=out, tokens=3000, held_out_tokens=600, stats_tokens=3000, context=64, d_sae=256, k=8,
        steps=20, batch_size=256, plain_steps=2, cards=4, candidates=3, sample_tokens=8, samples=2,
        strengths=(1.0, 2.0), screen_strengths=(1.0,),
    )  # fmt: skip


@pytest.mark.parametrize("step_s,steps", [(0.0, 40), (0.0026, 30), (0.0035, 20), (0.02, 10)])
def test_a_slow_machine_trains_for_fewer_steps(monkeypatch, tmp_path, step_s, steps):
    now = [0.0]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])

    def step(self, x):
        now[0] += step_s

    monkeypatch.setattr(pipeline.Trainer, "step", step)
    sae, x = TopKSAE(8, 32, 2, seed=0), torch.zeros(4, 8)
    asked = replace(small(tmp_path), steps=40, train_s=0.08)
    assert pipeline.affordable_steps(asked, sae, x) == steps
    assert pipeline.affordable_steps(replace(asked, train_s=None), sae, x) == 40


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in TIMING_KEYS}


@pytest.mark.skipif(not EMBEDDED_MODEL.exists(), reason="the embedded model is not here")
def test_end_to_end_and_the_same_seed_repeats(tmp_path: Path) -> None:
    import fastsae

    page = write(run(small(tmp_path / "a"), silent))
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(report) >= NEEDED
    assert 0 < report["fvu"] < 1
    assert 0 < report["l0"] <= 8
    assert report["ce_clean"] < report["ce_spliced"] < report["ce_zero_ablated"]
    assert 0 < report["loss_recovered"] < 1
    assert report["tokens"] == 20 * 256
    for feature in report["features"]:
        assert feature["top_examples"]
        assert feature["max_activation"] > 0
        assert 0 < feature["density"] < 1
    steering = report["steering"]
    assert steering["strength"] in (1.0, 2.0)
    assert steering["before"].startswith(steering["prompt"])
    assert steering["after"].startswith(steering["prompt"])
    assert {p["method"] for p in steering["sweep"]} == {"clamp", "difference of means"}
    html = page.read_text()
    assert "<script" not in html
    assert "http" not in html.split("<body>")[0]
    sae = fastsae.nn.TopKSAE.from_pretrained(tmp_path / "a" / "sae")
    assert sae.d_sae == 256

    again = run(small(tmp_path / "b"), silent).report()
    assert without_times(json.loads(json.dumps(again))) == without_times(report)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsae", *args], capture_output=True, text=True, timeout=120
    )


def test_a_model_that_is_not_there_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = command("quickstart", "--model", str(tmp_path / "none"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_hubs_retries_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    hub, shown = logging.getLogger("huggingface_hub.utils._http"), []

    def offline(_name: str) -> None:
        shown.append(hub.isEnabledFor(logging.WARNING))  # at which the retries are logged
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    with pytest.raises(UserError, match="cannot load 'org/none': no network"):
        load_subject("org/none")
    assert shown == [False]


@pytest.mark.parametrize(
    "args",
    [
        ["quickstart", "--device", "nope", "--out", "{}"],  # found before any model is loaded
        ["quickstart", "--device", "nope", "--out", "{}/deep/er"],
        ["compare-steering", "--sae", "nope", "--feature", "0", "--out", "{}"],
        ["bench", "--device", "nope", "--json", "{}/b.json"],
        ["bench", "--device", "nope", "--plot", "{}"],
    ],
)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    args: list[str], tmp_path: Path
) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    done = command(*(a.format(taken) for a in args))
    assert done.returncode == 2
    assert f"cannot write to {taken}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert taken.read_text() == "mine"


def test_info_prints_json() -> None:
    done = command("info", "--json")
    assert done.returncode == 0, done.stderr
    assert "topk_encode" in json.loads(done.stdout)["ops"]


def test_info_says_why_a_forced_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAE_BACKEND", "cuda")
    monkeypatch.setenv("COLUMNS", "200")
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert "cuda: the cuda kernels need a GPU tensor, got cpu" in done.stdout


def test_import_brings_in_neither_the_cli_nor_its_packages() -> None:
    code = (
        "import sys, fastsae; bad = {'transformers', 'matplotlib', 'typer', 'jinja2', 'rich', "
        "'fastsae.cli', 'fastsae.quickstart'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_package_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['typer'] = None; import fastsae.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "typer" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>&\n"
    assert "<script" not in flow(evil)
    assert "<script" not in chip(evil)
    assert "↵" in flow(evil)
    assert "<b>" not in line_chart(
        [Series("<b>", [(0.0, 1.0), (1.0, 2.0)])], x_label="<b>", title="<b>"
    )


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(3.0, 3.0) == [3.0]
    assert all(0.013 <= t <= 0.47 for t in ticks(0.013, 0.47))


def report_of_nothing() -> dict[str, Any]:
    return {
        "model": "<m>", "hook": "h", "d_sae": 8, "k": 2, "seed": 0, "tokens": 10,
        "tokens_per_s": 1.0, "speedup_vs_torch": 2.0, "fvu": 0.1, "l0": 2.0, "dead_fraction": 0.0,
        "held_out_tokens": 5, "ce_clean": 1.0, "ce_spliced": 1.1, "ce_zero_ablated": 3.0,
        "loss_recovered": 0.95, "loss_curve": [[1, 0.5], [2, 0.2]], "stats_tokens": 10,
        "features": [], "steering": None, "busy": "", "steps": 3, "steps_planned": 3,
        "timing": {"step_ms": 1.0, "plain_step_ms": 2.0, "threads": 1, "seconds": {}},
    }  # fmt: skip


def test_page_renders_without_steering() -> None:
    html = render(report_of_nothing())
    assert "&lt;m&gt;" in html
    assert "<m>" not in html
    assert "busy" not in html and "because steps were slow" not in html
    slow = report_of_nothing() | {"busy": "threads waited for a core 48% of the time", "steps": 1}
    told = render(slow)
    assert "on a busy machine: threads waited for a core 48%" in told
    assert "Trained for 1 steps of 3, because steps were slow" in told


class _Result:
    """What `write` needs of a Result, with the report given."""

    def __init__(self, out: Path, report: dict[str, Any]) -> None:
        from types import SimpleNamespace

        self.settings = Settings(out=out)
        self.training = SimpleNamespace(sae=TopKSAE(4, 8, 2))
        self.max_activation = MaxActivations(torch.ones(8), 1, "nothing")
        self.report = lambda: report


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    """As when zeroing the layer costs the model nothing, or training diverges."""
    report = report_of_nothing()
    report |= {"loss_recovered": float("nan"), "fvu": float("inf"), "ce_spliced": float("-inf")}
    report["loss_curve"][1][1] = float("nan")
    page = write(_Result(tmp_path, report))  # type: ignore[arg-type]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["loss_recovered"] is read["fvu"] is read["ce_spliced"] is None
    assert read["loss_curve"] == [[1, 0.5], [2, None]]
    assert read["ce_clean"] == 1.0
    assert 'y1="nan"' not in page.read_text()


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(_Result(tmp_path, report_of_nothing()))  # type: ignore[arg-type]
    old = (tmp_path / "report.json").read_text()

    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="no space"):
        write(_Result(tmp_path, report_of_nothing() | {"seed": 1}))  # type: ignore[arg-type]
    monkeypatch.undo()
    assert (tmp_path / "report.json").read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "report.json", "sae"]
