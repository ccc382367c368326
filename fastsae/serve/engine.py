"""Continuous batching: every sequence with its own program, sampling and end, in one batch.

A thread of its own runs the model. Sequences join after their prompt was read, one token is
generated for all of them at a time, and one that ends or whose reader is gone leaves at once. A
sequence depends on its own request only: its program, its generator, its positions (the batch is
padded on the left, the padding masked), up to the rounding of products of another batch size.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..lm.sites import device_of, refuse_encoder_decoder
from ..steer import Steerer, scale
from ..steer.operations import Operation

LENGTH, STOP, TIME, CANCELLED = "length", "stop", "time", "cancelled"
_BLOCK = 1 << 24  # logits whose softmax is made at a time
_UNLIKELY = -9999.0  # OpenAI's logarithm of no probability; JSON has no infinity
_FAR = 0.25  # of the way from the likeliest token to the least likely one


class FullError(Exception):
    """As many sequences run and wait as are allowed."""


class ClosedError(Exception):
    """The engine has ended, or is about to."""


def is_device_lost(error: BaseException) -> bool:
    """Whether an error of CUDA or HIP itself came up: after most of them every call fails.

    They cannot be told from the few that would pass, and to ask the device is a call like any
    other. Running out of memory is torch's own error and no such one.
    """
    kind = getattr(torch, "AcceleratorError", None)
    if kind is not None and isinstance(error, kind):
        return True
    text = str(error)
    lost = "CUDA error:" in text or "HIP error:" in text
    return isinstance(error, RuntimeError) and lost and "_ALLOC_FAILED" not in text


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_p cuts the tail of the distribution."""

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Scoring:
    """Log-probabilities of tokens, of the model's own distribution: at temperature 1, whole.

    Attributes:
        top: the likeliest tokens that are told beside each one.
        prompt: the prompt's tokens are scored too, from the second on.
    """

    top: int = 0
    prompt: bool = False


