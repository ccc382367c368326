"""`fastsae serve`: log-probabilities of prompts and completions, as the OpenAI API gives them."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from serving import GREEDY, PROMPTS, Reader, Server, busy, with_engine  # noqa: E402
from small_models import FAMILIES, LAYER, SLIDING, V, tiny, topk_sae  # noqa: E402

from fastsae.serve import engine as engines  # noqa: E402
from fastsae.serve.engine import Engine, Score, Scoring, scores  # noqa: E402
from fastsae.serve.text import ScoreText  # noqa: E402
from fastsae.steer import ablate, active, add, attach, clamp, min_clamp  # noqa: E402

STEER = [{"latent": 5, "value": 60.0}, {"latent": 9, "op": "add", "value": 30.0}]
PROGRAM = [clamp(5, 60.0), add(9, 30.0)]
BOTH = pytest.mark.parametrize(
    "edits,program", [(None, None), (STEER, PROGRAM)], ids=["plain", "steered"]
)


def after(model, steerer, ids, program):
    """Log-probabilities [T, V] of what follows each token, by a plain forward of the model."""
    with torch.no_grad(), steerer.steer([program]):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def truth(service, ids, program=None):
    busy(service, 0)
    service.engine._put_in_force([])  # the engine keeps the last programs in its tables
    return after(service.engine.model, service.engine.steerer, ids, program)


@pytest.fixture
def written(service, monkeypatch):
    """The tokens of every sequence that was asked for, with those of its prompt."""
    rows, original = [], service.start

    def start(*args, **options):
        job = original(*args, **options)
        rows.extend(job.rows)
        return job

    monkeypatch.setattr(service, "start", start)
    return lambda: [[*row.prompt, *row.generated] for row in rows]


def ask(server, path="/v1/completions", **body):
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def streamed(server, path="/v1/completions", **body):
    """The choices of a stream's chunks."""
    answer = httpx.post(server.url + path, json={**body, "stream": True}, timeout=60)
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line)["choices"][0] for line in lines]


def check(said, ids, expected, first=0):
    """What is said of `ids` from `first` on is what [T, V] `expected` says of them."""
    assert len({len(part) for part in said.values()} | {len(ids) - first}) == 1
    for i in range(first, len(ids)):
        name, logprob, top, _ = (said[key][i - first] for key in said)
        if i == 0:
            assert logprob is None and top is None
            continue
        there = expected[i - 1]
        assert logprob == top[name] == pytest.approx(float(there[ids[i]]), abs=2e-4)
        assert max(top.values()) == pytest.approx(float(there.max()), abs=2e-4)
        assert (logprob == max(top.values())) == (int(there.argmax()) == ids[i])


