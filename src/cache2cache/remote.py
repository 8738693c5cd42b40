"""A sharer on another machine: `c2c sharer serve` there, its address instead of a model here.

    pair = C2C.from_pretrained(sharers="http://127.0.0.1:8600")             # the fuser's own sharer, served elsewhere
    pair = C2C.from_pretrained(sharers="http://10.0.0.7:8600?numbers=int8")  # a quarter of the bytes

Three requests (the server is `serving.sharer`): what model it is, how it reads a prompt, and its cache of token ids,
which comes layer by layer while it is still being computed, so that fusing begins before the transfer ends. None leaves
anything behind that the next one needs: a server that was killed is asked again for the layers that are missing, and
says no if another model answers at its address.

A stream of layers is frames: kind (1 byte), length and CRC-32 of what follows (4 bytes each, big-endian), content.
A layer is its number, the error of its number format (float32) and the tensors of `packing`; a sign of life is empty;
an error is text. The last layer is the end.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .alignment.chat import Rendered, Segment
from .errors import C2CError, Unreachable
from .kv import KV, Read
from .models.load import LM
from .models.owner import Count, Owner
from .packing import Coded, Numbers, check_format, decode, unpack
from .web import MAX_ANSWER, MAX_ERROR, connected, headers, shut, words

PROTOCOL = 1
KEY_VARIABLE = "C2C_SHARER_KEY"
LAYER, ALIVE, ERROR = b"L", b"A", b"E"
_HEAD = struct.Struct(">cII")
_LAYER_HEAD = struct.Struct(">If")
_T = TypeVar("_T")


class Served(BaseModel):
    """What a server says of itself.

    Attributes:
        protocol: the version of what is spoken.
        model: whose cache it sends.
        revision: which bytes, as in `LM`.
        context_length, vocab_size: of the model.
        numbers: the number format of its cache.
        max_tokens: the most positions of one request, rows times the longest.
    """

    model_config = ConfigDict(strict=True)

    protocol: int
    model: Owner
    revision: str | None
    context_length: Count
    vocab_size: Count
    numbers: Numbers
    max_tokens: Count


class AskedCache(BaseModel):
    """The request for a cache.

    Attributes:
        model: weights, tokenizer and template that must be the server's.
        rows: token ids of each prompt.
        positions: their position ids, None where they count up.
        skip: per row, how many positions at its start are known to who asks.
        num_layers: the cache's lowest that many layers.
        first_layer: the first of them to be sent.
        numbers: number format.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Owner
    rows: list[list[int]] = Field(min_length=1)
    positions: list[list[int] | None]
    skip: list[int]
    num_layers: Count
    first_layer: int = Field(ge=0)
    numbers: Numbers


@dataclass(frozen=True)
class Transfer:
    """What it took to get one sharer's cache of a batch.

    Attributes:
        sharer: where from.
        nbytes: bytes received, those of broken off attempts too.
        first_layer_s, seconds: from the request until the first and until the last layer was there.
        attempts: 1 if nothing went wrong.
        error: the largest relative error of the number format over all layers, see `packing.relative_error`.
    """

    sharer: str
    nbytes: int
    first_layer_s: float
    seconds: float
    attempts: int
    error: float


def key_of(given: str | None) -> str | None:
    """A server's key without blanks around it; one that no header can hold is refused without being repeated."""
    key = (given or "").strip()
    if not key.isascii() or not key.isprintable():
        raise C2CError(f"the key in {KEY_VARIABLE} has characters that aren't printable ASCII; choose another")
    return key or None


# ---- frames ----------------------------------------------------------------------------------------------------------


def frame(kind: bytes, content: bytes = b"") -> bytes:
    return _HEAD.pack(kind, len(content), zlib.crc32(content)) + content


def layer_content(index: int, coded: Coded) -> bytes:
    """One layer (1, 2, N, H, D) as the content of a frame."""
    tensors = [t.contiguous().cpu().view(torch.uint8).numpy().tobytes() for t in coded.tensors if t.numel()]
    return b"".join([_LAYER_HEAD.pack(index, coded.error), *tensors])


def layer_bytes(model: Owner, counts: Sequence[int], numbers: Numbers) -> int:
    """The length of `layer_content`."""
    width = 2 * model.num_kv_heads * model.head_dim
    channels = 2 * 4 * width * len(counts) if numbers == "int8" else 0
    return _LAYER_HEAD.size + sum(counts) * width * _dtype(numbers).itemsize + channels


