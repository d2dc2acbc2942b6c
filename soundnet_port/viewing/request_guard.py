"""Protection of the server: which requests it takes, and what its page may do."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RequestGuard:
    """ASGI middleware against requests from other sites' pages; adds security headers to responses.

    Args:
        app: the application.
        allowed_hosts: names in the Host header, without port; None allows all.
    """

    def __init__(self, app: Any, allowed_hosts: frozenset[str] | None) -> None:
        self.app, self.allowed_hosts = app, allowed_hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        cross_origin = origin is not None and _get_netloc(origin) != host
        responder = self.app
        if self.allowed_hosts is not None and re.sub(r":\d*$", "", host) not in self.allowed_hosts:
            # another name for this computer (DNS rebinding)
            responder = JSONResponse({"error": "This server has another name."}, 421)
        elif cross_origin and scope["method"] not in ("GET", "HEAD"):
            responder = JSONResponse({"error": "Pages of other sites may not do this."}, 403)
        await responder(scope, receive, send_with_headers)


def _get_netloc(origin: str) -> str | None:
    with suppress(ValueError):
        return urlsplit(origin).netloc.lower()
    return None
