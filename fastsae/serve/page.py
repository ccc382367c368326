"""The page, and the calls that it makes. What goes wrong is said in words for a person."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute

from ..lm.tokens import head
from .engine import ClosedError, FullError
from .events import Stream, sse
from .latents import Latents
from .protocol import MAX_OPS, Edit, PageRequest, SteerRequest
from .service import Job, RefusedError, Service

_PAGE = Path(__file__).parent.parent / "assets" / "serve.html"
_READING = 4  # prompts that may wait for their latents
_LOG = logging.getLogger("fastsae.serve")


def add_page(app: FastAPI, service: Service) -> None:
    """Adds `/` and `/api/*` to the application."""
    page = _PAGE.read_text(encoding="utf-8")
    folder = Path(service.name)
    model = folder.name if folder.is_absolute() else service.name
    api = APIRouter(prefix="/api", route_class=_PlainRoute)
    chats: dict[str, Job] = {}
    reading = 0

    def latents() -> Latents:
        if service.engine.failure is not None:  # what follows would ask the device
            raise ClosedError("the server is shutting down")
        return service.latents

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return HTMLResponse(
            page.replace("{{nonce}}", nonce),
            headers={
                "content-security-policy": policy, "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer", "cache-control": "no-store",
            },
        )  # fmt: skip

    @api.get("/info")
    async def info() -> Any:
        known = latents()
        return {
            "model": model,
            "site": service.site,
            "latents": len(known),
            "edits": MAX_OPS,
            "characters": service.limits.body_bytes // 8,  # each may take six bytes
            "new_tokens": min(service.limits.new_tokens, service.context - 1),
            "step": None if known.has_max else await asyncio.to_thread(lambda: known.step),
            "example": await asyncio.to_thread(known.example),
            "load": service.engine.load,
        }

    @api.get("/features")
    async def features(
        q: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 40,
        latent: Annotated[list[int] | None, Query(max_length=100)] = None,
    ) -> Any:
        """Those that a search finds, or those that are named."""
        if latent is not None:
            return {"features": await asyncio.to_thread(latents().listed, latent)}
        return {"features": await asyncio.to_thread(latents().search, q, limit)}

    @api.get("/features/{latent}")
    async def feature(latent: int) -> Any:
        if not 0 <= latent < len(latents()):
            raise RefusedError(404, _no_latent(latent, len(latents())))
        return await asyncio.to_thread(latents().card, latent)

    @api.post("/fired")
    async def fired(body: PageRequest) -> Any:
        nonlocal reading
        known = latents()
        if reading >= _READING:
            raise FullError("too many prompts are being read")
        reading += 1
        try:
            ids, note = _prompt(service, await asyncio.to_thread(service.encode, body.prompt))
            first = len(_beginning(service, ids))
            if len(ids) == first:
                raise RefusedError(400, "The prompt has no tokens of its own.")
            found = await asyncio.to_thread(known.on_text, ids, first)
        except (NotImplementedError, ValueError) as error:
            raise RefusedError(501, f"Which latents fire cannot be shown: {error}.") from error
        finally:
            reading -= 1
        return {**found, "note": note}

    @api.post("/chat")
    async def chat(body: PageRequest) -> Response:
        program = _program(service, body.steer)
        ids = await asyncio.to_thread(service.encode, body.prompt)
        ids, tokens, note = _fitted(service, ids, body.max_tokens)
        # one seed for both: without an edit they are the same text
        job = service.start([ids, ids], body, tokens, [None, program], same_seed=True)
        name = secrets.token_urlsafe(12)
        chats[name] = job

        async def events() -> AsyncIterator[str]:
            yield sse({"id": name, "note": note})
            async for piece in job.pieces():
                if piece.error:
                    _LOG.error("the page's text ended: %s", piece.error)
                yield sse(
                    {"side": ("before", "after")[piece.index], "text": piece.text}
                    | ({"finish": piece.finish} if piece.finish else {})
                    | ({"error": "The model could not go on writing."} if piece.error else {})
                )

        def over() -> None:
            chats.pop(name, None)
            job.cancel()

        return Stream(events(), over)

    @api.post("/chat/{name}/steer")
    async def change(name: str, body: SteerRequest) -> Any:
        if name not in chats:
            raise RefusedError(404, "This text is not being written any more.")
        chats[name].change(1, _program(service, body.steer))
        return {"ok": True}

    app.include_router(api)


# -- limits, which cut a request and do not refuse it ---------------------------------------------


def _beginning(service: Service, ids: Sequence[int]) -> list[int]:
    """The tokens that are not the prompt's own."""
    bos = head(service.tokenizer)
    return bos if list(ids[: len(bos)]) == bos else []


