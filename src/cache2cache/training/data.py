"""Training examples: a chat, perhaps the start of an answer, and the response that is learned."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from ..config import DataSource, TrainConfig
from ..errors import C2CError
from ..tasks import TASKS, Question, load
from ..tasks.base import iterate_rows
from ..tasks.longbench import measured_on
from ..tasks.prompts import ANSWER_PREFIX, paper_prompt, short_prompt

Messages = tuple[Mapping[str, str], ...]
T = TypeVar("T")

# Rows of train splits that ask, word for word, what is asked by a row of the validation splits of ARC, OpenBookQA and
# MMLU, of MMLU's dev split or of MMLU-Redux; and instructions that contain such a question of 30 characters or more.
# They are never trained on. tests/training/test_data.py finds this list again from the data.
HELD_OUT = {
    "arc-easy": ["Mercury_7068793", "NYSEDREGENTS_2016_4_12"],
    "arc-challenge": ["Mercury_7219643"],
    "openbookqa": [
        "923", "10-230", "11-742", "12-140", "12-194", "12-209", "12-244", "12-253", "12-353", "12-474", "12-589",
        "12-605", "12-1001", "13-106", "13-497", "13-631", "13-892", "13-914", "14-377", "14-380", "14-895", "14-1396",
        "14-1449", "14-1485",
    ],
    "databricks/databricks-dolly-15k": ["11440"],
    "local/t0-mix": [  # the fact that one question of OpenBookQA asks for
        "1001", "1829", "3094", "3525", "4469", "6238", "6952", "8323", "8754", "9466", "9636", "9705", "9772",
        "10696", "12976", "14563", "15031", "15101", "15599", "16874", "17693", "18228", "19260", "20673", "21735",
        "21815", "22132", "22141", "23181", "24712", "27012", "27121", "27733", "28582", "29294", "29523", "29603",
        "30410", "30684", "31428", "33406", "34846", "35753", "36575", "36968",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """What is learned from one row, or from one assistant turn of it.

    Attributes:
        id: source and row, the same in every run; with "#2" for the second of several assistant turns. Of a row that
            `c2c rewrite` wrote that of what was answered.
        messages: the chat up to the response.
        prefix: the start of the answer that counts as prompt ("" mostly).
        response: the text whose tokens carry the loss.
        ends: whether the response is followed by the end of the turn.
        turn: which assistant turn of the row it is, from 1; 0 if it is the row's only example.
        source: the recipe's source, counted from 0.
    """

    id: str
    messages: Messages
    prefix: str
    response: str
    ends: bool = True
    turn: int = 0
    source: int = 0

    @property
    def row(self) -> str:
        """The id without the turn: what the examples of one chat share."""
        return self.id.removesuffix(f"#{self.turn}") if self.turn else self.id


def examples(config: TrainConfig) -> list[Example]:
    """All examples of a recipe, each source drawn with `drawn_by`, in an order that depends on nothing else.

    Rows of `HELD_OUT` are dropped at the end, so a `limit` can give a few rows less.

    Raises:
        C2CError: a source that is empty, unreadable or holds rows without a response (`DataSource.on_bad_rows`).
    """
    found = [
        e for index, source in enumerate(config.data) for e in draw(source, config.drawn_by, config.data_dir, index)
    ]
    seen: dict[tuple[str, int], Example] = {}
    for e in found:
        if (other := seen.setdefault((same_row(e.row), e.turn), e)) is e:
            continue
        if other.source == e.source:
            raise C2CError(f"{config.data[e.source].name} gives the id {e.id} twice; give each row an id of its own")
        raise C2CError(f"two sources of the recipe give the same rows, such as {e.id}; name each source once")
    random.Random(config.drawn_by).shuffle(found)
    return without_held_out(found)


def without_held_out(found: Sequence[Example]) -> list[Example]:
    """The examples but those of rows in `HELD_OUT`."""
    dropped = {f"{source}:{row}" for source, rows in HELD_OUT.items() for row in rows}
    return [e for e in found if same_row(e.row) not in dropped]


def same_row(row: str) -> str:
    """A row's id under the plainest name of its source, where it has several: of a subject's that of its set."""
    source, _, number = row.rpartition(":")
    task = source.split("/")[0]
    of_set = task in TASKS and not source.endswith((".jsonl", ".jsonl.gz"))
    return f"{(task if of_set else source.removesuffix('/default')).removesuffix('-paper')}:{number}"


def draw(source: DataSource, seed: int, data_dir: Path | None, index: int = 0) -> list[Example]:
    """The examples of one source, those of a chat together, `limit` rows of it at most."""
    rows = _questions(source, data_dir, index) if source.task else _instructions(source, data_dir, index)
    if not rows:
        raise C2CError(f"no rows are left of {source.name}; check split and limits")
    if source.limit and source.limit < len(rows):
        first = source.take == "first"
        name = source.jsonl.name if source.jsonl else source.name  # wherever the file lies
        rows = rows[: source.limit] if first else random.Random(f"{seed}:{name}").sample(rows, source.limit)
    return [example for row in rows for example in row]


def _short(row: list[Example], source: DataSource) -> list[Example]:
    """Those of a row's examples whose prompts are no longer than the source takes."""
    most = source.max_prompt_chars
    return row if most is None else [e for e in row if sum(len(m["content"]) for m in e.messages) <= most]


