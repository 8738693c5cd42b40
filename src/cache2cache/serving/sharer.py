"""The server behind `c2c sharer serve`: one model that reads prompts for pairs on other machines (see `remote`)."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from ..alignment.chat import Rendered, render
from ..errors import C2CError
from ..kv import KV, Read, pad_left, positions_from, prefill
from ..models.load import LM
from ..models.owner import Owner
from ..packing import encode, format_of, pack
from ..remote import ALIVE, ERROR, LAYER, PROTOCOL, AskedCache, Served, frame, layer_content
from ..web import MAX_ERROR
from .http import ELSEWHERE, Bodies, Patient, Refused, Streamed, is_here, listening, read_json

STALL_SECONDS = 30.0  # a client may keep the server waiting that long, for its request and for taking the answer
ALIVE_SECONDS = 5.0  # between two signs of life while a prompt waits for its turn or is read
MAX_WAITING = 16  # requests for caches at once, of which one computes
MAX_AHEAD = 4  # layers computed and not yet taken by the client
PIECE = 1 << 18  # bytes that a client takes at once

_Scalar = bool | int | float | Annotated[str, StringConstraints(max_length=1000)] | None


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Annotated[str, StringConstraints(max_length=100)]
    content: str


class AskedText(BaseModel):
    """The request for a rendered prompt: the arguments of `alignment.chat.render`, and whose."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Owner
    prompt: str | list[_Message]
    prefix: str = ""
    chat_template_kwargs: Annotated[dict[str, _Scalar], Field(max_length=32)] = {}


class Sharer:
    """What the server does, without HTTP.

    Args:
        lm: the model.
        max_tokens: the most positions of one request, rows times the longest.
        keep_bytes: how much of what was read is kept, so that a later turn of a chat computes only what is new.
    """

    def __init__(self, lm: LM, *, max_tokens: int = 16384, keep_bytes: int = 256 << 20) -> None:
        lm.need_tokenizer()
        self.lm, self.max_tokens, self.keep_bytes = lm, max_tokens, keep_bytes
        self.owner = Owner.of(lm)
        self._recent: deque[Read] = deque()
        # Names that apply_chat_template takes for itself (another template, tools, how to tokenize) are not free.
        self._reserved = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)

    def about(self) -> Served:
        lm = self.lm
        return Served(
            protocol=PROTOCOL,
            model=self.owner,
            revision=lm.revision,
            context_length=min(lm.context_length, (1 << 31) - 1),
            vocab_size=lm.vocab_size,
            numbers=format_of(lm.dtype),
            max_tokens=self.max_tokens,
        )

    def check_model(self, asked: Owner) -> None:
        if found := self.owner.differences(asked):
            raise _Conflict(
                f"this is {self.owner.name}, which differs from the {asked.name} that was asked for in "
                f"{', '.join(found)}; connect again"
            )

    def render(self, asked: AskedText) -> Rendered:
        """As `alignment.chat.render`."""
        self.check_model(asked.model)
        if reserved := self._reserved & asked.chat_template_kwargs.keys():
            raise C2CError(f"chat_template_kwargs holds {', '.join(sorted(reserved))}, which a server doesn't take")
        prompt = asked.prompt if isinstance(asked.prompt, str) else [dict(m) for m in asked.prompt]
        size = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
        # A token is rarely longer than 16 characters; this keeps hopeless texts from the tokenizer.
        if size + len(asked.prefix) > 64 * min(self.max_tokens, self.lm.context_length):
            raise C2CError(f"the prompt has {size} characters, too many for {self.lm.name}; shorten it")
        return render(
            self.lm.need_tokenizer(), prompt, prefix=asked.prefix, chat_template_kwargs=asked.chat_template_kwargs
        )

    def check(self, asked: AskedCache) -> None:
        """Raise a C2CError for what can't be read."""
        self.check_model(asked.model)
        lm, lengths = self.lm, [len(row) for row in asked.rows]
        if min(lengths) < 1 or max(lengths) > lm.context_length:
            raise C2CError(f"rows of {min(lengths)} to {max(lengths)} tokens; expected 1 to {lm.context_length}")
        if len(lengths) * max(lengths) > self.max_tokens:
            raise C2CError(
                f"{len(lengths)} rows of up to {max(lengths)} tokens are more than {self.max_tokens} positions; "
                "ask for fewer"
            )
        if any(not 0 <= i < lm.vocab_size for row in asked.rows for i in row):
            raise C2CError(f"token ids outside the vocabulary of {lm.name} ({lm.vocab_size} tokens)")
        if len(asked.positions) != len(lengths) or any(
            at is not None and (len(at) != n or any(not 0 <= p < lm.context_length for p in at))
            for at, n in zip(asked.positions, lengths, strict=False)
        ):
            raise C2CError("positions don't fit the rows; expected None or one position id per token")
        if len(asked.skip) != len(lengths) or any(not 0 <= k <= n for k, n in zip(asked.skip, lengths, strict=True)):
            raise C2CError("skip doesn't fit the rows; expected a number of positions for each")
        if asked.num_layers > lm.num_layers or asked.first_layer >= asked.num_layers:
            raise C2CError(
                f"layers {asked.first_layer} to {asked.num_layers} were asked for; {lm.name} has {lm.num_layers}"
            )

    def prefill(self, asked: AskedCache, emit: Callable[[bytes], None]) -> None:
        """Read checked prompts; hand over one frame per layer as soon as it is computed. One call at a time."""
        counts = [len(row) - k for row, k in zip(asked.rows, asked.skip, strict=True)]

        def on_layer(index: int, kv: KV) -> None:
            if index >= asked.first_layer:
                emit(frame(LAYER, layer_content(index, encode(pack(kv, counts), counts, asked.numbers))))

        ids, mask = pad_left(asked.rows, self.lm.pad_token_id, self.lm.device)
        past = [self._known(row, at, asked.num_layers) for row, at in zip(asked.rows, asked.positions, strict=True)]
        places = positions_from(asked.positions, mask)
        cache = prefill(self.lm, ids, mask, num_layers=asked.num_layers, positions=places, past=past, on_layer=on_layer)
        for row, (tokens, at) in enumerate(zip(asked.rows, asked.positions, strict=True)):
            self._keep(Read(tokens, cache.tail(row, len(tokens)), at))

    def _known(self, row: Sequence[int], at: Sequence[int] | None, layers: int) -> Read | None:
        """Of what was read lately, that which says most about these tokens."""
        fit = [read for read in self._recent if len(read.kv.keys) >= layers]
        best = max(fit, key=lambda read: read.shared(row, at), default=None)
        return best if best is not None and best.shared(row, at) else None

    def _keep(self, read: Read) -> None:
        if read.kv.nbytes > self.keep_bytes:
            return
        self._recent.append(Read(read.ids, read.kv.clone(), read.positions))
        while sum(kept.kv.nbytes for kept in self._recent) > self.keep_bytes:
            self._recent.popleft()


