"""What is shown of a latent: excerpts, titles, cards."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fastsae.features.cards import BINS, CardMaker, Effects, Scores, spread
from fastsae.features.excerpts import LINE_END, SPACE, Around, Example, Reader
from fastsae.features.stats import FeatureStats
from fastsae.features.titles import title
from fastsae.features.tokens import TokenShares
from fastsae.lm.harvest import Windows


class Pieces:
    """A vocabulary of given texts, as `TokenText`; "\\xf0" and "\\xf1" make one character."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __getitem__(self, token: int) -> str:
        return self.texts[token]

    def text(self, tokens: list[int]) -> str:
        return "".join("\ufffd" if self[t].startswith("\\x") else self[t] for t in tokens)

    def pieces(self, tokens: list[int]) -> list[str]:
        whole = {"\\xf0": "", "\\xf1": "🙂"}
        return [whole.get(self[t], self[t]) for t in tokens]


def read(*windows: list[str], documents: str = "") -> Reader:
    texts = sorted({token for window in windows for token in window})
    tokens = torch.tensor([[texts.index(token) for token in window] for window in windows])
    names = list(documents) or [f"d{i}" for i in range(len(windows))]
    return Reader(Windows(tokens, names, 0), Pieces(texts))  # type: ignore[arg-type]


def split(text: str) -> list[str]:
    """Tokens of three characters at most: words are cut."""
    return re.findall(r"\s|\w{1,3}|[^\w\s]{1,3}", text)


CODE = """x = compute(values)

    def handler(self, request):

        return self.lookup(request.name)


    # the rest is told below
    totally = unrelated(stuff)
"""
PROSE = "Once upon a time there was a fox. It ran over the hills, and nobody ever caught it again."


@pytest.mark.parametrize("text", [CODE, PROSE, "no\n\n\nbreaks\n\n\n \n"])
@pytest.mark.parametrize("before,after", [(64, 44), (12, 9), (0, 0)])
def test_excerpts_are_whole_words_and_lines_without_empty_ones(text, before, after) -> None:
    tokens = split(text)
    reader = read(tokens)
    words = set(re.findall(r"\w+", text))
    for place in range(len(tokens)):
        got = reader.example(place, [place], [2.5], before=before, after=after)
        shown = "".join(got.pieces)
        assert got.activations[got.peak] == 2.5 and sum(got.activations) == 2.5
        assert not re.search(r"\n\s*\n|^\n|\n$", shown)
        assert "  " not in shown
        if before:
            assert set(re.findall(r"\w+", shown)) <= words, shown
            assert len(shown) <= before + after + 12
        if tokens[place].strip():
            assert got.pieces[got.peak] == tokens[place]
        else:
            assert got.pieces[got.peak] in (" ", "\n", "↵")


def test_an_excerpt_begins_with_a_line_where_that_leaves_enough() -> None:
    tokens = split(CODE)
    place = tokens.index("loo")
    got = reader_text(tokens, place, 52, 11)
    assert got == "def handler(self, request):\nreturn self.lookup(request"
    assert reader_text(tokens, place, 24, 11) == "return self.lookup(request"
    assert reader_text(tokens, place, 14, 11) == "return self.lookup(request"


def reader_text(tokens: list[str], place: int, before: int, after: int) -> str:
    return "".join(read(tokens).example(place, [place], [1.0], before=before, after=after).pieces)


def test_text_without_words_to_cut_at_is_cut_anyway() -> None:
    got = read(["abc"] * 60).example(30, [30], [1.0], before=20, after=10)
    assert 20 <= len("".join(got.pieces)) <= 40


def test_an_excerpt_has_the_activations_around() -> None:
    reader = read(["zz", " one", " two", " three"], [" four", " five", " six", " end"])
    got = reader.example(5, [2, 3, 4, 5, 7], [9.0, 9.0, 1.0, 2.0, 3.0])
    assert got == Example("d1", ["four", " five", " six"], [1.0, 2.0, 0.0], 1)


def test_a_character_in_two_tokens_is_shown_once() -> None:
    reader = read(["a", " well", " ", "\\xf0", "\\xf1", " yes", " no"])
    got = reader.example(3, [3, 4], [1.0, 2.0])
    assert got.pieces == ["well ", "", "🙂", " yes"] and got.peak == 1
    assert reader.around(3) == reader.around(4) == Around("🙂", "well", "yes")


def pieces_of(tokens: list[str], fires_at: list[int], place: int) -> list[str]:
    return read(tokens).example(place, fires_at, [1.0] * len(fires_at)).pieces


def test_excerpts_keep_the_line_ends_where_a_latent_fires() -> None:
    tokens = [" x", "a", "\n\n", "\n", "  b", "  \n", "\t", "c", " ", " d", "\n ", "\n"]
    assert pieces_of(tokens, [1], 1) == ["x", "a", "\nb\nc d"]
    assert pieces_of(tokens, [2], 2) == ["xa", "\n", "b\nc d"]
    assert pieces_of(tokens, [2, 3], 3) == ["xa", "\n", "↵", "b\nc d"]
    assert pieces_of(tokens, [6, 8, 9], 6) == ["xa\nb\n", "\t", "c", " ", "d"]
    assert pieces_of(tokens, [10, 11], 10) == ["xa\nb\nc d", "↵"]
    assert pieces_of(tokens, [10, 11], 11) == ["xa\nb\nc d", "\n", "↵"]


def test_around_is_the_whole_word_and_its_neighbours() -> None:
    reader = read(["(", "hand", "ler", ")", " ", "don", "'t", "\n ", "x" * 20, "y" * 20])
    assert reader.around(1) == reader.around(2) == Around("handler", "(", ")")
    assert reader.around(0) == Around("(", "", "handler")
    assert reader.around(4) == Around(SPACE, ")", "don't")
    assert reader.around(6) == Around("don't", ")", "x" * 20 + "y" * 20)
    assert reader.around(7) == Around(LINE_END, "don't", "x" * 20 + "y" * 20)
    assert reader.around(9).unit == "y" * 20  # not all of so long a word
    assert read([" ", " "]).around(1) == Around(SPACE, "", "")