@BOTH
def test_what_an_evaluation_harness_asks(server, service, written, edits, program):
    """Prompts as lists of tokens, echoed and scored, while others are being written."""
    prompts = [service.encode(p) for p in (*PROMPTS[:3], "x")]
    others, held, original = [Reader() for _ in range(3)], threading.Event(), service.engine._step
    service.engine._step = lambda: (held.wait(0.02), original())[1]
    body = dict(echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    body |= {"steer": edits} if edits else {}
    try:
        rows = [
            service.engine.submit([7 * i, 3], reader, program=[clamp(i, 90.0)], max_tokens=300)
            for i, reader in enumerate(others)
        ]
        while not all(reader.tokens for reader in others):
            held.wait(0.01)
        got = ask(server, prompt=prompts, **body)
        assert not any(reader.done.is_set() for reader in others)
    finally:
        for row in rows:
            service.engine.cancel(row)
        service.engine._step = original
    for choice, ids, whole in zip(got, prompts, written(), strict=True):
        expected = truth(service, ids, program)
        assert whole == [*ids, int(expected[-1].argmax())]
        assert choice["text"] == service.tokenizer.decode(whole)
        check(choice["logprobs"], whole, expected)
    assert ask(server, prompt=prompts[:1], **body) == ask(server, prompt=prompts[0], **body)
    other = ask(server, prompt=prompts, **{**body, "steer": [] if edits else STEER})
    moved = [
        abs(a - b)
        for one, two in zip(got, other)
        for a, b in zip(one["logprobs"]["token_logprobs"], two["logprobs"]["token_logprobs"])
        if a is not None
    ]
    assert max(moved) > 0.1  # the program acts on the prompt


@BOTH
def test_a_completion_is_scored_by_the_whole_distribution(server, service, written, edits, program):
    """Whatever the temperature and top_p that it was drawn with."""
    before = "import os\n"
    body = dict(prompt=before, max_tokens=20, temperature=1.5, top_p=0.5, seed=5)
    body |= {"steer": edits} if edits else {}
    (plain,), (zero,), (five,) = (
        ask(server, **body, **more) for more in ({}, {"logprobs": 0}, {"logprobs": 5})
    )
    assert plain["logprobs"] is None and plain["text"] == zero["text"] == five["text"]
    said, ids = five["logprobs"], written()[-1]
    first = len(service.encode(before))
    check(said, ids, truth(service, ids, program), first)
    assert "".join(said["tokens"]) == five["text"]
    assert {len(top) for top in said["top_logprobs"]} <= {5, 6}
    for name, top, one in zip(
        said["tokens"], said["top_logprobs"], zero["logprobs"]["top_logprobs"]
    ):
        assert one == {name: top[name]} and next(iter(top)) == name
    # the offsets count from where the prompt begins, echoed or not
    assert said["text_offset"][0] == len(before)
    assert all(
        (before + five["text"])[at:].startswith(name)
        for at, name in zip(said["text_offset"], said["tokens"])
    )
    (echoed,) = ask(server, **body, logprobs=5, echo=True)
    assert echoed["text"] == before + five["text"]
    for key in ("tokens", "text_offset"):
        assert echoed["logprobs"][key][first:] == said[key]
    check(echoed["logprobs"], ids, truth(service, ids, program))


def test_a_prompt_may_be_scored_and_nothing_written(server, service):
    ids = service.encode("class Foo:\n")
    body = dict(prompt=["class Foo:\n", "x = 1\n"], echo=True, max_tokens=0)
    plain, scored = ask(server, **body), ask(server, **body, logprobs=2)
    assert [c["text"] for c in plain] == [c["text"] for c in scored] == body["prompt"]
    assert [c["finish_reason"] for c in [*plain, *scored]] == ["length"] * 4
    assert all(c["logprobs"] is None for c in plain)
    check(scored[0]["logprobs"], ids, truth(service, ids))
    (empty,) = ask(server, prompt="", echo=True, max_tokens=0, logprobs=1)  # read as a BOS alone
    assert empty["logprobs"] == {
        "tokens": ["<|endoftext|>"], "token_logprobs": [None], "top_logprobs": [None],
        "text_offset": [0],
    }  # fmt: skip
    answer = httpx.post(server.url + "/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 0


def test_offsets_and_names_of_tokens_that_are_no_characters(server, service):
    text = 'größe = "🙂🙂"\n'
    ids = service.encode(text)
    (got,) = ask(server, prompt=text, echo=True, max_tokens=0, logprobs=0)
    said = got["logprobs"]
    assert got["text"] == text and ids[0] == service.tokenizer.bos_token_id
    assert said["tokens"][0] == "<|endoftext|>"  # read in front of the text, and none of it
    assert said["text_offset"][:2] == [0, 0]
    smiles = [text.index("🙂"), text.index("🙂") + 1]
    raw = b""
    for name, at in zip(said["tokens"][1:], said["text_offset"][1:]):
        if name.startswith("bytes:"):
            raw += bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
        else:
            assert text[at:].startswith(name)
    assert raw.decode() == "öß🙂🙂"
    at_smiles = [at for at in said["text_offset"] if at in smiles]
    assert at_smiles == sorted(at_smiles) and len(set(at_smiles)) == 2 and len(at_smiles) > 2
    (tokens,) = ask(server, prompt=ids, echo=True, max_tokens=0, logprobs=0)  # as it is
    assert tokens["text"] == "<|endoftext|>" + text
    shifted = [at + len("<|endoftext|>") for at in said["text_offset"][1:]]
    assert tokens["logprobs"]["text_offset"] == [0, *shifted]
    torn = service.tokenizer("ok🙂", add_special_tokens=False)["input_ids"][:-1]
    (got,) = ask(server, prompt=torn, echo=True, max_tokens=0, logprobs=0)
    assert got["text"] == service.tokenizer.decode(torn)
    assert got["logprobs"]["text_offset"][-3:] == [2, 2, 2]


def test_an_offset_lies_in_the_text_however_a_tokenizer_decodes():
    class Lowering:
        """Writes a letter as two, so that texts are decoded to longer ones."""

        bos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids, **options):
            return "".join(2 * chr(i) for i in ids)

    assert ScoreText(Lowering()).place("abc", [97, 98, 99]).starts == [0, 2, 3]


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"stop": ["\n", "(", "."]}], ids=str)
def test_a_stream_has_the_scores_of_the_whole(server, options):
    body = dict(prompt="def main(", max_tokens=24, temperature=1.0, seed=3, logprobs=3, **options)
    (whole,) = ask(server, **body)
    parts = streamed(server, **body)
    assert "".join(p["text"] for p in parts) == whole["text"]
    for key, values in whole["logprobs"].items():
        assert [v for p in parts for v in p["logprobs"][key]] == values
    assert parts[-1]["finish_reason"] == whole["finish_reason"] and len(parts) > 1
    scored = sum(p["text"] != "" for p in parts if p["logprobs"]["tokens"])
    assert scored == sum(p["text"] != "" for p in parts)  # with their text, not at the end
    nothing = streamed(server, **{**body, "echo": True, "max_tokens": 0, "stop": None})
    assert [p["text"] for p in nothing] == ["def main("]
    assert nothing[0]["logprobs"]["token_logprobs"][0] is None


