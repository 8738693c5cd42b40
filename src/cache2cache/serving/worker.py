"""The process that holds a pair's models: it batches the jobs of an `engine.PairEngine` and answers them.

Jobs that wait are put together where they go the same way and are of like length. A batch is prefilled (from what
earlier turns left, see `kept`), fused and decoded in one call of stock `generate`, in which every row keeps settings of
its own: its tokens are drawn in a logits processor, its end is decided in a stopping criterion, which also hands each
new token on.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from .. import decode, heap
from ..alignment.chat import least_tokens
from ..config import ModelSpec, is_address
from ..decode import Words
from ..errors import C2CError, Unreachable
from ..fuser import checkpoint
from ..kv import Prefilled, Read, prefill_prompts
from ..methods.text_to_text import BACKGROUND, MAX_MESSAGE_TOKENS
from ..models.load import LM, weight_bytes
from ..pair import C2C, FusedCache, PromptIds, Turn, where_to_fuse
from ..remote import RemoteSharer
from ..response import answered_from, fused_sharers
from .engine import (
    WAYS,
    About,
    Event,
    Failed,
    Finished,
    Gates,
    Job,
    Limits,
    PairSpec,
    Piece,
    Started,
    Token,
    Weights,
)
from .kept import Kept

Emit = Callable[[list[tuple[int, Event | Failed]]], None]

GATHER_SECONDS = 0.005  # so long nobody comes before a batch is closed,
MAX_GATHER_SECONDS = 0.03  # which isn't put off further than that
DOWN_SECONDS = 10.0  # so long a sharer that couldn't be reached isn't asked again


def main(connection: Connection, spec: PairSpec, limits: Limits, warmup: bool) -> None:
    """Load the pair, say so, and answer until the pipe is closed from the other side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which lets the running jobs end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    heap.keep()
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            try:
                connection.send(message)
            except OSError:  # the server is gone
                os._exit(0)

    try:
        pair = load(spec)
        worker = Worker(pair, limits, lambda events: send("events", events), lambda size: send("kept", size))
        if warmup:
            worker.warm_up()
    except C2CError as error:
        send("failed", str(error))
        return
    except Exception as error:
        traceback.print_exc()
        send("failed", f"unexpected {type(error).__name__} while loading: {error}")
        return
    send("ready", about(pair, limits))

    def receive() -> None:
        try:
            while True:
                kind, number, *content = connection.recv()
                if kind == "job":
                    worker.submit(number, content[0])
                else:
                    worker.cancel(number)
        except (EOFError, OSError):
            os._exit(0)  # what runs has nobody to answer

    threading.Thread(target=receive, daemon=True).start()
    # In the thread that has loaded and warmed up: a second one's OpenMP team would be more threads than cores, which
    # then sleep at each barrier.
    worker.run()


def load(spec: PairSpec) -> C2C:
    """The pair, if there is memory for it."""
    check_memory(spec)
    return C2C.from_pretrained(
        spec.fuser,
        subfolder=spec.subfolder,
        receiver=spec.receiver,
        sharers=cast(Any, spec.sharers),
        dtype=spec.dtype,
        device=spec.device,
    )


def check_memory(spec: PairSpec) -> None:
    """Raise a C2CError where the weights need more memory than there is, before they are read."""
    fusers: Sequence[str | None] = spec.fuser if isinstance(spec.fuser, list) else [spec.fuser]
    inside: Sequence[str | None] = spec.subfolder if isinstance(spec.subfolder, list) else [spec.subfolder]
    folders = checkpoint.resolve_all(fusers, inside)
    configs = [checkpoint.read_config(folder)[0] for folder in folders]
    trained_for = [configs[0].receiver, *(config.sharer for config in configs)]
    given: list[str | None] = [spec.receiver, *(spec.sharers or [])]
    needed = sum(file.stat().st_size for folder in folders for file in checkpoint.weight_files(folder))
    overrides = {name: value for name, value in (("dtype", spec.dtype), ("device", spec.device)) if value}
    models: set[ModelSpec] = set()  # that are named twice are loaded once
    for source, model in zip_longest(given, trained_for):
        if source is None:
            assert model is not None  # a saved fuser names its models
            models.add(model.spec)
        elif not is_address(source):
            models.add(ModelSpec(source=source))
    needed += sum(weight_bytes(spec, **overrides) for spec in models)
    free = free_memory(spec.device)
    if free is not None and needed > free:
        raise C2CError(
            f"the models and the fuser need about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "free some, or choose smaller models or --dtype bfloat16"
        )