def shortened(messages: Messages) -> Iterator[Messages]:
    """The chat, then what is left of it without its oldest turns, from a later user turn on each time.

    System messages at its start stay, and so does everything from the last user turn on.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    yield messages
    for i, message in enumerate(messages):
        if i > first and message["role"] == "user":
            yield messages[:first] + messages[i:]


def split(found: Sequence[Example], holdout: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and the hold-out: whole rows, those with the smallest hashes, until it has `holdout`.

    A row's hash is that of its id alone, without the folders of a file. So the split of the same rows is the same for
    all models, seeds, orders and places, and a row that is trained on stays so when rows are added.
    """
    sizes: dict[str, int] = {}
    for example in found:
        sizes[example.row] = sizes.get(example.row, 0) + 1
    kept: set[str] = set()
    held = 0
    for row in sorted(sizes, key=lambda row: (hashlib.sha256(PurePath(row).name.encode()).digest(), row)):
        if held >= holdout:
            break
        kept.add(row)
        held += sizes[row]
    return [e for e in found if e.row not in kept], [e for e in found if e.row in kept]


def row_name(example: str) -> str:
    """Of an example's id, or a question's, the row that it is of by the plainest name of its source: whatever its turn
    and wherever its file lies."""
    source, _, number = same_row(re.sub(r"#\d+$", "", example)).rpartition(":")
    return f"{PurePath(source).name if source.endswith(('.jsonl', '.jsonl.gz')) else source}:{number}"


