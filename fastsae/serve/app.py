"""The application: the part of the OpenAI API that clients use, errors, and the page beside it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from .engine import CANCELLED, TIME, ClosedError, FullError
from .events import Stream, sse
from .guard import LOOPBACK, Guard, error_body
from .page import add_page
from .protocol import ChatRequest, CompletionRequest, Generation, told
from .service import Job, Piece, RefusedError, Service
from .text import Placed

_POLL = 0.25  # seconds between looks at whether the client is still there


def create_app(
    service: Service, *, token: str | None = None, hosts: frozenset[str] | None = LOOPBACK
) -> Any:
    """The ASGI application. `hosts` and `token` as in `Guard`."""
    app = FastAPI(title="fastsae serve", docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _error(400, told(error.errors(), skip=1))

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return _error(error.status, str(error))

    @app.exception_handler(FullError)
    async def full(_: Request, error: FullError) -> Response:
        response = _error(429, f"{error}; try again in a moment", "rate_limit_error")
        response.headers["retry-after"] = "2"
        return response

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> Response:
        return _error(503, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    add_page(app, service)

    @app.get("/health")
    async def health() -> Response:
        why = service.engine.ended
        if why is not None:
            return JSONResponse({"status": "failed", "reason": why}, status_code=503)
        return JSONResponse({"status": "ok"})

    # -- the OpenAI API ---------------------------------------------------------------------------

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != service.model_id:
            raise RefusedError(404, f"the model here is {service.model_id}")
        return service.model()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prompts = body.prompts()
        if len(prompts) > service.limits.sequences:  # before the work of encoding them
            raise RefusedError(400, f"prompt: at most {service.limits.sequences} sequences")
        # a long text takes 0.1 s, which is everybody's in the loop
        encoded = await asyncio.to_thread(lambda: [service.encode(p) for p in prompts])
        placed: list[Placed] = []
        if body.echo or body.scoring is not None:
            placed = await asyncio.to_thread(
                lambda: [service.scores.place(p, ids) for p, ids in zip(prompts, encoded)]
            )

        def choice(piece: Piece, first: bool) -> dict[str, Any]:
            i = piece.index // (body.n or 1)
            text = placed[i].text + piece.text if body.echo and first else piece.text
            scores = None
            if body.scoring is not None:
                after = [*piece.scores, *([piece.ending] if piece.ending else [])]
                scores = service.scores.completion(placed[i], piece.prompt, after)
            reason = _reason(piece)
            return {"text": text, "index": piece.index, "logprobs": scores, "finish_reason": reason}

        wanted = 16 if body.max_tokens is None else body.max_tokens
        return await _answer(
            service, body, request, encoded, wanted, "cmpl", "text_completion", "text_completion",
            choice, choice,
        )  # fmt: skip

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        ids = await asyncio.to_thread(service.encode_chat, messages)

        def choice(piece: Piece, name: str, said: dict[str, Any]) -> dict[str, Any]:
            scores = None if body.scoring is None else service.scores.chat(piece.scores)
            reason = _reason(piece)
            return {"index": piece.index, name: said, "logprobs": scores, "finish_reason": reason}

        def whole(piece: Piece, first: bool) -> dict[str, Any]:
            return choice(piece, "message", {"role": "assistant", "content": piece.text})

        def delta(piece: Piece, first: bool) -> dict[str, Any]:
            made: dict[str, Any] = {"content": piece.text} if piece.text or first else {}
            return choice(piece, "delta", {"role": "assistant", **made} if first else made)

        wanted = body.max_completion_tokens or body.max_tokens or 256
        room = service.context - len(ids)
        if body.max_completion_tokens is None and body.max_tokens is None and room > 0:
            wanted = min(wanted, room, service.limits.new_tokens)
        return await _answer(
            service, body, request, [ids], wanted, "chatcmpl", "chat.completion",
            "chat.completion.chunk", whole, delta,
        )  # fmt: skip

    app.add_middleware(Guard, limits=service.limits, token=token, hosts=hosts)
    return app


_Choice = Callable[[Piece, bool], dict[str, Any]]  # and whether it is the sequence's first


async def _answer(
    service: Service,
    body: Generation,
    request: Request,
    prompts: list[list[int]],
    max_tokens: int,
    prefix: str,
    kind: str,
    chunk_kind: str,
    whole: _Choice,
    part: _Choice,
) -> Response:
    """Whole, or as a stream of parts. Prompts times n sequences, a prompt's own side by side."""
    n = body.n or 1
    if n > service.limits.sequences:
        raise RefusedError(400, f"n: at most {service.limits.sequences}")
    program = service.program(service.steer if body.steer is None else body.steer)
    every = [ids for ids in prompts for _ in range(n)]
    job = service.start(
        every, body, max_tokens, [program] * len(every), body.stops, scoring=body.scoring
    )
    head = {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": service.model_id,
    }

    def usage() -> dict[str, int]:
        return {
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": job.new_tokens,
            "total_tokens": job.prompt_tokens + job.new_tokens,
        }

    if body.stream:

        async def events() -> AsyncIterator[str]:
            begun: set[int] = set()
            async for piece in job.pieces():
                if piece.error:
                    yield sse(error_body("generation failed", "server_error"))
                    break
                first = piece.index not in begun
                begun.add(piece.index)
                if piece.prompt is None:
                    choice = part(piece, first)
                else:  # naming its tokens takes as long as reading them did
                    choice = await asyncio.to_thread(part, piece, first)
                yield sse({**head, "object": chunk_kind, "choices": [choice]})
            if body.wants_usage:
                yield sse({**head, "object": chunk_kind, "choices": [], "usage": usage()})
            yield "data: [DONE]\n\n"

        return Stream(events(), job.cancel)

    answers = [Piece(i, "", "length") for i in range(len(every))]
    try:
        async for piece in _while_connected(request, job):
            if piece.error:
                return _error(500, "generation failed", "server_error")
            answers[piece.index].add(piece)
    except _GoneError:
        return Response(status_code=499)
    finally:
        job.cancel()
    choices = await asyncio.to_thread(lambda: [whole(answer, True) for answer in answers])
    return JSONResponse({**head, "object": kind, "choices": choices, "usage": usage()})


class _GoneError(Exception):
    pass


async def _while_connected(request: Request, job: Job) -> AsyncIterator[Piece]:
    """The job's pieces, while there is somebody to send them to."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_POLL)

    pieces = job.pieces().__aiter__()
    watch = asyncio.ensure_future(gone())
    following: asyncio.Future[Piece] | None = None
    try:
        while True:
            following = asyncio.ensure_future(pieces.__anext__())  # type: ignore[arg-type]
            await asyncio.wait({following, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                raise _GoneError
            try:
                piece = following.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        watch.cancel()
        if following is not None:
            following.cancel()


def _reason(piece: Piece) -> str | None:
    """A time limit is the length that there was time for."""
    return "length" if piece.finish in (TIME, CANCELLED) else piece.finish


def _error(status: int, message: str, kind: str = "invalid_request_error") -> Response:
    return JSONResponse(error_body(message, kind), status_code=status)
