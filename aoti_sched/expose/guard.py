"""Guard: keeps web pages of other origins away from the port.

A page of another origin may make a browser on this machine send requests to the port. With the name
of its own host pointed at 127.0.0.1 ("DNS rebinding"), such a page could even read the answers. So
the port answers to its own names alone, and tells browsers what to refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from aoti_sched.expose.answers import refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OWN_NAMES = {"127.0.0.1", "localhost"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses requests for other hosts, and requests that another site's page has made.

    Args:
        app: The application behind.
        check_origin: Whether browsers can reach it: on a port they can, on a Unix socket not.
    """

    def __init__(self, app: ASGIApp, *, check_origin: bool) -> None:
        self._app = app
        self._checks = check_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":  # there are no web sockets
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        problem = _problem(Headers(scope=scope), scope["path"]) if self._checks else None
        if problem is None:
            await self._app(scope, receive, send_guarded)
        else:
            await refusal(403, problem)(scope, receive, send_guarded)


def _problem(headers: Headers, path: str) -> str | None:
    host = headers.get("host", "")
    if host.rpartition(":")[0] not in _OWN_NAMES and host not in _OWN_NAMES:
        return "This port answers to http://127.0.0.1 and http://localhost only."
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return "This port answers to no page of another origin."
    # A link on another site may lead to the page, which then asks by itself.
    if path != "/" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return "This port answers to no page of another site."
    return None