def mix(sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> list[T]:
    """As many of all sources together as they have, a share of it from each that is as its weight.

    A source that has more is drawn from, one that has less is repeated: each of its elements is taken equally often,
    but for one time more for some that are drawn. The same in every run with this seed.
    """
    total = sum(map(len, sources))
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    # The largest remainders are rounded up, so that the counts add up.
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    mixed: list[T] = []
    for i, (items, count) in enumerate(zip(sources, counts, strict=True)):
        if count and not items:
            raise C2CError(f"source {i + 1} has a weight of {weights[i]:g}, but no examples to train on; leave it out")
        times, more = divmod(count, len(items)) if items else (0, 0)
        mixed += [*list(items) * times, *random.Random(f"{seed}:{i}").sample(list(items), more)]
    random.Random(seed).shuffle(mixed)
    return mixed


def question_example(task: str, question: Question) -> Example:
    """A question in one of four forms, chosen by its id: the paper's prompt or the short one; answering in full, or the
    letter alone behind "The correct answer is"."""
    form = hashlib.sha256(f"{task}:{question.id}".encode()).digest()[0]
    prompt = paper_prompt(question) if form & 1 else short_prompt(question)
    messages = ({"role": "user", "content": prompt},)
    if form & 2:
        return Example(f"{task}:{question.id}", messages, ANSWER_PREFIX, f" {question.letter}", ends=False)
    return Example(f"{task}:{question.id}", messages, "", f"{ANSWER_PREFIX} {question.letter}")


def _questions(source: DataSource, data_dir: Path | None, index: int) -> list[list[Example]]:
    assert source.task is not None
    if source.split in MEASURED and not source.task.endswith(".jsonl"):
        warnings.warn(
            f"{source.name} is trained on its split {source.split}, which fusers are measured on: no figure of this "
            "one counts there",
            stacklevel=2,
        )
    made = (question_example(source.task, q) for q in load(source.task, source.split, data_dir))
    return [row for example in made if (row := _short([replace(example, source=index)], source))]


def _instructions(source: DataSource, data_dir: Path | None, index: int) -> list[list[Example]]:
    """The examples of each row: one, or with `supervise: all` one per assistant turn."""
    made, bad = [], []
    for number, read in enumerate(_rows(source, data_dir)):
        if isinstance(read, dict) and read.keys() >= LONGBENCH and measured_on(read):
            continue
        try:
            if isinstance(read, C2CError):
                raise read
            if is_rewritten(read):
                row = _rewritten(read, source, index, f"{source.name}, row {number}")
            else:
                row = _examples(read, source, f"{source.name}:{number}", index, f"{source.name}, row {number}")
        except C2CError as error:
            if source.on_bad_rows == "error":
                raise C2CError(f"{error}; or set on_bad_rows: skip at this source") from error
            bad.append(str(error))
            continue
        if row := _short(row, source):
            made.append(row)
            if source.take == "first" and len(made) == source.limit:
                break  # the rest is not even read
    if bad and not made:
        raise C2CError(f"none of the {len(bad)} rows of {source.name} can be read; the first: {bad[0]}")
    if bad:
        warnings.warn(
            f"{len(bad)} of {len(made) + len(bad)} rows of {source.name} are left out; the first: {bad[0]}",
            stacklevel=2,
        )
    return made


LONGBENCH = {"_id", "input", "context", "answers"}  # by these fields its rows are known, wherever they lie
MEASURED = ("validation", "test", "dev")


def _examples(row: Mapping[str, Any], source: DataSource, name: str, index: int, where: str) -> list[Example]:
    responses = read_chat(row, where)
    # A row may say that its response was cut short, as c2c rewrite does.
    whole = [*[True] * (len(responses) - 1), row.get("ends") is not False]
    made = []
    for turn, ((messages, response), ends) in enumerate(zip(responses, whole, strict=True), 1):
        if source.max_response_chars and len(response) > source.max_response_chars:
            response, ends = cut(response, source.max_response_chars), False
        made.append(Example(f"{name}#{turn}", messages, "", response, ends, turn, index))
    if source.supervise == "last" or len(made) == 1:
        return [replace(made[-1], id=name, turn=0)]
    return made


def is_rewritten(row: Any) -> bool:
    """Whether `c2c rewrite` wrote this row."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        return False
    return row.keys() - {"generation"} == {"id", "messages", "ends", "teacher"}  # which earlier versions didn't write


def _rewritten(row: Mapping[str, Any], source: DataSource, index: int, where: str) -> list[Example]:
    """The example that a teacher has answered: by its id, so that it stays on its side of the split, and the last turn
    alone, as each turn that was asked for has a row of its own."""
    made = _examples(row, source.model_copy(update={"supervise": "last"}), row["id"], index, where)
    turn = re.search(r"#(\d+)$", row["id"])
    return [replace(made[-1], turn=int(turn[1]))] if turn else made


def cut(text: str, most: int, back: int = 40) -> str:
    """The first characters of a text, up to the last blank among its last few, so that no word is cut; in a script
    without blanks as many as there may be."""
    head = text[:most]
    whole = head.rsplit(maxsplit=1)[0]
    return whole if len(head) - len(whole) <= back else head


def _rows(source: DataSource, data_dir: Path | None) -> Iterable[Any]:
    """The rows of a source; in place of one that is no JSON, the error."""
    if source.jsonl:
        return _read_jsonl(source.jsonl)
    assert source.rows is not None
    owner, repo, *rest = source.rows.split("/")
    return iterate_rows(f"{owner}/{repo}", rest[0] if rest else "default", source.split, data_dir)


def _read_jsonl(path: Path) -> Iterator[Any]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                if not line.strip():
                    continue
                if number == 0 and line.startswith(b"\x1f\x8b") and path.suffix != ".gz":
                    raise C2CError(f"{path} is gzipped; name it .jsonl.gz")
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
                    if b"\\ud" in line.lower():  # half a pair is no text, and no tokenizer takes it
                        json.dumps(row, ensure_ascii=False).encode()
                    yield row
                except UnicodeDecodeError as error:
                    yield C2CError(f"{path}, row {number} is not UTF-8 ({error}); save the file as UTF-8")
                except (ValueError, RecursionError) as error:
                    yield C2CError(
                        f"{path}, row {number} cannot be read as JSON ({error}); give one JSON object per line"
                    )
                number += 1
    except (OSError, EOFError, zlib.error) as error:
        raise C2CError(f"{path} cannot be read ({error}); give a file of JSON lines, .jsonl or .jsonl.gz") from error


# What is asked for in those sets of LongBench whose `input` doesn't say it.
_CODE = "Write the next line of this code."
_LONGBENCH_TASKS = {
    "gov_report": "Summarise this report on one page.",
    "multi_news": "Summarise these news articles on one page.",
    "passage_count": "How many different paragraphs are these, each counted once? Answer with the number alone.",
    "passage_retrieval_en": 'Which of these paragraphs does the following summarise? Answer like this: "Paragraph 1".',
    "lcc": _CODE,
    "repobench-p": _CODE,
}

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_chat(row: Any, where: str) -> list[tuple[Messages, str]]:
    """The responses of a row in one of the usual layouts, each with the chat before it.

    `messages` (role, content), `conversations` (from, value), instruction with context or input and response or
    output, prompt with completion or response, question with answer (and without options), LongBench's context with
    input and answers, the first of which counts; prompt and completion may be lists of messages (role, content).
    `system_prompt` or `system` is a system message where the chat has none. Responses are the assistant turns with
    text behind a user turn, of a completion only its own; the last turn must be one, but for turns of others behind.
    """
    if not isinstance(row, Mapping):
        raise C2CError(f"{where} is {type(row).__name__}; expected an object with fields")
    start = 0  # assistant turns before it are prompt
    if turns := row.get("messages") or row.get("conversations"):
        chat = _turns(turns, where)
    elif isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        chat = _turns(_as_turns(row.get("prompt"), "user"), where)
        start = len(chat)
        chat += _turns(_as_turns(row.get("completion"), "assistant"), where)
    elif isinstance(row.get("answers"), list) and row["answers"] and row.get("context") and "input" in row:
        task = _LONGBENCH_TASKS.get(str(row.get("dataset", "")).removesuffix("_e"), "")
        asked_for = [part for part in (task, _first(row, ("input",))) if part]
        response = _first({"answer": row["answers"][0]}, ("answer",))
        if not asked_for or not response:
            raise C2CError(f"{where} asks nothing about its context, or its first answer is empty; leave the row out")
        chat = [
            _message("user", "\n\n".join([str(row["context"]), *asked_for])),
            _message("assistant", response),
        ]
    else:
        # A question with options is no chat: its answer is a letter, or a number.
        plain = not {"options", "choices"} & set(row)
        prompt = _first(row, ("instruction", "prompt", *["question"] * plain))
        response = _first(row, ("response", "output", "completion", *["answer"] * plain))
        if not prompt or not response:
            if not plain and "question" in row:
                raise C2CError(f"{where} is a question with options; give such a file as task, not as rows of a chat")
            empty = ", ".join(name for name, value in row.items() if not value)
            raise C2CError(
                f"{where} has fields {', '.join(row)}{f' (empty: {empty})' if empty else ''}; expected messages, "
                "conversations, instruction and response, prompt and completion, or question and answer, all filled"
            )
        context = _first(row, ("context", "input"))
        chat = [_message("user", f"{prompt}\n\n{context}" if context else prompt), _message("assistant", response)]
    system = _first(row, ("system_prompt", "system"))
    if system and not any(turn["role"] == "system" for turn in chat):
        chat.insert(0, _message("system", system))
        start += 1
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    asked = next((i for i, turn in enumerate(chat) if turn["role"] == "user"), len(chat))
    responses = [
        (tuple(chat[:i]), turn["content"].strip())
        for i, turn in enumerate(chat)
        if i >= start and i > asked and turn["role"] == "assistant" and turn["content"].strip()
    ]
    if not responses or len(responses[-1][0]) != len(chat) - 1:
        raise C2CError(f"{where} has no assistant turn with text behind a user turn; leave the row out")
    return responses


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


def _as_turns(value: Any, role: str) -> Any:
    return [_message(role, value)] if isinstance(value, str) else value


def _turns(turns: Any, where: str) -> list[Mapping[str, str]]:
    if not isinstance(turns, list):
        raise C2CError(f"{where}: its turns are {type(turns).__name__}; expected a list of objects")
    chat = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise C2CError(f"{where}: a turn is {type(turn).__name__}; expected an object with role and content")
        role = _ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            raise C2CError(
                f"{where}: a turn with fields {', '.join(turn)} has no known role and text; expected role and "
                "content, or from and value"
            )
        chat.append(_message(role, content))
    return chat


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((row[n].strip() for n in names if isinstance(row.get(n), str) and row[n].strip()), "")
