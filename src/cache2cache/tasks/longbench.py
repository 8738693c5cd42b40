"""LongBench and LongBench-E: 21 and 13 sets of long documents in English, Chinese and code (Bai et al., 2024).

Prompts, lengths and metrics are the published ones (THUDM/LongBench, config/ and eval.py; MIT licence). Unlike there,
every prompt is a user turn of a chat, also in few-shot and code sets.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cache2cache.errors import C2CError
from cache2cache.tasks.base import OpenQuestion, configs_there, read_rows

REPO = "THUDM/LongBench"
HELD_OUT = "held-out"


class Kind(NamedTuple):
    """How a set is asked and scored."""

    metric: str
    max_new_tokens: int
    prompt: str


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_STORY = (
    "Answer the question {}as concisely as you can, using a single phrase if possible. Do not provide any explanation."
)
_ARTICLE = (
    "Answer the question {}as concisely as you can, using a single phrase or sentence if possible. If the question "
    'cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.'
)

KINDS: dict[str, Kind] = {
    "narrativeqa": Kind(
        "f1",
        128,
        "You are given a story, which can be either a novel or a movie script, and a question. "
        + _STORY.format("")
        + "\n\nStory: {context}\n\nNow, "
        + _STORY.format("based on the story ").replace("Answer", "answer", 1)
        + "\n\nQuestion: {input}\n\nAnswer:",
    ),
    "qasper": Kind(
        "f1",
        128,
        "You are given a scientific article and a question. "
        + _ARTICLE.format("")
        + "\n\nArticle: {context}\n\n "
        + _ARTICLE.format("based on the above article ")
        + "\n\nQuestion: {input}\n\nAnswer:",
    ),
    "multifieldqa_en": Kind(
        "f1",
        64,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_zh": Kind(
        "f1-zh",
        64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    "hotpotqa": Kind("f1", 32, _PASSAGES),
    "2wikimqa": Kind("f1", 32, _PASSAGES),
    "musique": Kind("f1", 32, _PASSAGES),
    "dureader": Kind(
        "rouge-l-zh",
        128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    "gov_report": Kind(
        "rouge-l",
        512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": Kind(
        "rouge-l",
        512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Kind(
        "rouge-l",
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:",
    ),
    "vcsum": Kind(
        "rouge-l-zh",
        512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    "trec": Kind(
        "classification",
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    ),
    "triviaqa": Kind(
        "f1",
        32,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
    ),
    "samsum": Kind(
        "rouge-l",
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    ),
    "lsht": Kind("classification", 64, "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}"),
    "passage_count": Kind(
        "count",
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": Kind(
        "retrieval",
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the "
        'paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
    ),
    "passage_retrieval_zh": Kind(
        "retrieval",
        32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n"
        '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
    ),
    "lcc": Kind("code", 64, "Please complete the code given below. \n{context}Next line of code:\n"),
    "repobench-p": Kind("code", 64, "Please complete the code given below. \n{context}{input}Next line of code:\n"),
}
# fmt: off
EVEN = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)
# fmt: on
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # the answers of few-shot sets run on into another example


def load(split: str, data_dir: Path | None) -> list[OpenQuestion]:
    """LongBench. Splits: test, and held-out, the quarter of it that recipes don't train on (`measured_on`)."""
    return _load({name: name for name in KINDS}, split, data_dir)


def load_even(split: str, data_dir: Path | None) -> list[OpenQuestion]:
    """LongBench-E, whose lengths are spread evenly over three buckets, see `bucket`. Splits as of LongBench."""
    return _load({f"{name}_e": name for name in EVEN}, split, data_dir)


def _load(configs: Mapping[str, str], split: str, data_dir: Path | None) -> list[OpenQuestion]:
    of_split = "test" if split == HELD_OUT else split
    return [
        open_question(
            id=f"{configs[config]}/{row['_id']}",
            name=configs[config],
            prompt=KINDS[configs[config]].prompt.format(context=row["context"], input=row["input"]),
            row=row,
            length=row["length"],
        )
        for config in configs_there(REPO, tuple(configs), of_split, data_dir)
        for row in (_from_hub(config, of_split) if data_dir is None else read_rows(REPO, config, of_split, data_dir))
        if split != HELD_OUT or measured_on(row)
    ]


def open_question(id: str, name: str, prompt: str, row: Mapping[str, Any], length: int = 0) -> OpenQuestion:
    """A question of the set `name`, from a row with its answers and classes."""
    return OpenQuestion(
        id=id,
        prompt=prompt,
        references=tuple(row["answers"]),
        metric=KINDS[name].metric,
        max_new_tokens=KINDS[name].max_new_tokens,
        subject=name,
        classes=tuple(row["all_classes"] or ()),
        length=length,
        first_line=name in FIRST_LINE,
        document=hashlib.sha256(row["context"].encode()).hexdigest() if row.get("context") else "",
    )


def measured_on(row: Mapping[str, Any]) -> bool:
    """Whether a row is in the quarter that is not trained on, by the published rule: a hash of its id."""
    return int(hashlib.sha256(str(row.get("_id")).encode()).hexdigest(), 16) % 4 == 1


def bucket(length: int) -> str:
    """The bucket of a stated length (words, of Chinese characters) by which LongBench-E reports."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


_Token = TypeVar("_Token")


def cut_middle(tokens: list[_Token], limit: int) -> list[_Token]:
    """`tokens` without the middle where they are more than `limit`: instructions are at either end."""
    half = limit // 2
    return tokens if len(tokens) <= limit else tokens[:half] + tokens[len(tokens) - half :]


def _from_hub(config: str, split: str) -> list[dict[str, Any]]:
    """The rows as published, from the archive: the repository is a script, which `datasets` doesn't run any more."""
    if split != "test":
        raise C2CError(f"{REPO} has no split {split!r}; expected test or {HELD_OUT}")
    from huggingface_hub import hf_hub_download

    try:
        archive = zipfile.ZipFile(hf_hub_download(REPO, "data.zip", repo_type="dataset"))
        with archive, archive.open(f"data/{config}.jsonl") as lines:
            return [json.loads(line) for line in io.TextIOWrapper(lines, encoding="utf-8") if line.strip()]
    except Exception as error:  # of the network, the archive or its JSON
        reason = " ".join(str(error).split())[:300]
        raise C2CError(
            f"{REPO} ({config}) could not be had from the hub ({type(error).__name__}: {reason}); "
            "check the network, or give a local mirror as data folder"
        ) from error
