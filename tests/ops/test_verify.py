"""Known answers find faults; a record of them is kept; each runs in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cuda_host
import pytest
import torch
from common import INTERPRETED, ON_HOST
from verified import CPU, LEVELS, ONE, built

from fastsae import _dispatch, _verified
from fastsae._verified import FAILED, PASSED, UNKNOWN, Check, Record, Result
from fastsae.verify import answers, checks


def test_where_records_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for chosen, folder in (
        ("~/x", tmp_path / "x"),
        ("/x", Path("/x")),
        ("", tmp_path / ".cache/fastsae"),
    ):
        monkeypatch.setenv("FASTSAE_CACHE", chosen)
        assert _verified.cache_dir() == folder
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert _verified.cache_dir() == Path("/y/fastsae")


# ---- the answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", answers.SCALES[:2])
@pytest.mark.parametrize("op", _dispatch.OPS)
def test_the_reference_gives_the_known_answers(op, scale):
    """In fp32 too: the sums are exact, whatever the order."""
    from fastsae import reference

    for answer in answers.answers(op, "default", torch.float32, scale):
        if answer.refused:
            continue
        args = checks._arguments(answer, CPU, False, None)
        checks._once(getattr(reference, op), answer, args, None)


@built
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", _dispatch.OPS)
def test_every_cpu_level_gives_the_known_answers(op, level):
    try:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            assert checks.run(Check(op, "cpu", level, dtype), CPU, scale="small") >= 2
    finally:
        torch.ops.fastsae._set_cpu_level("auto")


@pytest.mark.skipif(not ON_HOST, reason="the CUDA kernels run on the GPU here")
@pytest.mark.parametrize("op", [op for op in cuda_host.SOURCES if op != "topk_encode"])
def test_the_cuda_kernels_give_the_known_answers(op):
    why = cuda_host.load()
    if why is not None:
        pytest.skip(why)
    for dtype in ("float32", "bfloat16"):
        assert checks.run(Check(op, "cuda", "default", dtype), CPU, scale="tiny") >= 2


@pytest.mark.skipif(not INTERPRETED, reason="the Triton kernels run on the GPU here")
@pytest.mark.parametrize("op", ["topk", "sparse_decode", "sparse_grad_values"])
def test_interpreted_triton_kernels_give_the_known_answers(op):
    """The others take minutes: `make test-all` runs `fastsae verify`."""
    assert checks.run(Check(op, "triton", "default", "bfloat16"), CPU, scale="tiny") >= 2


def _faults(launch, which):
    """The kernel with a fault put in."""

    def faulty(*args):
        result = launch(*args)
        out = result[0] if isinstance(result, tuple) else args[-1] if result is None else result
        flat = out.view(-1)
        if which == "one unit in the last place" and out.is_floating_point():
            bits = flat.view(torch.int32)
            bits[len(bits) // 2] += 1
        elif which == "nothing written at the end":
            flat[-1] = float("nan") if out.is_floating_point() else 0
        elif which == "ties swapped":
            indices = result[1]
            indices.copy_(indices.flip(1))
        elif which == "written behind the end":
            torch.as_strided(flat, (1,), (1,), flat.storage_offset() + len(flat)).zero_()
        elif which == "written before the beginning":
            torch.as_strided(flat, (1,), (1,), flat.storage_offset() - 1).zero_()
        return result

    return faulty


@built
@pytest.mark.parametrize(
    "op,fault",
    [
        ("sparse_decode", "one unit in the last place"),
        ("sparse_decode", "nothing written at the end"),
        ("sparse_decode", "written behind the end"),
        ("sparse_grad_values", "written before the beginning"),
        ("sparse_grad_weight", "one unit in the last place"),
        ("steer", "written behind the end"),
        ("topk_encode", "ties swapped"),
        ("topk_encode", "written behind the end"),
        ("topk", "ties swapped"),
    ],
)
def test_a_fault_is_found(monkeypatch, op, fault):
    plain = checks.kernel
    monkeypatch.setattr(checks, "kernel", lambda *a: _faults(plain(*a), fault))
    level = torch.ops.fastsae._cpu_level()
    with pytest.raises(checks.WrongError):
        checks.run(Check(op, "cpu", level, "float32"), CPU, scale="small")


# ---- the record -------------------------------------------------------------------------------


def test_a_record_ends_with_a_change_to_a_kernel(monkeypatch, tmp_path):
    """Wherever below the folder of the kernels its file lies."""
    monkeypatch.setattr(_verified, "__file__", str(tmp_path / "_verified.py"))
    found = {_verified._kernels("cuda")}
    for name in ("topk.py", "topk_encode/__init__.py", "topk_encode/fused.py"):
        path = tmp_path / "triton_kernels" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("one")
        found.add(_verified._kernels("cuda"))
        path.write_text("two")
        found.add(_verified._kernels("cuda"))
    assert len(found) == 7


def test_a_record_is_kept_by_device_and_kernels(records, monkeypatch):
    record = Record(CPU)
    assert record[ONE].state == UNKNOWN
    record.write({ONE: Result(PASSED, 0.5)})
    other = ONE._replace(op="steer")
    Record(CPU).write({other: Result(FAILED, 0.1, "wrong: one bit")})
    again = Record(CPU)
    assert again[ONE].state == PASSED and again[other].reason == "wrong: one bit"
    record.refresh()
    assert record[other].state == FAILED  # what another process wrote
    text = json.loads(record.path.read_text())
    assert text["key"]["torch"] == torch.__version__ and len(text["checks"]) == 2
    monkeypatch.setattr(_verified, "key", lambda device: {**record.key, "kernels": "others"})
    assert Record(CPU)[ONE].state == UNKNOWN


def test_a_broken_or_read_only_record_is_no_error(records):
    record = Record(CPU)
    record.path.parent.mkdir(parents=True)
    record.path.write_text('{"checks": [{"op"')
    assert Record(CPU)[ONE].state == UNKNOWN
    blocked = Record(CPU)
    blocked.path = Path("/proc/none/x.json")
    blocked.write({ONE: Result(PASSED)})
    assert blocked[ONE].state == PASSED  # in this process


# ---- processes of their own -------------------------------------------------------------------


def test_a_fault_ends_only_its_own_check(workers):
    names = ("topk", "steer", "sparse_decode", "topk_member", "topk_encode")
    wanted = [Check(name, "cpu", "portable", "float32") for name in names]
    faults = {":".join(wanted[1]): "crash", ":".join(wanted[2]): "wrong",
              ":".join(wanted[3]): "raise"}  # fmt: skip
    told = []
    found = workers(wanted, faults, on_result=lambda check, result: told.append(check))
    states = [found[c].state for c in wanted]
    assert states == [PASSED, FAILED, FAILED, FAILED, PASSED] and told == wanted
    reasons = [found[c].reason for c in wanted]
    assert "SIGSEGV" in reasons[1] and reasons[2] == "wrong: one bit"
    assert reasons[3] == "RuntimeError: CUDA error: an illegal memory access was encountered"


PARENT = """
from fastsae import _isolated
_isolated.rows("faulty_worker", ["sparse_decode:cpu:portable:float32"], print, limit_s=500)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks the child up in /proc")
def test_a_check_ends_with_the_process_that_asked_for_it(workers, monkeypatch):
    """SIGTERM leaves a parent no time to kill its child."""
    monkeypatch.setenv("FAULTS", json.dumps({":".join(ONE): "hang"}))
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            while "running" not in parent.stdout.readline():  # the child hangs from there on
                assert parent.poll() is None
            assert _processes("faulty_worker")
        finally:
            parent.terminate()
    deadline = time.monotonic() + 20
    while children := _processes("faulty_worker"):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)


