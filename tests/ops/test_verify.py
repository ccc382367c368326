"""Known answers find faults; a record is kept; dispatch uses only what has been proved."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import cuda_host
import pytest
import torch
from common import INTERPRETED, ON_HOST

import fastsae
from fastsae import _dispatch, _library, _verified, ops
from fastsae._verified import FAILED, PASSED, RUNNING, UNKNOWN, Check, Record, Result
from fastsae.verify import answers, checks, first_use, run, worker

CPU = torch.device("cpu")
BUILT = _library.CPU_MISSING is None
LEVELS = torch.ops.fastsae._cpu_levels().split() if BUILT else []
built = pytest.mark.skipif(not BUILT, reason=str(_library.CPU_MISSING))
ONE = Check("sparse_decode", "cpu", "portable", "float32")


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


# ---- dispatch on a CPU ------------------------------------------------------------------------


def decode():
    values, indices = torch.tensor([[2.0]]), torch.tensor([[1]], dtype=torch.int32)
    return ops.sparse_decode(values, indices, torch.tensor([[1.0], [3.0]]))


@built
def test_a_level_is_checked_once_on_a_processor(records, monkeypatch):
    asked = []
    verdict = worker.verdict
    monkeypatch.setattr(
        worker, "verdict", lambda c, *a, **k: (asked.append(c), verdict(c, *a, **k))[1]
    )
    for _ in range(2):
        assert decode().item() == 6
    assert asked == [Check("sparse_decode", "cpu", torch.ops.fastsae._cpu_level(), "float32")]
    _verified.record.cache_clear()
    _dispatch.forget()  # as another process would find it
    decode()
    assert len(asked) == 1
    info = fastsae.info()
    assert info["cpu_kernels"]["checked"][asked[0].design] == "passed 1 of 36 checks"
    assert f"{asked[0].design}: passed" in fastsae.explain("sparse_decode")
    assert "unknown: checked at first use" in fastsae.explain("steer")


@built
@pytest.mark.skipif(len(LEVELS) < 2, reason="only the portable level here")
def test_a_level_that_fails_is_not_used(records):
    below, best = LEVELS[-2:]
    torch.ops.fastsae._set_cpu_level(best)
    failing = Check("sparse_decode", "cpu", best, "float32")
    _verified.record(CPU).write({failing: Result(FAILED, reason="wrong: one bit")})
    told = fastsae.explain("sparse_decode")
    assert f"C++ level: {below}" in told and "sparse_decode on cpu, torch.float32: cpu" in told
    with pytest.warns(
        fastsae.KernelCheckWarning, match=f"sparse_decode cpu/{best}.*wrong: one bit"
    ):
        assert decode().item() == 6
    assert torch.ops.fastsae._cpu_level() == below
    assert _verified.record(CPU)[failing._replace(design=below)].state == PASSED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode()  # it warns once


@built
def test_where_every_level_fails_the_reference_is_taken(records):
    before = torch.ops.fastsae._cpu_level()
    level = {Check("sparse_decode", "cpu", name, "float32"): Result(FAILED) for name in LEVELS}
    _verified.record(CPU).write(level)
    with pytest.warns(fastsae.KernelCheckWarning):
        assert decode().item() == 6
    assert _dispatch.backend_of("sparse_decode", torch.zeros(1)) == "reference"
    assert "cpu: failed its known-answer check" in fastsae.explain("sparse_decode")
    assert torch.ops.fastsae._cpu_level() == before  # the other ops keep it
    with fastsae.use_backend("cpu"):  # forced: not asked
        assert _dispatch.backend_of("sparse_decode", torch.zeros(1)) == "cpu"


@built
def test_a_check_that_ended_its_process_twice_is_not_repeated(records):
    """Once may have been a signal from outside."""
    check = Check("sparse_decode", "cpu", torch.ops.fastsae._cpu_level(), "float32")
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = first_use._Note.of_this_process()
    left = own._replace(pid=gone.pid, start=first_use._start(gone.pid))
    assert left.is_alive()
    gone.communicate(b"\n")
    assert not left.is_alive()
    for note, ended in (
        (left, PASSED), (left._replace(ended=1), FAILED), (own, PASSED),
        (left._replace(boot="another machine's or container's", ended=1), PASSED),  # not ours
        (own._replace(start="1"), PASSED), (own._replace(start="1", ended=1), FAILED),  # pid reused
        ("4711", PASSED),
    ):  # fmt: skip
        _verified.record(CPU).write({check: Result(RUNNING, reason=str(note))})
        result = first_use.check([check], CPU)[check]
        assert result.state == ended and (ended == PASSED or "twice" in result.reason), note


@built
def test_ctrl_c_waits_for_the_check(records, monkeypatch):
    verdict = worker.verdict

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return verdict(*args, **options)

    monkeypatch.setattr(worker, "verdict", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job with & ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            decode()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    check = Check("sparse_decode", "cpu", torch.ops.fastsae._cpu_level(), "float32")
    assert Record(CPU)[check].state == PASSED
    monkeypatch.setattr(worker, "verdict", verdict)
    assert decode().item() == 6


@built
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        TypeError("patched"),
    ],
    ids=["memory", "other"],
)
def test_an_error_of_this_process_is_no_verdict_on_a_level(records, monkeypatch, error):
    def raises(*args, **options):
        raise error

    monkeypatch.setattr(checks, "run", raises)
    with pytest.warns(fastsae.KernelCheckWarning, match="has not been checked"):
        assert decode().item() == 6
    assert not [r for r in Record(CPU).results.values() if r.state == FAILED]


@built
def test_a_check_sees_no_default_device(records):
    torch.set_default_device("meta")
    try:
        values = torch.tensor([[2.0]], device="cpu")
        indices = torch.tensor([[1]], dtype=torch.int32, device="cpu")
        weight = torch.tensor([[1.0], [3.0]], device="cpu")
        assert ops.sparse_decode(values, indices, weight).item() == 6
        latents = torch.zeros(1, 1, dtype=torch.int32, device="cpu")
        assert ops.topk_member(torch.ones(1, 1, device="cpu"), weight, None, latents, 2).item()
    finally:
        torch.set_default_device(None)
    states = {r.state for r in Record(CPU).results.values()}
    assert states == {PASSED}


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_checks_see_no_default_dtype(records, dtype):
    torch.set_default_dtype(dtype)
    try:
        _dispatch.select("sparse_adam_step", torch.zeros(1, dtype=torch.float32))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert {r.state for r in Record(CPU).results.values()} == {PASSED}


@built
@pytest.mark.skipif(len(LEVELS) < 2, reason="only the portable level here")
def test_what_could_not_be_checked_once_lowers_no_level(records, monkeypatch):
    torch.ops.fastsae._set_cpu_level(LEVELS[-1])
    verdict = worker.verdict
    monkeypatch.setattr(worker, "verdict", lambda *a, **k: (UNKNOWN, 0.0, "no memory"))
    with pytest.warns(fastsae.KernelCheckWarning, match="no memory"):
        assert decode().item() == 6  # by the reference
    assert torch.ops.fastsae._cpu_level() == LEVELS[-1]
    monkeypatch.setattr(worker, "verdict", verdict)
    _dispatch._put_off.clear()  # a minute later
    decode()
    assert _dispatch.backend_of("sparse_decode", torch.zeros(1)) == "cpu"
    assert torch.ops.fastsae._cpu_level() == LEVELS[-1]


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_while_another_thread_chooses_can_choose(records):
    code = """
