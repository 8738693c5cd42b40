"""What answers requests, apart from HTTP: jobs in, events out. And the engine that runs a pair in a process of its own.

    engine = PairEngine("default", PairSpec())
    engine.start()                                     # loads the models; a C2CError says what is in the way
    (answering,) = engine.submit([Job([{"role": "user", "content": "Why is the sky blue?"}])])
    async for event in answering:
        ...
    engine.close()

`Engine` is all that the server and the page know, so that another inference engine can take this one's place. Nothing
here imports torch: the models are in the other process, `worker`.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

from ..errors import C2CError

Way = Literal["c2c", "receiver", "sharer", "text"]
WAYS: tuple[Way, ...] = ("c2c", "receiver", "sharer", "text")
Reason = Literal["invalid", "busy", "unavailable", "timeout", "internal"]


# ---- what goes in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One prompt, and how it is to be answered.

    Attributes:
        prompt: chat messages, text, or token ids that all models read alike.
        way: who answers; `text` is text-to-text.
        n: how many answers.
        max_tokens: of each answer; None: as many as the limits and the context leave.
        temperature: 0 is greedy.
        top_p: the share of the likeliest tokens that are drawn from.
        seed: of the first answer's draws, one more for each further one; None: another one each time.
        stop: texts before which an answer ends.
        logprobs: None: none; k: of every token, and of the k likeliest in its place.
        sharers: a mask as for `C2C.fuse`; None: all.
        mode, positions: as for `C2C.fuse`.
        timeout: seconds until the job is given up, the wait for its turn included.
        weights: whether the fusers' weights of the prompt are wanted too (c2c only).
        reuse: start from what earlier turns left, and leave something for later ones; without it the clock is a first
            turn's.
        aside: run at once beside whatever runs; the clocks of both then tell less.
        owner: whose it is: only jobs of the same one start from what its earlier turns left.
    """

    prompt: str | list[dict[str, str]] | list[int]
    way: Way = "c2c"
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    sharers: int | None = None
    mode: Literal["parallel", "sequential"] | None = None
    positions: str = "all"
    timeout: float = 600.0
    weights: bool = False
    reuse: bool = True
    aside: bool = False
    owner: str = ""


