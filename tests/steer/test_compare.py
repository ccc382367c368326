"""`fastsae compare-steering`: a clamp, a vector and a prompt on the same text."""

from __future__ import annotations

import json
import math

import pytest
import torch
from common import generator, randn
from small_models import D, V, tiny

from fastsae.lm.harvest import Store, Windows
from fastsae.nn import TopKSAE
from fastsae.nn.description import MAX_ACTIVATION
from fastsae.steer import MaxActivations, add_vector, attach, concept
from fastsae.steer.compare import (
    CLAMP,
    METHODS,
    PROMPT,
    VECTOR,
    Comparison,
    Outcome,
    Trial,
    compare,
    measure,
    neutral_kl,
    padded,
    perplexity,
)
from fastsae.steer.sweep import Sampling, sample

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("transformers")


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = generator(seed)
    return [[0, *torch.randint(2, V, (n - 1,), generator=draw).tolist()] for n in lengths]


def outcome(method: str = CLAMP, **values: float) -> Outcome:
    given = {"strength": 1.0, "share": 0.1, "perplexity": 9.0, "kl": 0.1, "distinct_bigrams": 0.8}
    return Outcome(method, **{**given, **values})


@torch.no_grad()
def test_perplexity_is_of_the_continuations_alone():
    model, prompts, after = tiny("llama"), rows(4, 7, 5), rows(3, 3, 3, seed=1)
    losses = []
    for before, new in zip(prompts, after):
        logits = model(torch.tensor([before + new])).logits[0].log_softmax(-1)
        losses += [-float(logits[len(before) - 1 + i, t]) for i, t in enumerate(new)]
    assert perplexity(model, prompts, after) == pytest.approx(
        math.exp(sum(losses) / 9), rel=1e-4
    )  # fmt: skip


@torch.no_grad()
def test_neutral_kl():
    model, neutral, begins = tiny("gpt2"), rows(5, 8, 6), frozenset([0])
    assert neutral_kl(model, neutral, begins=begins) == pytest.approx(0, abs=1e-5)
    steerer, v = attach(model, layer=1), randn(D, seed=2)
    total, count = 0.0, 0
    for row in neutral:
        p = model(torch.tensor([row])).logits[0, 1:].log_softmax(-1)
        with steerer.steer([[add_vector(v)]]):
            q = model(torch.tensor([row])).logits[0, 1:].log_softmax(-1)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(row) - 1
    got = neutral_kl(model, neutral, lambda: steerer.steer([[add_vector(v)]]), begins=begins)
    assert got == pytest.approx(total / count, rel=1e-3)
    # what stands before is behind the BOS, and the same places are compared
    prefix, total = [7, 9, 11], 0.0
    for row in neutral:
        p = model(torch.tensor([row])).logits[0, 1:].log_softmax(-1)
        q = model(torch.tensor([[0, *prefix, *row[1:]]])).logits[0, 4:].log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    got = neutral_kl(model, neutral, prefix=prefix, begins=begins)
    assert got == pytest.approx(total / count, rel=1e-3)


@torch.no_grad()
def test_text_is_judged_by_the_unsteered_model_without_the_prefix():
    model, v = tiny("gpt2"), 3 * randn(D, seed=2)
    steerer, own = attach(model, layer=1), torch.arange(2, 30)
    trial = Trial(rows(5), rows(6, seed=1), own, frozenset([0]), Sampling(new_tokens=8))

    def steered():
        return steerer.steer([[add_vector(v)]])

    for options in ({"context": steered}, {"prefix": [7, 9, 11]}):
        got = measure(model, Numbers(), trial, CLAMP, 1.0, **options)
        said = [int(t) for t in got.text.split()]
        assert got.share == pytest.approx(sum(t in own for t in said) / 8)
        assert got.perplexity == pytest.approx(perplexity(model, trial.prompts, [said]), rel=1e-5)
    with steered():
        other = perplexity(model, trial.prompts, [said])
    behind = perplexity(model, [[0, 7, 9, 11, *trial.prompts[0][1:]]], [said])
    assert abs(other / got.perplexity - 1) > 0.01 < abs(behind / got.perplexity - 1)


