"""`fastsae serve`: the batch of its engine, and text as it grows."""

from __future__ import annotations

import threading
import time

import pytest
from properties import HealthCheck, given, settings, st

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from serving import GREEDY, PROMPTS, Reader, alone  # noqa: E402

from fastsae.serve.engine import ClosedError, Engine, FullError, Sampling  # noqa: E402
from fastsae.serve.text import TextStream  # noqa: E402
from fastsae.steer import clamp  # noqa: E402


def test_a_row_in_a_changing_batch_is_what_it_is_alone(service):
    """Different prompts, lengths, programs and lifetimes, joining at different times."""
    cases = []
    for i in range(14):
        program = None if i % 3 == 0 else [clamp(i, 1.0 + i / 4, unit="max")]
        cases.append((PROMPTS[i % len(PROMPTS)], program, 6 + 5 * (i % 4)))
    expected = [alone(service, *case) for case in cases]
    readers = []
    for i, (prompt, program, n) in enumerate(cases):
        reader = Reader()
        service.engine.submit(
            service.encode(prompt), reader, program=program, sampling=GREEDY, max_tokens=n
        )
        readers.append(reader)
        time.sleep(0.004 * (i % 3))
    same = 0
    for reader, tokens in zip(readers, expected):
        reader.wait()
        ended = [t for t in tokens if t not in service.engine._eos]
        same += reader.tokens == ended
    assert same == len(cases)
    assert service.engine.load == 0


def test_sampling_depends_on_the_seed_and_not_on_the_others(service):
    def run(seeds):
        readers = [Reader() for _ in seeds]
        for reader, seed in zip(readers, seeds):
            how = Sampling(0.9, 0.95, seed)
            service.engine.submit(service.encode("import "), reader, sampling=how, max_tokens=12)
        return [r.wait().tokens for r in readers]

    one, many = run([7]), run([7, 8, 9, 7, 10])
    assert many[0] == many[3] == one[0]
    assert len({tuple(t) for t in many}) == 4


@pytest.mark.parametrize("top_p", [1e-9, 1e-50, 5e-324])
def test_however_small_top_p_is_the_likeliest_token_stays(service, top_p):
    readers = [Reader(), Reader()]
    for reader, how in zip(readers, (Sampling(1.0, top_p, 1), GREEDY)):
        service.engine.submit(service.encode("import "), reader, sampling=how, max_tokens=8)
    assert readers[0].wait().tokens == readers[1].wait().tokens


def test_a_changed_program_acts_from_the_next_token_on(service):
    strong = [clamp(5, 6.0, unit="max")]
    before = alone(service, "import os\n", None, 40)
    reader = Reader()
    seen = threading.Event()

    def emit(event):
        reader(event)
        if len(reader.tokens) == 10 and not seen.is_set():
            service.engine.change(row, strong)  # in the engine's thread: exactly here
            seen.set()

    held = threading.Event()
    original = service.engine._step
    service.engine._step = lambda: (held.wait(10), original())[1]
    try:
        row = service.engine.submit(
            service.encode("import os\n"), emit, sampling=GREEDY, max_tokens=40
        )
        held.set()
        reader.wait()
    finally:
        service.engine._step = original
    assert reader.tokens[:10] == before[:10]
    assert reader.tokens != before[: len(reader.tokens)]


def test_room_time_and_cancellation(service):
    engine = Engine(service.engine.model, None, rows=2, waiting=3)
    try:
        slow = threading.Event()
        original = engine._forward
        engine._forward = lambda *a: (slow.wait(20), original(*a))[1]
        readers = [Reader() for _ in range(5)]
        rows = [engine.submit([1, 2, 3], r, max_tokens=50, seconds=60) for r in readers]
        with pytest.raises(FullError):
            engine.submit([1], Reader())
        engine.cancel(rows[0])
        engine.cancel(rows[3])
        rows[1].deadline = 0.0
        slow.set()
        ends = [r.wait().end.finish for r in readers]
        assert ends[:2] == ["cancelled", "time"] and ends[3] == "cancelled"
        assert ends[2] in ("length", "stop") and ends[4] in ("length", "stop")
        assert engine.load == 0
        with pytest.raises(ValueError, match="empty"):
            engine.submit([], Reader())
        with pytest.raises(ValueError, match="no SAE"):
            engine.submit([1], Reader(), program=[clamp(0, 1.0)])
    finally:
        engine.close()
    with pytest.raises(ClosedError):
        engine.submit([1], Reader())


def test_a_failing_model_ends_its_batch_and_not_the_server(service):
    engine = Engine(service.engine.model, None, rows=4, waiting=3)
    try:
        original, times = engine._forward, []

        def fails_once(*args):
            times.append(1)
            if len(times) == 3:
                raise RuntimeError("out of memory")
            return original(*args)

        engine._forward = fails_once
        first, second = Reader(), Reader()
        engine.submit([5, 6], first, max_tokens=20)
        assert "out of memory" in first.wait().end.error
        engine.submit([5, 6], second, max_tokens=3, sampling=GREEDY)
        assert second.wait().end.error is None and engine.load == 0
    finally:
        engine.close()


