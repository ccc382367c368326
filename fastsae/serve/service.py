"""The model that is served: its tokenizer, its latents, and requests turned into sequences."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..lm.tokens import head
from ..nn import Description
from ..steer.operations import Operation
from .engine import Engine, Event, Row, Sampling
from .latents import Latents
from .protocol import Limits, Sampled, operations
from .text import TextStream


class RefusedError(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Piece:
    """What one sequence has next: text, or its end."""

    index: int
    text: str
    finish: str | None = None
    error: str | None = None


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

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every sequence has ended. Leaving early frees the rows (`cancel`)."""
        self.open = set(range(len(self.rows)))
        while self.open:
            i, event = await self.events.get()
            if i not in self.open:
                continue
            text = self.texts[i]
            if event.token is not None:
                self.new_tokens += 1
                piece = text.push(event.token)
                if text.stopped:
                    self.engine.cancel(self.rows[i])
                    self.open.discard(i)
                    yield Piece(i, piece, "stop")
                elif piece:
                    yield Piece(i, piece)
                continue
            self.open.discard(i)
            if event.error is not None:
                yield Piece(i, "", error=event.error)
            else:
                rest = text.end()
                finish = "stop" if text.stopped else event.finish
                yield Piece(i, rest, finish)

    def cancel(self) -> None:
        for row in self.rows:
            self.engine.cancel(row)

    def change(self, index: int, program: Sequence[Operation] | None) -> None:
        self.engine.change(self.rows[index], program)


class Service:
    """One model, one site, one SAE."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        engine: Engine,
        latents: Latents,
        limits: Limits,
        context: int,
        site: str = "",
    ) -> None:
        self.name, self.tokenizer, self.engine, self.latents = name, tokenizer, engine, latents
        self.limits, self.context, self.site = limits, context, site

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
            )
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        texts = [TextStream(self.tokenizer, stops, prompt) for prompt in prompts]
        return Job(self.engine, rows, texts, events, sum(map(len, prompts)))

    def program(self, edits: Any) -> list[Operation] | None:
        try:
            program = operations(edits)
            self.engine.check(program)
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        return program


def _seed(seed: int) -> int:
    return seed % 2**63