@dataclass(frozen=True)
class Score:
    """A token's log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Event:
    """A token, or the end of a sequence: its reason, or what went wrong.

    Where they were asked for, `prompt` has the prompt's scores, in an event before the first token,
    and `score` that of the token. The token that ends a sequence is told by its score alone.
    """

    token: int | None = None
    finish: str | None = None
    error: str | None = None
    score: Score | None = None
    prompt: list[Score] | None = None


@dataclass(eq=False)
class Row:
    """One sequence. Made by `Engine.submit`."""

    prompt: list[int]
    program: Sequence[Operation] | None
    sampling: Sampling
    max_tokens: int
    deadline: float  # of time.monotonic
    emit: Callable[[Event], None]  # called in the engine's thread
    scoring: Scoring | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    generated: list[int] = field(default_factory=list)
    cancelled: bool = False


class Engine:
    """The model, its steerer and the batch.

    Args:
        model: a causal language model of transformers whose cache is a `DynamicCache` of keys and
            values in every layer (`rehearse` finds out).
        steerer: attached to it, with max_batch >= rows and max_slots >= rows; None: no steering.
        eos: token ids that end a sequence.
        rows: sequences generated at a time.
        waiting: sequences that may wait for a place.

    An error while tokens are made ends the sequences of that batch, with the error, and the engine
    goes on. Where the device is lost, or what would bring the engine in order again fails too,
    every sequence gets the error, the engine takes no more (`ClosedError`), its thread ends without
    touching the device again, `failure` says why and `on_failure` is called.
    """

    def __init__(
        self,
        model: Any,
        steerer: Steerer | None,
        eos: Sequence[int] = (),
        rows: int = 32,
        waiting: int = 512,
    ) -> None:
        refuse_encoder_decoder(model, "serve")
        self.model, self.steerer, self.rows = model, steerer, rows
        self._eos = frozenset(eos)
        self._room = rows + waiting
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None  # called in the engine's thread
        self._device = device_of(model)
        self._wake = threading.Condition()
        self._waiting: deque[Row] = deque()  # touched under `_wake` only
        self._open: dict[Row, None] = {}  # rows that have not been told their end, in order
        self._closed = False
        self._live: list[Row] = []
        self._cache: Any = None
        self._mask: torch.Tensor | None = None  # [B, T]: columns of the cache that hold a token
        self._in_force: list[Sequence[Operation] | None] = []
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # transformers 5.24 renamed it; 5.40 will no longer take the old name
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self._thread = threading.Thread(target=self._run, name="fastsae-engine", daemon=True)
        self._thread.start()

    # -- from any thread --------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        emit: Callable[[Event], None],
        *,
        program: Sequence[Operation] | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 64,
        seconds: float = 120.0,
        scoring: Scoring | None = None,
    ) -> Row:
        """Adds a sequence; `emit` gets its tokens and then one end. No tokens: it is only read.

        Raises:
            FullError: no room to wait.
            ClosedError: the engine was closed or has failed.
            ValueError: the prompt is empty, or the program does not fit the SAE.
        """
        sequence = (prompt, emit, program)
        return self.submit_all([sequence], sampling, max_tokens, seconds, scoring)[0]

    def submit_all(
        self,
        sequences: Sequence[
            tuple[Sequence[int], Callable[[Event], None], Sequence[Operation] | None]
        ],
        sampling: Sampling | Sequence[Sampling] | None,
        max_tokens: int,
        seconds: float,
        scoring: Scoring | None = None,
    ) -> list[Row]:
        """All of them or none."""
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or Sampling()] * len(sequences)
        rows = []
        for (prompt, emit, program), how in zip(sequences, sampling, strict=True):
            if len(prompt) == 0:
                raise ValueError("the prompt is empty")
            self.check(program)
            row = Row(
                list(prompt), program or None, how, max_tokens, time.monotonic() + seconds, emit,
                scoring,
            )  # fmt: skip
            row.generator.manual_seed(how.seed)
            rows.append(row)
        with self._wake:
            if self._closed:
                raise ClosedError("the server is shutting down")
            if len(self._open) + len(rows) > self._room:
                raise FullError("too many requests are waiting")
            self._open |= dict.fromkeys(rows)
            self._waiting.extend(rows)
            self._wake.notify()
        return rows

    def check(self, program: Sequence[Operation] | None) -> None:
        """Raises ValueError when the program does not fit."""
        if program:
            if self.steerer is None:
                raise ValueError("this server has no SAE to steer with")
            self.steerer.check(program)

    def change(self, row: Row, program: Sequence[Operation] | None) -> None:
        """Another program, from the next token on. What has been read stays as it was read."""
        self.check(program)
        row.program = program or None

    def cancel(self, row: Row) -> None:
        """Frees the row's place before the next token."""
        row.cancelled = True
        with self._wake:
            self._wake.notify()

    @property
    def load(self) -> int:
        """Sequences that wait or run."""
        return len(self._open)

    @property
    def ended(self) -> str | None:
        """Why no more sequences are taken; None while they are."""
        if self.failure is not None:
            return self.failure
        return "the server is shutting down" if self._closed else None

    def rehearse(self, seconds: float = 600.0) -> None:
        """Has two short texts written in one batch, one longer than the other, which leaves first,
        so that a model that cannot be served says so now and not at its first request.

        Raises:
            NotImplementedError: an error on the way, or a token that the model, reading the same
                text without cache and batch, would be far from writing.
        """
        size = int(self.model.config.get_text_config().vocab_size)
        texts = [[(7 * i + 3) % size for i in range(n)] for n in (6, 2)]
        # changes nothing, and runs all that a program does
        program = [scale(0, 1.0)] if self.steerer is not None and self.steerer.sae else None
        kind, ends = type(self.model).__name__, queue.SimpleQueue[Event]()

        def reader(event: Event) -> None:
            if event.token is None:
                ends.put(event)

        rows = [
            self.submit(
                text, reader, program=program, sampling=Sampling(0.0), max_tokens=tokens,
                seconds=seconds,
            )
            for text, tokens in zip(texts, (2, 5), strict=True)
        ]  # fmt: skip
        for end in [ends.get() for _ in rows]:
            if end.error is not None or end.finish == TIME:
                why = end.error or f"no answer in {seconds} s"
                raise NotImplementedError(f"serve: {kind} cannot be served: {why}")
        for row in rows:
            ids = torch.tensor([[*row.prompt, *row.generated]], device=self._device)
            with torch.inference_mode():
                logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
            logits = logits[len(row.prompt) - 1 : -1]
            written = logits.gather(1, ids[0, len(row.prompt) :, None])[:, 0]
            best, worst = logits.amax(1), logits.amin(1)
            # rounding and a tie turn the choice over between the best few, not in the middle
            if bool((best - written > _FAR * (best - worst)).any()):
                raise NotImplementedError(
                    f"serve: {kind} cannot be served: it writes another text in a padded batch "
                    "with a cache than alone without one, so requests would change one another"
                )

    def close(self) -> None:
        """Ends every sequence and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=30)

    # -- in the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        """Whatever ends this thread, no row is left without an end."""
        error = None
        try:
            self._serve()
        except BaseException as failed:
            error = _told(failed)
        with self._wake:
            self._closed, self.failure = True, error
            rows = list(self._open)
            self._waiting.clear()
        end = Event(finish=CANCELLED) if error is None else Event(error=error)
        for row in rows:
            self._finish(row, end)
        if error is not None:
            self.on_failure()

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self._live and not self._waiting:
                    self._wake.wait()
                if self._closed:
                    return
            try:
                with torch.inference_mode():
                    self._turn()
            except Exception as error:
                if is_device_lost(error):
                    raise
                with self._wake:
                    waiting = set(self._waiting)
                    lost = [row for row in self._open if row not in waiting]
                for row in lost:  # before what follows, which may fail too
                    self._finish(row, Event(error=_told(error)))
                self._in_force, self._live, self._cache, self._mask = [], [], None, None
                if self.steerer is not None:
                    self.steerer.clear()

    def _turn(self) -> None:
        self._leave()
        if self._live:
            self._step()
        new = self._admitted()
        together = [row for row in new if not _alone(row)]
        for rows in (together, [row for row in new if _alone(row)]):
            if rows:
                self._join(rows)

    def _admitted(self) -> list[Row]:
        """Rows that there is room for; those that wait no longer end, room or none.

        One of those read alone at a time: the batch's next token comes between two of them.
        """
        new: list[Row] = []
        alone = False
        over: list[tuple[Row, str]] = []
        with self._wake:
            kept: deque[Row] = deque()
            for row in self._waiting:
                why = self._over(row)
                if why is not None:
                    over.append((row, why))
                elif len(self._live) + len(new) < self.rows and not (alone and _alone(row)):
                    new.append(row)
                    alone |= _alone(row)
                else:
                    kept.append(row)
            self._waiting = kept
        for row, why in over:
            self._finish(row, Event(finish=why))
        return new

    def _over(self, row: Row) -> str | None:
        if row.cancelled:
            return CANCELLED
        return TIME if time.monotonic() > row.deadline else None

    def _finish(self, row: Row, event: Event) -> None:
        """Tells the row's end, once."""
        with self._wake:
            if row not in self._open:
                return
            del self._open[row]
        self._tell(row, event)

    def _tell(self, row: Row, event: Event) -> None:
        """A reader that fails (its loop is closed) is gone; the others go on."""
        try:
            row.emit(event)
        except Exception:
            row.cancelled = True

    def _leave(self) -> None:
        """Rows whose reader is gone or whose time is over, and those that have ended."""
        kept = []
        for i, row in enumerate(self._live):
            why = self._over(row)
            if why is None and row.generated and row.generated[-1] in self._eos:
                why = STOP
            elif why is None and len(row.generated) >= row.max_tokens:
                why = LENGTH
            if why is None:
                kept.append(i)
            else:
                self._finish(row, Event(finish=why))
        if len(kept) == len(self._live):
            return
        self._live = [self._live[i] for i in kept]
        if not kept:
            self._cache = self._mask = None
            return
        assert self._mask is not None
        at = torch.tensor(kept, device=self._device)
        mask = self._mask[at]
        first = int(mask.any(0).to(torch.uint8).argmax())  # columns that only the leavers used
        self._mask = mask[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[at, :, first:]
            layer.values = layer.values[at, :, first:]

    def _join(self, new: list[Row]) -> None:
        """Reads the prompts of new rows, takes their first token and puts them into the batch.

        A row that is read alone has its prompt scored, and may want no token.
        """
        scoring = new[0].scoring if _alone(new[0]) else None
        longest = max(len(row.prompt) for row in new)
        try:
            from transformers import DynamicCache

            cache = DynamicCache()
            ids = torch.zeros(len(new), longest, dtype=torch.long)
            mask = torch.zeros(len(new), longest, dtype=torch.long)
            for i, row in enumerate(new):
                ids[i, longest - len(row.prompt) :] = torch.tensor(row.prompt)
                mask[i, longest - len(row.prompt) :] = 1
            ids, mask = ids.to(self._device), mask.to(self._device)
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self._forward(new, ids, mask, position, cache, scoring is not None)
            if scoring is not None:
                found = scores(logits[0, :-1], ids[0, 1:], scoring.top)
                self._tell(new[0], Event(prompt=found))
                logits = logits[:, -1]
        except Exception as error:  # of the new rows only: the batch has not been touched
            if is_device_lost(error):
                raise
            for row in new:
                self._finish(row, Event(error=_told(error)))
            return
        if new[0].max_tokens == 0:
            self._finish(new[0], Event(finish=LENGTH))
            return
        old, self._live = self._live, [*self._live, *new]
        if old:
            assert self._mask is not None
            width = max(self._mask.shape[1], longest)
            mask = torch.cat([_widened(m, width, 1) for m in (self._mask, mask)])
            for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    both = (getattr(mine, name), getattr(theirs, name))
                    setattr(mine, name, torch.cat([_widened(t, width, 2) for t in both]))
        else:
            self._cache = cache
        self._mask = mask
        self._take(new, logits)

    def _step(self) -> None:
        """One token for every row."""
        assert self._mask is not None
        last = torch.tensor([[row.generated[-1]] for row in self._live], device=self._device)
        position = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(last), 1)], 1)
        logits = self._forward(self._live, last, self._mask, position, self._cache)
        self._take(self._live, logits)

    def _forward(
        self,
        rows: list[Row],
        ids: torch.Tensor,
        mask: torch.Tensor,
        position: torch.Tensor,
        cache: Any,
        whole: bool = False,
    ) -> torch.Tensor:
        """Logits [B, V] of the last column, or [B, T, V] of them all."""
        self._put_in_force([row.program for row in rows])
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
            **{self._cache_name: cache}, **({} if whole else self._last_only),
        )  # fmt: skip
        if not _holds(cache, *mask.shape):
            raise NotImplementedError(
                "its cache does not hold keys and values of every token (a state-space, recurrent "
                "or hybrid model?), so sequences cannot join and leave a batch"
            )
        return out.logits if whole else out.logits[:, -1]

    def _put_in_force(self, programs: list[Sequence[Operation] | None]) -> None:
        """The steerer's tables are written when a row comes, goes or changes its program."""
        same = len(programs) == len(self._in_force) and all(
            a is b for a, b in zip(programs, self._in_force)
        )
        if self.steerer is None or same:
            return
        if any(self._in_force):
            self.steerer.clear()
        self._in_force = []
        if any(programs):
            self.steerer.set(programs)
        self._in_force = programs

    def _take(self, rows: list[Row], logits: torch.Tensor) -> None:
        tokens = sample(logits, rows)
        asked = {i: row.scoring.top for i, row in enumerate(rows) if row.scoring is not None}
        found: dict[int, Score] = {}
        if asked:
            chosen = torch.tensor([tokens[i] for i in asked], device=logits.device)
            made = scores(logits[list(asked)], chosen, max(asked.values()))
            for (i, top), score in zip(asked.items(), made, strict=True):
                found[i] = replace(score, top=score.top[:top])
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.generated.append(token)
            event = Event(None if token in self._eos else token, score=found.get(i))
            if event != Event() and not row.cancelled:
                self._tell(row, event)


