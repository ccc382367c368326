"""`fastsae serve`: the engine's batch, the API with a real client, bad requests, the page."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from properties import HealthCheck, given, settings, st

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from fastsae.cli.serve import load_service  # noqa: E402
from fastsae.nn import TopKSAE  # noqa: E402
from fastsae.nn.description import MAX_ACTIVATION  # noqa: E402
from fastsae.serve import connections  # noqa: E402
from fastsae.serve.app import create_app  # noqa: E402
from fastsae.serve.connections import Impatient  # noqa: E402
from fastsae.serve.engine import ClosedError, Engine, Event, FullError, Sampling  # noqa: E402
from fastsae.serve.protocol import Limits  # noqa: E402
from fastsae.serve.text import TextStream  # noqa: E402
from fastsae.steer import MaxActivations, clamp  # noqa: E402

LIMITS = Limits(
    body_bytes=20_000, body_seconds=2.0, prompt_tokens=64, new_tokens=96, sequences=4,
    seconds=60.0, rows=24, waiting=400,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)
PROMPTS = ["import os\n", "def main(", "class Foo:\n    def __init__(self", "x", "for i in range(1"]
TOKEN = "s3cret"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE for the embedded model; random latents, each a large step at 1 x max."""
    where = tmp_path_factory.mktemp("serve") / "sae"
    TopKSAE(256, 64, 4, seed=0).save_pretrained(where)
    MaxActivations(torch.full((64,), 30.0), 1000, "made up", site="transformer.h.2").save(
        where / MAX_ACTIVATION
    )
    return where


@pytest.fixture(scope="module")
def service(folder):
    made = load_service(folder, None, None, None, "cpu", LIMITS)
    yield made
    made.engine.close()


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


@pytest.fixture(scope="module")
def server(service):
    made = Server(service)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


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


# -- the engine -----------------------------------------------------------------------------------


def test_a_row_in_a_changing_batch_is_what_it_is_alone(service):
    """Different prompts, lengths, programs and lifetimes, joining at different times."""
    cases = []
    for i in range(14):
        program = None if i % 3 == 0 else [clamp(i, 1.0 + i / 4, unit="max")]
        cases.append((PROMPTS[i % len(PROMPTS)], program, 6 + 5 * (i % 4)))
    expected = [alone(service, *case) for case in cases]
    readers = []
    for i, (prompt, program, n) in enumerate(cases):
        reader = Reader()
        service.engine.submit(
            service.encode(prompt), reader, program=program, sampling=GREEDY, max_tokens=n
        )
        readers.append(reader)
        time.sleep(0.004 * (i % 3))
    same = 0
    for reader, tokens in zip(readers, expected):
        reader.wait()
        ended = [t for t in tokens if t not in service.engine._eos]
        same += reader.tokens == ended
    assert same == len(cases)
    assert service.engine.load == 0


def test_sampling_depends_on_the_seed_and_not_on_the_others(service):
    def run(seeds):
        readers = [Reader() for _ in seeds]
        for reader, seed in zip(readers, seeds):
            how = Sampling(0.9, 0.95, seed)
            service.engine.submit(service.encode("import "), reader, sampling=how, max_tokens=12)
        return [r.wait().tokens for r in readers]

    one, many = run([7]), run([7, 8, 9, 7, 10])
    assert many[0] == many[3] == one[0]
    assert len({tuple(t) for t in many}) == 4


@pytest.mark.parametrize("top_p", [1e-9, 1e-50, 5e-324])
def test_however_small_top_p_is_the_likeliest_token_stays(service, top_p):
    readers = [Reader(), Reader()]
    for reader, how in zip(readers, (Sampling(1.0, top_p, 1), GREEDY)):
        service.engine.submit(service.encode("import "), reader, sampling=how, max_tokens=8)
    assert readers[0].wait().tokens == readers[1].wait().tokens


def test_a_changed_program_acts_from_the_next_token_on(service):
    strong = [clamp(5, 6.0, unit="max")]
    before = alone(service, "import os\n", None, 40)
    reader = Reader()
    seen = threading.Event()

    def emit(event):
        reader(event)
        if len(reader.tokens) == 10 and not seen.is_set():
            service.engine.change(row, strong)  # in the engine's thread: exactly here
            seen.set()

    held = threading.Event()
    original = service.engine._step
    service.engine._step = lambda: (held.wait(10), original())[1]
    try:
        row = service.engine.submit(
            service.encode("import os\n"), emit, sampling=GREEDY, max_tokens=40
        )
        held.set()
        reader.wait()
    finally:
        service.engine._step = original
    assert reader.tokens[:10] == before[:10]
    assert reader.tokens != before[: len(reader.tokens)]


