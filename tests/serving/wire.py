"""A served sharer in a thread of the test, and connections that break."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache2cache.models import LM
from cache2cache.serving.sharer import Sharer, serve

HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"  # of a request written by hand


def served(lm: LM, key: str | None = None, **options: Any) -> str:
    """The address of a server that runs until the test process ends."""
    addresses: list[str] = []
    ready = threading.Event()

    def tell(address: str) -> None:
        addresses.append(address)
        ready.set()

    threading.Thread(target=serve, args=(Sharer(lm, **options), "127.0.0.1", 0, key, tell), daemon=True).start()
    assert ready.wait(30)
    return addresses[0]


def ask(
    address: str, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str
) -> tuple[int, bytes]:
    """One raw request: status and body."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    try:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def message(answer: bytes) -> str:
    return str(json.loads(answer)["error"]["message"])


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that hands every connection to `answer`, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def one(connection: socket.socket) -> None:
            with connection:
                with suppress(OSError):
                    answer(connection)
                with suppress(OSError):  # closing alone ends nothing while another thread reads
                    connection.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def breaking(address: str, limits: list[int], flip: bool = False, path: bytes = b"/v1/prefill") -> Iterator[str]:
    """The address of a relay to a server. The next answer of `path` (a cache) ends after limits[0] bytes, the one after
    it after limits[1], …; then all are whole. With `flip` the byte there is changed instead."""
    host, port = address.removeprefix("http://").split(":")

    def answer(client: socket.socket) -> None:
        with socket.create_connection((host, int(port))) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            first = client.recv(1 << 16)
            limit = limits.pop(0) if path in first and limits else None

            def forward() -> None:
                with suppress(OSError):
                    server.sendall(first)
                    while data := client.recv(1 << 16):
                        server.sendall(data)

            threading.Thread(target=forward, daemon=True).start()
            while data := server.recv(1 << 16):
                if limit is not None and limit < len(data):
                    if not flip:
                        client.sendall(data[:limit])
                        return
                    data = data[:limit] + bytes([data[limit] ^ 1]) + data[limit + 1 :]
                client.sendall(data)
                limit = None if limit is None or limit < len(data) else limit - len(data)

    with listening(answer) as relay:
        yield relay


def serve_process(model: str | Path, port: int) -> subprocess.Popen[str]:
    code = "from cache2cache.cli import main; main()"
    command = [sys.executable, "-c", code, "sharer", "serve", str(model), "--port", str(port)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def until_it_serves(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if " at http://" in line:
            return line.partition(" at ")[2].partition(";")[0]
    raise AssertionError(f"the server ended with {process.wait()}")


def stop(process: subprocess.Popen[str]) -> None:
    """Kill a server, if it still runs."""
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
