"""What the OpenAPI document says of the server's answers."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Shape):
    """Every answer that is no success."""

    error: ErrorDetail


class Ready(_Shape):
    ready: bool
    models: dict[str, bool]


class ModelAbout(_Shape):
    way: Literal["c2c", "receiver", "sharer", "text"]
    models: list[str]


class ModelCard(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    c2c: ModelAbout


class ModelList(_Shape):
    object: Literal["list"]
    data: list[ModelCard]


class PromptDetails(_Shape):
    cached_tokens: int = Field(description="known from an earlier turn")


class Usage(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Passed(_Shape):
    """The field `c2c` of an answer."""

    bytes_passed: int = Field(description="from the sharers to the receiver")
    first_token_s: float | None
    message: str | None = Field(None, description="the sharer's, in text-to-text")
    message_tokens: int | None = None


class TopLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="characters of the answer before each token")


class Message(_Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class _Choice(_Shape):
    index: int
    finish_reason: Literal["stop", "length"]


class ChatChoice(_Choice):
    message: Message
    logprobs: ChatLogprobs | None


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class _Answer(_Shape):
    id: str
    created: int
    model: str
    usage: Usage
    c2c: Passed


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


ANSWERS: tuple[type[BaseModel], ...] = (Error, Ready, ModelCard, ModelList, ChatCompletion, Completion)
_WHEN = {
    400: "the request isn't one that can be answered",
    401: "no valid API key",
    404: "there is no such model",
    408: "the body took too long to come",
    413: "the body is too large",
    415: "the body isn't JSON",
    429: "too many wait already; Retry-After says when to come back",
    500: "the server failed",
    503: "the models are loading, or the server is stopping",
    504: "the answer took too long",
}
EVENTS = "`data: ` and a chunk as JSON, event after event, the last one `data: [DONE]`"


def reference(kind: type[BaseModel]) -> dict[str, Any]:
    """A model of the document, as JSON."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def responses(success: type[BaseModel] | None, *errors: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What FastAPI is told of a route's answers: the good one (None: as FastAPI has it), and errors by status."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": _WHEN[status], "content": reference(Error)} for status in errors
    }
    if success is not None:
        content = reference(success)
        if streams:
            content["text/event-stream"] = {"schema": {"type": "string", "description": EVENTS}}
        found[200] = {"description": "the answer", "content": content}
    return found


def describe(app: FastAPI, requests: tuple[type[BaseModel], ...]) -> None:
    """Put the schemas of requests and answers into an application's document, and what its routes don't say out."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        shapes: tuple[type[BaseModel], ...] = (*requests, *ANSWERS)
        kinds: list[tuple[type[BaseModel], JsonSchemaMode]] = [(kind, "validation") for kind in shapes]
        _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        document.setdefault("components", {})["schemas"] = schemas["$defs"]
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own, which no route here answers
        return document

    app.openapi = openapi  # type: ignore[method-assign]
