"""`fastsae serve --steer`: edits for requests that name none."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from serving import ROOT  # noqa: E402

STEER = [{"latent": 5, "value": 6, "unit": "max"}]


def test_requests_that_name_no_edits_are_steered(folder):
    command = [sys.executable, "-m", "fastsae", "serve", "--sae", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--steer", json.dumps(STEER)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        at, told = process.stdout.readline(), process.stdout.readline()
        assert at.startswith("embedded: tiny_python_lm at http://localhost:"), at
        assert json.loads(told.partition(": ")[2]) == STEER
        url = at.split()[-1].rstrip("/")

        def ask(path, **body):
            body = {"temperature": 0, "max_tokens": 12, **body}
            answer = httpx.post(url + path, json=body, timeout=30)
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            return choice["text"] if "text" in choice else choice["message"]["content"]

        prompt = dict(path="/v1/completions", prompt="import os\n")
        chat = dict(path="/v1/chat/completions", messages=[{"role": "user", "content": "import"}])
        for body in (prompt, chat):
            steered = ask(**body)
            assert steered == ask(**body, steer=STEER) == ask(**body, steer=None)
            plain = ask(**body, steer=[])
            assert plain != steered  # named, and none
            assert ask(**body, steer=[{"latent": 5, "op": "scale", "value": 1}]) == plain
    finally:
        watch.cancel()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "steer,why",
    [
        ("{", "--steer: Invalid JSON"),
        ("{}", "--steer: Input should be a valid array"),
        ('[{"feature": 5}]', "--steer: 0: feature: not known here; latent is"),
        ('[{"latent": 5}]', "--steer: clamp needs a value"),
        ('[{"latent": 64, "value": 1}]', "whose SAE has 64"),
        ('[{"latent": 5, "value": 1}, {"latent": 5, "value": 2}]', "latent 5 is edited twice"),
    ],
)
def test_edits_that_cannot_be_are_one_line(folder, steer, why):
    from typer.testing import CliRunner

    from fastsae.cli.app import app

    run = CliRunner().invoke(app, ["serve", "--sae", str(folder), "--port", "0", "--steer", steer])
    assert run.exit_code == 2 and why in run.stderr and run.stderr.count("\n") == 1, run.output
