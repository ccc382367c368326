"""The model that is served: its tokenizer, its latents, and requests turned into sequences."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..lm.load import EMBEDDED, EMBEDDED_MODEL
from ..lm.tokens import head
from ..nn import Description
from ..steer.operations import Operation
from .engine import Engine, Event, Row, Sampling, Score, Scoring
from .latents import Latents
from .protocol import Edit, Limits, Sampled, operations
from .text import ScoreText, TextStream


class RefusedError(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Piece:
    """What one sequence has next: text, or its end.

    Where they were asked for, `scores` has the tokens of the text, each with the character of the
    completion that it begins at, `prompt` those of the prompt, in the first piece, and `ending` the
    token without text that ended the sequence.
    """

    index: int
    text: str
    finish: str | None = None
    error: str | None = None
    scores: list[tuple[Score, int]] = field(default_factory=list)
    prompt: list[Score] | None = None
    ending: tuple[Score, int] | None = None

    def add(self, more: Piece) -> None:
        """What comes next of the same sequence."""
        self.text += more.text
        self.finish = more.finish or self.finish
        self.scores += more.scores
        if more.prompt is not None:
            self.prompt = more.prompt
        self.ending = more.ending or self.ending


@dataclass
class Job:
    """Sequences of one request, read as they grow."""

    engine: Engine
    rows: list[Row]
    texts: list[TextStream]
    events: asyncio.Queue[tuple[int, Event]]
    prompt_tokens: int
    new_tokens: int = 0
    open: set[int] = field(default_factory=set)
    prompts: dict[int, list[Score]] = field(default_factory=dict)  # scores not yet in a piece
    scores: list[deque[tuple[Score, int]]] = field(init=False)  # likewise
    endings: dict[int, Score] = field(default_factory=dict)  # likewise

    def __post_init__(self) -> None:
        self.scores = [deque() for _ in self.rows]

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every sequence has ended. Leaving early frees the rows (`cancel`)."""
        self.open = set(range(len(self.rows)))
        while self.open:
            i, event = await self.events.get()
            if i not in self.open:
                continue
            text = self.texts[i]
            if event.prompt is not None:
                self.prompts[i] = event.prompt
            if event.score is not None and event.token is None:
                self.endings[i] = event.score
            elif event.score is not None:
                self.scores[i].append((event.score, len(text)))
            if event.token is not None:
                self.new_tokens += 1
                piece = text.push(event.token)
                if text.stopped:
                    self.engine.cancel(self.rows[i])
                    self.open.discard(i)
                    yield self._piece(i, piece, "stop")
                elif piece:
                    yield self._piece(i, piece)
            elif event.error is not None:
                self.open.discard(i)
                yield Piece(i, "", error=event.error)
            elif event.finish is not None:
                self.open.discard(i)
                rest = text.end()
                yield self._piece(i, rest, "stop" if text.stopped else event.finish)

    def _piece(self, index: int, text: str, finish: str | None = None) -> Piece:
        """With the tokens that begin in what has been sent; at the end with all, but for those that
        a stop string cut off."""
        stream, waiting = self.texts[index], self.scores[index]
        last = finish is not None and not stream.stopped
        found = []
        while waiting and (last or waiting[0][1] < stream.sent):
            found.append(waiting.popleft())
        piece = Piece(index, text, finish, scores=found, prompt=self.prompts.pop(index, None))
        if last and index in self.endings:
            piece.ending = self.endings[index], len(stream)
        return piece

    def cancel(self) -> None:
        for row in self.rows:
            self.engine.cancel(row)

    def change(self, index: int, program: Sequence[Operation] | None) -> None:
        self.engine.change(self.rows[index], program)


