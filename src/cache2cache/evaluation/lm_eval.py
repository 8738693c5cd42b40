"""C2C as a model of the lm-evaluation-harness, so that its tasks are answered from fused caches.

    import lm_eval
    from cache2cache.evaluation.lm_eval import HarnessLM

    lm_eval.simple_evaluate(model=HarnessLM(C2C.from_pretrained()), tasks=["arc_easy"], apply_chat_template=True)
    lm_eval.simple_evaluate(model="c2c", model_args="fuser=runs/fuser", tasks=["arc_easy"])

The harness hands contexts over as strings. A chat stays what it is, messages as JSON, since every model of a pair reads
it in its own template; a text is read by every model as it stands.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import __version__, decode
from ..alignment.chat import PLAIN_TEMPLATE
from ..errors import C2CError
from ..files import replace_text
from ..kv import Prefilled, prefill_prompts
from ..pair import C2C, Prompt, PromptIds
from ..remote import RemoteSharer
from ..response import answered_from, fused_sharers
from ..tasks import Question
from ..tasks.prompts import ANSWER_PREFIX, paper_prompt
from .writing import write_on

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM as HarnessBase
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise C2CError(
        "this needs the lm-evaluation-harness, which is not installed; get it with: pip install 'cache2cache[lm-eval]'"
    ) from error

Method = Literal["c2c", "receiver", "sharer"]
MAX_NEW_TOKENS = 256  # where a task doesn't say, as the harness's own models have it
MAX_CONTINUATIONS = 4  # scored at once per prompt of a batch, on average: each needs a copy of the prompt's cache
_CHAT = '{"chat": [{"role": '  # how a chat begins as a context
_ARGUMENTS = ("fuser", "subfolder", "revision", "receiver", "sharer", "dtype", "device")


@register_model("c2c")
class HarnessLM(HarnessBase):
    """A pair, or one of its models alone, as the harness asks its models.

    Attributes:
        pair: the pair.
        method: who answers: "c2c", "receiver" or "sharer" (the first one).
        lm: the model that answers.
        batch_size: prompts at once. The continuations of one prompt share its cache.
    """

    def __init__(self, pair: C2C, *, method: Method = "c2c", batch_size: int | str = 16) -> None:
        super().__init__()
        check_method(method)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise C2CError(f"batch size {batch_size!r}; expected how many prompts to read at once, from 1 on")
        self.pair, self.method, self.batch_size = pair, method, int(batch_size)
        self.lm = pair.sharers[0] if method == "sharer" else pair.receiver
        if isinstance(self.lm, RemoteSharer):
            raise C2CError(f"the sharer at {self.lm.url} hands out caches, no answers; load it here to evaluate it")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessLM:
        """From the harness's `model_args`: those of `C2C.from_pretrained` (`sharer` for its sharers) and the class."""
        given = {k: v for k, v in {**arg_dict, **(additional_config or {})}.items() if v is not None}
        own = {name: given.pop(name) for name in ("method", "batch_size") if name in given}
        if unknown := set(given) - set(_ARGUMENTS):
            known = ", ".join((*_ARGUMENTS, "method", "batch_size"))
            raise C2CError(f"unknown model argument {sorted(unknown)[0]!r}; expected some of {known}")
        return cls(C2C.from_pretrained(given.pop("fuser", None), sharers=given.pop("sharer", None), **given), **own)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> HarnessLM:
        """As `create_from_arg_obj`, from `key=value,key=value`."""
        pieces = [piece.partition("=") for piece in arg_string.split(",") if piece]
        return cls.create_from_arg_obj({name.strip(): value for name, _, value in pieces}, additional_config)

    # ---- chats --------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a context: JSON, and behind it the start of the answer, if the last message is one."""
        messages, start = [dict(message) for message in chat_history], ""
        if not add_generation_prompt:
            if not messages or messages[-1]["role"] != "assistant":
                raise C2CError("the chat has no answer to go on with; expected an assistant's message at its end")
            start = messages.pop()["content"]
        # role first, which is what a context is known by
        ordered = [{"role": message.pop("role"), **message} for message in messages]
        return json.dumps({"chat": ordered}, ensure_ascii=False) + start

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness logs: the template of the model that answers. Other models of the pair have their own."""
        if isinstance(chat_template, str):
            raise C2CError(
                f"the chat template {chat_template!r} was asked for, but every model of the pair reads a chat in its "
                "own; give none by name"
            )
        return str(self.tokenizer.chat_template or PLAIN_TEMPLATE) if chat_template else ""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model that answers."""
        return self.lm.need_tokenizer()

    @property
    def tokenizer_name(self) -> str:
        """What kept requests of the harness are told apart by: chats are the same for all models here."""
        return "c2c-chat"

    @property
    def eot_token_id(self) -> int | None:
        """What ends an answer of that model."""
        return self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        """Positions of the model that answers."""
        return self.lm.context_length

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        models = {"receiver": self.pair.receiver, **{f"sharer_{j}": lm for j, lm in enumerate(self.pair.sharers)}}
        named = {role: {"name": lm.name, "revision": lm.revision} for role, lm in models.items()}
        return {**named, "method": self.method, "cache2cache": __version__}

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _read(self, context: str, room: int) -> PromptIds:
        """What the models read of a context, which leaves `room` positions to the model that answers."""
        prompt: Prompt = context
        start = ""
        if context.startswith(_CHAT):
            chat, end = json.JSONDecoder().raw_decode(context)
            prompt, start = chat["chat"], context[end:]
        sharers = self.pair.sharers if self.method == "c2c" else []
        if not context:  # the likelihood of a text by itself: there is nothing that a sharer could tell of
            first = self.tokenizer.bos_token_id
            alone = [self.eot_token_id or 0 if first is None else first]
            ids = PromptIds(alone, [[0]] * len(sharers), [[-1]] * len(sharers))
        elif self.method == "c2c":
            ids = self.pair.encode(prompt, prefix=start)
        else:
            ids = PromptIds(self.pair.rendered(self.lm, prompt, start).ids, (), ())
        return shortened(ids, self.max_length - room, [lm.context_length for lm in sharers])

    def _prefill(self, prompts: Sequence[PromptIds]) -> Prefilled:
        if self.method == "c2c":
            return self.pair.fuse(prompts)
        return prefill_prompts(self.lm, [p.receiver for p in prompts])

    # ---- requests -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per request (context, continuation), its log-likelihood and whether greedy decoding would write it.

        Every context is read and fused once for all its continuations. Spaces at its end belong to the continuation, as
        in the harness's own models.
        """
        asked: dict[str, list[tuple[int, list[int]]]] = {}
        for place, request in enumerate(requests):
            context, continuation = request.args
            kept = context.rstrip()
            ids = self.lm.continuation_ids(context[len(kept) :] + continuation)
            asked.setdefault(kept, []).append((place, ids))
        read = [
            (self._read(context, max(len(ids) for _, ids in group)), group)
            for context, group in tqdm(asked.items(), desc="reading contexts", disable=disable_tqdm)
        ]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in self._batches(read):
                groups = [group for _, group in batch]
                scores = self._score([prompt for prompt, _ in batch], [[ids for _, ids in group] for group in groups])
                for group, of_group in zip(groups, scores, strict=True):
                    for (place, _), score in zip(group, of_group, strict=True):
                        found[place] = answer = (score.logprob, score.is_greedy)
                        self.cache_hook.add_partial("loglikelihood", requests[place].args, answer)
                    bar.update(len(group))
        return [found[place] for place in range(len(requests))]

    def _score(
        self, prompts: Sequence[PromptIds], continuations: Sequence[Sequence[list[int]]]
    ) -> list[list[decode.Score]]:
        """As `decode.score`, in parts where that would take many copies of caches."""
        state = self._prefill(prompts)
        flat = [(row, ids) for row, group in enumerate(continuations) for ids in group]
        no_copies = all(len(ids) == 1 for _, ids in flat)
        step = len(flat) if no_copies else MAX_CONTINUATIONS * self.batch_size
        scores: list[list[decode.Score]] = [[] for _ in prompts]
        for begin in range(0, len(flat), step):
            part = flat[begin : begin + step]
            groups = [[ids for owner, ids in part if owner == row] for row in range(len(prompts))]
            for known, more in zip(scores, decode.score(self.lm, state, groups), strict=True):
                known += more
        return scores

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Per request (context, options), the answer up to one of the texts that end it (`until`)."""
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for places in alike.values():
                options = dict(normalize_gen_kwargs(requests[places[0]].args[1], MAX_NEW_TOKENS))
                until, new = options.pop("until"), options.pop("max_gen_toks")
                if not options["do_sample"]:
                    options.pop("temperature", None)
                read = [(self._read(requests[place].args[0], new), place) for place in places]
                for batch in self._batches(read):
                    texts = self._generate([prompt for prompt, _ in batch], until, new, **options)
                    for (_, place), text in zip(batch, texts, strict=True):
                        found[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update(len(batch))
        return [found[place] for place in range(len(requests))]

    def _generate(self, prompts: Sequence[PromptIds], until: Sequence[str], limit: int, **options: Any) -> list[str]:
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name) or 1) != 1:
                raise C2CError(f"{name} is {options[name]}; one answer is written for each prompt, leave it out")
        if self.method == "c2c":
            state = answered_from(self.pair, self.pair.fuse(prompts, keep=bool(fused_sharers(self.pair))))
        else:
            state = self._prefill(prompts)
        # An end token that the model's own settings don't name ends an answer too.
        ends = [*until, *filter(None, [self.tokenizer.eos_token])]
        answers = write_on(self.lm, state, [limit] * len(prompts), ends, **options)
        return [postprocess_generated_text(answer.text, list(until), None) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: see the error."""
        raise C2CError(
            "loglikelihood_rolling scores a text from its first token on, with no prompt in front; a sharer would have "
            "read the very tokens that are to be predicted, so it has no fused meaning. Leave perplexity tasks out, or "
            "run them on the receiver with the harness's own model hf"
        )

    def _batches(self, read: Sequence[tuple[PromptIds, Any]]) -> list[list[tuple[PromptIds, Any]]]:
        """Batches of like length, the longest first: what doesn't fit the memory is seen at once."""
        ordered = sorted(read, key=lambda item: -len(item[0].receiver))
        return [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]


def shortened(prompt: PromptIds, room: int, sharers: Sequence[int]) -> PromptIds:
    """The prompt without its first tokens, as far as it is longer than `room`, or than `sharers` says for each sharer.

    The harness cuts long contexts so. A prompt whose position ids are given stays whole. What is left no longer is the
    text that it was encoded from.
    """
    cut = max(0, len(prompt.receiver) - room)
    cuts = [max(0, len(ids) - most) for ids, most in zip(prompt.sharers, sharers, strict=True)]
    if not any([cut, *cuts]) or room < 1 or prompt.positions is not None or prompt.sharer_positions:
        return prompt
    warnings.warn(
        f"a context of {len(prompt.receiver)} tokens loses the first {cut} of them, a sharer's its first "
        f"{max(cuts, default=0)}, to fit the models; the task is too long for them",
        stacklevel=2,
    )
    maps = [[max(i - by, -1) for i in index[cut:]] for index, by in zip(prompt.maps, cuts, strict=True)]
    theirs = [ids[by:] for ids, by in zip(prompt.sharers, cuts, strict=True)]
    content = prompt.content[cut:]
    return replace(prompt, receiver=prompt.receiver[cut:], sharers=theirs, maps=maps, content=content, text=None)


def task_of(questions: Sequence[Question], name: str = "own") -> dict[str, Any]:
    """Questions with options as a task of the harness, put as `c2c evaluate` puts them: the paper's prompt, and the
    likeliest letter behind "The correct answer is".

    For `simple_evaluate(tasks=[task_of(questions)], apply_chat_template=True)`; a document's `id` is its question's.
    """
    from datasets import Dataset, DatasetDict

    rows = [{"id": q.id, "prompt": paper_prompt(q), "letters": list(q.letters), "answer": q.answer} for q in questions]
    return {
        "task": name,
        "custom_dataset": lambda **kwargs: DatasetDict(test=Dataset.from_list(rows)),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{letters}}",
        "doc_to_target": "answer",
        "gen_prefix": ANSWER_PREFIX,
        "metric_list": [{"metric": "acc"}],
    }


