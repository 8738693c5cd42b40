"""What the servers share: bodies of bounded size and time, streams that end with their client, where to listen."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import C2CError

MAX_ERRORS = 1000  # of a body

_T = TypeVar("_T", bound=BaseModel)


class Refused(Exception):
    """A request that is answered with an error. `param`: the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Bodies:
    """Refuses bodies of more than `limit` bytes on every route, with what `error` makes of the refusal.

    And whatever comes while the requests that are not answered yet have sent `together` bytes.
    """

    def __init__(
        self, app: ASGIApp, limit: int, error: Callable[[Refused], Response], together: float = math.inf
    ) -> None:
        self.app, self.limit, self.error, self.together = app, limit, error, together
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        declared, read, started = int(given) if given.isdigit() else 0, 0, False
        refusal: Refused | None = None

        async def counted() -> Message:
            nonlocal read, refusal
            if declared <= self.limit:
                message = await receive()
                size = len(message.get("body", b""))
                read, self.held = read + size, self.held + size
                if read <= self.limit and (not size or self.held <= self.together):
                    return message
            if max(read, declared) > self.limit:
                refusal = Refused(413, f"the body has more than {self.limit} bytes; ask for less at a time")
            else:
                refusal = Refused(429, f"the server holds {self.together} bytes of requests already; come back later")
            raise refusal

        async def answered(message: Message) -> None:
            nonlocal started
            if refusal is None or started:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, answered)
        except Exception:
            if refusal is None or started:
                raise
        finally:
            self.held -= read
        if refusal is not None and not started:  # whatever the application made of it
            await self.error(refusal)(scope, receive, send)


async def read_json(request: Request, kind: type[_T], seconds: float) -> _T:
    """The body of a request as a model, or a `Refused`: 415, 408, 400; where `Bodies` says so, 413.

    Raises starlette's ClientDisconnect where the client leaves meanwhile.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"the body took longer than {seconds:g} s") from error
    try:
        return await asyncio.to_thread(kind.model_validate_json, bytes(body))
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise Refused(400, "the body: nested too deep") from error
        if error.error_count() > MAX_ERRORS:  # to say them all takes longer than to find them
            raise Refused(400, f"the body: {error.error_count()} things in it are wrong") from None
        where, words = what_is_wrong(error)
        raise Refused(400, f"{where or 'the body'}: {words}", where or None) from error


def what_is_wrong(error: ValidationError) -> tuple[str, str]:
    """Where, and in which words. Of something that may be one of several kinds every kind has an error: those that got
    furthest are said."""
    places = []
    for one in error.errors():
        extra = one["loc"][-1:] if one["type"] == "extra_forbidden" else ()  # a name that the client chose
        named = [str(part) for part in one["loc"][: len(one["loc"]) - len(extra)]]
        places.append(((*(part for part in named if not _KIND.match(part)), *map(str, extra)), one["msg"]))
    first = places[0][0]
    alike = [(where, words) for where, words in places if where[: len(first)] == first]
    furthest = max(len(where) for where, _ in alike)
    place = next(where for where, _ in alike if len(where) == furthest)
    said = dict.fromkeys(words for where, words in alike if where == place)
    return ".".join(place)[:200], " or ".join(said)[:300]


# Kinds of a union, in pydantic's places.
_KIND = re.compile(r"(str|int|float|bool)$|constrained-|(list|tuple|function-\w+)\[")


class Streamed(StreamingResponse):
    """A stream that gives up on a client that doesn't take it within `seconds`, and always closes its source.

    `done` is called when it ends, whichever way.
    """

    def __init__(
        self,
        content: AsyncGenerator[Any, None],
        *,
        media_type: str,
        done: Callable[[], None],
        seconds: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self.source, self.done, self.seconds = content, done, seconds

    async def stream_response(self, send: Send) -> None:
        async def in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), self.seconds)

        with suppress(asyncio.TimeoutError):
            await super().stream_response(in_time)

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            try:
                await self.source.aclose()
            finally:
                self.done()


ELSEWHERE = "without keys only localhost is answered; the Host header names something else"


def is_here(host: str) -> bool:
    """Whether a Host header names this machine. A page elsewhere may have a name of its own lead here (DNS rebinding),
    and without keys nothing else would tell it apart."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name.lower())


class Patient(H11Protocol):
    """uvicorn's connections, which it lets be silent for ever: closed where a request's head doesn't come in time."""

    SECONDS: ClassVar[float] = 30.0
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watched()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watched()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatched()
        super().connection_lost(exc)

    def _watched(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatched()
        elif self._watch is None:
            self._watch = self.loop.call_later(self.SECONDS, self._give_up)

    def _unwatched(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _give_up(self) -> None:
        self._watch = None
        upgraded = self.transport.get_protocol() is not self  # to a websocket
        if not upgraded and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens, and its address; a C2CError says why it can't."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, so that asyncio turns Nagle's algorithm off: it costs 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise C2CError(f"can't listen on {host}:{port} ({error}); choose another host or port") from error
    with listener:
        name = f"[{host}]" if ":" in host else host
        yield listener, f"http://{name}:{listener.getsockname()[1]}"
