"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse


def sse(data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


class Stream(StreamingResponse):
    """Server-sent events; `over` is called at their end, also when they were never begun."""

    def __init__(self, events: AsyncIterator[str], over: Callable[[], None]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._over = over

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()
