"""Responses rewritten by a teacher: the same prompts, answered by one model, as rows to train on.

A teacher is a function of chats that yields (which chat, its answer or what went wrong), in any order: a model here
(`local`) or one behind an OpenAI-compatible address (`served`).
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from ..alignment.chat import FROZEN, render
from ..decode import check_room, generate
from ..errors import C2CError
from ..files import holding
from ..kv import prefill_prompts
from ..models.load import LM
from ..web import MAX_ANSWER, MAX_ERROR, connected, headers, words
from .data import Example, Messages

KEY_VARIABLE = "C2C_TEACHER_KEY"
STOP_AFTER = 20  # failures in a row: then it is the teacher and not the rows
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_OF_THE_ROW = (400, 413, 422)


@dataclass(frozen=True)
class Response:
    """A teacher's answer; `ends` is false where it was cut at the longest allowed."""

    text: str
    ends: bool


class TooLong(C2CError):
    """A prompt that the teacher has no room for: the row's fault, which says nothing of the next one."""


Answers: TypeAlias = Iterator[tuple[int, Response | C2CError]]
Teacher: TypeAlias = Callable[[Sequence[Messages]], Answers]


@dataclass(frozen=True)
class Rewritten:
    """What a run did: rows written, rows that were there already, and why others failed."""

    written: int
    there: int
    failed: list[str]


def rewrite(
    found: Sequence[Example],
    output: Path,
    name: str,
    teacher: Teacher,
    progress: Callable[[int, int], None] = lambda done, failed: None,
    options: Mapping[str, Any] | None = None,
) -> Rewritten:
    """Append a row per example to a JSONL file, each on the disk before the next; go on where an earlier run ended.

    A row is {"id", "messages", "ends", "teacher", "generation"}: the chat, the teacher's answer as its last turn,
    whether that is whole, and `options`. Rows that failed are not written, so the next run tries them again.

    Args:
        found: what to answer; the examples' own responses are not looked at.
        output: the file, with only rows of this teacher and these examples.
        name: the teacher's.
        teacher: see the module.
        progress: called with how many examples have a row, and how many have failed.
        options: what the teacher answers with, as JSON has it.

    Raises:
        C2CError: the file holds something else, or answers with other options; another run writes it; the teacher
            fails 20 times in a row, prompts too long for it not counted.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    taken = f"another run is writing {output}; wait for it, or choose another file"
    with holding(output.with_name(f".{output.name}.lock"), taken):
        return _rewrite(found, output, name, teacher, progress, dict(options or {}))


def _rewrite(
    found: Sequence[Example],
    output: Path,
    name: str,
    teacher: Teacher,
    progress: Callable[[int, int], None],
    options: dict[str, Any],
) -> Rewritten:
    there, length = _finished(output, name, {e.id: e for e in found}, options)
    todo = [e for e in found if e.id not in there]
    before = len(found) - len(todo)
    written, failed, in_a_row = 0, [], 0
    progress(before, 0)
    with output.open("ab") as file:
        file.truncate(length)  # a line that a kill cut short
        for index, answer in teacher([e.messages for e in todo]):
            example = todo[index]
            if isinstance(answer, C2CError):
                failed.append(f"{example.id}: {answer}")
                in_a_row += not isinstance(answer, TooLong)
                if in_a_row == STOP_AFTER:
                    raise C2CError(
                        f"{in_a_row} rows failed one after the other, the last one {failed[-1]}; {before + written} of "
                        f"{len(found)} are in {output}; run it again once the teacher answers"
                    )
            else:
                in_a_row = 0
                messages = [*example.messages, {"role": "assistant", "content": answer.text}]
                row = {"id": example.id, "messages": messages, "ends": answer.ends, "teacher": name}
                file.write(json.dumps({**row, "generation": options}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                written += 1
            progress(before + written, len(failed))
    return Rewritten(written, before, failed)


def _finished(output: Path, name: str, examples: dict[str, Example], options: dict[str, Any]) -> tuple[set[str], int]:
    """The ids that have a row, and the length of the file's whole lines."""
    if not output.exists():
        return set(), 0
    there, length = set(), 0
    with output.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                # Only what this command could have been writing is ever dropped.
                if not b'{"id": "'.startswith(line[:8]):
                    raise _foreign(output, number)
                break
            try:
                row = json.loads(line)
                key, teacher, prompt = row["id"], row["teacher"], row["messages"][:-1]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise _foreign(output, number) from error
            if teacher != name:
                raise C2CError(f"{output} was written by {teacher}, not by {name}; choose another file, or remove it")
            if (known := row.get("generation", options)) != options:  # earlier versions didn't say it
                raise C2CError(
                    f"{output} was written with {json.dumps(known)}, not with {json.dumps(options)}; give the same "
                    "options, or choose another file"
                )
            if key in examples and prompt != [dict(m) for m in examples[key].messages]:
                raise C2CError(f"{output}, line {number} answers another prompt than {key}; choose another file")
            there.add(key)
            length += len(line)
    return there, length


