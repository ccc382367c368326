"""benchmarks/gpu_suite.sh without a GPU: its stages, its refusal, and that it resumes."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastsae import _dispatch

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks/gpu_suite.sh"
pytestmark = pytest.mark.skipif(
    not (SUITE.exists() and shutil.which("bash") and shutil.which("timeout")),
    reason="needs a checkout, bash and timeout",
)

# stands for the interpreter and for compute-sanitizer: notes its arguments, fails where told to
FAKE = """#!/bin/sh
echo "$(basename "$0") $@" >> "$CALLS"
case "$*" in *"${HANG:-nothing}"*)
  setsid sleep 300 &
  echo $! > "$CALLS.worker"
  sleep 300 ;;
esac
case "$*" in *"${FAIL:-nothing}"*) exit 7 ;; esac
"""
EVERY = ["hopper", "bench", "encode", "grid", "gather", "step", "largest", "report"]


@pytest.fixture
def suite(tmp_path):
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments: str, script: Path = SUITE, **environment: str):
        calls.write_text("")
        env = {
            **os.environ, "PYTHON": str(tmp_path / "python"), "CALLS": str(calls),
            "DEVICE_CHECK": "true", "STATE": str(tmp_path / "state"), "BUDGET": "100000",
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment,
        }  # fmt: skip
        env.pop("GPU_SUITE_STAGE", None)
        done = subprocess.run(
            ["bash", str(script), *arguments], capture_output=True, text=True, env=env, check=False
        )
        pieces = re.findall(r"gpu_targets\.py (\w+)", calls.read_text())
        return done, pieces, calls.read_text()

    return run


def limits(suite):
    done, _, calls = suite("--dry-run")
    assert done.returncode == 0 and not calls
    return {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


def test_the_script_parses_and_fits_two_runs_of_ten_minutes(suite):
    subprocess.run(["bash", "-n", str(SUITE)], check=True)
    found = limits(suite)
    assert list(found)[:4] == ["build", "warm", "verify", "sanitizer"] and len(found) == 14
    runs, budget = [0], 580
    for limit in found.values():  # as the script packs them when every stage takes its limit
        if runs[-1] + limit > budget:
            runs.append(0)
        runs[-1] += limit
    assert len(runs) == 2 and max(runs) <= budget


def test_what_it_names_exists():
    text = SUITE.read_text()
    listed = {
        name: re.search(rf'^{name}="([^"]*)"', text, re.M)[1].split() for name in ("ops", "tests")
    }
    assert sorted(listed["ops"]) == sorted(_dispatch.OPS)
    for name in listed["tests"]:
        assert (ROOT / f"tests/{name}.py").is_file(), name
    by_device = {
        str(p.relative_to(ROOT / "tests").with_suffix(""))
        for p in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^from common import .*\bdevice_of\b", p.read_text(), re.M)
    }
    assert by_device <= set(listed["tests"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_and_a_status(suite):
    done, _, _ = suite(PYTHON=sys.executable, DEVICE_CHECK="")
    assert done.returncode == 3 and not done.stdout
    assert "no GPU" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_option_is_refused(suite):
    done, _, calls = suite("--quick")
    assert done.returncode == 2 and "unknown option --quick" in done.stderr and not calls


def test_it_resumes_where_it_stopped(suite):
    done, pieces, calls = suite(FAIL="gpu_targets.py grid")
    assert done.returncode == 1 and pieces == EVERY  # the others still ran
    assert "setup.py build_ext --inplace" in calls and "-m pytest" in calls
    assert calls.index("verify --device cuda --json") < calls.index("compute-sanitizer")
    assert calls.index("compute-sanitizer") < calls.index("gpu_targets.py hopper")
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert calls.count(f"compute-sanitizer --tool {tool}") == len(_dispatch.OPS)
    assert "grid: failed with status 7" in done.stderr
    listed = suite("--dry-run")[0].stdout.splitlines()
    assert [line.split()[0] for line in listed if "done" not in line] == ["grid"]

    done, pieces, calls = suite()
    assert done.returncode == 0 and pieces == ["grid", "report"]
    assert "setup.py" not in calls and "encode: done before" in done.stdout

    done, pieces, _ = suite("--fresh")
    assert done.returncode == 0 and pieces == EVERY


def test_parts_of_a_stage_resume_too(suite):
    done, _, calls = suite(FAIL="--tool racecheck --error-exitcode 1")
    assert done.returncode == 1 and "sanitizer: failed with status" in done.stderr
    assert re.search(r"== failed with status 7: .*compute-sanitizer --tool racecheck", done.stdout)
    done, _, calls = suite()
    assert (
        done.returncode == 0
        and "memcheck" not in calls
        and calls.count("racecheck") == len(_dispatch.OPS)
    )

    done, _, calls = suite("--fresh", FAIL="tests/ops/test_steer.py")
    assert done.returncode == 1 and "tests: failed" in done.stderr
    done, _, calls = suite()
    assert re.findall(r"tests/([\w/]+)\.py", calls) == ["ops/test_steer"]


def test_what_failed_to_warm_is_told_by_verify(suite):
    done, pieces, _ = suite(FAIL="fastsae verify")
    assert done.returncode == 2 and pieces == EVERY  # verify itself, and the sanitizer's none
    assert "verify: failed with status 7" in done.stderr


def test_stages_that_do_not_fit_wait_for_the_next_run(suite):
    # nothing takes any time here: what counts is whether a limit fits in all
    done, pieces, _ = suite(BUDGET="110")
    assert done.returncode == 64 and not pieces
    assert "for the next run: verify" in done.stdout
    assert "== build" in done.stdout and "== warm" in done.stdout
    done, pieces, _ = suite()
    assert done.returncode == 0 and pieces == EVERY


def test_a_stage_over_its_limit_ends_with_all_that_it_started(suite, tmp_path):
    """Also with a worker in a session of its own, which holds the device."""
    quick = tmp_path / "benchmarks" / "gpu_suite.sh"
    quick.parent.mkdir()
    text = SUITE.read_text()
    assert "gather:" in text
    quick.write_text(re.sub(r"gather:\d+", "gather:2", text))
    quick.chmod(0o755)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    done, pieces, _ = suite(script=quick, HANG="gpu_targets.py gather")
    assert done.returncode == 1 and pieces == EVERY
    assert "gather: failed with status 124" in done.stderr
    worker = int((tmp_path / "calls.worker").read_text())
    for _ in range(50):
        stat = Path(f"/proc/{worker}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is left")


def test_the_report_holds_every_target_and_leaves_unmeasured_cells_empty(tmp_path):
    row = {
        "op": "topk_encode", "N": 64, "D": 32, "F": 512, "K": 4, "dtype": "bfloat16",
        "ms": 1.0, "p20": 0.9, "p80": 1.1, "tflops": 1.0, "gbps": 1.0, "verified": True, "note": "",
    }  # fmt: skip
    own = {**row, "backend": "cuda", "of_product": 1.25, "peak_mb": 33.0}
    slow = {**row, "backend": "reference", "ms": 9.0, "of_product": 9.0, "peak_mb": 900.0}
    eager = {**row, "backend": "eager", "ms": 3.0}
    machine = {"date": "2026-01-02", "commit": "abc+", "gpu": "NVIDIA H200"}
    limits = {"tflops": 2.0, "copy_gbps": 2.0, "gather_gbps": 2.0}
    likely = {**own, "backend": "triton fp8", "of_product": 0.75, "recall": 1.0}
    encode = {"rows": [own, slow, likely], "machine": machine, "ceilings": limits}
    grid = {"rows": [{**row, "backend": "auto", "ms": 1.5, "peak_mb": 40.0}, eager]}
    (tmp_path / "encode.json").write_text(json.dumps(encode))
    (tmp_path / "grid.json").write_text(json.dumps({**grid, "machine": machine}))
    forced = {"rows": [{**own, "backend": "triton hopper"}], "machine": machine}
    (tmp_path / "hopper.json").write_text(json.dumps(forced))
    command = [sys.executable, str(ROOT / "benchmarks/gpu_targets.py"), "report"]
    command += ["--state", str(tmp_path), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = json.loads((tmp_path / "results/h200/2026-01-02-abc.json").read_text())
    cells = [t["reached"] for t in whole["targets"]]
    assert cells[:7] == ["1.250", "–", "0.750", "1.0000000", "2.00 of 1 shapes", "2.00", "40"]
    assert set(cells[7:]) == {"–"} and len(cells) == 15
    assert "0.50 of the product's TFLOP/s" in done.stdout
    assert "triton hopper" in done.stdout and set(whole["pieces"]) == {"encode", "grid", "hopper"}


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_targets")


def step_row(backend, **more):
    row = {"op": "training_step", "backend": backend, "N": 64, "D": 32, "F": 512, "K": 4}
    return {**row, "dtype": "float32", "verified": True, "note": "", **more}


def test_a_piece_keeps_its_rows_as_they_come_and_tries_again_what_failed(targets, tmp_path):
    out = tmp_path / "step.json"
    names = ["fastsae", "fastsae, 8-bit moments and masters", "dense compiled", "sparsify"]
    before = [step_row(n) for n in names]
    before[1] = step_row(names[1], error="out of memory", verified=False)
    out.write_text(json.dumps({"rows": before}))
    targets.main(["step", "--device", "cpu", "--quick", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert rows[:3] == [before[0], *before[2:]]  # as they were
    assert [r["backend"] for r in rows[3:]] == [names[1], "dense eager"]
    assert all(r["verified"] and r["ms"] > 0 for r in rows[3:])


def test_the_largest_dictionary_is_tried_with_dense_code_too(targets, tmp_path):
    out = tmp_path / "largest.json"
    targets.main(["largest", "--device", "cpu", "--quick", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["backend"], r["verified"]) for r in rows] == [
        ("fastsae", True),
        ("dense eager", True),
    ]
    # what dense code reached is no result of ours
    rows[0]["verified"] = False
    assert targets.reached({"encode": {"rows": []}, "largest": {"rows": rows}})[-1] == "–"


@pytest.mark.parametrize("backend", ["triton fused", "cuda", "fastsae, 8-bit moments and masters"])
def test_a_wrong_row_of_ours_fails_the_piece(targets, backend):
    wrong = step_row(backend, wrong="wrong, not timed")
    peers = [step_row(n, error="ImportError") for n in ("eager", "sparsify", "dense eager")]
    assert targets.run.bad(targets.own([wrong, *peers, step_row("cuda")])) == [wrong]


def test_recall_counts_what_was_found_in_any_order(targets):
    exact, found = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 2, 1], [4, 5, 7]])
    assert targets.run.recall(exact, exact) == 1.0 and targets.run.recall(exact, found) == 5 / 6