def free_memory(device: str | None) -> int | None:
    """Bytes that are free where the models go; None: unknown."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # a container's limit
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=None)


def about(pair: C2C, limits: Limits) -> About:
    gates = []
    for sharer, fuser in zip(pair.sharers, pair.fusers, strict=True):
        keys, values = fuser.open_gates.view(2, -1).tolist()
        layers = (tuple(fuser.receiver_layers.tolist()), tuple(fuser.sharer_layers.tolist()))
        gates.append(Gates(sharer.name, *layers, tuple(keys), tuple(values)))
    # A sharer that is served elsewhere reads prompts and doesn't answer.
    ways = WAYS[:2] if isinstance(pair.sharers[0], RemoteSharer) else WAYS
    names = tuple(sharer.name for sharer in pair.sharers)
    return About(pair.receiver.name, names, ways, pair.receiver.context_length, limits.max_new_tokens, tuple(gates))


@dataclass(eq=False)
class _Work:
    """A job that was found good: its prompt as each model reads it.

    Attributes:
        prompt: of the model that starts to answer: for c2c the whole pair's.
        ids: the tokens of that model.
        read: how many tokens the one that answers reads at most, for text-to-text with the sharer's message.
        context: how many tokens that one has room for.
        max_new: of each answer.
        key: jobs of one batch have the same.
    """

    number: int
    job: Job
    prompt: PromptIds | None
    ids: Sequence[int]
    read: int
    context: int
    max_new: int
    key: tuple[Any, ...]
    kind: str
    message: str = ""
    emitted: bool = False
    cancelled: bool = False

    @property
    def positions(self) -> Sequence[int] | None:
        return None if self.prompt is None else self.prompt.positions


def _answering(work: _Work) -> str:
    """What the answering model's cache of a prompt is kept under; `kind` is of the model that reads first."""
    return f"{work.job.owner}receiver" if work.job.way == "text" else work.kind


@dataclass(eq=False)
class _Row:
    """One answer of a batch while it is decoded, or a message of the sharer.

    Attributes:
        work, choice: whose, and which of its answers.
        words: the text of its tokens.
        max_new: the most of its tokens.
        generator: of its draws; None: greedy.
        message: whether this is the sharer's message.
        held: text that may be the start of a stop text.
        tokens: of that text or of a character that isn't complete, where their logprobs were asked for.
        told: characters that were handed on.
        count: tokens so far.
        live: whether it goes on.
    """

    work: _Work
    choice: int
    words: Words
    max_new: int
    generator: torch.Generator | None = None
    message: bool = False
    held: str = ""
    tokens: list[Token] = field(default_factory=list)
    told: int = 0
    count: int = 0
    live: bool = True

    @property
    def stop(self) -> tuple[str, ...]:
        return () if self.message else self.work.job.stop

    @property
    def logprobs(self) -> int | None:
        return None if self.message else self.work.job.logprobs