def _foreign(output: Path, number: int) -> C2CError:
    return C2CError(f"line {number} of {output} was not written by c2c rewrite; choose another file")


# ---- a model here ----------------------------------------------------------------------------------------------------


def local(lm: LM, *, max_new_tokens: int, batch_size: int, temperature: float = 0.0) -> Teacher:
    """A model answers, prompts of like length together; greedily at temperature 0."""
    tokenizer = lm.need_tokenizer()
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ends = lm.end_tokens

    def response(ids: list[int]) -> Response | C2CError:
        whole = next((i for i, token in enumerate(ids) if token in ends), None)
        text = lm.text(ids[:whole]).strip()
        return Response(text, whole is not None) if text else C2CError("the answer is empty")

    def answers(chats: Sequence[Messages]) -> Answers:
        rows: list[tuple[int, list[int]]] = []
        for index, chat in enumerate(chats):
            try:
                ids = render(tokenizer, list(chat), chat_template_kwargs=FROZEN).ids
            except C2CError as error:
                yield index, error
                continue
            try:
                check_room(lm, len(ids), max_new_tokens)
            except C2CError as error:
                yield index, TooLong(str(error))
            else:
                rows.append((index, ids))
        rows.sort(key=lambda row: len(row[1]), reverse=True)  # what doesn't fit the memory fails at once
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            prompt = prefill_prompts(lm, [ids for _, ids in batch])
            made = generate(lm, prompt, max_new_tokens=max_new_tokens, **how)[:, prompt.input_ids.shape[1] :]
            for (index, _), ids in zip(batch, made.tolist(), strict=True):
                yield index, response(ids)

    return answers


