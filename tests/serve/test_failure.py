"""`fastsae serve` when the device is lost: every client hears it, and the process ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from fastsae.serve.engine import (
    ClosedError,
    Engine,
    Event,
    FullError,
    Sampling,
    is_device_lost,
)
from fastsae.steer import clamp

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(temperature=0.0)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
Accelerator = getattr(torch, "AcceleratorError", RuntimeError)


class Device:
    """Once it is lost, whatever touches it raises; notes what does."""

    def __init__(self, error):
        self.error, self.lost, self.touched = error, False, []

    def touch(self, what):
        self.touched.append(what)
        if self.lost:
            raise self.error


class Model(torch.nn.Module):
    """Writes token 1 for ever; the device is lost in a given call."""

    def __init__(self, device, fails_in):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.device, self.left = device, fails_in
        self.slow = threading.Event()

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        self.slow.wait(20)
        self.left -= 1
        self.device.lost |= self.left < 0
        self.device.touch("model")
        keys = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        past_key_values.update(keys, keys, 0)
        logits = torch.zeros(len(input_ids), 1, 4)
        logits[..., 1] = 1
        return SimpleNamespace(logits=logits)


class Steerer:
    def __init__(self, device):
        self.device = device

    def check(self, program):
        pass

    def set(self, programs):
        self.device.touch("set")

    def clear(self):
        self.device.touch("clear")


class Reader:
    def __init__(self):
        self.ends, self.done = [], threading.Event()

    def __call__(self, event: Event):
        if event.token is None:
            self.ends.append(event)
            self.done.set()


def started(error, fails_in, rows=2, steered=True):
    device = Device(error)
    model = Model(device, fails_in)
    engine = Engine(model, Steerer(device) if steered else None, rows=rows, waiting=8)
    return engine, model, device


@pytest.mark.parametrize("steered", [True, False], ids=["steered", "plain"])
@pytest.mark.parametrize("fails_in", [0, 1, 5], ids=["first prompt", "first step", "later"])
@pytest.mark.parametrize("error", [Accelerator(ILLEGAL), RuntimeError(ILLEGAL)], ids=["own", "old"])
def test_every_client_hears_that_the_device_is_lost(error, fails_in, steered):
    engine, model, device = started(error, fails_in, steered=steered)
    failed = threading.Event()
    engine.on_failure = failed.set
    program = [clamp(0, 1.0)] if steered else None
    readers = [Reader() for _ in range(7)]  # two run, five wait
    for i, reader in enumerate(readers):
        engine.submit([3] * (i + 1), reader, program=program, max_tokens=50, sampling=GREEDY)
    model.slow.set()
    for reader in readers:
        assert reader.done.wait(10), "a client waits for ever"
    assert failed.wait(10)
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    assert [[e.error for e in r.ends] for r in readers] == [
        [f"{type(error).__name__}: {ILLEGAL}"]
    ] * 7
    assert engine.load == 0 and ILLEGAL in engine.failure
    with pytest.raises(ClosedError):
        engine.submit([1], Reader())
    assert device.touched.index("model") >= 0
    lost = [w for w in device.touched if w == "model"]
    assert len(lost) == fails_in + 1 and device.touched[-1] == "model"  # nothing after the error
    engine.close()


def test_what_fails_while_order_is_restored_ends_the_server_too():
    """An ordinary error of the model, then one of the device in the handler."""
    engine, model, _device = started(RuntimeError("anything"), 2)
    engine.steerer.clear = lambda: (_ for _ in ()).throw(ValueError("no such table"))
    readers = [Reader() for _ in range(5)]
    for reader in readers:
        engine.submit([3], reader, max_tokens=50, sampling=GREEDY)
    model.slow.set()
    for reader in readers:
        assert reader.done.wait(10), "a client waits for ever"
    engine._thread.join(10)
    errors = [r.ends[0].error for r in readers]
    assert errors[:2] == ["RuntimeError: anything"] * 2  # the batch; then those that waited
    assert errors[2:] == ["ValueError: no such table"] * 3
    assert all(len(r.ends) == 1 for r in readers) and engine.failure == errors[2]
    with pytest.raises(ClosedError):
        engine.submit([1], Reader())


@pytest.mark.parametrize("where", ["_leave", "_admitted", "_take"])
def test_no_row_is_lost_wherever_the_device_is(where):
    engine, model, _ = started(None, 10**9)
    model.slow.set()
    calls = []

    def fails(*args):
        calls.append(1)
        if len(calls) > 3:
            raise Accelerator(ILLEGAL)
        return original(*args)

    original = getattr(engine, where)
    readers = [Reader() for _ in range(6)]
    for n, reader in enumerate(readers):
        engine.submit([3], reader, max_tokens=2 + n, sampling=GREEDY)
    setattr(engine, where, fails)
    for reader in readers:
        assert reader.done.wait(10), "a client waits for ever"
    engine._thread.join(10)
    assert all(len(r.ends) == 1 for r in readers) and engine.load == 0
    engine.close()


def test_other_errors_are_the_batch_s_own():
    engine, model, device = started(RuntimeError("CUDA out of memory"), 2)
    model.slow.set()
    first, second = Reader(), Reader()
    engine.steerer.clear = lambda: setattr(device, "lost", False)
    engine.submit([3], first, max_tokens=9, sampling=GREEDY)
    assert first.done.wait(10) and "out of memory" in first.ends[0].error
    model.left = 10**9
    engine.submit([3], second, max_tokens=3, sampling=GREEDY)
    assert second.done.wait(10) and second.ends[0].finish == "length"
    engine.close()
    assert engine.failure is None


def test_which_errors_lose_the_device():
    assert is_device_lost(Accelerator(ILLEGAL)) and is_device_lost(RuntimeError(ILLEGAL))
    assert is_device_lost(RuntimeError("HIP error: unspecified launch failure"))
    for other in (
        torch.OutOfMemoryError("CUDA out of memory"), ValueError("CUDA error: of a word"),
        RuntimeError("shape mismatch"), FullError("full"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ):  # fmt: skip
        assert not is_device_lost(other), other


# the command, its model failing as a GPU does after some tokens
LOSES = f"""
import sys, torch
from fastsae.serve.engine import Engine
forward, left = Engine._forward, int(sys.argv.pop(1))
def fails(self, *args):
    global left
    left -= 1
    if left < 0:
        raise getattr(torch, "AcceleratorError", RuntimeError)({ILLEGAL!r})
    return forward(self, *args)