def test_rows_that_wait_end_without_a_place(service):
    """Cancelled or out of time behind a full batch: at once, and their room is free again."""
    engine = Engine(service.engine.model, None, rows=1, waiting=2)
    try:
        original = engine._step
        engine._step = lambda: (time.sleep(0.05), original())[1]
        running, left, late = Reader(), Reader(), Reader()
        first = engine.submit([5], running, max_tokens=200, sampling=GREEDY)
        while not running.tokens:
            time.sleep(0.01)
        engine.cancel(engine.submit([6], left))
        engine.submit([7], late, seconds=0.1)
        assert left.wait().end.finish == "cancelled" and late.wait().end.finish == "time"
        assert not running.done.is_set() and engine.load == 1
        engine.cancel(first)
    finally:
        engine.close()


def test_no_row_is_lost_when_the_batch_fails_as_it_comes(service):
    engine = Engine(service.engine.model, None, rows=4, waiting=3)
    try:
        original, inside, go, times = engine._step, threading.Event(), threading.Event(), []

        def fails_second():
            times.append(1)
            inside.set()
            assert go.wait(10)
            if len(times) == 2:
                raise RuntimeError("out of memory")
            original()

        engine._step = fails_second
        first, second, odd = Reader(), Reader(), Reader()
        engine.submit([5], first, max_tokens=90, sampling=GREEDY)
        assert inside.wait(10)
        engine.submit([6], second, max_tokens=3, sampling=GREEDY)  # comes with the failing step
        go.set()
        assert "out of memory" in first.wait().end.error
        assert second.done.wait(10)
        engine.submit([2**70], odd)  # fails before the model runs
        assert odd.done.wait(10) and odd.end.error
        assert engine.load == 0
    finally:
        engine.close()


def test_a_reader_that_fails_is_alone(service):
    engine = Engine(service.engine.model, None, rows=4, waiting=3)
    try:
        for events in ("token", "finish"):

            def fails(event, events=events):
                if getattr(event, events) is not None:
                    raise RuntimeError("Event loop is closed")

            other = Reader()
            sequences = [([5], fails, None), ([6], other, None)]
            engine.submit_all(sequences, GREEDY, 4, 60.0)
            assert other.wait().end.error is None and other.end.finish in ("length", "stop")
            end = time.monotonic() + 5
            while engine.load:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert engine._thread.is_alive()
    finally:
        engine.close()


def test_text_is_never_taken_back(service):
    tokenizer = service.tokenizer
    text = 'name = "größe – 漢字 🙂"\nreturn name\n'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(t) for t in ids]
    assert "".join(pieces) + stream.end() == text and not any("\ufffd" in p for p in pieces)
    stream = TextStream(tokenizer, ["\nret", "zzz"])
    out = "".join(stream.push(t) for t in ids) + stream.end()
    assert out == text[: text.index("\nret")] and stream.stopped
    stream = TextStream(tokenizer, ["\nreturn nothing"])
    assert "".join(stream.push(t) for t in ids) + stream.end() == text


SIGNS = st.sampled_from([*"ab c\n=é漢", "🙂", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\u200d", "    "])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(SIGNS, min_size=1, max_size=40).map("".join), st.data())
def test_any_text_and_any_stop_across_tokens(service, text, data):
    """Characters of several tokens, alone or merged, and stops that begin and end anywhere."""
    tokenizer = service.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if data.draw(st.booleans()):  # as a model may write them: no token spans two characters
        ids = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in text]
        ids = [token for one in ids for token in one]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    for stops, whole in (((), text), ((stop,), text[: text.index(stop)]), (("zz",), text)):
        stream = TextStream(tokenizer, stops)
        pieces = [*(stream.push(t) for t in ids), stream.end()]
        assert "".join(pieces) == whole and "\ufffd" not in "".join(pieces)
        assert stream.stopped == (whole != text or stop in stops)


def test_bytes_that_are_no_character_end_as_a_sign(service):
    """An emoji that the limit cuts off, or whose end never comes: nothing is lost or doubled."""
    ids = service.tokenizer("🙂", add_special_tokens=False)["input_ids"]
    after = service.tokenizer("ok", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    stream = TextStream(service.tokenizer)
    assert [stream.push(t) for t in ids[:-1]] == [""] * (len(ids) - 1)
    assert set(stream.end()) == {"\ufffd"}
    stream = TextStream(service.tokenizer)
    text = "".join(stream.push(t) for t in ids[:-1] + after + ids * 5) + stream.end()
    assert text.strip("\ufffd") == "ok" + "🙂" * 5