def _alone(row: Row) -> bool:
    """Whether a prompt is read in no batch: where its logits are all wanted, or none."""
    return row.max_tokens == 0 or (row.scoring is not None and row.scoring.prompt)


def _holds(cache: Any, rows: int, length: int) -> bool:
    """Whether every layer of the cache has keys and values of all tokens of all rows."""
    layers = getattr(cache, "layers", ())
    parts = [getattr(layer, n, None) for layer in layers for n in ("keys", "values")]
    return bool(parts) and all(
        isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[0] == rows and t.shape[2] == length
        for t in parts
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _widened(tensor: torch.Tensor, width: int, axis: int) -> torch.Tensor:
    """Zeros in front along an axis."""
    missing = width - tensor.shape[axis]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], axis)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """An edit far out of range may leave NaN: such a token is as good as any, and no error."""
    return logits.float().nan_to_num(nan=-1e30, posinf=1e30, neginf=-1e30)


def scores(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[Score]:
    """Of tokens [N] under logits [N, V]; the softmax is made of some rows at a time."""
    found: list[Score] = []
    rows = max(1, _BLOCK // logits.shape[-1])
    for start in range(0, len(tokens), rows):
        part = _finite(logits[start : start + rows]).log_softmax(-1).clamp(min=_UNLIKELY)
        here = tokens[start : start + rows]
        own = part.gather(1, here[:, None])[:, 0].tolist()
        best = part.topk(min(top, part.shape[-1]))
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for token, logprob, (indices, values) in zip(here.tolist(), own, likeliest, strict=True):
            found.append(Score(token, logprob, list(zip(indices, values, strict=True))))
    return found


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """A token for each row of logits [B, V], by the row's own sampling and generator."""
    logits = _finite(logits)
    chosen = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        how = [rows[i].sampling for i in drawn]
        heat = torch.tensor(
            [max(s.temperature, 1e-4) for s in how], dtype=torch.float32, device=logits.device
        )
        # in fp32 a tiny top_p would be 0, which cuts the likeliest token too
        top_p = torch.tensor([s.top_p for s in how], dtype=torch.double, device=logits.device)
        scaled = (logits[drawn] / heat[:, None]).double()
        best, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = best.cumsum(-1) - best
        best = best * (before < top_p[:, None])  # the likeliest one always stays: top_p > 0
        total = best.cumsum(-1)
        u = torch.stack(
            [torch.rand((), generator=rows[i].generator, dtype=torch.float32) for i in drawn]
        ).double()
        at = (total <= (u.to(total.device) * total[:, -1])[:, None]).sum(-1)
        at = at.clamp(max=logits.shape[-1] - 1)
        chosen[drawn] = order.gather(1, at[:, None])[:, 0]
    tokens: list[int] = chosen.tolist()
    return tokens