class Service:
    """One model, one site, one SAE.

    Args:
        name: of the model, for people.
        model_id: what the OpenAI API calls the model; the name when it is empty.

    Attributes:
        steer: edits for requests of the OpenAI API that name none.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        engine: Engine,
        latents: Latents,
        limits: Limits,
        context: int,
        site: str = "",
        model_id: str = "",
    ) -> None:
        self.name, self.tokenizer, self.engine, self.latents = name, tokenizer, engine, latents
        self.limits, self.context, self.site = limits, context, site
        self.model_id = model_id or name
        self.steer: list[Edit] | None = None
        self.scores = ScoreText(tokenizer)

    @property
    def sae(self) -> Description:
        return self.latents.sae

    # -- requests ---------------------------------------------------------------------------------

    def encode(self, prompt: str | list[int]) -> list[int]:
        """A text as `encoded` reads it; an empty one is the BOS alone. From any thread."""
        if isinstance(prompt, list):
            vocabulary = len(self.tokenizer)
            if any(token >= vocabulary for token in prompt):
                raise RefusedError(400, f"prompt: token ids must be below {vocabulary}")
            return prompt
        return self._read(prompt, bos=True) or head(self.tokenizer)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """By the tokenizer's template, which alone decides about a BOS: it writes what the model
        was trained on. A model without a template reads the messages as plain text."""
        if getattr(self.tokenizer, "chat_template", None):
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            except Exception as error:  # templates refuse orders of roles in their own ways
                raise RefusedError(400, f"messages: the chat template says: {error}") from error
            return self._read(text, bos=False)
        return self.encode("\n".join(m["content"] for m in messages))

    def _read(self, text: str, *, bos: bool) -> list[int]:
        return self.latents.words.encode(text, bos=bos)

    def start(
        self,
        prompts: Sequence[list[int]],
        request: Sampled,
        max_tokens: int,
        programs: Sequence[list[Operation] | None],
        stops: Sequence[str] = (),
        same_seed: bool = False,
        scoring: Scoring | None = None,
    ) -> Job:
        """Raises RefusedError for what does not fit, FullError when there is no room, ClosedError
        when the engine has ended."""
        limits = self.limits
        if len(prompts) > limits.sequences:
            raise RefusedError(400, f"at most {limits.sequences} sequences a request")
        if max_tokens > limits.new_tokens:
            raise RefusedError(400, f"max_tokens: at most {limits.new_tokens}")
        for ids in prompts:
            if not ids:
                raise RefusedError(400, "the prompt is empty")
            if len(ids) > limits.prompt_tokens:
                raise RefusedError(
                    400, f"the prompt has {len(ids)} tokens, at most {limits.prompt_tokens}"
                )
            if len(ids) + max_tokens > self.context:
                raise RefusedError(
                    400, f"the prompt's {len(ids)} tokens and max_tokens {max_tokens} are more "
                    f"than the model's context of {self.context}"
                )  # fmt: skip
        seed = secrets.randbelow(2**62) if request.seed is None else request.seed
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        sampling = [
            Sampling(temperature, top_p, _seed(seed + (0 if same_seed else i)))
            for i in range(len(prompts))
        ]
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def emit(index: int) -> Any:
            def put(event: Event) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return put

        try:
            rows = self.engine.submit_all(
                [(ids, emit(i), programs[i]) for i, ids in enumerate(prompts)],
                sampling,
                max_tokens,
                limits.seconds,
                scoring,
            )
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        texts = [TextStream(self.tokenizer, stops, prompt) for prompt in prompts]
        return Job(self.engine, rows, texts, events, sum(map(len, prompts)))

    def program(self, edits: list[Edit] | None) -> list[Operation] | None:
        """Raises RefusedError when the edits do not fit."""
        try:
            program = operations(edits)
            self.engine.check(program)
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        return program

    def model(self) -> dict[str, Any]:
        """The model as the OpenAI API lists it, and what it can be steered by."""
        latents = 0 if self.sae is None else len(self.sae.W_dec)
        return {
            "id": self.model_id, "object": "model", "created": 0, "owned_by": "fastsae",
            "fastsae": {"site": self.site, "latents": latents},
        }  # fmt: skip


def _seed(seed: int) -> int:
    return seed % 2**63


def model_id(origin: str) -> str:
    """What the API calls a model of this origin: its hub id, or the folder's own name."""
    if origin == EMBEDDED:
        return EMBEDDED_MODEL.name
    return Path(origin).name if Path(origin).is_absolute() else origin