def check_method(method: Any) -> None:
    """Raise a C2CError for a method that doesn't exist."""
    if method not in get_args(Method):
        raise C2CError(f"unknown method {method!r}; expected one of {', '.join(get_args(Method))}")


def run(
    fuser: str | None,
    *,
    tasks: Sequence[str],
    output: Path,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    batch_size: int = 16,
    **model_args: Any,
) -> dict[str, Any]:
    """Run tasks of the harness and write `results.json` and a file of samples per task to `output`; prints a table.

    Args:
        fuser: folder or hub id; None: the packaged one.
        tasks: names of tasks, groups or tags of the harness.
        output: the folder.
        include_path: a folder with tasks of one's own.
        limit: only the first questions of each task.
        num_fewshot, apply_chat_template, system_instruction: as for the harness.
        batch_size: prompts at once.
        model_args: further arguments of `HarnessLM.create_from_arg_obj`.

    Raises:
        C2CError: `output` holds results already.

    Returns:
        The harness's results, without the samples.
    """
    if (output / "results.json").exists():
        raise C2CError(f"{output} holds results already; choose another --output, or remove it")
    if include_path is not None and not include_path.is_dir():
        raise C2CError(f"no folder {include_path}; expected one with tasks of your own")
    check_method(model_args.get("method", "c2c"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise C2CError(
            f"the harness has no task {unknown[0]!r}; give a name that `lm_eval ls tasks` prints, or the folder of "
            "your own task with --include-path"
        )
    given = {name: value for name, value in {"fuser": fuser, **model_args}.items() if value is not None}
    results = simple_evaluate(
        model="c2c",
        model_args=given,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        batch_size=batch_size,
    )
    output.mkdir(parents=True, exist_ok=True)
    for task, rows in results.pop("samples").items():
        lines = [json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows]
        replace_text(output / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines))
    replace_text(output / "results.json", json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    return dict(results)