@BOTH
def test_a_chat_is_scored(client, service, written, edits, program):
    """As the openai client reads it, whole and as a stream."""
    options = dict(
        model="m", messages=[{"role": "user", "content": "s = '🙂"}], max_tokens=16, seed=2,
        logprobs=True, top_logprobs=4, extra_body={"steer": edits} if edits else {},
    )  # fmt: skip
    (got,) = client.chat.completions.create(**options).choices
    content, ids = got.logprobs.content, written()[-1]
    if ids[-1] in service.engine._eos:  # no token of the message
        ids.pop()
    first = len(ids) - len(content)
    assert len(content) > 4 and got.logprobs.refusal is None
    for said, token, there in zip(content, ids[first:], truth(service, ids, program)[first - 1 :]):
        assert said.logprob == pytest.approx(float(there[token]), abs=2e-4)
        best = there.topk(4)
        assert [t.logprob for t in said.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=2e-4
        )
        assert all(bytes(t.bytes) for t in said.top_logprobs)
    raw = b"".join(bytes(said.bytes) for said in content)
    assert raw.decode("utf-8", "replace") == got.message.content
    chunks = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
    assert [said for c in chunks for said in c.logprobs.content] == content
    (bare,) = client.chat.completions.create(**{**options, "top_logprobs": 0}).choices
    assert [said.logprob for said in bare.logprobs.content] == [said.logprob for said in content]
    assert all(said.top_logprobs == [] for said in bare.logprobs.content)
    (none,) = client.chat.completions.create(
        **{**options, "logprobs": False, "top_logprobs": 0}
    ).choices
    assert none.logprobs is None and none.message == got.message