def _processes(argument):
    """Ids of the processes with this argument that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if argument in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                found.append(int(folder.name))
    return found


def test_the_child_finds_what_its_parent_finds(workers, tmp_path, monkeypatch):
    """Not a folder called fastsae where it runs, nor a module with the name of one of Python's."""
    (tmp_path / "fastsae").mkdir()
    for name in ("fastsae/__init__.py", "queue.py", "json.py", "runpy.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert workers([ONE], {})[ONE].state == PASSED


def test_a_signal_from_outside_is_no_verdict(workers):
    found = workers([ONE], {":".join(ONE): "killed"})
    assert found[ONE].state == UNKNOWN and "SIGKILL" in found[ONE].reason


def test_a_check_that_hangs_is_stopped(workers):
    wanted = [ONE, ONE._replace(op="steer")]
    found = workers(wanted, {":".join(ONE): "hang"}, limit_s=25)
    assert [found[c].state for c in wanted] == [FAILED, PASSED]
    assert found[ONE].reason == "nothing came for 25 s; stopped"


def test_what_cannot_be_checked_is_unknown(workers, monkeypatch):
    assert workers([ONE], {"start": "impossible"})[ONE].state == UNKNOWN
    result = workers([ONE], {":".join(ONE): "memory"})[ONE]
    assert result.state == UNKNOWN and "none left" in result.reason
    monkeypatch.setattr(sys, "executable", "")
    assert "executable" in workers([ONE], {})[ONE].reason


# ---- the command ------------------------------------------------------------------------------


@built
def test_the_command_checks_every_level_and_records_it(records, tmp_path):
    target = tmp_path / "rows.json"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "fastsae.verify", "--op", "sparse_decode", "--op", "topk",
         "--device", "cpu", "--json", str(target)],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(target.read_text())["checks"]
    native = [r for r in rows if not r["interpreted"]]
    assert {r["design"] for r in native} == set(LEVELS) and len(native) == 8 * len(LEVELS)
    assert all(r["passed"] for r in rows) and f"{len(rows)} of {len(rows)} checks" in done.stdout
    assert Record(CPU)[ONE].state == PASSED


def test_the_command_refuses_what_it_does_not_know(records):
    from fastsae.verify import report

    with pytest.raises(ValueError, match="unknown op 'encode'"):
        report.report(["encode"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no cuda:3"):
            report.report([], "cuda:3")