def test_room_time_and_cancellation(service):
    engine = Engine(service.engine.model, None, rows=2, waiting=3)
    try:
        slow = threading.Event()
        original = engine._forward
        engine._forward = lambda *a: (slow.wait(20), original(*a))[1]
        readers = [Reader() for _ in range(5)]
        rows = [engine.submit([1, 2, 3], r, max_tokens=50, seconds=60) for r in readers]
        with pytest.raises(FullError):
            engine.submit([1], Reader())
        engine.cancel(rows[0])
        engine.cancel(rows[3])
        rows[1].deadline = 0.0
        slow.set()
        ends = [r.wait().end.finish for r in readers]
        assert ends[:2] == ["cancelled", "time"] and ends[3] == "cancelled"
        assert ends[2] in ("length", "stop") and ends[4] in ("length", "stop")
        assert engine.load == 0
        with pytest.raises(ValueError, match="empty"):
            engine.submit([], Reader())
        with pytest.raises(ValueError, match="no SAE"):
            engine.submit([1], Reader(), program=[clamp(0, 1.0)])
    finally:
        engine.close()
    with pytest.raises(ClosedError):
        engine.submit([1], Reader())


def test_a_failing_model_ends_its_batch_and_not_the_server(service):
    engine = Engine(service.engine.model, None, rows=4, waiting=3)
    try:
        original, times = engine._forward, []

        def fails_once(*args):
            times.append(1)
            if len(times) == 3:
                raise RuntimeError("out of memory")
            return original(*args)

        engine._forward = fails_once
        first, second = Reader(), Reader()
        engine.submit([5, 6], first, max_tokens=20)
        assert "out of memory" in first.wait().end.error
        engine.submit([5, 6], second, max_tokens=3, sampling=GREEDY)
        assert second.wait().end.error is None and engine.load == 0
    finally:
        engine.close()


def test_rows_that_wait_end_without_a_place(service):
    """Cancelled or out of time behind a full batch: at once, and their room is free again."""
    engine = Engine(service.engine.model, None, rows=1, waiting=2)
    try:
        original = engine._step
        engine._step = lambda: (time.sleep(0.05), original())[1]
        running, left, late = Reader(), Reader(), Reader()
        first = engine.submit([5], running, max_tokens=200, sampling=GREEDY)
        while not running.tokens:
            time.sleep(0.01)
        engine.cancel(engine.submit([6], left))
        engine.submit([7], late, seconds=0.1)
        assert left.wait().end.finish == "cancelled" and late.wait().end.finish == "time"
        assert not running.done.is_set() and engine.load == 1
        engine.cancel(first)
    finally:
        engine.close()


def test_no_row_is_lost_when_the_batch_fails_as_it_comes(service):
    engine = Engine(service.engine.model, None, rows=4, waiting=3)
    try:
        original, inside, go, times = engine._step, threading.Event(), threading.Event(), []

        def fails_second():
            times.append(1)
            inside.set()
            assert go.wait(10)
            if len(times) == 2:
                raise RuntimeError("out of memory")
            original()

        engine._step = fails_second
        first, second, odd = Reader(), Reader(), Reader()
        engine.submit([5], first, max_tokens=90, sampling=GREEDY)
        assert inside.wait(10)
        engine.submit([6], second, max_tokens=3, sampling=GREEDY)  # comes with the failing step
        go.set()
        assert "out of memory" in first.wait().end.error
        assert second.done.wait(10)
        engine.submit([2**70], odd)  # fails before the model runs
        assert odd.done.wait(10) and odd.end.error
        assert engine.load == 0
    finally:
        engine.close()


def test_a_reader_that_fails_is_alone(service):
    engine = Engine(service.engine.model, None, rows=4, waiting=3)
    try:
        for events in ("token", "finish"):

            def fails(event, events=events):
                if getattr(event, events) is not None:
                    raise RuntimeError("Event loop is closed")

            other = Reader()
            sequences = [([5], fails, None), ([6], other, None)]
            engine.submit_all(sequences, GREEDY, 4, 60.0)
            assert other.wait().end.error is None and other.end.finish in ("length", "stop")
            end = time.monotonic() + 5
            while engine.load:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert engine._thread.is_alive()
    finally:
        engine.close()


def test_text_is_never_taken_back(service):
    tokenizer = service.tokenizer
    text = 'name = "größe – 漢字 🙂"\nreturn name\n'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(t) for t in ids]
    assert "".join(pieces) + stream.end() == text and not any("\ufffd" in p for p in pieces)
    stream = TextStream(tokenizer, ["\nret", "zzz"])
    out = "".join(stream.push(t) for t in ids) + stream.end()
    assert out == text[: text.index("\nret")] and stream.stopped
    stream = TextStream(tokenizer, ["\nreturn nothing"])
    assert "".join(stream.push(t) for t in ids) + stream.end() == text