def test_a_token_is_told_by_its_text_and_bytes(service):
    names = ScoreText(service.tokenizer)
    ids = service.tokenizer("größe 🙂", add_special_tokens=False)["input_ids"]
    said = [names._entry(token, -1.0) for token in ids]
    assert bytes(b for one in said for b in one["bytes"]).decode() == "größe 🙂"
    assert [one["token"] for one in said][-4:] == ["\\xf0", "\\x9f", "\\x99", "\\x82"]
    names._token = {7: "\ufffd"}  # a vocabulary that does not say which bytes
    names._token = type("Unknown", (dict,), {"text": lambda self, ids: "\ufffd"})(names._token)
    names._spellings.clear()
    assert names._entry(7, -1.0) == {"token": "\ufffd", "logprob": -1.0, "bytes": None}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_naming_the_tokens_of_a_prompt_holds_nobody_up(server, service, monkeypatch, stream):
    begun, original = threading.Event(), service.scores.completion

    def slowly(*args):
        begun.set()
        time.sleep(1.5)
        return original(*args)

    monkeypatch.setattr(service.scores, "completion", slowly)
    body = dict(prompt="x = 1", echo=True, max_tokens=0, logprobs=1, stream=stream)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(httpx.post, server.url + "/v1/completions", json=body, timeout=20)
        assert begun.wait(5)
        start = time.monotonic()
        assert httpx.get(server.url + "/health").status_code == 200
        assert time.monotonic() - start < 1.0 and not long.done()
        assert long.result().status_code == 200


def test_a_stop_string_cuts_tokens_off(server, service):
    body = dict(prompt="import os\n", max_tokens=40, temperature=0, logprobs=0)
    (whole,) = ask(server, **body)
    for first in range(4, 12):
        stop = whole["text"][first : first + 4]
        (cut,) = ask(server, **body, stop=stop)
        assert cut["text"] == whole["text"].split(stop)[0]
        kept, end = cut["logprobs"], len("import os\n") + len(cut["text"])
        wanted = [at for at in whole["logprobs"]["text_offset"] if at < end]
        assert kept["text_offset"] == wanted
        assert kept["tokens"] == whole["logprobs"]["tokens"][: len(wanted)]


def test_the_token_that_ends_a_text_is_scored_and_not_written(service):
    """A harness leaves the last score out, as that of the one token it had to ask for."""
    ids = service.encode("import os\n")
    first = int(truth(service, ids)[-1].argmax())
    ids += [first, int(truth(service, [*ids, first])[-1].argmax())]
    engine = Engine(service.engine.model, None, eos=set(range(4096)) - {first})
    server = Server(with_engine(service, engine))
    try:
        body = dict(echo=True, logprobs=1, temperature=0)
        for prompt, tokens in ((ids[:-2], 2), (ids[:-1], 1)):
            (got,) = ask(server, prompt=prompt, max_tokens=tokens, **body)
            assert got["text"] == service.tokenizer.decode(ids[:-1])
            assert got["finish_reason"] == "stop"
            check(got["logprobs"], ids, truth(service, ids))
            assert got["logprobs"]["text_offset"][-1] == len(got["text"])
    finally:
        server.stop()
        engine.close()


class Scored:
    """Collects a row's scores."""

    def __init__(self):
        self.prompt, self.scores, self.end, self.done = None, [], None, threading.Event()

    def __call__(self, event):
        if event.prompt is not None:
            assert self.prompt is None and not self.scores
            self.prompt = event.prompt
        if event.score is not None:
            self.scores.append(event.score)
        if event.finish is not None or event.error is not None:
            self.end = event
            self.done.set()