Engine._forward = fails
from fastsae.cli.app import app
app()
"""


def test_the_command_answers_everybody_and_ends_with_a_status(tmp_path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from fastsae.nn import TopKSAE

    TopKSAE(256, 64, 4, seed=0).save_pretrained(tmp_path / "sae")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", LOSES, "30", "serve", "--layer", "2"]
    process = subprocess.Popen(
        [*command, "--sae", str(tmp_path / "sae"), "--port", str(port), "--rows", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(url + "/api/info")
                break
            except httpx.HTTPError:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.1)

        def ask(stream):
            body = {"prompt": "x", "max_tokens": 250, "stream": stream, "temperature": 0}
            return httpx.post(url + "/v1/completions", json=body, timeout=60)

        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(ask, [True, False, False, True, False]))
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert f"cannot run any more: {Accelerator.__name__}: {ILLEGAL}" in output
    for answer in answers:
        if "event-stream" in answer.headers["content-type"]:
            said = [line for line in answer.text.splitlines() if line.startswith("data: {")]
            assert "error" in json.loads(said[-1].removeprefix("data: "))
            assert answer.text.rstrip().endswith("data: [DONE]")
        else:
            assert answer.status_code in (500, 503) and answer.json()["error"]
    assert 500 in [a.status_code for a in answers]
