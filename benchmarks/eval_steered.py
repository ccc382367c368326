"""What an edit costs a model: a task of lm-eval through `fastsae serve`, unsteered and steered.

    pip install "lm-eval[api]"
    python benchmarks/eval_steered.py --sae quickstart/sae
                                      [--steer '[{"latent": 1797, "value": 1.5, "unit": "max"}]']

The task is some lines of Python with four endings each, written into a temporary folder; nothing is
downloaded but a model that is not embedded. lm-eval's `local-completions` scores every ending by
the log-probabilities of an echoed prompt. It sends no edits, so the server is started twice, once
with `--steer`. Without that option the edit is the one that the quickstart shows in its report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsae.lm.load import EMBEDDED, EMBEDDED_MODEL
from fastsae.nn import SparseCoder

NAME = "fastsae_python"
# A text, and endings of which the first is right. No token spans a text and its ending: a harness
# tokenizes both together, and such a token would count for neither.
ITEMS = [
    (
        "class Point:\n    def __init__(",
        ["self, x, y):", "cls, x, y):", "x, y, self):", "x, self, y):"],
    ),
    (
        "class A:\n    def area(self):\n        return",
        [" self.width", " cls.width", " width.self", " A.width"],
    ),
    ("def add(a, b):\n    return", [" a + b", " a - b", " b, a", " None"]),
    ("if a == b:\n    return True\nelse:\n    return", [" False", " True", " None", " self"]),
    ("if x is not", [" None:", " True:", " self:", " x:"]),
    ("if isinstance(x,", [" str):", " None):", " x):", " 1):"]),
    ("with open(name) as f:\n    text = f", [".read()", ".write()", ".append()", ".pop()"]),
    (
        "names = []\nfor name in table:\n    names",
        [".append(name)", ".add(name)", ".write(name)", ".split(name)"],
    ),
    ("words = text", [".split()", ".append()", ".read()", ".items()"]),
    ("for key, value in table", [".items():", ".keys():", ".values():", ".split():"]),
    ("for line in f:\n    line = line", [".strip()", ".close()", ".items()", ".append()"]),
    (
        "while True:\n    if not line:",
        ["\n        break", "\n        continue", "\n        pass", "\n        raise"],
    ),
    (
        "try:\n    n = int(text)\nexcept",
        [" ValueError:", " KeyError:", " OSError:", " ImportError:"],
    ),
    (
        "try:\n    value = table[key]\nexcept",
        [" KeyError:", " ValueError:", " OSError:", " ImportError:"],
    ),
    ("try:\n    import json\nexcept", [" ImportError:", " ValueError:", " KeyError:", " OSError:"]),
    (
        "try:\n    os.remove(path)\nexcept",
        [" OSError:", " ValueError:", " KeyError:", " ImportError:"],
    ),
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
output_type: multiple_choice
test_split: test
doc_to_text: {text}
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""


def write_task(folder: Path, bos: str) -> None:
    """The right ending stands in another place from item to item.

    Args:
        bos: stands in front of every text, as everywhere in fastsae. lm-eval leaves that to the
            tokenizer, and many do not add theirs.
    """
    lines = []
    for i, (query, endings) in enumerate(ITEMS):
        gold = i % len(endings)
        choices = [*endings[1:]]
        choices.insert(gold, endings[0])
        lines.append(json.dumps({"query": query, "choices": choices, "gold": gold}))
    items = folder / "items.jsonl"
    items.write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps(bos + "{{query}}")
    task = TASK.format(name=NAME, items=json.dumps(str(items)), text=text)
    (folder / f"{NAME}.yaml").write_text(task, encoding="utf-8")


@contextmanager
def served(sae: Path, *options: str) -> Iterator[str]:
    """The address of a server on a free port, which ends with the block."""
    command = [sys.executable, "-m", "fastsae", "serve", "--sae", str(sae), "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise SystemExit(process.wait())  # it has said why
        url = words[-1].rstrip("/")
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def scored(url: str, folder: Path, tokenizer: str, longest: int) -> tuple[float, float]:
    """The accuracy, and the mean log-probability of the right ending."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        model="local-completions",
        model_args={
            "model": "served", "base_url": f"{url}/v1/completions", "tokenizer": tokenizer,
            "tokenizer_backend": "huggingface", "max_length": longest,
        },
        tasks=[NAME],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )  # fmt: skip
    right = [float(s["filtered_resps"][s["target"]][0]) for s in found["samples"][NAME]]
    return found["results"][NAME]["acc,none"], sum(right) / len(right)


def report_edit(sae: Path) -> str | None:
    """The edit that the quickstart's report shows, if there is one."""
    report = sae.parent / "report.json"
    chosen = json.loads(report.read_text())["steering"] if report.exists() else None
    if not chosen:
        return None
    edit = {"latent": chosen["feature"], "value": chosen["strength"], "unit": "max"}
    return json.dumps([edit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--steer", help="edits in JSON; the quickstart's own by default")
    parser.add_argument(
        "--model", help="hub id or folder; the one the SAE was trained on by default"
    )
    args = parser.parse_args()
    if find_spec("lm_eval") is None:
        parser.error('lm-eval is not installed: pip install "lm-eval[api]"')
    steer = args.steer or report_edit(args.sae)
    if steer is None:
        parser.error(f"no report.json beside {args.sae} says what to steer: give --steer")
    origin = SparseCoder.from_pretrained(args.sae).origin
    model = args.model or (origin.model if origin else EMBEDDED)
    if model == EMBEDDED:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to look up
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = str(EMBEDDED_MODEL) if model == EMBEDDED else model
    bos = AutoTokenizer.from_pretrained(tokenizer).bos_token or ""
    config = AutoConfig.from_pretrained(tokenizer).get_text_config()
    longest = min(int(getattr(config, "max_position_embeddings", 1024)), 1024)
    options = ["--model", args.model] if args.model else []
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        write_task(folder, bos)
        for name, more in (("unsteered", []), ("steered", ["--steer", steer])):
            with served(args.sae, *options, *more) as url:
                rows.append((name, *scored(url, folder, tokenizer, longest)))
    print(f"{len(ITEMS)} items; steered: {steer}")
    print(f"{'':12}{'accuracy':>10}{'log p of the right ending':>28}")
    for name, accuracy, logprob in rows:
        print(f"{name:12}{accuracy:10.3f}{logprob:28.3f}")


if __name__ == "__main__":
    main()
