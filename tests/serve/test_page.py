"""`fastsae serve`: the page, the command line, connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from serving import ROOT, TOKEN, Server, alone  # noqa: E402

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
