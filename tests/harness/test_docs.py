"""README and docs/: their Python runs, their commands and links exist, their tables are fresh."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import Letters, V

from fastsae.nn import TopKSAE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "benchmarks" / "notes").glob("*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_in(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def language_model():
    """The names that stand for a model of the reader's, 21 blocks deep and 4 wide."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=4, n_layer=21, n_head=1, bos_token_id=0, eos_token_id=None
    )
    return {
        "model": transformers.GPT2LMHeadModel(config).eval(),
        "tokenizer": Letters(),
        "sae": TopKSAE(4, 31165, 2),
        "polite_texts": ["would you"],
        "rude_texts": ["get lost"],
    }


def batch(rows: int):
    ids = torch.randint(2, V, (rows, 4), generator=torch.Generator().manual_seed(0))
    return {"batch": {"input_ids": ids, "max_new_tokens": 2, "pad_token_id": 1}}


def weights():
    shapes = {"x": (5, 8), "W_enc": (64, 8), "b_enc": (64,), "W_dec": (64, 8), "b_dec": (8,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def rows():
    pytest.importorskip("tqdm")  # for progress=True
    return {"activations": torch.randn(2100, 768), "held_out": torch.randn(100, 768)}


# What a page's blocks find prepared, block by block; names live on to the page's end.
PREPARED = {
    "README.md": [
        lambda: {
            "activations": [torch.randn(64, 768) for _ in range(2)],
            "sample": torch.randn(64, 768),
        },
        lambda: language_model() | batch(2),
    ],
    "docs/install.md": [weights],
    "docs/training.md": [rows, dict, weights],
    "docs/steering.md": [lambda: language_model() | batch(3), lambda: batch(1)],
}
SMALLER = {"24576": "512", "steps=1500": "steps=3", "activations, 2048": "activations, 32"}


@pytest.mark.parametrize("page", PREPARED)
def test_the_python_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks, names = python_in(page), {}
    assert len(blocks) == len(PREPARED[page])
    for block, prepare in zip(blocks, PREPARED[page]):
        for size, small in SMALLER.items():
            block = block.replace(size, small)
        names.update(prepare())
        exec(block, names)


def test_no_python_goes_untested():
    with_python = {name_of(p) for p in PAGES if python_in(name_of(p))}
    # a client needs a server: tests/serve/test_api.py
    assert with_python == {*PREPARED, "docs/serving.md"}


def commands(text: str) -> list[list[str]]:
    """The words of each `fastsae` and `make` that a page shows, in a block or in running text."""
    shell = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in shell for line in block.split("\n")]
    lines += re.findall(r"`([^`\n]+)`", text)
    lines = [line.split(" #")[0] for line in lines if re.match("(fastsae|make) ", line)]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_exist(page):
    typer = pytest.importorskip("typer")
    from fastsae.cli.app import app

    known = typer.main.get_command(app).commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *words in commands(page.read_text()):
        if program == "make":
            assert words[0] in targets, words
        else:
            assert words[0] in known, words
            options = {o for p in known[words[0]].params for o in p.opts} | {"--help"}
            assert not {w for w in words if w.startswith("--")} - options, words


def anchors(path: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
    folders = "benchmarks|csrc|docs|examples|fastsae|tests|tools|triton_kernels"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists() or not re.search(r"\.\w+$", path), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_tables_and_picture_are_those_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "make_tables.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
