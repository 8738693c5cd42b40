"""The OpenAI-compatible server behind `c2c serve`: HTTP in front of engines.

    POST /v1/chat/completions, /v1/completions; GET /v1/models, /health, /ready, /metrics

A fuser is a model, NAME; `NAME:receiver`, `NAME:sharer` and `NAME:text` are its receiver alone, its sharer alone and
text-to-text. The field `c2c` of a request chooses sharers, fusion mode and positions. What is not supported is refused,
never ignored, unless ignoring it changes no answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import C2CError
from . import document
from .engine import Answering, Engine, EngineError, Event, Finished, Job, Piece, Started, Token, Way
from .http import ELSEWHERE, Bodies, Patient, Refused, Streamed, is_here, listening, read_json
from .metrics import Metrics

MAX_BODY = 8 << 20
MAX_BODIES = 128 << 20  # of all requests that are not answered yet
LAST_SECONDS = 2  # to send what is left when nothing runs any more
STALL_SECONDS = 30.0  # a client may keep the server waiting that long, for its request and for taking the answer
MAX_PROMPTS = 64  # of one request for completions
MAX_MESSAGES = 2048
MAX_FIELDS = 100  # of an object
MAX_MESSAGE = 900  # characters of an error

_STATUS = {"invalid": 400, "busy": 429, "unavailable": 503, "timeout": 504, "internal": 500}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    413: "body_too_large",
    429: "too_many_requests",
    503: "unavailable",
    504: "timeout",
}

# ---- requests --------------------------------------------------------------------------------------------------------

# Settings that change no answer of these models, and settings that are let pass with these values only.
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    # Of vLLM, whose clients send them unasked.
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
}
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]
_Ids = Annotated[list[_Id], Field(min_length=1, fail_fast=True)]  # millions of wrong items are one error


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        # Every field that isn't known would be an error of its own.
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        # What is null says nothing, as in a message that a client has had from here and sends back.
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


class Choices(_Model):
    """How the caches are fused: the field `c2c` of a request."""

    sharers: Annotated[list[Annotated[int, Field(ge=0, le=63)] | str], Field(max_length=64)] | None = Field(
        None, description="numbers from 0 or names of the sharers that take part; all without it"
    )
    mode: Literal["parallel", "sequential"] | None = Field(None, description="with several sharers")
    positions: Annotated[str, StringConstraints(pattern=r"^(all|content|(front|back):(0(\.\d+)?|1(\.0+)?))$")] = Field(
        "all", description="all, content, front:SHARE or back:SHARE"
    )


class StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Asked(_Model):
    model: Annotated[str, StringConstraints(max_length=500)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    c2c: Choices | None = None

    @model_validator(mode="before")
    @classmethod
    def _unsupported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        left = {name: value for name, value in given.items() if name not in _IGNORED}
        for name in _ONLY.keys() & left.keys():
            if (value := left.pop(name)) is not None and value not in _ONLY[name]:
                raise ValueError(f"{name} is not supported here; leave it out")
        return left

    def job(self, prompt: Any, way: Way, engine: Engine, timeout: float) -> Job:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        options = self.c2c or Choices()
        if self.c2c is not None and way != "c2c":
            raise Refused(400, f"c2c is for the model {engine.name}, not for {self.model}", "c2c")
        return Job(
            prompt,
            way,
            n=self.n or 1,
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            sharers=_mask(options.sharers, engine.about.sharers),
            mode=options.mode,
            positions=options.positions,
            timeout=timeout,
        )


class Text(_Model):
    type: Literal["text"]
    text: str


class Said(_Model):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Text], Field(max_length=1000)]
    type: Literal["text", "message"] | None = None
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Asked):
    """A chat to be answered."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(_Asked):
    """Text to be gone on with."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def prompts(self) -> list[Any]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _mask(sharers: Sequence[int | str] | None, names: Sequence[str]) -> int | None:
    if sharers is None:
        return None
    mask = 0
    for sharer in sharers:
        number = names.index(sharer) if sharer in names else sharer
        if not isinstance(number, int) or number >= len(names):
            offers = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise Refused(400, f"there is no sharer {str(sharer)[:100]!r}; expected some of {offers}", "c2c.sharers")
        mask |= 1 << number
    return mask


# ---- the application -------------------------------------------------------------------------------------------------


def make_app(
    engines: Sequence[Engine],
    *,
    keys: Sequence[str] = (),
    timeout: float = 600.0,
    log: Callable[[dict[str, Any]], None] | None = None,
    log_prompts: bool = False,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The server as an application.

    Args:
        engines: each a model; their names differ.
        keys: with some, only who sends one of them is answered, but for /health and /ready.
        timeout: seconds that a request may take, the wait for its turn included.
        log: is called with a record of each request.
        log_prompts: whether the records hold prompts and answers.

    `state.on_stop` of the application is a list of what `serve` calls, without arguments, when all jobs have ended.
    """
    metrics = metrics or Metrics(engines)
    api = _Api(engines, metrics, timeout, log or (lambda record: None), log_prompts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        for engine in engines:
            await asyncio.to_thread(engine.close)

    from .. import __version__

    app = FastAPI(title="cache2cache", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.on_stop = []

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error.status, str(error), error.param)

    @app.exception_handler(EngineError)
    async def unanswered(_: Request, error: EngineError) -> Response:
        return _error(_STATUS[error.reason], str(error), retry_after=error.retry_after)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        return _error(
            error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", headers=error.headers
        )

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return _error(500, "the server failed at this request")

    _routes(app, api)
    document.describe(app, (ChatRequest, CompletionRequest))
    app.add_middleware(
        Bodies,
        limit=MAX_BODY,
        together=MAX_BODIES,
        error=lambda error: _error(error.status, str(error), retry_after=1 if error.status == 429 else None),
    )
    app.add_middleware(_Keys, keys=list(keys))
    return app


def _routes(app: FastAPI, api: _Api) -> None:
    def asks(kind: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
        return {
            "openapi_extra": {"requestBody": {"required": True, "content": document.reference(kind)}},
            "responses": document.responses(answer, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504, streams=True),
        }

    loading = {"description": "some model is not loaded", "content": document.reference(document.Ready)}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/ready", responses={**document.responses(document.Ready), 503: loading})
    async def ready() -> Response:
        """Whether every model is loaded."""
        states = {engine.name: engine.ready for engine in api.engines}
        fine = all(states.values())
        return JSONResponse({"ready": fine, "models": states}, 200 if fine else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=document.responses(None, 401))
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=document.responses(document.ModelList, 401))
    async def models() -> dict[str, Any]:
        """What `model` may be."""
        return {"object": "list", "data": [api.card(name) for name in api.names()]}

    @app.get("/v1/models/{name:path}", responses=document.responses(document.ModelCard, 401, 404))
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        api.find(name)
        return api.card(name)

    @app.post("/v1/chat/completions", **asks(ChatRequest, document.ChatCompletion))
    async def chat(request: Request) -> Response:
        """Answer a chat."""
        return await api.answer(request, ChatRequest)

    @app.post("/v1/completions", **asks(CompletionRequest, document.Completion))
    async def completions(request: Request) -> Response:
        """Go on with a text."""
        return await api.answer(request, CompletionRequest)


class _Keys:
    """Answers only who sends one of the keys; without any, who names this machine in the Host header."""

    OPEN = ("/health", "/ready", "/favicon.ico", "/ui")  # the page asks for a key itself

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self.app, self.keys = app, [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.keys:
            host = next((value for name, value in scope["headers"] if name == b"host"), b"")
            if not is_here(host.decode("latin-1")):
                await _error(403, ELSEWHERE)(scope, receive, send)
                return
        if scope["type"] == "http" and self.keys and not scope["path"].startswith(self.OPEN):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not any(hmac.compare_digest(given, key) for key in self.keys):
                await _error(401, "a valid API key is needed: Authorization: Bearer KEY")(scope, receive, send)
                return
        await self.app(scope, receive, send)


_T = TypeVar("_T")
_Merged = AsyncGenerator[tuple[int, Event], None]


class _Api:
    """Requests to jobs, events to answers."""

    def __init__(
        self,
        engines: Sequence[Engine],
        metrics: Metrics,
        timeout: float,
        log: Callable[[dict[str, Any]], None],
        log_prompts: bool,
    ) -> None:
        self.engines, self.metrics, self.timeout = engines, metrics, timeout
        self.log, self.log_prompts = log, log_prompts
        self.created = int(time.time())

    def names(self) -> list[str]:
        return [_name(engine, way) for engine in self.engines for way in engine.about.ways]

    def find(self, name: str) -> tuple[Engine, Way]:
        for engine in self.engines:
            for way in engine.about.ways:
                if name == _name(engine, way):
                    return engine, way
        raise Refused(404, f"there is no model {name[:100]!r}; expected one of {', '.join(self.names())}", "model")

    def card(self, name: str) -> dict[str, Any]:
        engine, way = self.find(name)
        about = engine.about
        models = {"c2c": [about.receiver, *about.sharers], "receiver": [about.receiver], "sharer": [about.sharers[0]]}
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "cache2cache",
            "c2c": {"way": way, "models": models.get(way, [about.receiver, about.sharers[0]])},
        }

    async def answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """One request from its body to its answer, and its record."""
        began = time.perf_counter()
        record: dict[str, Any] = {"event": "request", "id": uuid.uuid4().hex, "path": request.url.path}

        def done(status: int) -> None:
            self.metrics.responses.labels(request.url.path, status).inc()
            self.log({**record, "status": status, "seconds": round(time.perf_counter() - began, 4)})

        try:
            asked = await read_json(request, kind, STALL_SECONDS)
            record.update(model=asked.model, stream=bool(asked.stream), n=asked.n or 1)
            engine, way = self.find(asked.model)
            # Of several users none can tell by `cached_tokens` what another has asked.
            sender = hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()[:16]
            jobs = [replace(job, owner=sender) for job in _jobs(asked, engine, way, self.timeout)]
            if self.log_prompts:
                record["prompts"] = [job.prompt for job in jobs]
            writer = _Writer(asked, record, began)
            events = self._events(engine, jobs)
            # What can go wrong before the first event is answered with the right status, also when streaming.
            try:
                first = await _while_there(request, anext(events))
            except BaseException:
                await events.aclose()
                raise
            if asked.stream:
                return Streamed(
                    writer.stream(first, events, self.log_prompts),
                    media_type="text/event-stream",
                    done=lambda: done(writer.status),
                    seconds=STALL_SECONDS,
                    headers={"Cache-Control": "no-cache", "X-Request-Id": record["id"]},
                )
            try:
                content = await _while_there(request, writer.whole(first, events, self.log_prompts))
            finally:
                await events.aclose()
            done(200)
            return JSONResponse(content, headers={"X-Request-Id": record["id"]})
        except (_Gone, ClientDisconnect):
            done(499)
            return Response(status_code=499)
        except EngineError as error:
            done(_STATUS[error.reason])
            raise
        except Refused as error:
            done(error.status)
            raise
        except Exception:
            done(500)
            raise

    async def _events(self, engine: Engine, jobs: Sequence[Job]) -> _Merged:
        """The events of all jobs of a request, with each job's number, as they come. An error ends all."""
        sources = self.metrics.submit(engine, jobs)
        # Of one event per job, so that a client who reads slowly isn't read ahead for.
        ready: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(len(jobs))

        async def read(number: int, source: Answering) -> None:
            try:
                async for event in source:
                    await ready.put((number, event))
                await ready.put((number, None))
            except Exception as error:
                await ready.put((number, error))

        tasks = [asyncio.create_task(read(number, source)) for number, source in enumerate(sources)]
        try:
            left = len(tasks)
            while left:
                number, item = await ready.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield number, item
        finally:
            for task, source in zip(tasks, sources, strict=True):
                task.cancel()
                source.close()
            await asyncio.gather(*tasks, return_exceptions=True)


def _name(engine: Engine, way: Way) -> str:
    return engine.name if way == "c2c" else f"{engine.name}:{way}"


def _jobs(asked: ChatRequest | CompletionRequest, engine: Engine, way: Way, timeout: float) -> list[Job]:
    if isinstance(asked, ChatRequest):
        job = asked.job([said.plain() for said in asked.messages], way, engine, timeout)
        return [replace(job, logprobs=(asked.top_logprobs or 0) if asked.logprobs else None)]
    if way == "text":
        raise Refused(400, f"{asked.model} answers chats; use /v1/chat/completions", "model")
    return [replace(asked.job(p, way, engine, timeout), logprobs=asked.logprobs) for p in asked.prompts()]


class _Gone(Exception):
    """The client has left."""


async def _while_there(request: Request, work: Awaitable[_T]) -> _T:
    """Wait for something as long as the client does."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


# ---- answers ---------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes events as the protocol has them: at once or piece by piece. Figures also go into the record."""

    def __init__(self, asked: ChatRequest | CompletionRequest, record: dict[str, Any], began: float) -> None:
        self.asked, self.record, self.began = asked, record, began
        self.chat = isinstance(asked, ChatRequest)
        self.n = asked.n or 1
        self.count = 1 if isinstance(asked, ChatRequest) else len(asked.prompts())
        self.texts = [""] * (self.n * self.count)
        self.message = ""
        self.sums = dict.fromkeys(("prompt_tokens", "reused", "new_tokens", "message_tokens", "bytes_passed"), 0)
        self.first_token_s: float | None = None
        self.status = 499  # of a stream: what became of it; its client has left unless it came to an end
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{kind}-{record['id']}", "created": int(time.time()), "model": asked.model}

    def note(self, event: Event) -> None:
        """Add up what an event says in numbers."""
        sums = self.sums
        if isinstance(event, Started):
            sums["prompt_tokens"] += event.prompt_tokens
            sums["reused"] += event.reused
        elif isinstance(event, Finished):
            sums["new_tokens"] += event.new_tokens
            sums["message_tokens"] += event.message_tokens
            sums["bytes_passed"] += event.bytes_passed
        elif event.message:
            self.message += event.text
        elif self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began
        self.record.update(sums, first_token_s=self.first_token_s and round(self.first_token_s, 4))

    def usage(self) -> dict[str, Any]:
        prompt, new = self.sums["prompt_tokens"], self.sums["new_tokens"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.sums["reused"]},
        }

    def extra(self) -> dict[str, Any]:
        """The field `c2c` of an answer."""
        sums = self.sums
        extra: dict[str, Any] = {"bytes_passed": sums["bytes_passed"], "first_token_s": self.first_token_s}
        if sums["message_tokens"]:
            extra.update(message=self.message, message_tokens=sums["message_tokens"])
        return extra

    async def whole(self, first: tuple[int, Event], events: _Merged, log_answers: bool) -> dict[str, Any]:
        tokens: list[list[Token]] = [[] for _ in self.texts]
        finish: list[str | None] = [None] * len(self.texts)

        async def every() -> _Merged:
            yield first
            async for item in events:
                yield item

        async for number, event in every():
            self.note(event)
            if isinstance(event, Piece) and not event.message:
                place = number * self.n + event.choice
                self.texts[place] += event.text
                tokens[place] += event.tokens
                finish[place] = event.finish or finish[place]
        if log_answers:
            self.record["answers"] = self.texts
        choices = []
        for index, text in enumerate(self.texts):
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            )
            logprobs = (
                self.logprobs(tokens[index])
                if self.asked.logprobs is not None and self.asked.logprobs is not False
                else None
            )
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": finish[index]})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage(), "c2c": self.extra()}

    async def stream(self, first: tuple[int, Event], events: _Merged, log_answers: bool) -> AsyncGenerator[str, None]:
        """Server-sent events, the last of them [DONE]."""
        with_usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        object_ = "chat.completion.chunk" if self.chat else "text_completion"

        def data(choices: list[dict[str, Any]], **more: Any) -> str:
            if with_usage:
                more = {"usage": None, **more}
            return _sse({**self.head, "object": object_, "choices": choices, **more})

        def choice(index: int, text: str, finish: str | None, tokens: Sequence[Token]) -> dict[str, Any]:
            logprobs = self.logprobs(tokens) if tokens else None
            content = {"delta": {"content": text} if text or not finish else {}} if self.chat else {"text": text}
            return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

        try:
            try:
                if self.chat:
                    for index in range(len(self.texts)):
                        yield data([{**choice(index, "", None, ()), "delta": {"role": "assistant", "content": ""}}])
                number, event = first
                while True:
                    self.note(event)
                    if isinstance(event, Piece) and not event.message and (event.text or event.finish or event.tokens):
                        index = number * self.n + event.choice
                        if self.chat and event.finish and event.text:  # the protocol ends with a choice of its own
                            yield data([choice(index, event.text, None, event.tokens)])
                            yield data([choice(index, "", event.finish, ())])
                        else:
                            yield data([choice(index, event.text, event.finish, event.tokens)])
                        self.texts[index] += event.text
                    number, event = await anext(events)
            except StopAsyncIteration:
                pass
            except EngineError as error:
                self.record["error"], self.status = error.reason, _STATUS[error.reason]
                yield _sse(_shape(_STATUS[error.reason], _told(str(error))))
                return
            if with_usage:
                yield data([], usage=self.usage(), c2c=self.extra())
            self.status = 200
            yield "data: [DONE]\n\n"
        finally:
            if log_answers:
                self.record["answers"] = self.texts
            await events.aclose()

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self.chat:
            content = [{**_logprob(t), "top_logprobs": [_logprob(other) for other in t.likeliest]} for t in tokens]
            return {"content": content, "refusal": None}
        return {
            "tokens": [_key(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_key(other): other.logprob for other in token.likeliest} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _logprob(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def _key(token: Token) -> str:
    """A token as completions name it, parts of characters by their bytes: text alone would make several the same."""
    whole = token.data == token.text.encode()
    return token.text if whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _shape(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = "model_not_found" if status == 404 and param == "model" else _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(
    status: int,
    message: str,
    param: str | None = None,
    *,
    retry_after: int | None = None,
    headers: Any = None,
) -> Response:
    headers = dict(headers or {})
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return JSONResponse(_shape(status, _told(message), param and _told(param)), status, headers)


def _told(text: str) -> str:
    """A text that may quote a request, without halves of characters, and no longer than one reads."""
    return text[:MAX_MESSAGE].encode("utf-8", "replace").decode()


# ---- running it ------------------------------------------------------------------------------------------------------


def log_line(record: dict[str, Any]) -> None:
    """A record as one line of JSON on stderr."""
    line = {"time": round(time.time(), 3), **record}
    print(json.dumps(line, ensure_ascii=True, separators=(",", ":")), file=sys.stderr, flush=True)


class _Server(uvicorn.Server):
    """Refuses what waits as soon as it is told to stop; what runs may end within `grace` seconds.

    Only jobs are waited for; what else is open, such as a page's connections, is then closed by `app.state.on_stop`.
    """

    def __init__(self, config: uvicorn.Config, engines: Sequence[Engine], grace: float, app: FastAPI) -> None:
        super().__init__(config)
        self.engines, self.grace, self.app = engines, grace, app

    async def shutdown(self, sockets: Any = None) -> None:
        for engine in self.engines:
            engine.drain()
        end = time.monotonic() + self.grace
        while any(engine.running for engine in self.engines) and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        for engine in self.engines:  # who is still waiting is told so
            await asyncio.to_thread(engine.close)
        for call in self.app.state.on_stop:
            call()
        await super().shutdown(sockets)


def serve(
    engines: Sequence[Any],
    host: str,
    port: int,
    *,
    ready: Callable[[str], None],
    make: Callable[[], FastAPI],
    grace: int = 60,
    on_server: Callable[[uvicorn.Server], None] = lambda server: None,
) -> None:
    """Load the engines' models and serve until interrupted.

    Args:
        engines: not started yet.
        ready: is called with the address once requests are answered.
        make: makes the application, once the models are loaded.
        grace: seconds that running requests may take to end after an interrupt.
        on_server: is given the server, whose `should_exit` stops it.
    """
    try:
        # First, since loading takes longer than seeing that this fails.
        with listening(host, port) as (listener, address):
            for engine in engines:
                engine.start()
            app = make()
            config = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                http=Patient,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
            server = _Server(config, engines, grace, app)
            on_server(server)
            ready(address)
            server.run(sockets=[listener])
    finally:
        for engine in engines:
            engine.close()


def check_names(names: Sequence[str]) -> None:
    """Raise a C2CError for names that requests couldn't tell apart."""
    for name in names:
        if ":" in name or not name.strip():
            raise C2CError(f"a model's name has no colon and isn't empty; {name!r} does; give NAME=FUSER")
    if twice := [name for name in names if names.count(name) > 1]:
        raise C2CError(f"two fusers are called {twice[0]!r}; name them: NAME=FUSER")