import os, sys, threading, torch, fastsae
from fastsae import _dispatch
held = threading.Event()
def hold():
    with _dispatch._choosing:
        held.set()
        threading.Event().wait(20)
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    _dispatch.select("topk", torch.zeros(1))
    os._exit(7)
threading.Timer(15, os.kill, (child, 9)).start()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""
    env = {**os.environ, "FASTSAE_CACHE": str(records), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.stdout.strip() == "7", done.stderr


@built
def test_the_first_use_loads_no_compiler(records):
    """torch._dynamo takes a second to import."""
    code = (
        "import sys, torch, fastsae\nbefore = set(sys.modules)\n"
        "fastsae.ops.topk(torch.ones(2, 3), 1)\n"
        "print([m for m in sys.modules if m not in before and 'dynamo' in m])"
    )
    env = {**os.environ, "FASTSAE_CACHE": str(records), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.strip() == "[]" and list((records / "verified").glob("*.json"))


@built
def test_checks_do_not_see_the_callers_modes(records):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "fastsae" in func._schema.name or not seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    values, indices = torch.tensor([[2.0]]), torch.tensor([[1]], dtype=torch.int32)
    W = torch.tensor([[1.0], [3.0]])
    with torch.inference_mode(), Refuse():
        ops.sparse_decode(values, indices, W)
    assert len(seen) < 30  # the call's own, not those of a hundred checks


# ---- dispatch on a GPU, played by the interpreter and by surrogates ---------------------------


@pytest.fixture
def as_on_a_gpu(records, monkeypatch):
    """The order of a GPU for CPU tensors, without the C++ kernels."""
    if not INTERPRETED or _dispatch._missing("topk_encode", "triton", CPU, torch.float32):
        pytest.skip("the Triton kernels are not interpreted here")
    order = {"cpu": ("triton", "reference")}
    monkeypatch.setattr(_dispatch, "ORDER", dict.fromkeys(_dispatch.OPS, order))
    return _verified.record(CPU)


def encode(dtype=torch.float32):
    x = torch.eye(4, 16, dtype=dtype)
    W = torch.arange(32 * 16).view(32, 16).remainder(7).to(dtype)
    return ops.topk_encode(x, W, None, 2)


def _encode_checks(**states):
    return {
        Check("topk_encode", "triton", design, "float32"): Result(state, reason="wrong")
        for design, state in states.items()
    }


def test_a_design_that_failed_is_not_used(as_on_a_gpu, monkeypatch):
    as_on_a_gpu.write(_encode_checks(bounded=FAILED, chunked=PASSED))
    used = []
    module = _dispatch._triton_module("topk_encode")
    launch = module.topk_encode
    monkeypatch.setattr(module, "topk_encode", lambda *a, trusted=None: (
        used.append(trusted), launch(*a, trusted=trusted))[1])  # fmt: skip
    with pytest.warns(fastsae.KernelCheckWarning, match="topk_encode triton/bounded float32"):
        values, _ = encode()
    assert used == [frozenset({"chunked"})]
    with fastsae.use_backend("reference"):
        assert torch.equal(encode()[0], values)


def test_an_op_on_another_uses_its_proved_designs_only(as_on_a_gpu, monkeypatch):
    """topk_member is topk_encode and a comparison."""
    member = Check("topk_member", "triton", "default", "float32")
    x, W = torch.eye(4, 16), torch.arange(32 * 16).view(32, 16).remainder(7).float()
    latents = torch.zeros(4, 1, dtype=torch.int32)
    given = []
    module = _dispatch._triton_module("topk_member")
    launch = module.topk_member
    monkeypatch.setattr(module, "topk_member", lambda *a, trusted=None: (
        given.append(trusted), launch(*a, trusted=trusted))[1])  # fmt: skip
    as_on_a_gpu.write({member: Result(PASSED), **_encode_checks(bounded=FAILED, chunked=PASSED)})
    ops.topk_member(x, W, None, latents, 8)
    assert given == [frozenset({"chunked"})]
    _dispatch.forget()
    as_on_a_gpu.write(_encode_checks(bounded=FAILED, chunked=FAILED))
    told = fastsae.explain("topk_member", x, W, None, latents, 8)
    assert "float32: reference\n" in told
    assert "triton: the kernel that it calls failed its known-answer check" in told
    assert _dispatch.backend_of("topk_member", x) == "reference"
    _dispatch.forget()
    as_on_a_gpu.write(_encode_checks(bounded=UNKNOWN, chunked=UNKNOWN))
    with monkeypatch.context() as patched:
        patched.setattr(
            first_use, "check", lambda cs, d: {c: Result(UNKNOWN, reason="busy") for c in cs}
        )
        assert "float32: triton\n" in fastsae.explain("topk_member", x, W, None, latents, 8)
        assert _dispatch.backend_of("topk_member", x) == "reference"
        told = fastsae.explain("topk_member", x, W, None, latents, 8)
        assert "float32: reference\n" in told and "it calls could not be checked" in told
        told = fastsae.explain("topk_encode", x, W, None, 8)
        assert "float32: reference\n" in told
        assert "chunked: not checked: busy; tried again in 60 s" in told
    as_on_a_gpu.write(_encode_checks(bounded=PASSED, chunked=PASSED))
    assert _dispatch.backend_of("topk_member", x) == "triton"  # nothing was kept
    _dispatch.forget()
    as_on_a_gpu.write(_encode_checks(bounded=PASSED, chunked=FAILED))
    ops.topk_member(x, W, None, latents, 8)  # too narrow for the bounds: the reference
    assert len(given) == 1
    told = fastsae.explain("topk_member", x, W, None, latents, 8)
    assert "float32: reference\n" in told
    assert "topk_encode bounded: it pays from D = 64 and F = 192 on, not at 16 and 32" in told
    assert "topk_encode chunked: failed: wrong" in told


def test_a_call_that_only_a_failed_design_takes_goes_to_the_next_backend(as_on_a_gpu, monkeypatch):
    as_on_a_gpu.write(_encode_checks(bounded=PASSED, chunked=FAILED))
    module = _dispatch._triton_module("topk_encode")
    monkeypatch.setattr(module, "topk_encode", None)  # would fail
    with pytest.warns(fastsae.KernelCheckWarning, match="chunked"):
        encode()  # too narrow for the bounds
    assert _dispatch.backend_of("topk_encode", torch.zeros(1)) == "triton"  # for those that fit


def test_unknown_designs_are_checked_in_a_process_of_their_own(as_on_a_gpu, workers, monkeypatch):
    failing = Check("topk_encode", "triton", "bounded", "float32")
    monkeypatch.setenv("FAULTS", json.dumps({":".join(failing): "crash"}))
    with pytest.warns(fastsae.KernelCheckWarning, match="SIGSEGV"):
        encode()
    known = _verified.record(CPU)
    assert known[failing].state == FAILED
    assert known[failing._replace(design="chunked")].state == PASSED
    assert Record(CPU)[failing].state == UNKNOWN  # interpreted: of this process only


def test_what_cannot_be_checked_now_takes_the_reference_or_says_so(
    as_on_a_gpu, workers, monkeypatch
):
    monkeypatch.setenv("FAULTS", json.dumps({"start": "impossible"}))
    with pytest.warns(fastsae.KernelCheckWarning, match="has not been checked.*fastsae verify"):
        encode()
    monkeypatch.setattr(first_use, "_free", lambda device: 10)
    with pytest.raises(RuntimeError, match=r"the reference in its place needs.*fastsae verify"):
        encode()
    monkeypatch.setenv("FAULTS", "{}")  # nothing was kept of the failure to check but when it was
    started = []
    rows = run._isolated.rows
    monkeypatch.setattr(
        run._isolated, "rows", lambda *a, **k: (started.append(1), rows(*a, **k))[1]
    )
    monkeypatch.setattr(first_use, "_free", lambda device: 1 << 40)
    for _ in range(3):
        encode()
    assert not started  # a process for each call would be a second for each
    monkeypatch.setattr(_dispatch, "_PUT_OFF_S", 0.0)
    _dispatch._put_off.clear()
    encode()
    assert _dispatch.backend_of("topk_encode", torch.zeros(1)) == "triton"


def test_a_design_that_was_asked_for_must_be_proved(as_on_a_gpu, monkeypatch):
    check = Check("topk_encode", "triton", "fp8", "float32")
    as_on_a_gpu.write(_encode_checks(bounded=PASSED, chunked=PASSED))
    as_on_a_gpu.write({check: Result(FAILED, reason="wrong: one bit")})
    x, W = torch.zeros(2, 16), torch.zeros(8, 16)
    with pytest.raises(
        RuntimeError, match="'fp8' was asked for and cannot run: it is not proved.*one bit"
    ):
        ops.topk_encode(x, W, None, 2, design="fp8")
    as_on_a_gpu.write({check: Result(PASSED)})
    ops.topk_encode(x, W, None, 2, design="fp8")


def test_old_gpus_take_the_reference(monkeypatch):
    """Keyed by capability and by device, not by its kind."""
    _dispatch.forget()
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    capability = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[d.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: f"GPU {d.index}")
    monkeypatch.setattr(_dispatch, "GUARDED", set())
    try:
        why = _dispatch._missing("sparse_decode", "triton", old, torch.float32)
        assert why == "GPU 0 is sm_75; the GPU kernels need sm_80 or later"
        assert _dispatch._missing("sparse_decode", "triton", new, torch.float32) is None
        take = partial(_dispatch.chosen, "sparse_decode", dtype=torch.float32)
        assert take(device=old) == "reference" and take(device=new) == "triton"
    finally:
        _dispatch.forget()


def test_the_library_is_asked_whether_it_has_code_for_a_gpu(monkeypatch):
    _dispatch.forget()
    monkeypatch.setattr(_library, "CUDA_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    lib = torch.library.Library("fastsae", "IMPL")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "fastsae::_cuda_image", "CompositeExplicitAutograd"
    ):
        lib.impl(
            "_cuda_image",
            lambda device: "no kernel image is available" if device else "",
            "CompositeExplicitAutograd",
        )
    try:
        assert _dispatch._no_image(torch.device("cuda", 0)) is None
        why = _dispatch._no_image(torch.device("cuda", 1))
        assert why == "the CUDA library has no code for this GPU: no kernel image is available"
    finally:
        lib._destroy()
        _dispatch.forget()


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