def test_prompts_of_several_lengths_are_sampled_as_alone():
    model, prompts = tiny("pythia"), rows(3, 7)
    settings = Sampling(new_tokens=5, temperature=1e-4)
    ids, mask = padded(prompts, "left")
    assert mask.tolist() == [[0] * 4 + [1] * 3, [1] * 7]
    together = sample(model, ids, settings, attention_mask=mask)
    for row, prompt in zip(together, prompts):
        assert torch.equal(row, sample(model, torch.tensor([prompt]), settings)[0])


def test_best_is_bounded_by_every_damage():
    base = outcome("unsteered", share=0.0)
    good = outcome(share=0.2, perplexity=17.9, kl=0.49, distinct_bigrams=0.61)
    found = Comparison(base, [
        outcome(share=0.1), good, outcome(share=0.5, perplexity=18.1), outcome(share=0.5, kl=0.51),
        outcome(share=0.5, distinct_bigrams=0.59), outcome(PROMPT, share=0.9, kl=3.0),
    ], 1.0, 1.0)  # fmt: skip
    assert found.best(CLAMP) is good
    assert found.best(PROMPT) is None and found.best(VECTOR) is None
    best = found.as_dict()["best_within_limits"]
    assert best[CLAMP]["share"] == 0.2 and best[PROMPT] is None


@torch.no_grad()
def test_compare_sets_what_it_says():
    """The vector has the clamp's length, strength 0 is the unsteered model, nothing stays."""
    model, latent, unit = tiny("gpt2"), 3, 2.5
    sae = TopKSAE(D, 32, 32, seed=0).eval()  # all are active: 0 at strength 0 is an ablation
    steerer = attach(model, sae, layer=1)
    trial = Trial(rows(4, 6), rows(9, 9, seed=1), torch.tensor([5, 6]), frozenset([0]),
                  Sampling(new_tokens=6))  # fmt: skip
    v, prefixes, told = 7 * randn(D, seed=3), [[8, 9], [8, 9, 10, 11]], []
    moved = []
    edit, steer, programs = steerer._edit, steerer.steer, []
    steerer.steer = lambda given: programs.append(given[0][0]) or steer(given)
    steerer._edit = lambda x: moved.append((out := edit(x)) - x) or out
    got = compare(model, Numbers(), steerer, latent, unit, v, prefixes, trial, [0.0, 2.0],
                  told.append)  # fmt: skip
    assert [(o.method, o.strength) for o in got.outcomes] == [
        (CLAMP, 0.0), (CLAMP, 2.0), (VECTOR, 0.0), (VECTOR, 2.0), (PROMPT, 1), (PROMPT, 2),
    ]  # fmt: skip
    assert len(told) == 7
    assert [p.value for p in programs if p.latent == latent] == [0.0, 0.0, 5.0, 5.0]
    length = unit * float(sae.W_dec[latent].norm())
    assert got.added_norm == pytest.approx(length) and got.vector_norm == float(v.norm())
    added = moved[-1].reshape(-1, D)  # the vector at 2, the last that was steered
    assert torch.allclose(added, (2 * length * v / v.norm()).expand_as(added), atol=1e-4)
    nothing, strong = got.of(VECTOR)
    same = ("share", "perplexity", "distinct_bigrams", "text")
    assert all(getattr(nothing, n) == getattr(got.base, n) for n in same)
    assert nothing.kl == pytest.approx(0, abs=1e-5) and strong.kl > 0.01
    assert strong.text != got.base.text and got.of(PROMPT)[0].kl > 0.01
    again = compare(model, Numbers(), steerer, latent, unit, v, prefixes, trial, [0.0, 2.0])
    assert again == got
    with pytest.raises(ValueError, match="same mean"):
        compare(model, Numbers(), steerer, latent, unit, 0 * v, [], trial, [1.0])
    with pytest.raises(ValueError, match="1024"):
        compare(model, Numbers(), steerer, latent, unit, v, [[5] * 1020], trial, [1.0])


