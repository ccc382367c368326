"""`benchmarks/eval_steered.py`, beside a stand-in for lm-eval that asks what it asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("yaml")

from serving import ROOT

SCRIPT = ROOT / "benchmarks" / "eval_steered.py"
STAND_IN = """
import json, pathlib, urllib.request
import yaml
from transformers import AutoTokenizer

def simple_evaluate(model, model_args, tasks, task_manager, batch_size, bootstrap_iters):
    assert model == "local-completions" and batch_size == 4
    (folder,), (name,) = task_manager, tasks
    task = yaml.safe_load((pathlib.Path(folder) / f"{name}.yaml").read_text())
    lines = open(task["dataset_kwargs"]["data_files"]["test"]).read().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(model_args["tokenizer"])
    samples = []
    for doc in map(json.loads, lines):
        before = task["doc_to_text"].replace("{{query}}", doc["query"])
        read = tokenizer(before, add_special_tokens=False).input_ids
        whole = [before + choice for choice in doc[task["doc_to_choice"]]]
        body = {
            "model": model_args["model"], "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True,
            "prompt": [tokenizer(text, add_special_tokens=False).input_ids for text in whole],
        }
        assert read[0] == tokenizer.bos_token_id != read[1]
        assert all(ids[: len(read)] == read for ids in body["prompt"])  # no token spans both
        request = urllib.request.Request(
            model_args["base_url"], json.dumps(body).encode(), {"content-type": "application/json"}
        )
        choices = json.load(urllib.request.urlopen(request))["choices"]
        sums = [sum(c["logprobs"]["token_logprobs"][len(read) : -1]) for c in choices]
        samples.append({"filtered_resps": [(s, False) for s in sums], "target": doc["gold"]})
    right = [
        s["filtered_resps"].index(max(s["filtered_resps"])) == s["target"] for s in samples
    ]
    accuracy = sum(right) / len(right)
    return {"results": {name: {"acc,none": accuracy}}, "samples": {name: samples}}
"""


def run(folder, *options, path=()):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run(
        [sys.executable, SCRIPT, "--sae", folder, *options], capture_output=True, text=True,
        env=env, cwd=ROOT, timeout=300,
    )  # fmt: skip


def test_both_scores_are_printed(folder, tmp_path):
    made = tmp_path / "lm_eval"
    made.mkdir()
    (made / "__init__.py").write_text(STAND_IN)
    (made / "tasks.py").write_text(
        "def TaskManager(include_path, include_defaults):\n"
        "    assert not include_defaults\n    return [include_path]\n"
    )
    steer = '[{"latent": 5, "value": 180}]'
    done = run(folder, "--steer", steer, path=(tmp_path,))
    assert done.returncode == 0, done.stderr
    told, _, plain, steered = done.stdout.splitlines()
    assert told == f"16 items; steered: {steer}"
    assert plain.split()[0] == "unsteered" and steered.split()[0] == "steered"
    accuracy, right = map(float, plain.split()[1:])
    assert accuracy > 0.4 and -5 < right < -2  # four endings each
    assert float(steered.split()[2]) < right - 1
    wrong = run(folder, "--steer", '[{"latent": 64, "value": 1}]', path=(tmp_path,))
    assert wrong.returncode == 2 and "whose SAE has 64" in wrong.stderr and not wrong.stdout
    none = run(folder, path=(tmp_path,))
    assert none.returncode == 2 and "give --steer" in none.stderr


def test_without_lm_eval_it_says_so(folder, monkeypatch):
    if (
        subprocess.run([sys.executable, "-c", "import lm_eval"], capture_output=True).returncode
        == 0
    ):
        pytest.skip("lm-eval is installed")
    done = run(folder)
    assert done.returncode == 2 and 'pip install "lm-eval[api]"' in done.stderr
