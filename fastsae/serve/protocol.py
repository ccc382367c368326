"""What a request may be. Everything else is refused before it is acted on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from .. import steer
from ..steer.operations import Operation
from .engine import Scoring


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        body_bytes: of a request's body; also `body_seconds` for it to arrive.
        prompt_tokens, new_tokens: of a sequence.
        sequences: that one request may ask for (prompts times n).
        seconds: until a sequence is ended where it stands.
        rows, waiting: sequences generated at a time, and waiting for a place.
    """

    body_bytes: int = 256 << 10
    body_seconds: float = 20.0
    prompt_tokens: int = 1024
    new_tokens: int = 512
    sequences: int = 16
    seconds: float = 120.0
    rows: int = 32
    waiting: int = 512


MAX_OPS = 32  # entries of a program
_UNKNOWN = 64  # fields that a misspelt one is looked for among

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Latent = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Unit = Literal["max", "raw"]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has a lone surrogate in it") from None
    return text


class _Model(BaseModel):
    # Clients send fields that are not known here (user, service_tier, ...): they are ignored, but
    # not those that are all but one of these.
    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _refuse_misspelt(cls, data: Any) -> Any:
        unknown = (
            [name for name in data if name not in cls.model_fields]
            if isinstance(data, dict)
            else []
        )
        for name in unknown[:_UNKNOWN]:
            meant = difflib.get_close_matches(str(name)[:64], cls.model_fields, 1, 0.75)
            if meant and name not in _UNSUPPORTED:
                raise ValueError(f"{str(name)[:64]}: not known here; {meant[0]} is")
        return data


class _Strict(BaseModel):
    """Of an edit: a misspelt one must not steer with a default."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_names(cls, data: Any) -> Any:
        for name in data if isinstance(data, dict) else ():
            meant = _COMMAND_LINE.get(name)
            if meant in cls.model_fields:
                raise ValueError(f"{name}: not known here; {meant} is")
        return data


# What `fastsae steer` calls an edit's fields.
_COMMAND_LINE = {"feature": "latent", "strength": "value", "operation": "op"}


class When(_Strict):
    """Acts only where this latent's activation exceeds `above`."""

    latent: Latent
    above: Finite = 0.0
    unit: Unit = "raw"


class Edit(_Strict):
    """One operation of `fastsae.steer` on a latent."""

    latent: Latent
    op: Literal["clamp", "min_clamp", "scale", "ablate", "add"] = "clamp"
    value: Finite | None = None
    unit: Unit = "raw"
    when: When | None = None

    def operation(self) -> Operation:
        """Raises ValueError when a value is missing."""
        when = None
        if self.when is not None:
            when = steer.active(self.when.latent, self.when.above, self.when.unit)
        if self.op == "ablate":
            return steer.ablate(self.latent, when)
        if self.value is None:
            raise ValueError(f"steer: {self.op} needs a value")
        if self.op == "scale":
            return steer.scale(self.latent, self.value, when)
        make = {"clamp": steer.clamp, "min_clamp": steer.min_clamp, "add": steer.add}[self.op]
        return make(self.latent, self.value, self.unit, when)


def _once_each(program: list[Edit]) -> list[Edit]:
    """Two edits of a latent would be summed, which nobody means who writes a program down."""
    seen: list[tuple[int, When | None]] = []
    for edit in program:
        if (edit.latent, edit.when) in seen:
            raise ValueError(
                f"latent {edit.latent} is edited twice under the same gate; "
                "one edit for each latent and gate"
            )
        seen.append((edit.latent, edit.when))
    return program


Program = Annotated[list[Edit], Field(max_length=MAX_OPS), AfterValidator(_once_each)]


def read_program(text: str) -> list[Edit]:
    """From JSON.

    Raises:
        ValueError: what is wrong, in one line.
    """
    try:
        program: list[Edit] = TypeAdapter(Program).validate_json(text)
    except ValidationError as error:
        raise ValueError(told(error.errors())) from error
    return program


def told(errors: Sequence[Any], skip: int = 0) -> str:
    """What pydantic found, by its first error: where, less so many steps, and why."""
    # of a union's branches the one whose type is right says what is wrong
    first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
    where = ".".join(str(p) for p in first.get("loc", ())[skip:])
    why = str(first.get("msg")).removeprefix("Value error, ")
    return f"{where}: {why}" if where else why


def operations(program: list[Edit] | None) -> list[Operation] | None:
    return [edit.operation() for edit in program] if program else None


class Sampled(_Model):
    """What completions, chats and the page have in common."""

    steer: Program | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


# Fields of the OpenAI API that would change the answer, and their values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "best_of": (1,),
    # not OpenAI's, but often sent to servers of its API
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
}

Stop = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class StreamOptions(_Model):
    include_usage: StrictBool | None = False


class Generation(Sampled):
    """A request of the OpenAI API; `model` is not looked at, there is one."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name, neutral in _UNSUPPORTED.items():
            given = data.get(name) if isinstance(data, dict) else None
            if name not in cls.model_fields and given is not None and given not in neutral:
                raise ValueError(f"{name}: not supported here")
        return data

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def scoring(self) -> Scoring | None:
        """The log-probabilities that are asked for."""
        return None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


_Tokens = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]


class CompletionRequest(Generation):
    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[_Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: StrictBool | None = False
    logprobs: Annotated[int, Field(strict=True, ge=0, le=5)] | None = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        for text in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(text, str):
                _encodable(text)
        return prompt

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 writes nothing, and without echo there is no answer")
        return self

    @property
    def scoring(self) -> Scoring | None:
        return None if self.logprobs is None else Scoring(self.logprobs, bool(self.echo))

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(_Model):
    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _check_type(cls, kind: Any) -> Any:
        if kind != "text":
            raise ValueError(f"only parts of type 'text' are read here, not {str(kind)[:64]!r}")
        return kind


class Message(_Model):
    """`content` is null in histories: an assistant's message may have had no text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: only an assistant's may be null")
        _encodable(self.text)
        return self


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @property
    def scoring(self) -> Scoring | None:
        return Scoring(self.top_logprobs or 0) if self.logprobs else None


class PageRequest(Sampled):
    """The page: one prompt, written on twice."""

    prompt: Annotated[str, StringConstraints(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 64

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return _encodable(prompt)


class SteerRequest(BaseModel):
    """The page's sliders, moved while text is being written."""

    model_config = ConfigDict(extra="forbid")
    steer: Program
