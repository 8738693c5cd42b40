"""What the analyses share: which prompts they run on, how these are read, and what a run leaves behind."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..config import DataSource
from ..errors import C2CError
from ..evaluation.answers import GENERATION, drawn
from ..evaluation.asking import PROMPTS, check_names
from ..evaluation.controls import sharer_cache
from ..evaluation.loading import claim, load_pair, open_store
from ..evaluation.runner import batches_of
from ..files import replace_text, replacing, save_tensors
from ..kv import KV, Prefilled, prefill_prompts
from ..pair import C2C, FusedCache, PromptIds, where_to_fuse
from ..progress import Bar
from ..tasks import Question, load
from ..tasks.prompts import ANSWER_PREFIX
from ..training.data import Example, draw
from ..training.items import Item, response_ids
from ..training.store import Store, check_room

RESPONSE_TOKENS = 64  # of a response are scored at most, which bounds the memory of logits
SAVE_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Setup:
    """What is run and where its results go.

    Attributes:
        fuser, subfolder: as for `C2C.from_pretrained`.
        receiver, sharer: source (None: the fuser's own) and dtype.
        store: folder and precision of a prefill store of the sharer; None: computed.
        max_bytes: refuse to put more into it.
        batch_size: prompts at once.
        output: folder of the results.
        seed: of what is drawn from the data.
        command: how the run was called, for the record.
    """

    fuser: str | None
    output: Path
    subfolder: str | None = None
    receiver: tuple[str | None, str] = (None, "auto")
    sharer: tuple[str | None, str] = (None, "auto")
    store: tuple[Path | None, str | None] = (None, None)
    max_bytes: int = 20 * 10**9
    batch_size: int = 8
    seed: int = 0
    command: str = ""


@dataclass(frozen=True)
class Data:
    """Which prompts: question sets, or rows of instruction data (`jsonl`), or a prompt a line (`text`).

    Attributes:
        tasks, split, data_dir: question sets, see `tasks.load`.
        prompt: how questions are put, "paper" or "short".
        limit: that many of each set or file, drawn with the seed; None: all.
    """

    tasks: Sequence[str] = ()
    split: str = "validation"
    data_dir: Path | None = None
    prompt: str = "paper"
    jsonl: Path | None = None
    text: Path | None = None
    limit: int | None = None

    def record(self) -> dict[str, Any]:
        """For the settings of a run."""
        if self.tasks:
            return {"tasks": list(self.tasks), "split": self.split, "prompt": self.prompt, "limit": self.limit}
        return {"file": str(self.jsonl or self.text), "limit": self.limit}


def questions_of(data: Data, seed: int) -> dict[str, list[Question]]:
    """The questions of each set, in its order."""
    check_names(data.prompt, [], GENERATION)
    found = {task: load(task, data.split, data.data_dir) for task in data.tasks}
    if empty := [task for task, rows in found.items() if not rows]:
        raise C2CError(f"{empty[0]} holds no questions; give at least one")
    for task, rows in found.items():
        check_ids(task, rows)
    return {task: drawn(rows, data.limit, seed) for task, rows in found.items()}


def check_ids(named: str, questions: Sequence[Question]) -> None:
    """Refuse questions that share an id, by which answers are kept."""
    if twice := [i for i, count in Counter(q.id for q in questions).items() if count > 1]:
        raise C2CError(f"{named} has {len(twice)} ids twice, such as {twice[0]}; give every question its own")


def examples_of(data: Data, seed: int) -> list[Example]:
    """Prompts with the response that is expected: of a question the letter behind "The correct answer is"; of a plain
    prompt none."""
    if sum(map(bool, (data.tasks, data.jsonl, data.text))) != 1:
        raise C2CError("give exactly one kind of data: question sets, instruction rows, or a file of prompts")
    if data.tasks:
        return [
            Example(f"{task}:{q.id}", question_chat(q, data.prompt), ANSWER_PREFIX, f" {q.letter}", ends=False)
            for task, rows in questions_of(data, seed).items()
            for q in rows
        ]
    if data.jsonl:
        return draw(DataSource(jsonl=data.jsonl, limit=data.limit, on_bad_rows="skip"), seed, None)
    assert data.text is not None
    if not data.text.is_file():
        raise C2CError(f"no file {data.text}; expected a prompt in each line; check the path")
    lines = [line for line in data.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise C2CError(f"{data.text} holds no prompts; expected one in each line")
    rows = [Example(f"line {n}", ({"role": "user", "content": line},), "", "") for n, line in enumerate(lines, 1)]
    return drawn(rows, data.limit, seed)


def question_chat(question: Question, prompt: str) -> tuple[dict[str, str], ...]:
    """The chat that puts a question."""
    return ({"role": "user", "content": PROMPTS[prompt](question)},)


def items_of(pair: C2C, examples: Sequence[Example]) -> list[Item]:
    """Examples as token ids, those of like length together; a response of more than RESPONSE_TOKENS is cut."""
    items = []
    for e in examples:
        try:
            prompt = pair.encode(list(e.messages), prefix=e.prefix)
        except C2CError as error:
            raise C2CError(f"{e.id}: {error}") from error
        response = response_ids(pair.receiver.need_tokenizer(), e) if e.response else []
        items.append(Item(e.id, prompt, response[:RESPONSE_TOKENS]))
    return sorted(items, key=lambda i: (len(i.prompt.sharers[0]), len(i.prompt.receiver), i.id))


def open_pair(setup: Setup) -> tuple[C2C, Store | None, dict[str, Any]]:
    """The pair, the store, and the settings that identify them."""
    pair, settings = load_pair([setup.fuser], [setup.subfolder], setup.receiver, ([setup.sharer[0]], setup.sharer[1]))
    if len(pair.sharers) != 1:
        raise C2CError(f"the analyses look at a pair with one sharer, {len(pair.sharers)} were given")
    store = open_store(*setup.store, pair.sharers[0])
    fuser = pair.fusers[0]
    if store is not None and fuser.config.moves_tokens:
        raise C2CError(
            "a store knows prompts by their tokens, and with a published token map the sharer reads them at positions "
            "of their own; leave out --store"
        )
    return pair, store, {**settings, "store": store.config["precision"] if store else None}


def read(pair: C2C, prompts: Sequence[PromptIds], store: Store | None) -> tuple[Prefilled, KV]:
    """The receiver's clean caches of prompts but their last token, and the sharer's of whole prompts, padded left."""
    clean = prefill_prompts(pair.receiver, [p.receiver for p in prompts], [p.positions for p in prompts])
    return clean, sharer_cache(pair, 0, prompts, store)


def lengths_of(prompts: Sequence[PromptIds]) -> list[int]:
    """How many tokens of each prompt `read` has the sharer read."""
    return [len(p.sharers[0]) for p in prompts]


@dataclass(frozen=True)
class Fused:
    """A batch of prompts, read and fused.

    Attributes:
        clean: the receiver's caches before that.
        sharer: the sharer's, (L, B, H, T', D).
        fused: the receiver's afterwards.
        where: (4, N), the positions that are fused, see `pair.where_to_fuse`.
    """

    clean: Prefilled
    sharer: KV
    fused: FusedCache
    where: Tensor


def fuse(pair: C2C, prompts: Sequence[PromptIds], store: Store | None) -> Fused:
    """`read` prompts, and fuse them."""
    clean, cache = read(pair, prompts, store)
    lengths = lengths_of(prompts)
    fused = pair.fuse(prompts, clean=clean, sharers=[(cache, lengths)])
    where, _ = where_to_fuse(prompts, 0, clean.kv.length, cache.length, lengths)
    return Fused(clean, cache, fused, where)


def check_store(store: Store | None, prompts: Sequence[PromptIds], max_bytes: int) -> None:
    """Refuse a run whose prompts would make its store larger than it may be."""
    if store is not None:
        check_room([(store, [p.sharers[0] for p in prompts])], max_bytes)


# ---- a run's files ---------------------------------------------------------------------------------------------------


def begin(setup: Setup, settings: dict[str, Any], kind: str, rows: Sequence[object]) -> dict[str, Any]:
    """Claim the output folder, and return what a result says about its run.

    A folder that holds a run with other settings, or on other rows (by all that they say), is refused.
    """
    digest = hashlib.sha256("\n".join(map(repr, rows)).encode()).hexdigest()
    settings = {**settings, "kind": kind, "seed": setup.seed, "rows": len(rows), "rows_hash": digest}
    claim(setup.output, settings)
    versions = {"cache2cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**settings, "command": setup.command, "versions": versions}


def batches(
    items: Sequence[Item], setup: Setup, state: dict[str, Tensor], label: str
) -> Iterator[tuple[int, Sequence[Item]]]:
    """Batches of items, with the number of the first; those that a stopped run has done are left out.

    `state` is what the run sums up, in place; it is restored first and saved from time to time.
    """
    path = setup.output / "state.safetensors"
    done = _restore(path, state)
    saved = time.monotonic()
    with Bar() as bar:
        task = bar.add_task(label, total=len(items), completed=done)
        for batch in batches_of(items[done:], setup.batch_size) if done < len(items) else []:
            yield done, batch
            done += len(batch)
            bar.advance(task, len(batch))
            if time.monotonic() - saved > SAVE_EVERY or done == len(items):
                _save(path, state, done)
                saved = time.monotonic()


def _save(path: Path, state: dict[str, Tensor], done: int) -> None:
    with replacing(path) as partial:
        save_tensors({**state, "done": torch.tensor(done)}, partial)


def _restore(path: Path, state: dict[str, Tensor]) -> int:
    """Put a saved state into `state`; how many items it has seen."""
    if not path.exists():
        return 0
    try:
        saved = load_file(path)
        done = int(saved.pop("done"))
        if {k: (v.shape, v.dtype) for k, v in saved.items()} != {k: (v.shape, v.dtype) for k, v in state.items()}:
            raise ValueError("other tensors")
    except (SafetensorError, ValueError, KeyError) as error:
        raise C2CError(
            f"{path} is no state of this run ({' '.join(str(error).split())}); remove it to start again"
        ) from error
    for name, tensor in saved.items():
        state[name].copy_(tensor)
    return done


def finish(output: Path, result: dict[str, Any]) -> None:
    """Write a run's numbers."""
    replace_text(output / "result.json", json.dumps(result, indent=1) + "\n")


def earlier(folders: Sequence[Path], kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The results of other runs of one kind, with a label each, to be drawn beside one's own."""
    found = []
    for folder in folders:
        result = finished(folder, command_of(kind))
        if (made := result["about"]["kind"]) != kind:
            raise C2CError(f"{folder} holds a run of {command_of(made)}; give one of {command_of(kind)}")
        found.append((folder.name, result))
    return found


def finished(folder: Path, command: str) -> dict[str, Any]:
    """What a finished run wrote; `command` is the one whose run is expected there."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        command_of(result["about"]["kind"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise C2CError(f"{folder} holds no finished run of {command}; give its output folder") from error
    return result


def command_of(kind: str) -> str:
    """The command that makes a kind of run."""
    return f"c2c {kind}" if kind.startswith("oracle ") else f"c2c analyze {kind}"


def rounded(value: Any, digits: int = 6) -> Any:
    """Tensors and floats as JSON takes them, rounded; NaN becomes None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float):
        return None if value != value else round(value, digits)
    return value
