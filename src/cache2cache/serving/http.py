"""What the servers share: bodies of bounded size and time, streams that end with their client, where to listen."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.types import Message, Send

from ..errors import C2CError

_T = TypeVar("_T", bound=BaseModel)


class Refused(Exception):
    """A request that is answered with an error. `param`: the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


async def read_json(request: Request, kind: type[_T], max_body: int, seconds: float) -> _T:
    """The body of a request as a model, or a `Refused`: 415, 413, 408, 400."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > max_body:
                raise Refused(413, f"the body has more than {max_body} bytes; ask for less at a time")

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"the body took longer than {seconds:g} s") from error
    try:
        return await asyncio.to_thread(kind.model_validate_json, bytes(body))
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deep"}
        where = ".".join(map(str, first["loc"]))[:200]
        raise Refused(400, f"{where or 'the body'}: {first['msg'][:300]}", where or None) from error


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