class _Conflict(C2CError):
    """Another model than the one that was asked for."""


class _Gone(Exception):
    """The client has left."""


def make_app(sharer: Sharer, key: str | None = None) -> FastAPI:
    """The three requests of `remote` as an application."""
    app = FastAPI(title="cache2cache sharer", docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(1, "prefill")  # one prompt at a time, first come, first served
    waiting = threading.BoundedSemaphore(MAX_WAITING)
    # A token takes up to 8 bytes as JSON, and every row may bring position ids.
    limit = 1 << 16 | sharer.max_tokens * 64
    app.add_middleware(Bodies, limit=limit, error=lambda refusal: _error(refusal.status, str(refusal)))

    async def asked(request: Request, kind: type[Any]) -> Any:
        return await read_json(request, kind, STALL_SECONDS)

    @app.middleware("http")
    async def allowed(request: Request, go_on: Callable[[Request], Any]) -> Response:
        if not key and not is_here(request.headers.get("host", "")):
            return _error(403, ELSEWHERE)
        given = request.headers.get("authorization", "").encode()
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            return _error(401, "a key is needed")
        answer: Response = await go_on(request)
        return answer

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error.status, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # to nobody

    @app.exception_handler(C2CError)
    async def wrong(_: Request, error: C2CError) -> Response:
        return _error(409 if isinstance(error, _Conflict) else 400, str(error))

    @app.get("/v1/model")
    async def about() -> Response:
        return Response(sharer.about().model_dump_json(), media_type="application/json")

    @app.post("/v1/render")
    async def rendered(request: Request) -> Response:
        text: AskedText = await asked(request, AskedText)
        return JSONResponse(asdict(await asyncio.to_thread(sharer.render, text)))

    @app.post("/v1/prefill")
    async def cache(request: Request) -> Response:
        what: AskedCache = await asked(request, AskedCache)
        await asyncio.to_thread(sharer.check, what)
        if not waiting.acquire(blocking=False):
            return _error(503, f"{MAX_WAITING} requests are waiting already; try again later")
        frames = _computed(sharer, what, worker)
        return Streamed(frames, media_type="application/octet-stream", done=waiting.release, seconds=STALL_SECONDS)

    return app


async def _computed(sharer: Sharer, asked: AskedCache, worker: ThreadPoolExecutor) -> AsyncGenerator[bytes, None]:
    """The frames of an answer. Closing it stops the computation at the next layer."""
    loop, ready = asyncio.get_running_loop(), asyncio.Queue[bytes | None](MAX_AHEAD)
    gone = threading.Event()

    def emit(item: bytes | None) -> None:
        if gone.is_set():
            raise _Gone
        # Waits while the client is behind; longer than a client may be only if the loop itself has ended.
        asyncio.run_coroutine_threadsafe(ready.put(item), loop).result(2 * STALL_SECONDS)

    def work() -> None:
        try:
            if not gone.is_set():
                sharer.prefill(asked, emit)
        except _Gone:
            return
        except Exception as error:  # the client is told, the server goes on
            text = str(error) if isinstance(error, C2CError) else f"{type(error).__name__} while reading the prompt"
            if not isinstance(error, C2CError):
                print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            emit(frame(ERROR, text.encode()[:MAX_ERROR]))
        emit(None)

    worker.submit(work)
    try:
        while True:
            try:
                item = await asyncio.wait_for(ready.get(), ALIVE_SECONDS)
            except asyncio.TimeoutError:
                yield frame(ALIVE)
                continue
            if item is None:
                return
            for begin in range(0, len(item), PIECE):  # each in time for itself: a layer may be megabytes
                yield item[begin : begin + PIECE]
    finally:
        gone.set()
        while not ready.empty():  # one `emit` may be waiting for a place
            ready.get_nowait()


def _error(status: int, message: str) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": {"message": message}}, status, headers)


def serve(sharer: Sharer, host: str, port: int, key: str | None, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; `ready` is called with the address once connections are taken."""
    with listening(host, port) as (listener, address):
        config = uvicorn.Config(
            make_app(sharer, key),
            log_level="warning",
            access_log=False,
            server_header=False,
            http=Patient,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
        )
        ready(address)
        uvicorn.Server(config).run(sockets=[listener])