class Worker:
    """Batches jobs and answers them.

    Args:
        pair: the models.
        limits: of the engine.
        emit: is called with (job's number, event) pairs, from the thread that computes.
        tell_kept: is called with the bytes kept for later turns when they change.
    """

    def __init__(
        self,
        pair: C2C,
        limits: Limits,
        emit: Emit,
        tell_kept: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.pair, self.limits, self._emit, self._tell_kept = pair, limits, emit, tell_kept
        self.kept = Kept(limits.keep_bytes)
        # The shortest prompts first: to look at a long one takes a while.
        self._inbox: queue.PriorityQueue[tuple[int, int, Job]] = queue.PriorityQueue()
        self._waiting: list[_Work] = []
        self._all: dict[int, _Work | None] = {}  # every job that has not ended; None: not looked at yet
        self._gone: set[int] = set()  # cancelled before they were looked at
        self._arrived = threading.Condition()
        self._down_until = 0.0
        threading.Thread(target=self._look_at, daemon=True).start()

    # ---- coming and going --------------------------------------------------------------------------------------------

    def submit(self, number: int, job: Job) -> None:
        self._all[number] = None
        self._inbox.put((_size(job.prompt), number, job))

    def cancel(self, number: int) -> None:
        with self._arrived:
            if number not in self._all:
                return
            if (work := self._all[number]) is None:
                self._gone.add(number)
            else:
                work.cancelled = True
                if work in self._waiting:
                    self._waiting.remove(work)
                    self._all.pop(number, None)

    def warm_up(self) -> None:
        """Answer once each way: the first prompt of a process pays for threads, buffers and pages."""
        hello = [{"role": "user", "content": "Hello"}]
        for way in about(self.pair, self.limits).ways:
            work = self._checked(-1, Job(hello, way, max_tokens=2))
            self._answer([work], lambda events: None)

    def run(self) -> None:
        """Answer, batch after batch, for ever."""
        while True:
            batch = self._take()
            self._guarded(batch)
            self._tell_kept(self.kept.nbytes)

    def _look_at(self) -> None:
        """Tokenize and check jobs beside what is computed, so that bad ones are refused at once."""
        while True:
            _, number, job = self._inbox.get()
            try:
                work = None if number in self._gone else self._checked(number, job)
            except C2CError as error:
                self._end(number, _refusal(error, self.pair))
                continue
            except Exception as error:
                _complain("a prompt could not be read", error)
                self._end(number, Failed("internal", "the prompt could not be read"))
                continue
            with self._arrived:
                if work is None or number in self._gone:
                    self._gone.discard(number)
                    self._all.pop(number, None)
                    continue
                self._all[number] = work
                if not job.aside:
                    self._waiting.append(work)
                    self._arrived.notify()
            if job.aside:
                threading.Thread(target=self._guarded, args=([work],), daemon=True).start()

    def _end(self, number: int, event: Finished | Failed) -> None:
        with self._arrived:
            self._all.pop(number, None)
            self._gone.discard(number)
        self._emit([(number, event)])

    # ---- what a job means --------------------------------------------------------------------------------------------

    def _checked(self, number: int, job: Job) -> _Work:
        """Raises a C2CError for what can't be answered."""
        pair, prompt = self.pair, job.prompt
        self._bounded(job)
        mask = (1 << len(pair.sharers)) - 1
        if job.way == "c2c":
            encoded = self._encoded(prompt)
            (encoded,) = pair.selected([encoded], job.sharers, job.positions)
            mask = mask if job.sharers is None else job.sharers
            mode = job.mode or pair.mode
            kind = f"c2c {mask} {mode} {job.positions}"
            return self._work(number, job, encoded, encoded.receiver, pair.receiver, ("c2c", mode), kind)
        if job.way == "receiver":
            return self._work(
                number, job, None, self._ids(pair.receiver, prompt), pair.receiver, ("receiver",), "receiver"
            )
        sharer = pair.sharers[0]
        if isinstance(sharer, RemoteSharer):
            raise C2CError(f"the sharer {sharer.name} is served elsewhere and doesn't answer; choose c2c or receiver")
        if job.way == "sharer":
            return self._work(number, job, None, self._ids(sharer, prompt), sharer, ("sharer",), "sharer")
        if not isinstance(prompt, list) or not isinstance(prompt[-1], dict) or prompt[-1]["role"] != "user":
            raise C2CError("text-to-text takes chat messages of which the last one is the user's")
        # What the receiver will read holds the sharer's message too, of a length that isn't known yet.
        chat = self._relayed(job, "")
        read = len(self._ids(pair.receiver, chat)) + MAX_MESSAGE_TOKENS
        ids = self._ids(sharer, chat[:-2])
        decode.check_room(sharer, len(ids), MAX_MESSAGE_TOKENS)
        return self._work(number, job, None, ids, pair.receiver, ("text",), "sharer", read)

    def _encoded(self, prompt: Any) -> PromptIds:
        """The prompt in all models' tokens. A sharer elsewhere that couldn't be reached isn't asked again at once: to
        find that out takes a while, in which nobody's jobs are looked at."""
        if time.monotonic() < self._down_until:
            raise Unreachable("a sharer couldn't be reached a moment ago")
        try:
            return self.pair.encode(prompt)
        except Unreachable:
            self._down_until = time.monotonic() + DOWN_SECONDS
            raise

    def _bounded(self, job: Job) -> None:
        """Raise a C2CError for a prompt that is far too long, before it is looked at in earnest."""
        size, sharers = _size(job.prompt), self.pair.sharers
        readers = {
            "receiver": [self.pair.receiver],
            "sharer": sharers[:1],
            "text": [self.pair.receiver, sharers[0]],
            "c2c": [self.pair.receiver, *sharers],
        }
        for lm in readers[job.way]:
            if size <= lm.context_length or isinstance(lm, RemoteSharer):
                continue
            least = size
            if not _is_ids(job.prompt):
                kwargs, tokenizer = self.pair.chat_template_kwargs, lm.need_tokenizer()
                text = cast("str | list[dict[str, str]]", job.prompt)
                least = least_tokens(tokenizer, text, lm.context_length, chat_template_kwargs=kwargs)
            if least > lm.context_length:
                raise C2CError(
                    f"the prompt has more than {lm.context_length} tokens and so doesn't fit the context of {lm.name}; "
                    "shorten it"
                )

    def _work(
        self,
        number: int,
        job: Job,
        prompt: PromptIds | None,
        ids: Sequence[int],
        lm: LM,
        key: Any,
        kind: str,
        read: int | None = None,
    ) -> _Work:
        """`lm` answers, and reads `ids`, or so many tokens as `read` says."""
        read = len(ids) if read is None else read
        decode.check_room(lm, read, job.max_tokens or 1)
        most = self.limits.max_batch_tokens // job.n
        if read + (job.max_tokens or 1) > most:
            raise C2CError(
                f"{job.n} answers to {read} prompt tokens are more than the {self.limits.max_batch_tokens} positions "
                "of a batch; shorten the prompt or ask for less"
            )
        room = min(lm.context_length, most) - read
        new = job.max_tokens or min(self.limits.max_new_tokens, room)
        return _Work(number, job, prompt, ids, read, lm.context_length, new, key, job.owner + kind)

    def _ids(self, lm: LM, prompt: Any) -> list[int]:
        if _is_ids(prompt):
            if min(prompt) < 0 or max(prompt) >= lm.vocab_size:
                raise C2CError(f"a token id is outside the vocabulary of {lm.name} ({lm.vocab_size} tokens)")
            return prompt
        return list(self.pair.rendered(lm, prompt).ids)

    @staticmethod
    def _relayed(job: Job, message: str) -> list[dict[str, str]]:
        """The chat that the receiver reads in text-to-text; without its last two messages, the one for the sharer."""
        *before, question = cast("list[dict[str, str]]", job.prompt)
        asked = {"role": "user", "content": BACKGROUND.format(question=question["content"])}
        return [*before, asked, {"role": "assistant", "content": message}, question]

    # ---- batches -----------------------------------------------------------------------------------------------------

    def _take(self) -> list[_Work]:
        """The job that has waited longest and others that go with it."""
        with self._arrived:
            while not self._waiting:
                self._arrived.wait()
            close = time.monotonic() + MAX_GATHER_SECONDS
            while time.monotonic() < close and self._arrived.wait(GATHER_SECONDS):
                pass
            if not self._waiting:  # cancelled meanwhile
                return []
            first = self._waiting[0]
            others = sorted(self._waiting[1:], key=lambda work: abs(len(work.ids) - len(first.ids)))
            batch, unknown = [first], self._unknown(first)
            for work in others:
                # What no earlier turn knows is read for the whole batch at once, so that should be alike too.
                if self._fit([*batch, work]) and abs(unknown - self._unknown(work)) <= 64:
                    batch.append(work)
            self._waiting = [work for work in self._waiting if work not in batch]
            return batch

    def _fit(self, batch: Sequence[_Work]) -> bool:
        first, last = batch[0], batch[-1]
        if last.key != first.key:
            return False
        rows = sum(work.job.n for work in batch)
        lengths, new = [len(work.ids) for work in batch], max(work.max_new for work in batch)
        read = max(work.read for work in batch)
        return (
            rows <= self.limits.max_batch
            and rows * (read + new) <= self.limits.max_batch_tokens
            and read + new <= first.context
            and max(lengths) <= 2 * min(lengths) + 32
        )

    def _unknown(self, work: _Work) -> int:
        return len(work.ids) - self._known(work, work.kind, work.ids)[1]

    def _known(self, work: _Work, kind: str, ids: Sequence[int]) -> tuple[Read | Turn | None, int]:
        """What an earlier turn left of a prompt, and how many of its tokens that knows."""
        return self.kept.best(kind, ids[:-1], work.positions) if work.job.reuse else (None, 0)

    def _guarded(self, batch: list[_Work]) -> None:
        """Answer a batch; where it fails before anyone was told anything, one by one."""
        batch = [work for work in batch if not work.cancelled]
        try:
            if batch:
                self._answer(batch, self._emit)
        except Exception as error:
            if not isinstance(error, C2CError):
                _complain(f"a batch of {len(batch)} failed", error)
            fresh = [work for work in batch if not work.emitted]
            if len(batch) > 1 and len(fresh) == len(batch) and not isinstance(error, Unreachable):
                del error
                for work in batch:
                    self._guarded([work])
                return
            failed = (
                _refusal(error, self.pair)
                if isinstance(error, C2CError)
                else Failed("internal", f"{type(error).__name__} while answering")
            )
            for work in batch:
                if work.number in self._all:
                    self._end(work.number, failed)
        finally:
            with self._arrived:
                for work in batch:
                    self._all.pop(work.number, None)

    @torch.no_grad()
    def _answer(self, batch: list[_Work], emit: Emit) -> None:
        """Read, fuse and decode a batch, and tell each job what becomes of it."""
        pair, way = self.pair, batch[0].job.way
        written = [0] * len(batch)
        if way == "text":
            written = self._write_messages(batch, emit)
        prompt: Prefilled
        turns: Sequence[Turn] = ()
        if way == "c2c":
            lm, rows = pair.receiver, [work.ids for work in batch]
            prompt, reused = self._fused(batch)
            passed, turns = _bytes_passed(prompt), prompt.turns
        else:
            lm, rows, prompt, reused = self._read(batch)
            passed = [len(work.message.encode()) for work in batch]
        size = sum(work.job.n for work in batch)
        lengths = prompt.attention_mask.sum(1).tolist()
        for work in batch:
            work.emitted = True
        emit(
            [
                (work.number, Started(int(length), known, size, i == 0))
                for i, (work, length, known) in enumerate(zip(batch, lengths, reused, strict=True))
            ]
        )
        repeated = _repeated(prompt, batch)
        if isinstance(repeated, FusedCache):
            repeated = answered_from(pair, repeated)
        answers = self._rows(lm, batch)
        self._decode(lm, repeated, answers, emit)
        for i, work in enumerate(batch):
            if not work.cancelled:
                new = sum(row.count for row in answers if row.work is work)
                weights = _weights(pair, turns[i]) if turns and work.job.weights else ()
                self._all.pop(work.number, None)
                emit([(work.number, Finished(new, written[i], passed[i], weights))])
        for i, (work, ids) in enumerate(zip(batch, rows, strict=True)):
            if self.limits.keep_bytes and work.job.reuse:
                read = Read(ids[:-1], prompt.kv.tail(i, len(ids) - 1))
                self.kept.add(_answering(work), turns[i] if turns else read)

    def _fused(self, batch: Sequence[_Work]) -> tuple[FusedCache, list[int]]:
        """The prompts fused, and how many tokens of each were known."""
        past, reused = self._past(batch, [work.ids for work in batch], [work.kind for work in batch])
        fused = self.pair.fuse(
            [cast(PromptIds, work.prompt) for work in batch],
            mode=batch[0].key[1],
            past=cast("list[Turn | None]", past),
            keep=bool(self.limits.keep_bytes or fused_sharers(self.pair) or any(work.job.weights for work in batch)),
        )
        return fused, reused

    def _read(self, batch: Sequence[_Work]) -> tuple[LM, list[Sequence[int]], Prefilled, list[int]]:
        """The model that answers alone, what it reads of each prompt, that read, and how many tokens were known."""
        way = batch[0].job.way
        lm = self.pair.sharers[0] if way == "sharer" else self.pair.receiver
        rows: list[Sequence[int]] = [work.ids for work in batch]
        if way == "text":
            rows = [self._ids(lm, self._relayed(work.job, work.message)) for work in batch]
            for work in batch:
                work.max_new = min(work.max_new, lm.context_length - max(map(len, rows)))
        past, reused = self._past(batch, rows, [_answering(work) for work in batch])
        return lm, rows, prefill_prompts(lm, rows, past=cast("list[Read | None]", past)), reused

    def _past(
        self, batch: Sequence[_Work], rows: Sequence[Sequence[int]], kinds: Sequence[str]
    ) -> tuple[list[Read | Turn | None], list[int]]:
        """Per prompt what an earlier turn left, and how many of its tokens are taken from there."""
        found = [self._known(work, kind, ids) for work, kind, ids in zip(batch, kinds, rows, strict=True)]
        # Rows are padded on the left and read together from where the first of them has something new.
        new = max(len(ids) - 1 - shared for ids, (_, shared) in zip(rows, found, strict=True))
        return [entry for entry, _ in found], [max(0, len(ids) - 1 - new) for ids in rows]

    def _write_messages(self, batch: list[_Work], emit: Emit) -> list[int]:
        """The sharer's messages, greedy; returns how many tokens each has."""
        sharer = self.pair.sharers[0]
        prompts = [work.ids for work in batch]
        past, _ = self._past(batch, prompts, [work.kind for work in batch])
        prompt = prefill_prompts(sharer, prompts, past=cast("list[Read | None]", past))
        rows = [_Row(work, 0, Words(sharer), MAX_MESSAGE_TOKENS, message=True) for work in batch]
        self._decode(sharer, prompt, rows, emit)
        return [row.count for row in rows]

    def _rows(self, lm: LM, batch: Sequence[_Work]) -> list[_Row]:
        """Every answer that a batch asks for."""
        rows = []
        for work in batch:
            seed = work.job.seed if work.job.seed is not None else int.from_bytes(os.urandom(7), "big")
            behind = isinstance(work.job.prompt, str) or _is_ids(work.job.prompt)
            for choice in range(work.job.n):
                drawn = torch.Generator().manual_seed((seed + choice) % (1 << 63)) if work.job.temperature else None
                rows.append(_Row(work, choice, Words(lm, behind), work.max_new, drawn))
        return rows

    def _decode(self, lm: LM, prompt: Prefilled, rows: Sequence[_Row], emit: Emit) -> None:
        step = _Step(rows, lm.end_tokens, emit)
        decode.generate(
            lm,
            prompt,
            do_sample=False,  # the draws are in `_Draw`, per row,
            repetition_penalty=1.0,  # of what the model says, and not of what its settings make of that
            max_new_tokens=max(row.max_new for row in rows),
            logits_processor=LogitsProcessorList([_Draw(step)]),
            stopping_criteria=[step],
        )


def _complain(what: str, error: Exception) -> None:
    """Where an error is from, without what it says: that may quote a prompt."""
    print(f"error: {what}: {type(error).__name__}", file=sys.stderr, flush=True)
    traceback.print_tb(error.__traceback__)


def _is_ids(prompt: Any) -> TypeGuard[list[int]]:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _size(prompt: Any) -> int:
    """Characters or token ids of a prompt."""
    return len(prompt) if isinstance(prompt, str) or _is_ids(prompt) else sum(len(said["content"]) for said in prompt)


def _refusal(error: C2CError, pair: C2C) -> Failed:
    """What a client is told: of a sharer elsewhere neither where it is nor that the request was at fault."""
    if isinstance(error, Unreachable):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Failed("unavailable", "the sharer can't be reached; try again later")
    if any(isinstance(sharer, RemoteSharer) and sharer.url in str(error) for sharer in pair.sharers):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Failed("invalid", "the sharer can't take this request; send a shorter prompt, or ask for less")
    return Failed("invalid", str(error))


class _Step(StoppingCriteria):
    """Takes each new token of a batch: its text, whether its row ends with it, and who is told."""

    def __init__(self, rows: Sequence[_Row], ends: frozenset[int], emit: Emit) -> None:
        self.rows, self.ends, self.emit = rows, ends, emit
        self.scores: dict[int, Tensor] = {}  # by row: log-probabilities of the token that comes, where asked for

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        events: list[tuple[int, Event | Failed]] = []
        for index, (row, token) in enumerate(zip(self.rows, input_ids[:, -1].tolist(), strict=True)):
            if row.live and row.work.cancelled:
                row.live = False
            if row.live:
                events.append((row.work.number, self._take(index, row, token)))
                row.work.emitted = True
        if events:
            self.emit(events)
        return torch.tensor([not row.live for row in self.rows], device=input_ids.device)

    def _take(self, index: int, row: _Row, token: int) -> Piece:
        # The token that ends an answer is none of its text's.
        if (logprobs := self.scores.pop(index, None)) is not None and token not in self.ends:
            offset = row.told + len(row.held)
            row.tokens.append(_token(row.words.lm, token, logprobs, offset, row.logprobs or 0))
        row.count += 1
        row.held += row.words.add(token)
        finish: Any = "stop" if token in self.ends else "length" if row.count >= row.max_new else None
        if finish is not None:
            row.held += row.words.rest()
        found = min((at for stop in row.stop if (at := row.held.find(stop)) >= 0), default=-1)
        if found >= 0:
            text, row.held, finish = row.held[:found], "", "stop"
        else:
            keep = 0 if finish is not None else _possible(row.held, row.stop)
            text, row.held = row.held[: len(row.held) - keep], row.held[len(row.held) - keep :]
        row.live = finish is None
        row.told += len(text)
        if row.message:
            row.work.message += text
            return Piece(row.choice, text, message=True)
        # Tokens come with their text, and those of a stop text not at all.
        every = finish is not None and found < 0
        tokens = tuple(each for each in row.tokens if every or each.offset < row.told)
        row.tokens = row.tokens[len(tokens) :]
        return Piece(row.choice, text, tokens, finish)


class _Draw(LogitsProcessor):
    """Draws the tokens of rows that aren't greedy; all other tokens of such a row become impossible."""

    def __init__(self, step: _Step) -> None:
        self.step = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for index, row in enumerate(self.step.rows):
            if not row.live:
                continue
            if row.logprobs is not None:
                self.step.scores[index] = scores[index].log_softmax(-1)
            if row.generator is not None:
                token = draw(scores[index], row.work.job.temperature, row.work.job.top_p, row.generator)
                scores[index] = -torch.inf
                scores[index, token] = 0
        return scores


def draw(scores: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token from (V,) scores: of the fewest tokens whose probability is at least `top_p`, by their probability."""
    scores = scores.float().cpu()
    # In units of the best score's distance, so that no temperature overflows.
    probabilities = ((scores - scores.max()).double() / max(temperature, 1e-6)).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        probabilities[index[ordered.cumsum(0) - ordered >= max(top_p, 1e-9)]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _possible(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the start of a stop text."""
    longest = max(map(len, stops), default=1) - 1
    fits = (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops))
    return next(fits, 0)


def _token(lm: LM, token: int, logprobs: Tensor, offset: int, likeliest: int) -> Token:
    tokenizer = lm.need_tokenizer()

    def one(token: int, others: tuple[Token, ...] = ()) -> Token:
        text, data = token_text(tokenizer, token)
        return Token(text, data, max(float(logprobs[token]), -9999.0), offset, others)

    top = logprobs.topk(min(likeliest, len(logprobs))).indices.tolist() if likeliest else []
    return one(token, tuple(one(other) for other in top))


def token_text(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text as it stands inside of a text, and its bytes; of a part of a character U+FFFD and the part."""
    alone, twice = str(tokenizer.decode([token])), str(tokenizer.decode([token, token]))
    # At the start of a text some decoders leave a token's space out.
    text = twice[len(alone) :] if twice.startswith(alone) else alone
    if "\ufffd" in text:
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return text, bytes.fromhex(byte[1])
        if all(letter in _BYTE_OF for letter in piece):
            return text, bytes(_BYTE_OF[letter] for letter in piece)
    return text, text.encode()


def _byte_alphabet() -> dict[str, int]:
    """By which letters byte-level tokenizers write bytes: printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _repeated(prompt: Prefilled, batch: Sequence[_Work]) -> Prefilled:
    """Every prompt as often as answers to it are asked for."""
    if all(work.job.n == 1 for work in batch):
        return prompt
    places = [i for i, work in enumerate(batch) for _ in range(work.job.n)]
    index = torch.tensor(places, device=prompt.input_ids.device)
    changes: dict[str, Any] = {
        "input_ids": prompt.input_ids[index],
        "attention_mask": prompt.attention_mask[index],
        "kv": prompt.kv.rows(index),
        "position_ids": None if prompt.position_ids is None else prompt.position_ids[index],
    }
    if isinstance(prompt, FusedCache) and prompt.turns:
        changes["turns"] = [prompt.turns[i] for i in places]
    return replace(prompt, **changes)


def _bytes_passed(fused: FusedCache) -> list[int]:
    """Of each prompt of a batch: its share of the positions that were fused."""
    whole = sum(fused.fused_positions)
    return [fused.bytes_passed * n // whole if whole else 0 for n in fused.fused_positions]


@torch.no_grad()
def _weights(pair: C2C, turn: Turn) -> tuple[Weights | None, ...]:
    """The fusers' weights for a prompt that was fused, mean over the heads; 0 where the gate is closed."""
    tokenizer = pair.receiver.need_tokenizer()
    tokens = tuple(str(tokenizer.decode([i])) for i in turn.receiver.ids)
    found: list[Weights | None] = []
    for j, (fuser, read) in enumerate(zip(pair.fusers, turn.sharers, strict=True)):
        if read is None:
            found.append(None)
            continue
        where, _ = where_to_fuse([turn.prompt], j, turn.receiver.kv.length, read.kv.length, [read.kv.length])
        where = where.to(turn.receiver.kv.keys.device)
        weights = fuser.weights(*fuser.inputs(turn.receiver.kv, read.kv.to(where.device), where))
        weights = weights.mean(-1).unflatten(0, (2, -1)) * fuser.open_gates.view(2, -1, 1)
        at = where[1].tolist()
        rows = []
        for kind in weights.tolist():
            table: list[tuple[float | None, ...]] = []
            for layer in kind:
                by_position = dict(zip(at, layer, strict=True))
                table.append(tuple(by_position.get(t) for t in range(len(tokens))))
            rows.append(tuple(table))
        found.append(Weights(tokens, rows[0], rows[1]))
    return tuple(found)
