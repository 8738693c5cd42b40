"""What the clients of servers share: connections that end in time, and what a refusal says.

Standard library: one connection per request, no redirects, no proxies.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MAX_ANSWER = 64 << 20  # bytes of a JSON answer: a rendered prompt of a million tokens
MAX_ERROR = 4096  # bytes of an error's text


@contextmanager
def connected(
    host: str, port: int | None, *, secure: bool, timeout: float, seconds: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection that ends after so many seconds at the latest, and when nothing comes for `timeout`."""
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(host, port, timeout=timeout)
    connection.connect()
    # Each byte may take up to `timeout`, so a server that trickles is stopped from outside. The socket itself, since
    # http.client forgets it when the server says that it will close.
    watch = threading.Timer(max(0.0, seconds), shut, [connection.sock])
    watch.daemon = True
    watch.start()
    try:
        yield connection
    finally:
        watch.cancel()
        connection.close()


def headers(key: str | None) -> dict[str, str]:
    """Of a request with a JSON body."""
    common = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    return {**common, "Authorization": f"Bearer {key}"} if key else common


def shut(sock: socket.socket) -> None:
    """End a connection that another thread may be reading from."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def words(answer: bytes) -> str:
    """The message of an error answer on one line: {"error": {"message": …}}, else the start of what came."""
    text = answer.decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return "".join(c if c.isprintable() else " " for c in text)[:300].strip()