def parse_layer(content: bytearray, model: Owner, counts: Sequence[int], numbers: Numbers) -> tuple[int, Coded]:
    """The inverse of `layer_content`, of content with the right length."""
    index, error = _LAYER_HEAD.unpack_from(content)
    shape = (1, 2, sum(counts), model.num_kv_heads, model.head_dim)
    channels = (1, 2, len(counts), model.num_kv_heads, model.head_dim)
    parts, at = [], _LAYER_HEAD.size
    for dtype, size in [(_dtype(numbers), shape)] + [(torch.float32, channels)] * (2 if numbers == "int8" else 0):
        count = torch.Size(size).numel()
        # `torch.frombuffer` wants aligned memory, which the head in front of the numbers spoils.
        raw = (
            torch.frombuffer(content, dtype=torch.uint8, count=count * dtype.itemsize, offset=at).clone()
            if count
            else None
        )
        parts.append(torch.empty(size, dtype=dtype) if raw is None else raw.view(dtype).view(size))
        at += count * dtype.itemsize
    codes, low, scale = [*parts, None, None][:3]
    assert codes is not None
    return index, Coded(codes, low, scale, error)


def _dtype(numbers: Numbers) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, numbers))


# ---- the client ------------------------------------------------------------------------------------------------------


class RemoteSharer(LM):
    """A sharer that is served elsewhere: it renders and reads prompts there; its cache comes here.

    Whatever else a model can do (its weights, its tokenizer, answering by itself) is refused with a C2CError.

    Args:
        url: http://host:port or https://…, with ?numbers=float32, float16, bfloat16 or int8 for another number format
            than the sharer's own.
        key: the server's key; by default the environment variable C2C_SHARER_KEY.
        timeout: seconds without a byte until an attempt counts as failed.
        deadline: seconds for a whole request, all attempts together.
        attempts: how often a request is tried; the pause between doubles from a quarter of a second.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 30.0, deadline: float = 600.0, attempts: int = 6
    ) -> None:
        self._secure, self._host, self._port, self._path, numbers = _address(url)
        self.url = url
        self._key = key_of(os.environ.get(KEY_VARIABLE) if key is None else key)
        self.timeout, self.deadline, self.attempts = timeout, deadline, attempts
        self.served = self._of(Served, self._ask("GET", "/v1/model"))
        if self.served.protocol != PROTOCOL:
            raise C2CError(
                f"the sharer at {url} speaks protocol {self.served.protocol}, this version {PROTOCOL}; install the "
                "same version of cache2cache on both sides"
            )
        self.numbers: Numbers = self.served.numbers if numbers is None else check_format(numbers)
        self.tokenizer = None
        self.name, self.revision = self.served.model.name, self.served.revision

    # The dataclass's own would ask for the model.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"RemoteSharer({self.url!r}, name={self.name!r})"

    # What a pair asks of a sharer.

    @property
    def model(self) -> Any:  # type: ignore[override]
        raise self._not_here()

    def need_tokenizer(self) -> Any:
        raise self._not_here()

    def _not_here(self) -> C2CError:
        return C2CError(
            f"{self.name} runs at {self.url}, which only reads prompts for a pair; to use the model itself or its "
            "tokenizer, load it here"
        )

    @property
    def num_layers(self) -> int:
        return self.served.model.num_layers

    @property
    def num_kv_heads(self) -> int:
        return self.served.model.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.served.model.head_dim

    @property
    def context_length(self) -> int:
        return self.served.context_length

    @property
    def vocab_size(self) -> int:
        return self.served.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.served.model.weights

    @property
    def tokenizer_fingerprint(self) -> str | None:
        return self.served.model.tokenizer

    @property
    def template_fingerprint(self) -> str | None:
        return self.served.model.template

    def render(
        self, prompt: str | Sequence[Mapping[str, str]], *, prefix: str, chat_template_kwargs: Mapping[str, Any]
    ) -> Rendered:
        """As `alignment.chat.render` with the sharer's tokenizer and template."""
        messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        asked = {
            "model": self.served.model.model_dump(),
            "prompt": messages,
            "prefix": prefix,
            "chat_template_kwargs": dict(chat_template_kwargs),
        }
        answer = self._of(_Rendered, self._ask("POST", "/v1/render", asked))
        ids, offsets, size = answer.ids, answer.offsets, len(answer.text)
        if (
            not ids
            or len(ids) != len(offsets)
            or not 0 <= min(ids) <= max(ids) < self.vocab_size
            or any(not 0 <= a <= b <= size for a, b in offsets)
            or any(not 0 <= s.start < s.end <= size for s in answer.segments)
        ):
            raise self._wrong("a rendered prompt whose tokens or spans are impossible")
        return Rendered(answer.text, ids, offsets, [Segment(s.start, s.end, s.key) for s in answer.segments])

    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int] | None],
        depth: int,
        past: Sequence[Read | None],
        device: torch.device | str = "cpu",
    ) -> Incoming:
        """Ask for the cache of the lowest `depth` layers; returns at once.

        Args:
            rows: token ids of each prompt.
            positions: their position ids, None where they count up.
            depth: how many layers.
            past: per row, what is known already and so doesn't travel.
            device: where the cache goes.
        """
        known = [
            read.shared(row, at) if read is not None and len(read.kv.keys) >= depth else 0
            for row, at, read in zip(rows, positions, past, strict=True)
        ]
        longest = max(map(len, rows))
        if len(rows) * longest > self.served.max_tokens:
            raise C2CError(
                f"{len(rows)} prompts of up to {longest} tokens are more than the {self.served.max_tokens} positions "
                f"that the sharer at {self.url} takes at once; ask for fewer prompts at a time, or start it with a "
                "higher --max-tokens"
            )
        asked = AskedCache(
            model=self.served.model,
            rows=[list(map(int, row)) for row in rows],
            positions=[
                None if at is None else list(map(int, at[: len(row)])) for row, at in zip(rows, positions, strict=True)
            ],
            skip=known,
            num_layers=depth,
            first_layer=0,
            numbers=self.numbers,
        )
        return Incoming(self, asked, past, device)

    def _ask(self, method: str, path: str, content: Any = None) -> bytes:
        """A request with a JSON answer."""
        body = None if content is None else json.dumps(content).encode()

        def once(connection: http.client.HTTPConnection) -> bytes:
            response = self._request(connection, method, path, body)
            answer = response.read(MAX_ANSWER + 1)
            if len(answer) > MAX_ANSWER:
                raise self._wrong(f"more than {MAX_ANSWER} bytes")
            if response.length:  # a read of at most so many bytes does not complain of a connection that ended
                raise _Failed(f"the connection ended {response.length} bytes before the answer did")
            return answer

        return self._tried(once)

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        """A response with status 200. Raises `_Failed` where it is worth another try, else a C2CError."""
        connection.request(method, self._path + path, body, headers(self._key))
        response = connection.getresponse()
        if response.status == 200:
            return response
        said = words(response.read(MAX_ERROR))
        if response.status in (429, 502, 503, 504):
            raise _Failed(f"it said {response.status}: {said}")
        hint = f"; set {KEY_VARIABLE} to its key" if response.status in (401, 403) else ""
        # A key or another model there is between the two machines, and no fault of what is asked.
        kind = Unreachable if response.status in (401, 403, 409) else C2CError
        raise kind(f"the sharer at {self.url} refused the request ({response.status}): {said}{hint}")

    def _tried(self, once: Callable[[http.client.HTTPConnection], _T]) -> _T:
        """What `once` returns with a connection, after as many attempts as it takes and is allowed."""
        ends = time.monotonic() + self.deadline
        for attempt in range(1, self.attempts + 1):
            try:
                left = ends - time.monotonic()
                with connected(
                    self._host, self._port, secure=self._secure, timeout=self.timeout, seconds=left
                ) as connection:
                    return once(connection)
            except (_Failed, OSError, ValueError, http.client.HTTPException) as error:
                failed = error
            pause = 0.25 * 2 ** (attempt - 1)
            if attempt == self.attempts or time.monotonic() + pause > ends:
                break
            time.sleep(pause)
        reason = str(failed) if isinstance(failed, _Failed) else f"{type(failed).__name__}: {failed}"
        raise Unreachable(
            f"no answer from the sharer at {self.url}, attempt {attempt} of {self.attempts}: {reason}; see that "
            "`c2c sharer serve` runs there and can be reached from here"
        ) from failed

    def _of(self, kind: type[Any], answer: bytes) -> Any:
        try:
            return kind.model_validate_json(answer)
        except ValidationError as error:
            first = error.errors()[0]
            raise self._wrong(f"{'.'.join(map(str, first['loc'])) or 'its answer'}: {first['msg']}") from error

    def _wrong(self, what: str) -> C2CError:
        return C2CError(f"what answers at {self.url} is no sharer that this version knows ({what[:300]})")