def _prompt(service: Service, ids: list[int], room: int = 0) -> tuple[list[int], str]:
    """A prompt that is too long loses its beginning, and leaves `room` then; what to say of it."""
    most = min(service.limits.prompt_tokens, service.context - 1)
    if len(ids) <= most:
        return ids, ""
    first = _beginning(service, ids)
    kept = max(1, min(most, service.context - room) - len(first))
    return [*first, *ids[-kept:]], f"The prompt is long: only its last {kept:,} tokens are read."


def _fitted(service: Service, ids: list[int], wanted: int) -> tuple[list[int], int, str]:
    """A prompt and a number of tokens that there is room for, and what to say of it."""
    tokens = min(wanted, service.limits.new_tokens)
    ids, note = _prompt(service, ids, min(tokens, service.context // 2))
    room = service.context - len(ids)
    if note:
        return ids, min(tokens, room), note
    if tokens > room:
        return ids, room, f"The model has room for {room:,} tokens after this prompt."
    if tokens < wanted:
        note = f"At most {tokens:,} tokens are written at a time."
    return ids, tokens, note


# -- what is wrong, in plain words ----------------------------------------------------------------


def _program(service: Service, edits: list[Edit] | None) -> Any:
    known = service.latents
    for edit in edits or ():
        named = [edit.latent] if edit.when is None else [edit.latent, edit.when.latent]
        for latent in named:
            if latent >= len(known):
                raise RefusedError(400, _no_latent(latent, len(known)))
        if edit.value is None and edit.op != "ablate":
            raise RefusedError(400, f"The edit of latent {edit.latent} needs a number.")
        units = [edit.unit] * (edit.op not in ("ablate", "scale"))
        units += [] if edit.when is None else [edit.when.unit]
        if "max" in units and not known.has_max:
            raise RefusedError(
                400, "No maximum is known of this SAE's latents: choose raw numbers."
            )
    return service.program(edits)


def _no_latent(latent: int, count: int) -> str:
    return f"There is no latent {latent}: this SAE's are 0 to {count - 1:,}."


_WRONG = {
    "prompt": "Write a prompt first.",
    "temperature": "The temperature must be a number from 0 to 2.",
    "max_tokens": "The number of tokens must be a whole number, 1 or more.",
    "seed": "The seed must be a whole number.",
    "q": "This search is too long.",
}


class _PlainRoute(APIRoute):
    """Says what is wrong with a request without the names of its fields."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def plain(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise RefusedError(400, _wrong(error.errors())) from error

        return plain


def _wrong(errors: Sequence[Any]) -> str:
    where = list(errors[0].get("loc", ()))[1:]
    if where[:1] == ["steer"]:
        if errors[0]["type"] == "too_long":
            return f"At most {MAX_OPS} latents can be edited at a time."
        if len(where) > 1 and isinstance(where[1], int):
            return f"Edit {where[1] + 1} has a number or a choice that is not possible."
    if where[:1] == ["prompt"] and errors[0]["type"] not in ("missing", "string_too_short"):
        return "The prompt cannot be read as text."
    return _WRONG.get(str(where[0]) if where else "", "The server cannot read this request.")
