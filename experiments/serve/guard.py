"""What stands before every request: whether it is taken in at all, how large it is, and how long it took."""

import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from experiments.serve.measured import Measured

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# These show nothing of the run.
OPEN = ("/health", "/ready", "/", "/page.js")


class _Gone(Exception):
    """The client left before its body had come."""


class Guard:
    """An ASGI application around another one.

    Attributes:
      stopping: requests but those for health are refused from now on.
      open_requests: taken in and not yet answered.
    """

    def __init__(self, app: Any, tokens: Sequence[str], most_bytes: int, measured: Measured) -> None:
        """Sets the limits.

        Args:
          app: answers what is let through.
          tokens: one of which every request must bring but those for `OPEN`; none at all where empty.
          most_bytes: of a body.
          measured: counts requests.
        """
        self._app, self._tokens, self._most, self._measured = app, [t.encode() for t in tokens], most_bytes, measured
        self.stopping, self.open_requests = False, 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), [500]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._let_in(scope, receive, counted)
        except _Gone:
            status[0] = 499
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._measured.requests.labels(route, status[0]).inc()
            self._measured.seconds.labels(route).observe(time.perf_counter() - began)

    async def _let_in(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self.stopping and scope["path"] not in OPEN:
            more = [(b"retry-after", b"1"), (b"connection", b"close")]
            await refuse(send, 503, "the service is stopping; ask another one", more)
            return
        if self._tokens and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            more = [(b"www-authenticate", b"Bearer")]
            await refuse(send, 401, "give a valid token: Authorization: Bearer TOKEN", more)
            return
        length = headers.get(b"content-length", b"0")
        too_large = f"the body is over {self._most} bytes; send less at a time"
        if length.isdigit() and int(length[:20]) > self._most:
            await refuse(send, 413, too_large, [(b"connection", b"close")])
            return
        body = await self._body(receive)
        if body is None:
            await refuse(send, 413, too_large, [(b"connection", b"close")])
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        self.open_requests += 1
        try:
            await self._app(scope, replay, send)
        finally:
            self.open_requests -= 1

    async def _body(self, receive: Receive) -> bytes | None:
        """Returns the body; None where it is too large."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    def _knows(self, header: bytes) -> bool:
        kind, _, given = header.partition(b" ")
        # All are compared, in a time that tells nothing of them.
        found = [hmac.compare_digest(given.strip(), token) for token in self._tokens]
        return kind.lower() == b"bearer" and any(found)


async def refuse(send: Send, status: int, why: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answers with an error of one line."""
    body = json.dumps({"error": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