SIGNS = st.sampled_from([*"ab c\n=é漢", "🙂", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\u200d", "    "])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(SIGNS, min_size=1, max_size=40).map("".join), st.data())
def test_any_text_and_any_stop_across_tokens(service, text, data):
    """Characters of several tokens, alone or merged, and stops that begin and end anywhere."""
    tokenizer = service.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if data.draw(st.booleans()):  # as a model may write them: no token spans two characters
        ids = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in text]
        ids = [token for one in ids for token in one]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    for stops, whole in (((), text), ((stop,), text[: text.index(stop)]), (("zz",), text)):
        stream = TextStream(tokenizer, stops)
        pieces = [*(stream.push(t) for t in ids), stream.end()]
        assert "".join(pieces) == whole and "\ufffd" not in "".join(pieces)
        assert stream.stopped == (whole != text or stop in stops)


def test_bytes_that_are_no_character_end_as_a_sign(service):
    """An emoji that the limit cuts off, or whose end never comes: nothing is lost or doubled."""
    ids = service.tokenizer("🙂", add_special_tokens=False)["input_ids"]
    after = service.tokenizer("ok", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    stream = TextStream(service.tokenizer)
    assert [stream.push(t) for t in ids[:-1]] == [""] * (len(ids) - 1)
    assert set(stream.end()) == {"\ufffd"}
    stream = TextStream(service.tokenizer)
    text = "".join(stream.push(t) for t in ids[:-1] + after + ids * 5) + stream.end()
    assert text.strip("\ufffd") == "ok" + "🙂" * 5


# -- the OpenAI API, by its own client ------------------------------------------------------------


def test_completions(client, service):
    plain = client.completions.create(
        model="any", prompt="import os\n", max_tokens=20, temperature=0, seed=1
    )
    expected = alone(service, "import os\n", None, 20)
    assert plain.choices[0].text == service.tokenizer.decode(expected, skip_special_tokens=True)
    assert plain.usage.completion_tokens <= 20 and plain.choices[0].finish_reason in (
        "length",
        "stop",
    )
    steered = client.completions.create(
        model="any", prompt="import os\n", max_tokens=20, temperature=0,
        extra_body={"steer": [{"latent": 5, "value": 6}]},
    )  # fmt: skip
    expected = alone(service, "import os\n", [clamp(5, 6.0, unit="max")], 20)
    assert steered.choices[0].text == service.tokenizer.decode(expected, skip_special_tokens=True)
    assert steered.choices[0].text != plain.choices[0].text
    off = client.completions.create(
        model="any", prompt="import os\n", max_tokens=20, temperature=0, extra_body={"steer": []}
    )
    assert off.choices[0].text == plain.choices[0].text


def test_the_docs_example_runs(server, capsys):
    page = (ROOT / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(block.replace("8000", str(server.port)).replace("1797", "5"), {})
    assert capsys.readouterr().out.strip()


def test_several_prompts_n_echo_and_stop(client):
    got = client.completions.create(
        model="m", prompt=["import os\n", "def f("], n=2, max_tokens=8, seed=3, echo=True
    )
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    assert [c.text.startswith(p) for c, p in zip(got.choices, ["import"] * 2 + ["def f("] * 2)]
    again = client.completions.create(
        model="m", prompt=["import os\n", "def f("], n=2, max_tokens=8, seed=3, echo=True
    )
    assert [c.text for c in again.choices] == [c.text for c in got.choices]
    whole = client.completions.create(model="m", prompt="import os\n", max_tokens=40, temperature=0)
    mark = whole.choices[0].text[10:13]
    cut = client.completions.create(
        model="m", prompt="import os\n", max_tokens=40, temperature=0, stop=[mark]
    )
    assert cut.choices[0].text == whole.choices[0].text.split(mark)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_streams_are_the_whole_text(client):
    options = dict(model="m", prompt="class A:\n", max_tokens=24, temperature=0.8, seed=11)
    whole = client.completions.create(**options)
    parts = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].text for p in parts[:-1]) == whole.choices[0].text
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage and len(parts) > 3


def test_chat(client):
    messages = [
        {"role": "system", "content": "# a module"},
        {"role": "user", "content": [{"type": "text", "text": "import os"}]},
    ]
    options = dict(model="m", messages=messages, max_tokens=12, temperature=0, seed=0)
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**options, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    joined = "".join(p.choices[0].delta.content or "" for p in parts)
    assert joined == whole.choices[0].message.content
    steered = client.chat.completions.create(
        **options, extra_body={"steer": [{"latent": 7, "op": "add", "value": 8}]}
    )
    assert steered.choices[0].message.content != whole.choices[0].message.content
    assert client.models.list().data[0].id == client.models.retrieve(whole.model).id


def test_200_concurrent_requests_each_get_their_own(client, service):
    """Steered and not, different prompts and lengths: every answer is the one it would be alone."""
    kinds = []
    for i in range(20):
        edit = None if i % 2 else [{"latent": i, "value": 1 + i / 5}]
        kinds.append((PROMPTS[i % len(PROMPTS)], edit, 4 + i % 9))
    expected = []
    for prompt, edit, n in kinds:
        program = None if edit is None else [clamp(edit[0]["latent"], edit[0]["value"], "max")]
        tokens = alone(service, prompt, program, n)
        expected.append(service.tokenizer.decode(tokens, skip_special_tokens=True))

    def ask(i):
        prompt, edit, n = kinds[i % 20]
        answer = client.completions.create(
            model="m", prompt=prompt, max_tokens=n, temperature=0,
            extra_body={"steer": edit} if edit else {},
        )  # fmt: skip
        return answer.choices[0].text == expected[i % 20]

    with ThreadPoolExecutor(200) as pool:
        right = list(pool.map(ask, range(200)))
    assert sum(right) == 200
    busy(service, 0)


# -- limits and bad requests ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body,status,reason",
    [
        ({"prompt": "x", "max_tokens": 97}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x " * 200}, 400, "tokens, at most 64"),
        ({"prompt": ["a"] * 5}, 400, "at most 4 sequences"),
        ({"prompt": "x", "n": 5}, 400, "n: at most 4"),
        ({"prompt": "x", "n": 10**30}, 400, "n: at most 4"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [10**9]}, 400, "token ids"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({}, 400, "prompt"),
        ({"prompt": "x", "temperature": 3}, 400, "temperature"),
        ({"prompt": "x", "temperature": float("nan")}, 400, "temperature"),
        ({"prompt": "x", "logprobs": 5}, 400, "logprobs"),
        ({"prompt": "x", "stop": ["a"] * 5}, 400, "stop"),
        ({"prompt": "x", "steer": [{"latent": 64, "value": 1}]}, 400, "whose SAE has 64"),
        ({"prompt": "x", "steer": [{"latent": 2**40, "value": 1}]}, 400, "latent"),
        ({"prompt": "x", "steer": [{"latent": True, "value": 1}]}, 400, "latent"),
        ({"prompt": "x", "steer": [{"latent": 1}]}, 400, "needs a value"),
        ({"prompt": "x", "steer": [{"latent": 1, "value": float("inf")}]}, 400, "value"),
        ({"prompt": "x", "steer": [{"latent": 1, "vlaue": 1}]}, 400, "vlaue"),
        ({"prompt": "x", "steer": [{"latent": 1, "op": "exec", "value": 1}]}, 400, "op"),
        ({"prompt": "x", "steer": [{"latent": 1, "value": 1}] * 33}, 400, "32"),
        (
            {
                "prompt": "x",
                "steer": [{"latent": 1, "value": 1, "when": {"latent": 2, "abvoe": 5}}],
            },
            400,
            "abvoe",
        ),
        ({"prompt": "x", "logit_bias": {"50": 100}}, 400, "logit_bias: not supported here"),
        ({"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"prompt": "x", "frequency_penalty": -1}, 400, "frequency_penalty"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"prompt": "x", "tools": [{}]}, 400, "tools"),
        ({"prompt": "x", "functions": [{"name": "f"}]}, 400, "functions"),
        ({"prompt": "x", "tool_choice": "required"}, 400, "tool_choice"),
        ({"prompt": "x", "top_logprobs": 3}, 400, "top_logprobs"),
        ({"prompt": "x", "top_k": 5}, 400, "top_k: not supported here"),
        ({"prompt": "x", "stear": []}, 400, "stear: not known here; steer is"),
        ({"prompt": "x", "steering": []}, 400, "steering: not known here; steer is"),
        ({"prompt": "x", "max_token": 5}, 400, "max_token: not known here; max_tokens is"),
        ({"prompt": "x", "stream": True, "stream_options": {"include_usage": "no"}}, 400, "usage"),
        ({"prompt": "x", "stop": ""}, 400, "at least 1 character"),
        ({"prompt": []}, 400, "at least 1 item"),
        ({"prompt": [5, -1]}, 400, "greater than or equal to 0"),
        ({"prompt": "y" * 30_000}, 413, "larger than 20000"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refused_with_a_reason(server, body, status, reason):
    content = json.dumps(body)
    answer = httpx.post(
        server.url + "/v1/completions", content=content,
        headers={"content-type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]["message"]


def test_fields_that_change_nothing_are_taken(server):
    """What clients send by default, or send to no effect."""
    neutral = {
        "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [],
        "response_format": {"type": "text"}, "tool_choice": "none", "top_logprobs": None,
        "functions": None, "user": "somebody", "service_tier": "auto", "store": False,
        "stream_options": None,
    }  # fmt: skip
    ask = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = httpx.post(server.url + path, json={**ask, **neutral})
        assert answer.status_code == 200, answer.text


def test_a_chat_says_which_part_is_wrong(server):
    part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "'text'" in answer.json()["error"]["message"]


def test_malformed_bodies(server):
    def post(content, kind="application/json", **headers):
        return httpx.post(
            server.url + "/v1/chat/completions", content=content,
            headers={"content-type": kind, **headers},
        )  # fmt: skip

    for content in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 9000, b"9" * 9000):
        answer = post(content)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:9]
    assert post(b"messages=1", "application/x-www-form-urlencoded").status_code == 415
    assert post(b"{}", "text/plain").status_code == 415
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    head = httpx.head(server.url + "/")
    assert head.status_code == 200 and "content-security-policy" in head.headers
    for path in ("/nothing", "/../../etc/passwd", "/assets/serve.html", "/docs"):
        assert httpx.get(server.url + path).status_code == 404
    assert httpx.get(server.url + "/api/features?limit=0").status_code == 400
    assert httpx.get(server.url + "/api/features?q=" + "a" * 101).status_code == 400
    assert httpx.get(server.url + "/api/features", params={"q": "\u00b2"}).status_code == 200


def raw(server, head, body=b"", wait=6.0):
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as s:
        s.sendall(head + b"\r\n\r\n" + body)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = s.recv(4096)
            if not piece:
                break
            answer += piece
        return int(answer.split()[1])


def test_bodies_that_lie_about_their_size_or_never_come(server):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    chunk = b"%x\r\n" % 5000 + b"a" * 5000 + b"\r\n"
    assert raw(server, head + b"transfer-encoding: chunked", chunk * 5) == 413
    assert raw(server, head + b"content-length: 99999999") == 413
    assert raw(server, head + b"content-length: 100", b"{") == 408


def test_too_many_prompts_are_refused_before_they_are_read(server, service, monkeypatch):
    read = []
    original = service.encode
    monkeypatch.setattr(service, "encode", lambda p: (read.append(p), original(p))[1])
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": ["x"] * 1000})
    assert answer.status_code == 400 and "at most 4" in answer.json()["error"]["message"]
    assert not read


@pytest.mark.parametrize("path", ["/api/chat", "/v1/completions", "/v1/chat/completions"])
def test_a_long_prompt_holds_nobody_up(server, service, monkeypatch, path):
    begun, original = threading.Event(), service._read

    def slowly(text, **options):
        begun.set()
        time.sleep(1.5)
        return original(text, **options)

    monkeypatch.setattr(service, "_read", slowly)
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    body.pop("prompt" if "chat/" in path else "messages")
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(httpx.post, server.url + path, json=body, timeout=20)
        assert begun.wait(5)
        start = time.monotonic()
        assert httpx.get(server.url + "/api/info").status_code == 200
        assert time.monotonic() - start < 1.0 and not long.done()
        assert long.result().status_code == 200


@pytest.mark.parametrize("path", ["/api/chat", "/v1/completions"])
def test_a_client_that_left_before_the_stream_began(service, path):
    """The response's generator never starts then: its rows end all the same."""
    body = json.dumps({"prompt": "x", "max_tokens": 90, "stream": True, "seed": 1}).encode()
    jobs = []
    original = service.start
    service.start = lambda *a, **k: (jobs.append(original(*a, **k)), jobs[-1])[1]

    async def visit():
        came = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return came.pop() if came else {"type": "http.disconnect"}

        async def send(message):
            raise OSError("the client is gone")

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        with contextlib.suppress(Exception):
            await create_app(service)(scope, receive, send)

    try:
        asyncio.run(visit())
        assert jobs and all(row.cancelled for row in jobs[0].rows)
        busy(service, 0)
    finally:
        service.start = original


def test_host_header_and_token(service, server):
    assert httpx.get(server.url + "/api/info", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(server.url + "/api/info", headers={"host": "localhost:1"}).status_code == 200
    guarded = Server(service, token=TOKEN)
    try:
        assert httpx.get(guarded.url + "/").status_code == 200  # the page has nothing in it
        for value in ("", "Bearer", "Bearer wrong", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"):
            answer = httpx.get(
                guarded.url + "/api/info", headers={"authorization": value.encode("latin-1")}
            )
            assert answer.status_code == 401 and answer.json()["error"]["message"]
        right = openai.OpenAI(base_url=guarded.url + "/v1", api_key=TOKEN, max_retries=0)
        assert right.models.list().data
        wrong = openai.OpenAI(base_url=guarded.url + "/v1", api_key="no", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="m", prompt="x")
    finally:
        guarded.stop()


def test_no_room_is_429(service, folder):
    small = load_service(folder, None, None, None, "cpu", Limits(rows=1, waiting=1))
    held = threading.Event()
    original = small.engine._forward
    small.engine._forward = lambda *a: (held.wait(20), original(*a))[1]
    server = Server(small)
    try:
        with ThreadPoolExecutor(2) as pool:
            body = {"prompt": "x", "max_tokens": 2}
            waiting = [
                pool.submit(httpx.post, server.url + "/v1/completions", json=body, timeout=30)
                for _ in range(2)
            ]
            busy(small, 2)
            answer = httpx.post(server.url + "/v1/completions", json=body)
            assert answer.status_code == 429 and "retry-after" in answer.headers
            held.set()
            assert [w.result().status_code for w in waiting] == [200, 200]
    finally:
        server.stop()
        small.engine.close()


def test_a_client_that_leaves_frees_its_place(service, server):
    held = threading.Event()
    original = service.engine._forward
    try:
        service.engine._forward = lambda *a: (held.wait(0.05), original(*a))[1]
        for path, body in (
            ("/v1/completions", {"prompt": "x", "max_tokens": 90, "temperature": 0}),
            ("/v1/completions", {"prompt": "x", "max_tokens": 90, "stream": True}),
            ("/api/chat", {"prompt": "x", "max_tokens": 90}),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            busy(service, 2 if "chat" in path else 1)
            connection.sock.close()
            connection.close()
            busy(service, 0, seconds=3.0)  # 90 tokens would take 4.5 s
    finally:
        service.engine._forward = original
        held.set()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4),
    max_leaves=12,
)
NAMES = """prompt messages max_tokens max_completion_tokens n stop stream stream_options
    temperature top_p seed model echo logprobs tools best_of suffix"""
bodies = st.dictionaries(st.sampled_from(NAMES.split()), json_values, max_size=6)
edits = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "latent": st.integers(-2, 70) | json_values,
            "value": json_values | st.floats(-5, 5),
            "op": st.sampled_from(["clamp", "add", "scale", "ablate", "min_clamp", "x"]),
            "unit": st.sampled_from(["max", "raw", ""]),
            "when": json_values | st.fixed_dictionaries({"latent": st.integers(0, 70)}),
        },
    ),
    max_size=3,
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/api/chat"]),
    body=bodies | json_values,
    steer=edits | json_values,
    whole=st.booleans(),
)
def test_no_request_is_an_error_of_the_server(server, path, body, steer, whole):
    if isinstance(body, dict):
        body = {**body, "steer": steer}
        if whole:
            body |= {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            body.pop("max_completion_tokens", None)
    answer = httpx.post(
        server.url + path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


# -- the page -------------------------------------------------------------------------------------


def test_the_page_is_closed_off(server):
    answer = httpx.get(server.url + "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert answer.text.count(f'nonce="{nonce}"') == 2 and "{{nonce}}" not in answer.text
    for text in ("http://", "https://", "innerHTML", "eval("):
        assert text not in answer.text
    assert httpx.get(server.url + "/").headers["content-security-policy"] != policy


def test_the_api_describes_itself_without_a_warning(service):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = create_app(service).openapi()["paths"]
    assert "/v1/chat/completions" in paths and "/" not in paths


def test_latents_are_found_by_number_and_word(server, service):
    def ask(q, **more):
        params = {"q": q, **more}
        return httpx.get(server.url + "/api/features", params=params).json()["features"]

    assert [f["latent"] for f in ask("17")] == [17] and ask("64") == [] and ask("9" * 30) != None  # noqa: E711
    assert len(ask("", limit=5)) == 5 and all(f["max"] == 30.0 for f in ask(""))
    word = service.tokenizer(" import", add_special_tokens=False)["input_ids"][0]
    effect = service.sae.W_dec @ service._readout[:, word]
    assert int(effect.argmax()) in [f["latent"] for f in ask("import", limit=6)]
    service._labels[9] = ["Widget", " w"]
    assert ask("widget")[0]["latent"] == 9 and ask("")[0]["words"] == ["Widget", " w"]
    service._labels.clear()


async def page_stream(url, body, on_token):
    events = []
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", url + "/api/chat", json=body) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                await on_token(http, events)
    return events


def test_before_and_after_and_sliders(server):
    """Two visitors at once; one of them moves a slider while its text is being written."""
    body = {"prompt": "import os\n", "max_tokens": 60, "temperature": 0}

    async def nothing(http, events):
        pass

    async def move(http, events):
        if len(events) == 20:
            path = server.url + f"/api/chat/{events[0]['id']}/steer"
            answer = await http.post(path, json={"steer": [{"latent": 5, "value": 6}]})
            assert answer.status_code == 200

    async def both():
        return await asyncio.gather(
            page_stream(server.url, body, nothing), page_stream(server.url, body, move)
        )

    for events, moved in zip(asyncio.run(both()), (False, True)):
        text = {"before": "", "after": ""}
        for e in events[1:]:
            text[e["side"]] += e["text"]
        assert sum("finish" in e for e in events) == 2
        assert (text["before"] != text["after"]) == moved
    gone = httpx.post(server.url + "/api/chat/none/steer", json={"steer": []})
    assert gone.status_code == 404 and gone.json()["error"]["message"]


def chromium():
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


class Browser:
    """Headless Chromium by its debugging protocol."""

    def __init__(self, folder):
        from websockets.sync.client import connect

        self.process = subprocess.Popen(
            [
                chromium(), "--headless=new", "--no-sandbox", "--disable-gpu",
                "--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=1280,900",
                "--disable-dev-shm-usage", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.port = int(self._until(lambda: (folder / "DevToolsActivePort").read_text().split()[0]))
        pages = self._until(
            lambda: [
                p for p in httpx.get(f"http://127.0.0.1:{self.port}/json").json()
                if p["type"] == "page"
            ]
        )  # fmt: skip
        self.opened = contextlib.ExitStack()
        self.socket = self.opened.enter_context(
            connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
        )
        self.sent = 0

    def _until(self, found, seconds=30.0):
        end = time.monotonic() + seconds
        while True:
            try:
                value = found()
                if value:
                    return value
            except (OSError, IndexError, ValueError, httpx.HTTPError):
                pass
            assert time.monotonic() < end, "the browser did not answer"
            time.sleep(0.1)

    def call(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=30))
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script):
        return self._until(lambda: self.run(script))

    def close(self):
        self.opened.close()
        self.process.kill()
        self.process.wait()


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_the_page_in_a_browser(service, tmp_path):
    """Search, choose, write, move a slider, stop: what a visitor does; no script error, no leak."""
    server = Server(service, token=TOKEN)
    browser = Browser(tmp_path)
    try:
        browser.call("Page.enable")
        browser.call("Page.navigate", url=f"{server.url}/#token={TOKEN}")
        browser.until("document.body && document.body.dataset.ready === '1'")
        assert "64 latents" in browser.run("document.getElementById('about').textContent")
        browser.run(
            "document.getElementById('search').value = '5';"
            "document.getElementById('search').dispatchEvent(new Event('input'));"
        )
        browser.until("document.querySelectorAll('#found button').length === 1")
        browser.run("document.querySelector('#found button').click()")
        browser.run(
            "const r = document.querySelector('#edits input'); r.value = 4;"
            "r.dispatchEvent(new Event('input'));"
        )
        assert browser.run("document.querySelector('#edits output').textContent") == "4.0 × max"
        browser.run(
            "document.getElementById('temperature').value = 0;"
            "document.getElementById('tokens').value = 48;"
            "document.getElementById('write').click();"
        )
        browser.until("document.body.dataset.done === '1'")
        text = {
            side: browser.run(f"document.getElementById('{side}').textContent")
            for side in ("before", "after")
        }
        assert browser.run("document.getElementById('error').textContent") == ""
        program = [clamp(5, 4.0, unit="max")]
        for side, edit in (("before", None), ("after", program)):
            tokens = alone(service, "import os\n", edit, 48)
            written = service.tokenizer.decode(tokens, skip_special_tokens=True)
            assert text[side] == "import os\n" + written
        assert text["before"] != text["after"]
        browser.run(  # moved before the server has said what this text is called
            "delete document.body.dataset.done; document.getElementById('tokens').value = 96;"
            "document.getElementById('write').click();"
            "const s = document.querySelector('#edits input'); s.value = 0;"
            "s.dispatchEvent(new Event('input'));"
        )
        browser.until("document.body.dataset.done === '1'")
        tokens = alone(service, "import os\n", program, 96)
        unmoved = service.tokenizer.decode(tokens, skip_special_tokens=True)
        written = browser.run("document.getElementById('after').textContent")
        assert written != "import os\n" + unmoved
        shot = browser.call("Page.captureScreenshot", format="png")["data"]
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1,
            mobile=True,
        )  # fmt: skip
        assert browser.run("document.documentElement.scrollWidth") <= 390
        top = "document.getElementById('before').getBoundingClientRect().top"
        bottom = "document.querySelector('#edits input').getBoundingClientRect().bottom"
        assert browser.run(f"{bottom} - {top}") < 844  # the texts, and the slider that changes them
        shot = browser.call("Page.captureScreenshot", format="png")["data"]
        assert len(shot) > 20_000
        import base64

        (tmp_path / "page.png").write_bytes(base64.b64decode(shot))
    finally:
        browser.close()
        server.stop()


def test_ctrl_c_ends_streams_and_the_server(folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "fastsae", "serve", "--sae", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(url + "/api/info")
                break
            except httpx.HTTPError:
                assert process.poll() is None
                time.sleep(0.1)
        body = {"prompt": "x", "max_tokens": 250, "stream": True, "temperature": 2.0}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        output, _ = process.communicate(timeout=15)
        assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in output
    finally:
        process.kill()


@pytest.mark.parametrize("token", ["s3cret", "a+b&c%41#d/=?"])
@pytest.mark.parametrize(
    "host,name",
    [("127.0.0.1", "localhost"), ("::1", "localhost"), ("::", "[::]"), ("10.0.0.5", "10.0.0.5")],
)
def test_the_address_that_is_printed_opens_the_page(host, name, token):
    from urllib.parse import parse_qs, urlsplit  # as the page reads it, by URLSearchParams

    from fastsae.cli.serve import address

    page = urlsplit(address(host, 8000, "/", token))
    assert page.netloc == f"{name}:8000" and parse_qs(page.fragment)["token"] == [token]
    assert address(host, 8000, "/v1") == f"http://{name}:8000/v1"


def test_command_line_says_what_is_wrong(folder, tmp_path):
    from typer.testing import CliRunner

    from fastsae.cli.app import app

    run = CliRunner().invoke(app, ["serve", "--sae", str(tmp_path / "none")])
    assert run.exit_code == 2
    run = CliRunner().invoke(app, ["serve", "--sae", str(folder), "--layer", "1", "--hook", "x"])
    assert run.exit_code == 2
    run = CliRunner().invoke(app, ["serve", "--sae", str(folder), "--token", "a b"])
    assert run.exit_code == 2
    run = CliRunner().invoke(app, ["serve", "--sae", str(folder)], env={"FASTSAE_SERVE_TOKEN": ""})
    assert run.exit_code == 2 and "set and empty" in run.output
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        run = CliRunner().invoke(app, ["serve", "--sae", str(folder), "--port", port])
    assert run.exit_code == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in run.output and "http" not in run.output
    run = CliRunner().invoke(app, ["serve", "--sae", str(folder), "--host", "no such host"])
    assert run.exit_code == 2 and "cannot listen on no such host" in run.output


@pytest.mark.parametrize(
    "before,pieces",
    [
        (b"", []),
        (b"", [b"GET / HTTP/1.1\r\n"]),
        (b"", [b"GET / HTTP/1.1\r\nA: "] + [b"a"] * 20),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", [b"POST /v1/comp"]),
    ],
    ids=["silent", "half a head", "a letter at a time", "after a request"],
)
def test_a_head_that_does_not_arrive_ends_the_connection(server, monkeypatch, before, pieces):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(10)
        if before:
            s.sendall(before)
            assert b"200 OK" in s.recv(100_000)
        begin = time.monotonic()
        for piece in pieces:
            try:
                s.sendall(piece)
            except OSError:  # it has been closed
                break
            time.sleep(0.1 if len(pieces) > 1 else 0)
        try:
            while s.recv(100_000):
                pass
        except ConnectionError:
            pass
        assert 0.5 < time.monotonic() - begin < 5


def test_a_long_answer_is_not_cut_by_the_time_of_a_head(server, client, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    stream = client.completions.create(
        model="any", prompt="import os\n", max_tokens=60, temperature=0, stream=True
    )
    assert sum(1 for _ in stream) > 20


def test_an_address_is_taken_from_the_first_moment():
    from fastsae.cli.serve import bound

    with bound("127.0.0.1", 0) as one, pytest.raises(SystemExit):
        bound("127.0.0.1", one.getsockname()[1])
