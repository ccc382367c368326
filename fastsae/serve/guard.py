"""What stands before every request: who may ask, and how much."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from .protocol import Limits

LOOPBACK = frozenset(("127.0.0.1", "localhost", "[::1]"))
_OPEN = frozenset(("/", "/health"))  # paths that need no token


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> Any:
    """An error in the form of the OpenAI API."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Guard:
    """ASGI middleware: host, token, media type and size of the body, before it is parsed.

    `hosts`: names that the Host header may have (a page elsewhere could otherwise reach a local
    server through a name that it points here), or None for any. `token`: bearer token of everything
    but the page itself and `/health`, compared in constant time.
    """

    def __init__(
        self, app: Any, limits: Limits, token: str | None, hosts: frozenset[str] | None
    ) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        refusal = self._refused(scope, headers)
        if refusal is not None:
            await _send_error(send, *refusal)
            return
        body = b""
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            try:
                body = await asyncio.wait_for(self._body(receive), self.limits.body_seconds)
            except asyncio.TimeoutError:
                await _send_error(send, 408, "the request's body took too long to arrive")
                return
            except _TooLargeError:
                size = self.limits.body_bytes
                await _send_error(send, 413, f"the request's body is larger than {size} bytes")
                return
            except _GoneError:
                return
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _refused(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name not in self.hosts:
                return 403, "the Host header names another server"
        if self.token is not None and scope["path"] not in _OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                return 401, "a bearer token is needed, and this is not it"
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 18):
            return 400, "Content-Length is no number"
        if length is not None and int(length) > self.limits.body_bytes:
            return 413, f"the request's body is larger than {self.limits.body_bytes} bytes"
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":  # which a form of another site cannot send
                return 415, "the body must be application/json"
        return None

    async def _body(self, receive: Any) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.body_bytes:
                raise _TooLargeError
            if not message.get("more_body", False):
                return b"".join(parts)


class _TooLargeError(Exception):
    pass


class _GoneError(Exception):
    pass


async def _send_error(send: Any, status: int, message: str) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps(error_body(message, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
