"""`fastsae serve`: the page, the command line, connections."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from serving import ROOT, alone  # noqa: E402

from fastsae.nn import TopKSAE  # noqa: E402
from fastsae.serve import connections  # noqa: E402
from fastsae.serve.app import create_app  # noqa: E402
from fastsae.steer import clamp  # noqa: E402


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


def ask(server, path, body=None, **params):
    """JSON of one of the page's calls."""
    url = server.url + "/api/" + path
    answer = httpx.get(url, params=params) if body is None else httpx.post(url, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_latents_are_found_by_number_and_word(server, service):
    def found(q, **more):
        return ask(server, "features", q=q, **more)["features"]

    assert [f["latent"] for f in found("17")] == [17] and found("64") == []
    assert [f["latent"] for f in found("5 17 5")] == [5, 17]
    assert found("9" * 30) is not None
    assert len(found("", limit=5)) == 5 and all(f["max"] == 30.0 for f in found(""))
    word = service.tokenizer(" import", add_special_tokens=False)["input_ids"][0]
    effect = service.sae.W_dec @ service.latents._readout[:, word]
    assert int(effect.argmax()) in [f["latent"] for f in found("import", limit=6)]
    some = ask(server, "features", latent=[9, 3, 64])["features"]
    assert [f["latent"] for f in some] == [9, 3] and all(len(f["words"]) == 6 for f in some)
    card = ask(server, "features/9")
    assert card["words"] == some[0]["words"] and len(card["promotes"]) == 10


def test_the_page_begins_with_an_edit_that_shows(server, service):
    """One press: the texts differ, and the prompt is not a finished line."""
    example = ask(server, "info")["example"]
    assert example["prompt"] == example["prompt"].strip() and example["steer"]
    text = {"before": "", "after": ""}
    body = {**example, "max_tokens": 60, "seed": 0, "temperature": 0.8, "top_p": 0.95}
    for e in asyncio.run(page_stream(server.url, body))[1:]:
        text[e["side"]] += e["text"]
    assert text["before"] != text["after"]


def test_which_latents_fire(server, service, folder):
    prompt = "import os\nx = 1"
    found = ask(server, "fired", {"prompt": prompt})
    assert "".join(found["tokens"]) == "import os⏎x = 1" and found["note"] == ""
    assert len(found["fired"]) == len(found["fires"]) == len(found["tokens"])
    reader = service.latents._reader
    with torch.no_grad():
        code = TopKSAE.from_pretrained(folder).encode(reader(service.encode(prompt))[1:])
    for row, values, at in zip(found["fired"], code.values.tolist(), code.indices.tolist()):
        assert [j for j, _ in row] == [j for j, v in zip(at, values) if v > 0]
        assert [v for _, v in row] == pytest.approx([v for v in values if v > 0], abs=2e-3)
    assert found["latents"] and all(f["words"] and f["max"] == 30.0 for f in found["latents"])


async def nothing(http, events):
    pass


async def page_stream(url, body, on_token=nothing):
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

    async def move(http, events):
        if len(events) == 20:
            path = server.url + f"/api/chat/{events[0]['id']}/steer"
            answer = await http.post(path, json={"steer": [{"latent": 5, "value": 180}]})
            assert answer.status_code == 200

    async def both():
        return await asyncio.gather(
            page_stream(server.url, body), page_stream(server.url, body, move)
        )

    for events, moved in zip(asyncio.run(both()), (False, True)):
        text = {"before": "", "after": ""}
        for e in events[1:]:
            text[e["side"]] += e["text"]
        assert sum("finish" in e for e in events) == 2
        assert (text["before"] != text["after"]) == moved
    gone = httpx.post(server.url + "/api/chat/none/steer", json={"steer": []})
    assert gone.status_code == 404 and gone.json()["error"]["message"]


@pytest.mark.parametrize(
    "edit",
    [
        {"op": "clamp", "value": 2}, {"op": "min_clamp", "value": 2}, {"op": "scale", "value": 6},
        {"op": "ablate"}, {"op": "add", "value": 60, "unit": "raw"},
        {"op": "clamp", "value": 2, "when": {"latent": 0, "above": 0}},
        {"op": "add", "value": 2, "when": {"latent": 0, "above": 0, "unit": "max"}},
    ],
    ids=str,
)  # fmt: skip
def test_every_operation_shows(server, edit):
    """On the latents that fire on the prompt; a gate on one of them."""
    base = {"prompt": "def main(", "max_tokens": 60, "temperature": 1, "seed": 1}
    fires = ask(server, "fired", {"prompt": "def main("})["fired"][-1]
    if "when" in edit:
        edit = {**edit, "when": {**edit["when"], "latent": fires[0][0]}}
    steer = [{"latent": j, **edit} for j, _ in fires]
    text = {"before": "", "after": ""}
    for e in asyncio.run(page_stream(server.url, {**base, "steer": steer}))[1:]:
        text[e["side"]] += e["text"]
    assert text["before"] != text["after"]


def test_limits_cut_a_request_and_are_told(server, service, monkeypatch):
    """96 new tokens, 64 of a prompt."""

    def written(prompt, tokens):
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
        events = asyncio.run(page_stream(server.url, body))
        assert sum("finish" in e for e in events) == 2
        return events[0]["note"]

    assert written("import os", 5) == ""
    assert written("import os", 10**9) == "At most 96 tokens are written at a time."
    long = "x = 1\n" * 50
    assert written(long, 5) == "The prompt is long: only its last 63 tokens are read."
    found = ask(server, "fired", {"prompt": long})
    assert len(found["tokens"]) == 63 and "last 63 tokens" in found["note"]
    monkeypatch.setattr(service, "context", 30)
    prompt = "x = 1\n" * 5
    left = 30 - len(service.encode(prompt))
    assert written(prompt, 20) == f"The model has room for {left} tokens after this prompt."
    assert written(prompt, left) == ""
    # a prompt that leaves no room is cut so that half of the context is left to write in
    assert written(long, 90) == "The prompt is long: only its last 14 tokens are read."


def test_a_chat_that_is_cut_goes_on_from_the_end_of_its_prompt(service, server, monkeypatch):
    monkeypatch.setattr(service, "context", 30)
    long = "import os\n" * 40
    body = {"prompt": long, "max_tokens": 8, "temperature": 0}
    events = asyncio.run(page_stream(server.url, body))
    text = "".join(e["text"] for e in events[1:] if e["side"] == "before")
    ids = service.encode(long)
    cut = [ids[0], *ids[-21:]]
    job = httpx.post(
        server.url + "/v1/completions", json={"prompt": cut, "max_tokens": 8, "temperature": 0}
    )
    assert text == job.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    "path,body,says",
    [
        ("chat", {"prompt": ""}, "Write a prompt first."),
        ("fired", {"prompt": ""}, "Write a prompt first."),
        ("chat", {"prompt": "\ud800"}, "The prompt cannot be read as text."),
        ("chat", {"prompt": 3}, "The prompt cannot be read as text."),
        ("chat", {"prompt": "x", "temperature": 9}, "temperature must be a number from 0 to 2"),
        ("chat", {"prompt": "x", "seed": "a"}, "seed must be a whole number"),
        ("chat", {"prompt": "x", "max_tokens": 0}, "must be a whole number, 1 or more"),
        ("chat", {"prompt": "x", "steer": [{"latent": 64, "value": 1}]}, "no latent 64: this"),
        ("chat", {"prompt": "x", "steer": [{"latent": 1}]}, "latent 1 needs a number"),
        ("chat", {"prompt": "x", "steer": [{"latent": 1, "value": 1, "when": {"latent": 99}}]},
         "no latent 99"),
        ("chat", {"prompt": "x", "steer": [{"latent": 1, "value": 1e9}]}, "Edit 1 has a number"),
        ("chat", {"prompt": "x", "steer": [{"latent": 1, "value": 1}] * 33}, "At most 32 latents"),
        ("chat", [], "The server cannot read this request."),
        ("chat/none/steer", {"steer": []}, "not being written any more"),
        ("chat/none/steer", {"steer": 3}, "The server cannot read this request."),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_what_is_wrong_is_said_in_plain_words(server, path, body, says):
    answer = httpx.post(
        f"{server.url}/api/{path}", content=json.dumps(body),
        headers={"content-type": "application/json"},
    )  # fmt: skip
    message = answer.json()["error"]["message"]
    assert 400 <= answer.status_code < 500 and says in message
    assert message[0].isupper() and message.endswith(".")
    assert not re.search(r"steer|\b(loc|body|max_tokens|value_error|\w+Error)\b", message)


def test_a_search_that_is_too_long_and_a_latent_that_is_not_there(server):
    answer = httpx.get(server.url + "/api/features", params={"q": "a" * 101})
    assert answer.json()["error"]["message"] == "This search is too long."
    answer = httpx.get(server.url + "/api/features/64")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "There is no latent 64: this SAE's are 0 to 63."


def test_units_of_max_need_a_maximum(server, service, monkeypatch):
    monkeypatch.setattr(service.latents, "sae", replace(service.sae, max_activation=None))
    body = {"prompt": "x", "steer": [{"latent": 1, "value": 1, "unit": "max"}]}
    answer = httpx.post(server.url + "/api/chat", json=body)
    assert answer.status_code == 400 and "choose raw numbers" in answer.json()["error"]["message"]
    for edit in ({"op": "ablate"}, {"op": "scale", "value": 2}, {"value": 1, "unit": "raw"}):
        body["steer"] = [{"latent": 1, **edit}]
        assert httpx.post(server.url + "/api/chat", json=body).status_code == 200


def test_an_error_of_the_model_is_told_without_its_name(server, service, monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(service.engine, "_forward", fails)
    events = asyncio.run(page_stream(server.url, {"prompt": "x", "max_tokens": 3}))
    said = [e["error"] for e in events if "error" in e]
    assert said == ["The model could not go on writing."] * 2
    assert "RuntimeError: shapes do not match" in caplog.text  # for whoever runs the server


def test_a_prompt_that_cannot_be_read_says_why(server, service, monkeypatch):
    def message():
        answer = httpx.post(server.url + "/api/fired", json={"prompt": "import os"})
        assert answer.status_code == 501
        return answer.json()["error"]["message"]

    with monkeypatch.context() as patch:
        patch.setattr(service.latents, "sae", replace(service.sae, W_enc=torch.zeros(64, 8)))
        assert "the SAE reads activations 8 wide, and the model has 256 here" in message()
    monkeypatch.setattr(service.latents, "_reader", None)
    assert message().startswith("Which latents fire cannot be shown: the model cannot be run")


def test_reading_holds_nobody_up_and_is_bounded(server, service, monkeypatch):
    held, original = threading.Event(), service.latents._reader
    begun = threading.Semaphore(0)

    def slowly(ids):
        begun.release()
        held.wait(20)
        return original(ids)

    monkeypatch.setattr(service.latents, "_reader", slowly)
    url, body = server.url + "/api/fired", {"prompt": "import os"}
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(httpx.post, url, json=body, timeout=30) for _ in range(4)]
        for _ in waiting:
            assert begun.acquire(timeout=10)
        answer = httpx.post(url, json=body)
        assert answer.status_code == 429 and "try again" in answer.json()["error"]["message"]
        assert asyncio.run(page_stream(server.url, {"prompt": "x", "max_tokens": 3}))
        held.set()
        assert [w.result().status_code for w in waiting] == [200] * 4
    assert ask(server, "fired", body)["latents"]


def test_reading_beside_a_steered_text_changes_neither(server, service):
    prompt = "def main("
    alone_read = ask(server, "fired", {"prompt": prompt})
    tokens = alone(service, prompt, [clamp(5, 4.0, unit="max")], 90)
    body = {
        "prompt": prompt,
        "max_tokens": 90,
        "temperature": 0,
        "steer": [{"latent": 5, "value": 4, "unit": "max"}],
    }
    with ThreadPoolExecutor(4) as pool:
        text = pool.submit(asyncio.run, page_stream(server.url, body))
        read = list(pool.map(lambda _: ask(server, "fired", {"prompt": prompt}), range(30)))
        events = text.result()
    after = "".join(e["text"] for e in events[1:] if e["side"] == "after")
    assert after == service.tokenizer.decode(tokens, skip_special_tokens=True)
    assert all(one == alone_read for one in read)


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
