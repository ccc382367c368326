"""What the page shows of latents: labels, a search, cards, a quickstart's report."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from fastsae.lm.load import load_subject
from fastsae.lm.readout import logit_effect
from fastsae.nn import Description, MaxActivations
from fastsae.serve.latents import Latents
from fastsae.serve.reading import Reader
from fastsae.serve.report import Report, read_report
from fastsae.serve.words import PIECE, WORD, Words, shown


@pytest.fixture(scope="module")
def subject():
    return load_subject(None)


@pytest.fixture(scope="module")
def words(subject):
    return Words(subject.tokenizer)


@pytest.fixture(scope="module")
def readout(subject):
    return logit_effect(subject.model, torch.eye(256))


def token(subject, text):
    (only,) = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    return only


def promoting(subject, readout, *promoted, maxima=None, report=None):
    """Latents whose decoder rows promote the tokens given for each."""
    rows = [sum(readout[:, token(subject, t)] for t in texts) for texts in promoted]
    W_dec = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    count = len(rows)
    largest = None if maxima is None else MaxActivations(torch.tensor(maxima), 1000, "made up")
    sae = Description(
        W_dec, torch.zeros(count), W_dec, torch.zeros(256), "relu", max_activation=largest
    )
    return Latents(subject.tokenizer, sae, readout, report)


# -- words ----------------------------------------------------------------------------------------


def test_how_tokens_are_written():
    assert shown(" raise") == " raise" and shown("\n    ") == "⏎    " and shown("a\tb") == "a⇥b"
    assert shown("\r\n") == "⏎" and shown("\x06") == "" and shown("\u200b") == ""
    assert shown("a\xa0b") == "a b"


@pytest.mark.parametrize(
    "text,kind",
    [
        (" raise", WORD), ("raise", WORD), (" is", WORD), ("):", WORD), ("\n    ", WORD),
        ("_error", WORD), (".write", WORD), ("42", WORD), ("\t", WORD), ("日", WORD),
        ("bject", PIECE), ("ction", PIECE), (" z", PIECE), ("P", PIECE), ("in", PIECE),
        ("", None), ("    ", None), ("\x06", None), ("\\xfa", None), ("\ufffd", None),
        ("a\x06", None), ("<|endoftext|>", None),
    ],
    ids=repr,
)  # fmt: skip
def test_what_a_token_says_alone(words, text, kind):
    special = words._tokenizer.all_special_tokens
    assert words.kind(special[0] if kind is None and text.startswith("<|") else text) == kind


def test_a_label_has_whole_words_where_there_are_any(words):
    texts = ["bject", "\x06", " raise", "raise", "\n        ", "\n", "", "ction", " is"]
    assert words.label(texts, 6) == [" raise", "⏎", " is"]
    assert words.label(["bject", "\ufffd", "ction", "bject"], 6) == ["bject", "ction"]
    assert words.label(["", "\x06"], 6) == []


def test_every_token_of_the_vocabulary_makes_a_readable_label_or_none(words, subject):
    for i in range(len(subject.tokenizer)):
        for line in words.label([words[i]], 6):
            assert line.strip() and line.isprintable() and "\ufffd" not in line
    assert words[len(subject.tokenizer)] == ""


@pytest.mark.parametrize(
    "word,found",
    [
        ("import", {"import", " import", ".import"}),
        ("VALUEERROR", {"ValueError", " ValueError"}),
        ("unittes", {"unittest", " unittest"}),
        ("):", {"):"}),
        ("é", set()),  # bytes, which nobody can read
        ("", set()),
    ],
)
def test_tokens_of_a_word_that_somebody_types(words, word, found):
    assert found <= {words[t] for t in words.looked_for(word)}
    assert words.looked_for(word) or not found
    assert all(words.kind(words[t]) is not None for t in words.looked_for(word))


# -- lists ----------------------------------------------------------------------------------------


def test_labels_are_made_in_the_same_way_for_all(subject, readout):
    """Of the readout, also where the report has words of its own."""
    features = [{"index": 1, "fires_on": [["zzz", 1.0]], "promotes": [["yyy", 1.0]]}]
    latents = promoting(
        subject, readout, (" raise",), (" import",), (" return",), report=report_of(features)
    )
    labels = [one["words"] for one in latents.listed([0, 1, 2])]
    assert [label[0] for label in labels] == [" raise", " import", " return"]
    assert all(len(label) == 6 for label in labels)
    assert latents.listed([7, -1]) == []


def test_without_a_readout_the_report_s_latents_have_labels(subject, readout):
    features = [{"index": 1, "promotes": [[" import", 0.5], ["bject", 0.4], ["\x06", 0.3]]}]
    known = promoting(subject, readout, (" raise",), (" import",), report=report_of(features))
    bare = Latents(subject.tokenizer, known.sae, None, report_of(features))
    assert [one["words"] for one in bare.listed([0, 1])] == [[], [" import"]]
    assert [one["latent"] for one in bare.search("import", 9)] == [1]
    assert "promotes" not in bare.card(0) and bare.example()["steer"][0]["latent"] == 1


def test_a_search_of_several_words_puts_those_that_match_all_first(subject, readout):
    latents = promoting(
        subject, readout, (" raise",), (" import",), (" raise", " import"), (" return",)
    )
    found = latents.search("import raise", 5)
    assert found[0]["latent"] == 2 and {one["latent"] for one in found[1:3]} == {0, 1}
    assert [w.strip() for w in found[0]["found"]] == ["import", "raise"]
    assert latents.search("raise import", 5)[0]["latent"] == 2
    assert latents.search("import import", 5)[0]["latent"] == 1
    assert [one["latent"] for one in latents.search("3 1 9 3", 5)] == [3, 1]
    assert latents.search("", 3) and latents.search("\x00", 3) == []


def test_a_report_s_words_are_found_too(subject, readout):
    features = [{"index": 1, "fires_on": [["Zyzzyva", 1.0]]}]
    latents = promoting(subject, readout, (" raise",), (" import",), report=report_of(features))
    assert [one["latent"] for one in latents.search("zyzz", 5)][:1] == [1]


def test_without_a_query_the_report_s_come_first_then_the_clearest(subject, readout):
    features = [{"index": 3}]
    latents = promoting(
        subject, readout, ("bject",), (" raise", " return", " import"), ("ction",), (" def",),
        (" class", " def"), maxima=[1.0, 1.0, 1.0, 1.0, 0.0], report=report_of(features),
    )  # fmt: skip
    order = [one["latent"] for one in latents.search("", 9)]
    assert order[:2] == [3, 1]
    assert 4 not in order  # not seen to fire
    assert [one["max"] for one in latents.listed([0, 4])] == [1.0, 0.0]


def test_a_card_has_both_ends_of_the_readout(subject, readout, words):
    latents = promoting(subject, readout, (" raise",), maxima=[3.0])
    card = latents.card(0)
    effect = latents.sae.W_dec[0] @ readout
    assert card["max"] == 3.0 and card["promotes"][0][0] == " raise"
    for name, sign in (("promotes", 1), ("suppresses", -1)):
        texts, values = zip(*card[name])
        assert len(texts) == 10 and list(values) == sorted(values, key=lambda v: -sign * v)
        assert all(t.strip() and t.isprintable() for t in texts)
        readable = [v for v, t in sorted(zip((sign * effect).tolist(), range(4096)), reverse=True)
                    if words.kind(words[t]) is not None]  # fmt: skip
        assert values[0] * sign == pytest.approx(readable[0], abs=1e-3)
    assert "examples" not in card


# -- the report -----------------------------------------------------------------------------------


def report_of(features, **more):
    """As `read_report` makes it of a file with these."""
    import tempfile
    from pathlib import Path

    whole = {
        "fires_on": [], "promotes": [], "density": 0.01, "top_examples": [], "weaker_examples": [],
    }  # fmt: skip
    data = {"d_sae": 5, "steering": None, "features": [{**whole, **f} for f in features], **more}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        path.write_text(json.dumps(data))
        return read_report(path, 5)


def steering(texts, **more):
    made = [{"prompt": p, "own_before": [False] * g, "own_after": [True] * g} for p, g in texts]
    return {"feature": 2, "strength": 1.5, "texts": made, **more}


def test_what_a_report_says():
    example = {"document": "a.py", "tokens": ["x", "\n"], "activations": [0.0, 2.5], "peak": 1}
    features = [
        {"index": 4, "fires_on": [["x", 0.9]], "top_examples": [example] * 3},
        {"index": 2, "weaker_examples": [example] * 9},
    ]
    texts = [
        ("lf): pass\n    a = 1\n", 9),
        ("begins\nin a line of its own", 6),
        ("no\nlonger one", 0),
    ]
    report = report_of(features, steering=steering(texts))
    assert list(report.latents) == [4, 2] and report.latents[4].fires_on == ["x"]
    assert [len(known.examples) for known in report.latents.values()] == [3, 4]
    assert (report.steered, report.strength) == (2, 1.5)
    assert report.prompt == "in a line of its own"
    assert report_of(features, steering=steering([("one line", 3)])).prompt is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"d_sae": 6, "features": []}', '{"d_sae": 5, "features": [3]}',
     '{"d_sae": 5, "features": {}, "steering": 1}', '{"d_sae": 5, "features": []}'],
)  # fmt: skip
def test_a_report_that_says_nothing(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    assert read_report(tmp_path / "report.json", 5) == Report()
    assert read_report(tmp_path / "none.json", 5) == Report()


def test_the_example(subject, readout):
    promoted = [(" raise",), ("bject",), (" def",), ("ction",), ("vert",)]
    maxima = [2.0] * 5
    steered = report_of([{"index": 1}], steering=steering([("a\nlong enough", 3)]))
    latents = promoting(subject, readout, *promoted, maxima=maxima, report=steered)
    (edit,) = latents.example()["steer"]
    assert edit == {"latent": 2, "op": "clamp", "value": 1.5, "unit": "max"}
    latents = promoting(
        subject, readout, *promoted, maxima=maxima, report=report_of([{"index": 1}])
    )
    assert latents.example()["steer"][0]["latent"] == 1
    latents = promoting(subject, readout, *promoted, maxima=maxima)
    assert latents.example()["steer"][0]["latent"] in (0, 2)  # of whole words


def test_where_no_maximum_is_known_the_example_is_of_the_activations_length(subject, readout):
    latents = promoting(subject, readout, (" raise",))
    reader = Reader(subject.model, subject.site)
    known = Latents(subject.tokenizer, latents.sae, readout, None, reader, "def read(path):")
    ids = subject.tokenizer("def read(path):")["input_ids"]
    length = float(reader([subject.tokenizer.bos_token_id, *ids])[1:].norm(dim=1).mean())
    (edit,) = known.example()["steer"]
    assert edit["unit"] == "raw" and edit["value"] == pytest.approx(length / 3, rel=0.05)
    assert latents.example()["steer"][0]["value"] == 10.0


# -- a text ---------------------------------------------------------------------------------------


def test_latents_of_a_text(subject, readout):
    from fastsae.nn import TopKSAE

    sae, reader = TopKSAE(256, 64, 4, seed=0), Reader(subject.model, subject.site)
    latents = Latents(subject.tokenizer, sae.describe(), readout, None, reader)
    ids = latents.words.encode("import os\nx = '🙂'", bos=True)
    found = latents.on_text(ids, 1)
    with torch.no_grad():
        code = sae.encode(reader(ids)[1:])
    assert "".join(found["tokens"]) == "import os⏎x = '🙂'" and "" in found["tokens"]
    assert len(found["fired"]) == len(found["tokens"]) == len(ids) - 1
    for row, values, at in zip(found["fired"], code.values.tolist(), code.indices.tolist()):
        assert [j for j, _ in row] == [j for j, v in zip(at, values) if v > 0]
        assert [v for _, v in row] == pytest.approx([v for v in values if v > 0], abs=2e-3)
    listed = [one["latent"] for one in found["latents"]]
    assert set(listed) <= {j for row in found["fired"] for j, _ in row} and len(listed) > 4
    assert all(one["words"] for one in found["latents"])
    with pytest.raises(NotImplementedError, match="beside the one that writes"):
        Latents(subject.tokenizer, sae.describe(), readout).on_text(ids, 1)


def test_those_closest_to_their_maximum_are_listed_first(subject, readout):
    from fastsae.nn import TopKSAE
    from fastsae.steer import describe

    sae, reader = TopKSAE(256, 64, 4, seed=0), Reader(subject.model, subject.site)
    ids = Latents(subject.tokenizer, sae.describe()).words.encode("import os", bos=True)
    last = Latents(subject.tokenizer, sae.describe(), readout, None, reader).on_text(ids, 1)
    weakest = min((v, j) for row in last["fired"] for j, v in row)[1]
    maxima = torch.full((64,), 1e4)
    maxima[weakest] = 1e-3
    known = describe(sae, MaxActivations(maxima, 1000, "made up"))
    latents = Latents(subject.tokenizer, known, readout, None, reader)
    assert latents.on_text(ids, 1)["latents"][0]["latent"] == weakest