def test_leads_and_excerpts():
    tokens = torch.tensor([[0, 5, 6, 7, 5], [0, 1, 1, 1, 1], [0, 5, 5, 5, 9], [0, 9, 9, 9, 5]])
    store = Store(torch.zeros(16, 2), Windows(tokens, ["a", "b", "c", "a"]))
    own = torch.tensor([5, 6])
    assert concept.leads(store, own).view(4, 4).int().tolist() == [
        [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0],
    ]  # fmt: skip
    assert concept.excerpts(store, own, 4, 2) == [[5, 6], [5, 5]]  # one a document, best first
    assert concept.excerpts(store, own, 1, 9) == [[5, 6, 7, 5]]


# -- the command ----------------------------------------------------------------------------------


def run(*arguments: object):
    from fastsae.cli.app import app

    return typer_testing.CliRunner().invoke(app, ["compare-steering", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from fastsae.cli import compare as command

    for name, value in (("TOKENS", 3000), ("PROMPTS", 2), ("NEUTRAL", 2), ("PREFIXES", 2)):
        monkeypatch.setattr(command, name, value)
    TopKSAE(256, 32, 4, seed=0).save_pretrained(tmp_path / "sae")
    MaxActivations(torch.full((32,), 40.0), 1000, "made up", site="transformer.h.2").save(
        tmp_path / "sae" / MAX_ACTIVATION
    )
    return tmp_path / "sae"


def test_command_offline_with_the_embedded_model(folder, tmp_path):
    out = tmp_path / "out"
    options = ("--sae", folder, "--feature", 3, "--strengths", "0.5,2", "--tokens", 4)
    done = run(*options, "--out", out)
    assert done.exit_code == 0, done.output
    for text in (*METHODS, "unsteered", "perplexity", "distinct bigrams", "compare.png"):
        assert text in done.output
    report = json.loads((out / "compare.json").read_text())
    assert report["latent"] == 3 and report["concept"] and report["prompts"] == 2
    methods = [o["method"] for o in report["outcomes"]]
    assert methods[:5] == [CLAMP] * 2 + [VECTOR] * 2 + [PROMPT]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")

    for name, text in (
        ("positive", "import sys\nprint(sys\n"), ("negative", "def f(x):\nreturn x\n"),
        ("prompts", "import os\n\nclass A:\n"), ("neutral", "x = 1 + 2\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    own = [x for n in ("positive", "negative", "prompts", "neutral")
           for x in (f"--{n}", tmp_path / n)]  # fmt: skip
    done = run(*options, *own, "--concept", "sys, path", "--prefix", "import sys\n", "--out", out)
    assert done.exit_code == 0, done.output
    assert "Harvesting" not in done.output + done.stderr  # nothing needs the library's text
    report = json.loads((out / "compare.json").read_text())
    assert {t.strip().lower() for t in report["concept"]} == {"sys", "path"}
    assert report["prefixes"] == ["import sys\n", "import sys\nimport sys\n"]


def test_says_what_is_wrong_in_one_line(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n")
    options = ("--sae", folder, "--feature", 3, "--out", tmp_path / "out")
    for arguments, message in (
        ((*options, "--feature", 99), "the SAE has 32 latents"),
        ((*options, "--strengths", "1,much"), "must be numbers"),
        ((*options, "--positive", empty), "--positive and --negative"),
        ((*options, "--concept", "notaword"), "no single token"),
        ((*options, "--concept", "sys", "--prompts", empty), "holds no text"),
        ((*options, "--concept", "sys", "--prompts", tmp_path / "none"), "No such file"),
        (("--sae", tmp_path / "nowhere", "--feature", 3), "no such file"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        last = result.stderr.strip().splitlines()[-1]
        assert message in last and last.startswith("fastsae: ")
