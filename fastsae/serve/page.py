"""The page, and the calls that it makes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse, Response

from .events import Stream, sse
from .protocol import PageRequest, SteerRequest
from .service import Job, RefusedError, Service

_PAGE = Path(__file__).parent.parent / "assets" / "serve.html"


def add_page(app: FastAPI, service: Service) -> None:
    """Adds `/` and `/api/*` to the application."""
    page = _PAGE.read_text(encoding="utf-8")
    chats: dict[str, Job] = {}

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

    @app.get("/api/info")
    async def info() -> Any:
        limits = service.limits
        return {
            "model": service.name,
            "site": service.site,
            "latents": 0 if service.sae is None else len(service.sae.W_dec),
            "has_max": service.sae is not None and service.sae.max_activation is not None,
            "new_tokens": min(limits.new_tokens, service.context - 1),
            "load": service.engine.load,
        }

    @app.get("/api/features")
    async def features(
        q: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 40,
    ) -> Any:
        return {"features": await asyncio.to_thread(service.features, q, limit)}

    @app.post("/api/chat")
    async def chat_page(body: PageRequest) -> Response:
        program = service.program(body.steer)
        ids = await asyncio.to_thread(service.encode, body.prompt)
        # one seed for both: without an edit they are the same text
        job = service.start([ids, ids], body, body.max_tokens, [None, program], same_seed=True)
        name = secrets.token_urlsafe(12)
        chats[name] = job

        async def events() -> AsyncIterator[str]:
            yield sse({"id": name})
            async for piece in job.pieces():
                yield sse(
                    {"side": ("before", "after")[piece.index], "text": piece.text}
                    | ({"finish": piece.finish} if piece.finish else {})
                    | ({"error": piece.error} if piece.error else {})
                )

        def over() -> None:
            chats.pop(name, None)
            job.cancel()

        return Stream(events(), over)

    @app.post("/api/chat/{name}/steer")
    async def change(name: str, body: SteerRequest) -> Any:
        if name not in chats:
            raise RefusedError(404, "this text is not being written any more")
        chats[name].change(1, service.program(body.steer))
        return {"ok": True}