def titled(*places: tuple[str, str, str]) -> str:
    return title([Around(*place) for place in places], [1.0] * len(places))


def test_titles_are_words() -> None:
    assert title([], []) == ""
    assert titled(("cat", "", ""), ("Cat", "", ""), ("cat", "", ""), ("dog", "", "")) == "cat, dog"
    assert title([Around("cat", "", ""), Around("dog", "", "")], [1.0, 9.0]) == "dog"
    assert titled(*[(w, "", "") for w in "abcdefgh"]) == "a, b, c …"
    assert titled(*[(w, "the", w + w) for w in "abcdefgh"]) == "after the"
    assert titled(*[(w, w + w, "of") for w in "abcdefgh"]) == "before of"


def test_titles_of_marks_name_them_and_what_is_near() -> None:
    assert titled((",", "and", "x")) == "comma after and"
    assert titled((LINE_END, "a", "next"), (LINE_END, "b", "next"), (LINE_END, "c", "next")) == (
        "line end before next"
    )
    assert titled(*[(".", w, w) for w in "abcdefgh"]) == "full stop"
    assert titled(("=>", "", "")) == "“=>”"
    assert titled(("§", "", "")) == "section sign"


def test_examples_are_of_different_documents_and_wording() -> None:
    reader = read(*(["a", "b", w] for w in "ccdef"), documents="wxxyz")
    ends = [2, 5, 8, 11, 14]
    assert spread([ends], [5], reader) == [[2, 8, 11, 14]]  # one wording once
    assert spread([ends], [2], reader) == [[2, 8]]
    assert spread([[5, 8, 11], []], [2, 1], reader) == [[5, 11, 8], []]  # for want of others
    assert spread([[5, 8], [11, 14]], [2, 1], reader) == [[5], [11, 14]]  # one of document x
    assert spread([[2], [8, 11]], [2, 1], reader) == [[2], [8, 11]]  # what one list lacks


N, LENGTH = 24, 40


def maker() -> tuple[CardMaker, torch.Tensor]:
    """Latent 0 fires everywhere, at every strength; latent 1 on one word; latent 2 never."""
    vocabulary = [" alpha", " beta", " gam", " delta", ".", "\n"]
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (N, LENGTH), generator=g)
    dense = torch.zeros(N, LENGTH, 3)
    dense[..., 0] = torch.rand(N, LENGTH, generator=g) + 0.001
    dense[..., 1] = (tokens == 1) * 3.0
    stats = FeatureStats(3)
    index = torch.arange(3).int().expand(N, LENGTH, 3)
    stats.update(dense, index, torch.arange(N * LENGTH).view(N, LENGTH))
    shares = TokenShares(stats, tokens.reshape(-1))
    ids = torch.tensor([[0, 1]] * 3)
    effects = Effects(ids, ids * 0.5, ids.flip(1), ids * -0.5)
    windows = Windows(tokens, [f"d{i}" for i in range(N)], 0)
    fires_on = tuple(
        torch.stack(some)
        for some in zip(*(shares.rows(j, j + 1)[0].sort(descending=True) for j in range(3)))
    )
    fires_on = fires_on[1], fires_on[0]
    scores = Scores(*torch.zeros(4, 3), fires_on, fires_on)
    text = Pieces(vocabulary)
    return CardMaker(stats, scores, effects, windows, text), dense  # type: ignore[arg-type]


def test_a_card_has_examples_by_interval_one_of_each_document() -> None:
    cards, dense = maker()
    card = cards.card(0)
    assert [(i.low, i.high) for i in card.intervals] == [
        (0.75, 1),
        (0.5, 0.75),
        (0.25, 0.5),
        (0, 0.25),
    ]
    assert [len(i.examples) for i in card.intervals] == [3, 1, 1, 1]
    assert sum(i.share for i in card.intervals) == pytest.approx(1, abs=1e-3)
    largest = float(dense[..., 0].max())
    for interval in card.intervals:
        for example in interval.examples:
            peak = example.activations[example.peak]
            assert interval.low * largest < peak * 1.001 and peak <= interval.high * largest * 1.001
    documents = [e.document for i in card.intervals for e in i.examples]
    assert len(set(documents)) == len(documents)
    strongest = dense[..., 0].amax(1).sort(descending=True).values[:3]
    shown = [e.activations[e.peak] for e in card.intervals[0].examples]
    assert shown == pytest.approx(strongest.tolist(), rel=1e-3)


def test_a_card_has_a_title_a_histogram_and_effects_with_values() -> None:
    cards, dense = maker()
    card = cards.card(1)
    assert card.title == "beta"
    assert card.max_activation == 3.0
    assert card.fires_on == [(" beta", 1.0)]
    assert len(card.histogram) == BINS
    assert card.histogram[-1] == sum(card.histogram) == int((dense[..., 1] > 0).sum())
    assert card.promotes == [(" alpha", 0.0), (" beta", 0.5)]
    assert card.suppresses == [(" beta", 0.0), (" alpha", -0.5)]
    # all activations are in the top interval, and so are all examples
    assert [(i.low, len(i.examples)) for i in card.intervals] == [(0.75, 6)]
    assert json.loads(json.dumps(card.as_dict()))["intervals"][0]["share"] == 1.0


def test_a_latent_that_never_fires_is_refused_no_card() -> None:
    card = maker()[0].card(2)
    assert card.title == "" and card.intervals == [] and card.density == 0