# ---- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A job's prompt is read.

    Attributes:
        prompt_tokens: of the model that answers.
        reused: how many of them were known from an earlier turn.
        batch: how many answers are written together with this job's, its own included.
        first: whether the job is the first of its batch.
    """

    prompt_tokens: int
    reused: int
    batch: int
    first: bool


@dataclass(frozen=True)
class Token:
    """A token in its place.

    Attributes:
        text: of the token alone; of a part of a character "\ufffd".
        data: its bytes, also of a part of a character.
        logprob: nats.
        offset: how many characters of the answer stand before it, or before the character that it is a part of.
        likeliest: the likeliest tokens in its place, themselves without any.
    """

    text: str
    data: bytes
    logprob: float
    offset: int = 0
    likeliest: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One more token of an answer and the text that it completes ("" inside a character or a possible stop text).

    Attributes:
        choice: of which answer, from 0.
        tokens: the logprobs of the tokens that the text is of, where they were asked for.
        finish: why the answer ends here.
        message: this is of the sharer's message (text-to-text), not of the answer.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Literal["stop", "length"] | None = None
    message: bool = False


@dataclass(frozen=True)
class Finished:
    """The last event of a job: tokens written, end tokens included, bytes from the sharers to the receiver.

    `weights`: per sharer (None: it wasn't read), see `Weights`.
    """

    new_tokens: int
    message_tokens: int = 0
    bytes_passed: int = 0
    weights: tuple[Weights | None, ...] = ()


@dataclass(frozen=True)
class Weights:
    """The dynamic weights of one fuser for a prompt, mean over the heads.

    Attributes:
        tokens: the texts of the receiver's tokens, all but the last.
        keys, values: per entry of the layer map, per token; None where nothing was fused.
    """

    tokens: tuple[str, ...]
    keys: tuple[tuple[float | None, ...], ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Failed:
    """How a worker says that a job gets no answer, see `EngineError`."""

    reason: Reason
    message: str


Event = Started | Piece | Finished


class EngineError(C2CError):
    """A job that gets no answer, and why.

    `invalid`: the job itself; `busy`: too many wait; `unavailable`: the models are loading or the engine is stopping;
    `timeout`; `internal`. `retry_after`: in how many seconds it may work, where it may.
    """

    def __init__(self, reason: Reason, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


# ---- the interface ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """One fuser as a page shows it: per entry of its layer map the two layers, and which gates are open."""

    sharer: str
    receiver_layers: tuple[int, ...]
    sharer_layers: tuple[int, ...]
    keys: tuple[bool, ...]
    values: tuple[bool, ...]


@dataclass(frozen=True)
class About:
    """What an engine runs. `ways`: those that it can answer in; `max_new_tokens`: its longest answer."""

    receiver: str
    sharers: tuple[str, ...]
    ways: tuple[Way, ...]
    context_length: int
    max_new_tokens: int
    gates: tuple[Gates, ...] = ()


class Answering(Protocol):
    """The events of a job, which end with `Finished`. Closing it early gives the job up."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """What the server and the page need of an inference engine.

    `submit` takes the jobs of one request, all or none, and gives one `Answering` per job; it raises an EngineError for
    what isn't taken, and so does the iteration for what goes wrong later. `drain` refuses new jobs and those that wait
    and lets the running ones end, `close` ends all.
    """

    name: str

    @property
    def about(self) -> About: ...

    @property
    def ready(self) -> bool: ...

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def kept_bytes(self) -> int: ...

    @property
    def restarts(self) -> int: ...

    def submit(self, jobs: Sequence[Job]) -> Sequence[Answering]: ...

    def drain(self) -> None: ...

    def close(self) -> None: ...


# ---- a pair in a process of its own ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSpec:
    """Which pair, as `C2C.from_pretrained` takes it."""

    fuser: str | list[str] | None = None
    subfolder: str | list[str] | None = None
    receiver: str | None = None
    sharers: list[str] | None = None
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Limits:
    """What one engine takes.

    Attributes:
        max_waiting: jobs that wait for their turn. A request is taken as a whole while fewer wait.
        max_batch: answers that are written together; also the most that one job may ask for.
        max_batch_tokens: positions of a batch, answers times the longest prompt and answer.
        max_new_tokens: the longest answer.
        keep_bytes: memory for the caches of earlier turns.
        silence: seconds. A worker that has jobs and says nothing for so long is killed and started anew. Not less than
            a request may take: what such a worker computes is then for nobody any more.
    """

    max_waiting: int = 64
    max_batch: int = 16
    max_batch_tokens: int = 32768
    max_new_tokens: int = 1024
    keep_bytes: int = 512 << 20
    silence: float = 600.0


_END = object()
_PAUSES = (0.0, 1.0, 5.0, 15.0)  # seconds before a worker is started again, by how often in a row loading failed


class PairEngine:
    """Runs a pair in a worker process and starts it anew when it dies.

    Jobs travel to the worker and events back through a pipe between these two processes alone. `log` is called with a
    record of each worker that ends or comes back.
    """

    def __init__(
        self,
        name: str,
        spec: PairSpec,
        limits: Limits | None = None,
        *,
        warmup: bool = False,
        log: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.name, self.spec, self.limits, self.warmup, self.log = name, spec, limits or Limits(), warmup, log
        self._about: About | None = None
        self._pending: dict[int, _Answering] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process: Any = None
        self._ready = self._draining = self._closed = False
        self._first: queue.SimpleQueue[C2CError | None] = queue.SimpleQueue()
        self._seconds: deque[float] = deque(maxlen=32)  # of jobs that have ended lately
        self._kept_bytes = self._restarts = 0
        self._heard = 0.0  # when the worker last said something, or had nothing to do
        self._wake = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name=f"engine-{name}", daemon=True)

    # -- for the server

    @property
    def about(self) -> About:
        if self._about is None:
            raise EngineError("unavailable", f"{self.name} is loading its models", 5)
        return self._about

    @property
    def ready(self) -> bool:
        return self._ready and not self._draining

    @property
    def waiting(self) -> int:
        return sum(not answering.started for answering in list(self._pending.values()))

    @property
    def running(self) -> int:
        return len(self._pending) - self.waiting

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    @property
    def restarts(self) -> int:
        return self._restarts

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the worker and wait until its models are loaded; a C2CError says why they can't be."""
        self._supervisor.start()
        if (error := self._first.get()) is not None:
            self.close()
            raise error

    def submit(self, jobs: Sequence[Job]) -> list[_Answering]:
        """Queue the jobs of a request, all or none. To be called on the event loop that reads the answers."""
        if self._draining:
            raise EngineError("unavailable", "the server is stopping; try again later", 5)
        for job in jobs:
            if job.n > self.limits.max_batch:
                raise EngineError(
                    "invalid",
                    f"{job.n} answers were asked for; at most {self.limits.max_batch} are given (the server's "
                    "--max-batch)",
                )
            if job.max_tokens is not None and job.max_tokens > self.limits.max_new_tokens:
                raise EngineError(
                    "invalid",
                    f"an answer of up to {job.max_tokens} tokens was asked for; at most {self.limits.max_new_tokens} "
                    "are given (the server's --max-new-tokens)",
                )
        with self._lock:
            if not self._ready:
                raise EngineError("unavailable", f"{self.name} is loading its models; try again soon", 5)
            if (waiting := self.waiting) >= self.limits.max_waiting:
                typical = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
                turns = waiting / self.limits.max_batch
                retry = min(60, max(1, round(typical * turns)))
                raise EngineError("busy", f"{waiting} requests are waiting already; try again in {retry} s", retry)
            if all(answering.over for answering in self._pending.values()):
                self._heard = time.monotonic()
            answers = [_Answering(self, next(self._ids), job.timeout) for job in jobs]
            self._pending.update((answering.number, answering) for answering in answers)
            for answering, job in zip(answers, jobs, strict=True):
                self._outbox.put(("job", answering.number, job))
        return answers

    def drain(self) -> None:
        self._draining = True
        for number, answering in list(self._pending.items()):
            if not answering.started:
                answering.push(EngineError("unavailable", "the server is stopping; try again later", 5))
                self.forget(number)

    def close(self) -> None:
        self._draining = self._closed = True
        self._wake.set()
        self._outbox.put(None)
        process = self._process
        if process is not None:
            process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()
        self._fail_all("the server has stopped")

    # -- inside

    def forget(self, number: int) -> None:
        """Give a job up, or take note that it has ended."""
        with self._lock:
            answering = self._pending.pop(number, None)
        if answering is not None and not answering.over:
            self._outbox.put(("cancel", number))
        elif answering is not None:
            self._seconds.append(time.monotonic() - answering.began)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        for answering in pending.values():
            answering.push(EngineError("unavailable", why, 5))

    def _supervise(self) -> None:
        """Keep a worker running until the engine is closed."""
        failures = 0  # in a row
        while True:
            said = self._run_worker()
            with self._lock:
                came_up, self._ready = self._ready, False
            self._fail_all(f"the worker of {self.name} has ended; it is being started again")
            if self._closed:
                return
            code = None if self._process is None else self._process.exitcode
            hint = ", perhaps for want of memory" if code == -9 else ""
            if self._about is None:  # it has never come up
                self._first.put(
                    C2CError(said or f"the worker of {self.name} ended with code {code} while loading{hint}")
                )
                return
            failures = 0 if came_up else failures + 1
            pause = _PAUSES[min(failures, len(_PAUSES) - 1)]
            self._restarts += 1
            record = {"event": "worker_died" if came_up else "worker_failed", "model": self.name, "exit_code": code}
            if not came_up:
                record["error"] = said or f"it ended while loading{hint}"
            self.log({**record, "restarts": self._restarts, "again_in_s": pause})
            self._wake.wait(pause)
            if self._closed:
                return

    def _run_worker(self) -> str | None:
        """One worker from its start to its end; returns what it said when it could not load."""
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        process = context.Process(
            target=_work, args=(theirs, self.spec, self.limits, self.warmup), name=f"c2c-{self.name}", daemon=True
        )
        process.start()
        theirs.close()
        self._process = process
        with self._lock:
            self._outbox = outbox
        threading.Thread(target=_send, args=(mine, outbox), daemon=True).start()
        said = None
        try:
            while True:
                if not mine.poll(1.0):
                    if self._stuck():
                        self.log({"event": "worker_stuck", "model": self.name, "silent_s": self.limits.silence})
                        process.kill()  # its end is read next
                    continue
                kind, content = mine.recv()
                if kind == "failed":
                    said = content
                else:
                    self._hear(kind, content)
        except (EOFError, OSError):
            pass
        outbox.put(None)
        mine.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        self._kept_bytes = 0
        return said

    def _stuck(self) -> bool:
        with self._lock:
            # One that is done stays until its client has read it.
            waits = any(not answering.over for answering in self._pending.values())
            return self._ready and waits and time.monotonic() - self._heard > self.limits.silence

    def _hear(self, kind: str, content: Any) -> None:
        """What a worker says."""
        self._heard = time.monotonic()
        if kind == "events":
            for number, event in content:
                if (answering := self._pending.get(number)) is not None:
                    answering.over = isinstance(event, (Finished, Failed))
                    failed = isinstance(event, Failed)
                    answering.push(EngineError(event.reason, event.message) if failed else event)
        elif kind == "kept":
            self._kept_bytes = content
        else:
            self._about, first = content, self._about is None
            with self._lock:
                self._ready = True
            if first:
                self._first.put(None)
            else:
                self.log({"event": "worker_ready", "model": self.name, "restarts": self._restarts})


def _work(connection: Connection, spec: PairSpec, limits: Limits, warmup: bool) -> None:
    """What the worker process runs."""
    from .worker import main

    main(connection, spec, limits, warmup)


def _send(connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    """Hand over what is for the worker, so that nobody else waits for the pipe."""
    try:
        while (item := outbox.get()) is not None:
            connection.send(item)
    except (OSError, ValueError):  # it has died; its end is noticed where its events are read
        pass


class _Answering:
    """The events of one job on their way to an event loop."""

    def __init__(self, engine: PairEngine, number: int, timeout: float) -> None:
        self.engine, self.number = engine, number
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.began = time.monotonic()
        # Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with an event.
        self.timer = self.loop.call_later(timeout, self.expire)
        # `over`: the worker has no more to do for it.
        self.started = self.ended = self.over = False

    def push(self, event: Event | EngineError) -> None:
        """From any thread."""
        self.started = self.started or not isinstance(event, EngineError)
        if isinstance(event, (Finished, EngineError)):
            self.ended = True
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
            if self.ended:
                self.loop.call_soon_threadsafe(self.events.put_nowait, _END)
        except RuntimeError:  # the loop is closed, so nobody reads
            pass

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self.events.get()
        if event is _END:
            self.close()
            self.events.put_nowait(_END)
            raise StopAsyncIteration
        if isinstance(event, EngineError):
            self.close()
            raise event
        result: Event = event
        return result

    def expire(self) -> None:
        if not self.ended:
            self.push(EngineError("timeout", "the request took longer than it may; ask for less, or try later"))
            self.engine.forget(self.number)

    def close(self) -> None:
        self.timer.cancel()
        self.engine.forget(self.number)
