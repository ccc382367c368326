"""`fastsae serve`: the OpenAI API with a real client, limits and bad requests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from properties import HealthCheck, given, settings, st

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from serving import PROMPTS, ROOT, TOKEN, Server, alone, busy, with_engine  # noqa: E402

from fastsae.cli.serve import load_service  # noqa: E402
from fastsae.cli.subject import load_saved  # noqa: E402
from fastsae.lm.load import EMBEDDED_MODEL, load_subject  # noqa: E402
from fastsae.serve.app import create_app  # noqa: E402
from fastsae.serve.engine import Engine  # noqa: E402
from fastsae.serve.protocol import Limits  # noqa: E402
from fastsae.serve.service import model_id  # noqa: E402
from fastsae.steer import clamp  # noqa: E402


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
        extra_body={"steer": [{"latent": 5, "value": 6, "unit": "max"}]},
    )  # fmt: skip
    expected = alone(service, "import os\n", [clamp(5, 6.0, unit="max")], 20)
    assert steered.choices[0].text == service.tokenizer.decode(expected, skip_special_tokens=True)
    assert steered.choices[0].text != plain.choices[0].text
    raw = client.completions.create(  # the unit of the Python API, 6 times the maximum of 30
        model="any", prompt="import os\n", max_tokens=20, temperature=0,
        extra_body={"steer": [{"latent": 5, "value": 180}]},
    )  # fmt: skip
    assert raw.choices[0].text == steered.choices[0].text
    off = client.completions.create(
        model="any", prompt="import os\n", max_tokens=20, temperature=0, extra_body={"steer": []}
    )
    assert off.choices[0].text == plain.choices[0].text


def test_the_docs_examples_run(server, client, capsys):
    page = (ROOT / "docs" / "serving.md").read_text()
    page = page.replace("8000", str(server.port)).replace("1797", "5")
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(block, names)
        assert capsys.readouterr().out.strip()
    (curl,) = re.findall(r"^curl (\S+) .* -d '(.*?)'$", page, re.DOTALL | re.MULTILINE)
    answer = httpx.post(curl[0], json=json.loads(curl[1]))
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"]
    (default,) = re.findall(r"serve --steer '(.*?)'", page)
    asked = dict(model="m", prompt="import os\n", max_tokens=0, echo=True, logprobs=0)
    scores = [
        client.completions.create(**asked, extra_body={"steer": edits}).choices[0].logprobs
        for edits in (json.loads(default), [])
    ]
    assert len(blocks) == 2 and scores[0].token_logprobs != scores[1].token_logprobs


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
        **options, extra_body={"steer": [{"latent": 7, "op": "add", "value": 240}]}
    )
    assert steered.choices[0].message.content != whole.choices[0].message.content


def test_the_model_has_a_name_for_clients(client, tmp_path):
    (listed,) = client.models.list().data
    assert listed.id == "tiny_python_lm" == client.models.retrieve("tiny_python_lm").id
    assert listed.fastsae == {"site": "transformer.h.2", "latents": 64}
    answer = client.completions.create(model="any", prompt="x", max_tokens=1)
    assert answer.model == "tiny_python_lm"
    for other in ("embedded: tiny_python_lm", "embedded", str(EMBEDDED_MODEL)):
        with pytest.raises(openai.NotFoundError, match="the model here is tiny_python_lm"):
            client.models.retrieve(other)
    assert model_id("google/gemma-3-1b-it") == "google/gemma-3-1b-it" and model_id("gpt2") == "gpt2"
    assert model_id(load_subject(str(EMBEDDED_MODEL)).origin.model) == "tiny_python_lm"
    assert model_id(str(tmp_path / "my-model")) == "my-model"


def test_200_concurrent_requests_each_get_their_own(client, service):
    """Steered and not, different prompts and lengths: every answer is the one it would be alone."""
    kinds = []
    for i in range(20):
        edit = None if i % 2 else [{"latent": i, "value": 1 + i / 5, "unit": "max"}]
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
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens: 0 writes nothing"),
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
        ({"prompt": "x", "logprobs": 6}, 400, "logprobs: Input should be less than or equal to 5"),
        ({"prompt": "x", "logprobs": -1}, 400, "logprobs"),
        ({"prompt": "x", "logprobs": True}, 400, "logprobs"),
        ({"prompt": [[]]}, 400, "at least 1 item"),
        ({"prompt": [[5], [5, -1]]}, 400, "greater than or equal to 0"),
        ({"prompt": [[5], [10**9]]}, 400, "token ids"),
        ({"prompt": [[5], "x"]}, 400, "prompt"),
        ({"prompt": [[5]] * 5}, 400, "at most 4 sequences"),
        ({"prompt": [[5] * 65]}, 400, "the prompt has 65 tokens, at most 64"),
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
        ({"prompt": "x", "steer": [{"feature": 1}]}, 400, "feature: not known here; latent is"),
        (
            {"prompt": "x", "steer": [{"latent": 1, "strength": 1}]},
            400,
            "strength: not known here; value is",
        ),
        (
            {"prompt": "x", "steer": [{"latent": 1, "operation": "add"}]},
            400,
            "operation: not known here; op is",
        ),
        (
            {"prompt": "x", "steer": [{"latent": 1, "value": 1, "when": {"feature": 5}}]},
            400,
            "steer.0.when: feature: not known here; latent is",
        ),
        (
            {
                "prompt": "x",
                "steer": [{"latent": 1, "value": 1, "when": {"latent": 2, "strength": 5}}],
            },
            400,
            "steer.0.when.strength: Extra inputs",
        ),
        (
            {"prompt": "x", "steer": [{"latent": 7, "value": 1}, {"latent": 7, "op": "ablate"}]},
            400,
            "steer: latent 7 is edited twice under the same gate",
        ),
        (
            {
                "prompt": "x",
                "steer": [
                    {"latent": 7, "value": 1, "when": {"latent": 5}},
                    {"latent": 7, "op": "scale", "value": 2, "when": {"latent": 5, "above": 0}},
                ],
            },
            400,
            "latent 7 is edited twice",
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
        "response_format": {"type": "text"}, "tool_choice": "none", "top_logprobs": 0,
        "functions": None, "user": "somebody", "service_tier": "auto", "store": False,
        "stream_options": None,
    }  # fmt: skip
    ask = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = httpx.post(server.url + path, json={**ask, **neutral})
        assert answer.status_code == 200, answer.text


def test_a_latent_may_be_edited_under_several_gates(server):
    edits = [
        {"latent": 7, "value": 1}, {"latent": 8, "value": 1},
        {"latent": 7, "value": 1, "when": {"latent": 5}},
        {"latent": 7, "value": 1, "when": {"latent": 5, "above": 2}},
        {"latent": 7, "value": 1, "when": {"latent": 6}},
    ]  # fmt: skip
    body = {"prompt": "x", "max_tokens": 2, "steer": edits}
    answer = httpx.post(server.url + "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_a_chat_says_which_part_is_wrong(server):
    part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    text = {"type": "text", "text": "x"}
    for message, why in (
        ({"role": "user", "content": [text, part]}, "only parts of type 'text' are read here"),
        ({"role": "user", "content": [part]}, "not 'image_url'"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "only parts of type 'text'"),
        ({"role": "user", "content": None}, "messages.0: content: only an assistant's may be null"),
        ({"role": "system"}, "messages.0: content: only an assistant's may be null"),
        ({"role": "user", "content": "\ud800"}, "surrogate"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, "surrogate"),
        ({"role": "tool", "content": "x"}, "'system', 'developer', 'user' or 'assistant'"),
    ):
        body = json.dumps({"messages": [message]})
        answer = httpx.post(
            server.url + "/v1/chat/completions", content=body,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text


def test_a_history_may_hold_a_message_without_text(server):
    user = {"role": "user", "content": "import os"}
    texts = []
    for silent in ({"content": None}, {}, {"content": ""}, {"content": []}):
        body = {"messages": [user, {"role": "assistant", **silent}, user], "temperature": 0}
        answer = httpx.post(server.url + "/v1/chat/completions", json={**body, "max_tokens": 8})
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    "body,reason",
    [
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs to be true"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs: needs logprobs to be true"),
        ({"tools": [{}]}, "tools: not supported here"),
    ],
    ids=str,
)
def test_a_chat_is_refused_with_a_reason(server, body, reason):
    ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = httpx.post(server.url + "/v1/chat/completions", json={**ask, **body})
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"], answer.text


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
        assert httpx.get(guarded.url + "/health").json() == {"status": "ok"}
        elsewhere = httpx.get(guarded.url + "/health", headers={"host": "evil.example"})
        assert elsewhere.status_code == 403
        right = openai.OpenAI(base_url=guarded.url + "/v1", api_key=TOKEN, max_retries=0)
        assert right.models.list().data
        wrong = openai.OpenAI(base_url=guarded.url + "/v1", api_key="no", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="m", prompt="x")
    finally:
        guarded.stop()


def test_health_says_why_no_more_is_written(service):
    engine = Engine(service.engine.model, None, rows=1)
    server = Server(with_engine(service, engine))

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    try:
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        engine._turn = lost
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert answer.status_code == 500
        engine._thread.join(10)
        answer = httpx.get(server.url + "/health")
        assert answer.status_code == 503 and "illegal memory" in answer.json()["reason"]
    finally:
        server.stop()
    closed = Engine(service.engine.model, None)
    assert closed.ended is None
    closed.close()
    assert closed.ended == "the server is shutting down"


def test_no_room_is_429(service, folder):
    small = load_service(
        load_saved(folder, None, None, None, "cpu", False), Limits(rows=1, waiting=1)
    )
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