PROGRAMS = [
    [clamp(3, 6.0)], None, [min_clamp(7, 4.0), ablate(11), add(12, 2.0)],
    [clamp(20, -5.0, when=active(3))],
]  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_scores_in_a_changing_batch_are_those_of_a_plain_forward(family):
    """Rows that are scored, in part or whole, and rows that are not, in three places."""
    model = tiny(family)
    steerer = attach(model, topk_sae(), layer=LAYER)
    engine = Engine(model, steerer, rows=3)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, V, (n,), generator=draw).tolist() for n in (9, 2, 11, 1)]
    kinds = [Scoring(0, True), Scoring(4, True), Scoring(2), None]
    cases = [(p, program, kind) for p, program in zip(prompts, PROGRAMS) for kind in kinds]
    readers = [Scored() for _ in cases]
    try:
        rows = [
            engine.submit(
                prompt, reader, program=program, scoring=kind, sampling=GREEDY,
                max_tokens=i % 5 if kind is not None and kind.prompt else 3,
            )
            for i, ((prompt, program, kind), reader) in enumerate(zip(cases, readers))
        ]  # fmt: skip
        for reader in readers:
            assert reader.done.wait(60) and reader.end.error is None
    finally:
        engine.close()
    engine._put_in_force([])
    for (prompt, program, kind), reader, row in zip(cases, readers, rows):
        if kind is None:
            assert reader.prompt is None and not reader.scores
            continue
        ids = [*prompt, *row.generated]
        expected = after(model, steerer, ids, program)
        found = [*(reader.prompt or []), *reader.scores]
        assert len(reader.scores) == len(row.generated)
        assert [s.token for s in found] == ids[len(ids) - len(found) :]
        assert (reader.prompt is None) == (not kind.prompt)
        assert len(found) == len(ids) - (1 if kind.prompt else len(prompt))
        for score, there in zip(found, expected[len(ids) - len(found) - 1 :]):
            assert score.logprob == pytest.approx(float(there[score.token]), abs=2e-4)
            best = there.topk(kind.top)
            assert [p for _, p in score.top] == pytest.approx(best.values.tolist(), abs=2e-4)
            assert all(p == pytest.approx(float(there[t]), abs=2e-4) for t, p in score.top)


def test_the_batch_goes_on_between_two_prompts_that_are_read_alone(service):
    engine = Engine(service.engine.model, None, rows=8)
    original, calls, ready = engine._forward, [], threading.Event()

    def forward(rows, ids, *rest):
        ready.wait(10)
        calls.append(("step" if ids.shape[1] == 1 else "prompt", len(rows)))
        return original(rows, ids, *rest)

    engine._forward = forward
    try:
        writer, readers = Reader(), [Scored() for _ in range(4)]
        engine.submit([5, 6], writer, max_tokens=30, sampling=GREEDY)
        scored = [([7, 8, 9], reader, None) for reader in readers]
        engine.submit_all(scored, GREEDY, 0, 60.0, Scoring(1, True))
        ready.set()
        for reader in readers:
            assert reader.done.wait(20) and len(reader.prompt) == 2
        writer.wait()
    finally:
        engine.close()
    kinds = [kind for kind, _ in calls]
    alone = [i for i, kind in enumerate(kinds) if kind == "prompt"][-4:]
    assert all("step" in kinds[a:b] for a, b in itertools.pairwise(alone)), kinds


def test_the_softmax_is_made_of_some_rows_at_a_time(monkeypatch):
    logits = torch.randn(23, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(23)
    whole = scores(logits, tokens, 3)
    sizes, original = [], torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor,
        "log_softmax",
        lambda t, *a: (sizes.append(tuple(t.shape)), original(t, *a))[1],
    )
    monkeypatch.setattr(engines, "_BLOCK", 220)
    assert scores(logits, tokens, 3) == whole
    assert sizes == [(4, 50)] * 5 + [(3, 50)]
    expected = original(logits.float(), -1)
    for i, score in enumerate(whole):
        assert score.logprob == pytest.approx(float(expected[i, i]), abs=1e-5)
        assert [t for t, _ in score.top] == expected[i].topk(3).indices.tolist()


def test_scores_are_numbers_whatever_the_logits():
    """JSON knows no infinity, and a model that an edit has ruined no order."""
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(1, 8)
        logits[0, 3] = value
        for token in (3, 4):
            (score,) = scores(logits, torch.tensor([token]), 8)
            assert all(-9999.0 <= p <= 0.0 for p in [score.logprob, *(p for _, p in score.top)])
    (score,) = scores(torch.full((1, 8), math.nan), torch.tensor([0]), 20)
    assert score.logprob == pytest.approx(-math.log(8)) and len(score.top) == 8


def test_two_tokens_of_one_text_have_two_names(service):
    names = ScoreText(service.tokenizer)
    assert names._named(5000) == names._named(5001)  # no tokens at all
    placed = names.place("x", service.encode("x"))
    said = names.completion(placed, None, [(Score(5000, -2.0, [(5001, -0.5), (5000, -2.0)]), 0)])
    assert said["top_logprobs"] == [{"": -2.0, "token_id:5001": -0.5}]