# ---- a model behind an address ---------------------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible server: one connection per request, no redirects, no proxies.

    Args:
        url: the API's address up to "/v1".
        key: sent as a bearer token; by default the environment variable C2C_TEACHER_KEY.
        timeout: seconds without a byte until an attempt counts as failed; no byte comes before an answer is whole.
        deadline: seconds for one attempt.
        attempts: how often a request is tried; the pause between doubles from `pause` seconds, unless the server asks
            for more (up to a minute).
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 300.0,
        deadline: float = 900.0,
        attempts: int = 5,
        pause: float = 0.5,
    ) -> None:
        try:
            parts = urlsplit(url)
            self._port = parts.port
        except ValueError as error:
            raise C2CError(f"{url!r} is no address of a teacher ({error}); expected http://host:port/v1") from error
        if parts.username or parts.password:
            raise C2CError(f"the address of a teacher holds no user or password; set {KEY_VARIABLE} to its key")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise C2CError(f"{url!r} is no address of a teacher; expected http://host:port/v1")
        self.url, self._secure, self._host, self._path = url, parts.scheme == "https", parts.hostname, parts.path
        self._key = os.environ.get(KEY_VARIABLE) if key is None else key
        self.timeout, self.deadline, self.attempts, self.pause = timeout, deadline, attempts, pause

    def model(self) -> str:
        """The name of the one model that is served."""
        answer = self.ask("GET", "/models")
        try:
            names = [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError) as error:
            raise C2CError(f"{self.url} doesn't list its models; give --model NAME") from error
        if len(names) != 1:
            some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise C2CError(f"{self.url} serves {some or 'no models'}; choose one with --model NAME")
        return names[0]

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """The JSON answer to a request. Raises `Refused` for a request that this server doesn't answer, and another
        C2CError where it would answer none."""
        body = None if content is None else json.dumps(content).encode()
        failed = ""
        for attempt in range(1, self.attempts + 1):
            wait = self.pause * 2 ** (attempt - 1)
            try:
                status, answer, asked = self._once(method, path, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failed = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return answer
                failed = f"it said {status}: {answer}"
                if status in _OF_THE_ROW:
                    raise Refused(f"refused ({status}): {answer}")
                if status not in _BUSY:
                    hint = f"set {KEY_VARIABLE} to its key" if status in (401, 403) else "check address and model"
                    raise C2CError(f"the teacher at {self.url} refused ({status}): {answer}; {hint}")
                wait = max(wait, asked)
            if attempt < self.attempts:
                time.sleep(wait)
        raise Refused(f"no answer from {self.url} in {self.attempts} attempts, the last one {failed}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, float]:
        """Status, the answer or what a refusal says, and how many seconds to wait before another attempt."""
        with connected(
            self._host, self._port, secure=self._secure, timeout=self.timeout, seconds=self.deadline
        ) as connection:
            connection.request(method, self._path.rstrip("/") + path, body, headers(self._key))
            response = connection.getresponse()
            if response.status != 200:
                after = response.getheader("Retry-After", "")
                return response.status, words(response.read(MAX_ERROR)), min(60.0, _seconds(after))
            content = response.read(MAX_ANSWER + 1)
        if len(content) > MAX_ANSWER:
            raise ValueError(f"more than {MAX_ANSWER} bytes")
        return 200, json.loads(content), 0.0


class Refused(C2CError):
    """One request was not answered; another may be."""


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0


def served(
    server: Server,
    model: str,
    *,
    max_new_tokens: int,
    parallel: int,
    temperature: float = 0.0,
    extra_body: Mapping[str, Any] | None = None,
) -> Teacher:
    """A served model answers, that many requests at a time; `extra_body` is added to each."""

    def one(chat: Messages) -> Response | C2CError:
        asked = {
            "model": model,
            "messages": [dict(m) for m in chat],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            **(extra_body or {}),
        }
        try:
            answer = server.ask("POST", "/chat/completions", asked)
        except Refused as error:
            return error
        try:
            choice = answer["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            return C2CError("the answer is no chat completion")
        if finish not in (None, "stop", "length"):
            return C2CError(f"the answer ended with {str(finish)[:80]!r}")
        if not isinstance(text, str) or not text.strip():
            return C2CError("the answer is empty")
        return Response(text.strip(), finish != "length")

    def answers(chats: Sequence[Messages]) -> Answers:
        todo: queue.SimpleQueue[tuple[int, Messages]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Response | C2CError | None, BaseException | None]] = queue.SimpleQueue()
        for numbered in enumerate(chats):
            todo.put(numbered)
        left = threading.Event()

        def work() -> None:
            with suppress(queue.Empty):
                while not left.is_set():
                    index, chat = todo.get_nowait()
                    try:
                        done.put((index, one(chat), None))
                    except BaseException as error:  # handed to the thread that reads
                        done.put((index, None, error))

        # No pool: its threads would hold up the end of the process until the server has answered.
        for _ in range(min(parallel, len(chats))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in chats:
                index, answer, error = done.get()
                if answer is None:
                    assert error is not None
                    raise error
                yield index, answer
        finally:
            left.set()

    return answers
