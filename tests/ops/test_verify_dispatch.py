"""Dispatch uses only kernels that have been proved on the device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from common import INTERPRETED, ON_HOST
from verified import CPU, LEVELS, built

import fastsae
from fastsae import _dispatch, _explain, _library, _verified, ops
from fastsae._verified import FAILED, PASSED, RUNNING, UNKNOWN, Check, Record, Result
from fastsae.verify import checks, first_use, run, worker

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
        take = partial(_explain.chosen, "sparse_decode", dtype=torch.float32)
        assert take(device=old) == "reference" and take(device=new) == "triton"
    finally:
        _dispatch.forget()


@pytest.mark.skipif(not ON_HOST, reason="the library itself answers")
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