class Incoming:
    """A cache on its way, (L, B, H, T, D) padded on the left: `wait` for layers, read them in `kv`."""

    def __init__(
        self, sharer: RemoteSharer, asked: AskedCache, past: Sequence[Read | None], device: torch.device | str
    ) -> None:
        self.sharer, self.asked = sharer, asked
        self.depth = asked.num_layers
        lengths = [len(row) for row in asked.rows]
        self.counts = [n - k for n, k in zip(lengths, asked.skip, strict=True)]
        dtype = torch.float32 if asked.numbers == "int8" else _dtype(asked.numbers)
        shape = (self.depth, len(lengths), sharer.num_kv_heads, max(lengths), sharer.head_dim)
        self.kv = KV(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for row, (read, known) in enumerate(zip(past, asked.skip, strict=True)):
            if read is not None and known:
                start = max(lengths) - lengths[row]
                for mine, theirs in ((self.kv.keys, read.kv.keys), (self.kv.values, read.kv.values)):
                    mine[:, row, :, start : start + known] = theirs[: self.depth, 0, :, :known].to(dtype)
        self._here = 0  # layers that have arrived
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None
        self._closed = False
        self._began = time.perf_counter()
        self._attempts = self._nbytes = 0
        self._first_layer_s = self._error = self._seconds = 0.0
        threading.Thread(target=self._run, daemon=True, name="sharer-cache").start()

    def wait(self, layers: int) -> int:
        """Block until at least that many of the lowest layers are here; how many are. Raises what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self._here >= layers or self._failure is not None)
            if self._here < layers:
                assert self._failure is not None
                raise self._failure
            return self._here

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The layers as they come: from the first of each pair to before the second."""
        done = 0
        while done < self.depth:
            here = self.wait(done + 1)
            yield done, here
            done = here

    def transfer(self) -> Transfer:
        """What it took, once everything is here."""
        self.wait(self.depth)
        url = self.sharer.url
        return Transfer(url, self._nbytes, self._first_layer_s, self._seconds, self._attempts, self._error)

    def close(self) -> None:
        """Stop the transfer; nothing happens where it has ended."""
        self._closed = True
        if self._socket is not None:
            shut(self._socket)

    def _run(self) -> None:
        try:
            self.sharer._tried(self._attempt)
        except BaseException as error:  # handed to whoever waits
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _attempt(self, connection: http.client.HTTPConnection) -> None:
        """Receive the layers that are missing."""
        self._socket = connection.sock
        self._attempts += 1
        if self._closed:
            raise C2CError("the transfer was stopped")
        body = self.asked.model_copy(update={"first_layer": self._here}).model_dump_json().encode()
        for content in self._frames(self.sharer._request(connection, "POST", "/v1/prefill", body)):
            self._store(content)

    def _frames(self, response: http.client.HTTPResponse) -> Iterator[bytearray]:
        """The contents of the layers as they come."""
        size = layer_bytes(self.asked.model, self.counts, self.asked.numbers)
        most = {LAYER: size, ALIVE: 0, ERROR: MAX_ERROR}
        while self._here < self.depth:
            kind, length, checksum = _HEAD.unpack(self._take(response, _HEAD.size))
            if kind not in most or length > most[kind] or (kind == LAYER and length != size):
                raise self.sharer._wrong(f"a frame {kind!r} of {length} bytes")
            content = self._take(response, length)
            if zlib.crc32(content) != checksum:
                raise _Failed("a frame was damaged on its way")
            if kind == ERROR:
                raise C2CError(f"the sharer at {self.sharer.url} could not read the prompt: {words(bytes(content))}")
            if kind == LAYER:
                yield content

    def _take(self, response: http.client.HTTPResponse, size: int) -> bytearray:
        content = bytearray(size)
        view, got = memoryview(content), 0
        while got < size:
            if not (n := response.readinto(view[got:])):
                raise _Failed(f"the connection ended after {self._here} of {self.depth} layers")
            got += n
            self._nbytes += n
        return content

    def _store(self, content: bytearray) -> None:
        index, coded = parse_layer(content, self.asked.model, self.counts, self.asked.numbers)
        if index != self._here or index >= self.depth:
            raise self.sharer._wrong(f"layer {index} where {self._here} was due")
        one = unpack(decode(coded, self.counts), self.counts)
        for row, n in enumerate(self.counts):
            start = self.kv.length - n
            self.kv.keys[index, row, :, start:] = one.keys[0, row, :, one.length - n :]
            self.kv.values[index, row, :, start:] = one.values[0, row, :, one.length - n :]
        self._error = max(self._error, coded.error)
        with self._changed:
            self._seconds = time.perf_counter() - self._began
            self._first_layer_s = self._first_layer_s or self._seconds
            self._here += 1
            self._changed.notify_all()


class _Segment(BaseModel):
    start: int
    end: int
    key: int | str


class _Rendered(BaseModel):
    """`alignment.chat.Rendered` as JSON."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    segments: list[_Segment]


class _Failed(Exception):
    """An attempt that is worth another one."""


def _address(url: str) -> tuple[bool, str, int | None, str, str | None]:
    """Whether it is TLS, host, port, path and the number format asked for."""
    try:
        parts = urlsplit(url)
        port = parts.port
        query = parse_qsl(parts.query, strict_parsing=True) if parts.query else []
    except ValueError as error:
        raise C2CError(f"{url!r} is no address of a sharer ({error}); expected http://host:port") from error
    if parts.username or parts.password:
        raise C2CError(f"the address of a sharer holds no user or password; set {KEY_VARIABLE} to the server's key")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
        raise C2CError(f"{url!r} is no address of a sharer; expected http://host:port")
    options = dict(query)
    if unknown := options.keys() - {"numbers"}:
        raise C2CError(f"unknown option {sorted(unknown)[0]!r} in {url!r}; expected numbers")
    return parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/"), options.get("numbers")
