"""What the tests of `fastsae serve` share: a server, readers, a text alone."""

from __future__ import annotations

import copy
import socket
import threading
import time
from pathlib import Path

import torch
import uvicorn

from fastsae.serve.app import create_app
from fastsae.serve.connections import Impatient
from fastsae.serve.engine import Event, Sampling
from fastsae.serve.protocol import Limits

LIMITS = Limits(
    body_bytes=20_000, body_seconds=2.0, prompt_tokens=64, new_tokens=96, sequences=4,
    seconds=60.0, rows=24, waiting=400,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)
PROMPTS = ["import os\n", "def main(", "class Foo:\n    def __init__(self", "x", "for i in range(1"]
TOKEN = "s3cret"
ROOT = Path(__file__).parents[2]


class Server:
    """The application behind uvicorn, on a port of its own."""

    def __init__(self, service, **options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        config = uvicorn.Config(
            create_app(service, **options), host="127.0.0.1", port=self.port, log_level="error",
            http=Impatient,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(500):
            if self.server.started:
                return
            time.sleep(0.02)
        raise RuntimeError("uvicorn did not start")

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


def with_engine(service, engine):
    """The service on another engine; methods that tests have put back are not bound to the old."""
    other = copy.copy(service)
    for name, value in list(vars(other).items()):
        if getattr(value, "__self__", None) is service:
            delattr(other, name)
    other.engine = engine
    return other


def alone(service, prompt, program, n):
    """Greedy tokens through transformers' own generate()."""
    ids = torch.tensor([service.encode(prompt)])
    made = service.engine
    busy(service, 0)
    steerer = made.steerer
    made._put_in_force([])  # the engine keeps the last programs in its tables
    with torch.no_grad():
        run = dict(max_new_tokens=n, do_sample=False, pad_token_id=0)
        if program:
            with steerer.steer([program]):
                out = made.model.generate(ids, attention_mask=torch.ones_like(ids), **run)
        else:
            out = made.model.generate(ids, attention_mask=torch.ones_like(ids), **run)
    return out[0, ids.shape[1] :].tolist()


def busy(service, wanted, seconds=20.0):
    """Waits until so many sequences run or wait."""
    end = time.monotonic() + seconds
    while service.engine.load != wanted:
        assert time.monotonic() < end, f"{service.engine.load} sequences, not {wanted}"
        time.sleep(0.01)


class Reader:
    """Collects a row's events."""

    def __init__(self):
        self.tokens, self.end, self.done = [], None, threading.Event()

    def __call__(self, event: Event):
        if event.token is not None:
            self.tokens.append(event.token)
        else:
            self.end = event
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self
