"""C2C in the lm-evaluation-harness: against our own scoring, against stock transformers, against the harness's `hf`."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cache2cache import C2C, C2CError, FuserConfig, decode
from cache2cache.cli import main
from cache2cache.evaluation import lm_eval as adapter
from cache2cache.evaluation.lm_eval import HarnessLM, shortened
from cache2cache.models import LM
from cache2cache.pair import PromptIds
from cache2cache.tasks import Question, load
from cache2cache.tasks.prompts import ANSWER_PREFIX
from evaluation.harness import compare, own_tasks_only, run_task
from training.runs import lm_of, pair_of, write_questions

TEXTS = [
    "Question: What is the capital of France?\nAnswer:",
    "Plants need light, ",
    "A magnet attracts",
    "水是生命之源。 Which of these is it? ",
]
CHOICES = [" Paris", " the Seine and Paris", " iron", " A", " light 北"]


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


def likelihoods(model: Any, *arguments: tuple[str, str]) -> list[tuple[float, bool]]:
    return list(model.loglikelihood(asked("loglikelihood", *arguments), disable_tqdm=True))


def answers(model: Any, *arguments: tuple[str, dict[str, Any]]) -> list[str]:
    return list(model.generate_until(asked("generate_until", *arguments), disable_tqdm=True))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes the harness seconds each time: the index of its own tasks, and a list of what is installed."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks_only)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return load(str(write_questions(tmp_path / "questions.jsonl", 9)))


def continued(lm: LM, ids: Sequence[int], more: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness of `more` behind `ids`, from one ordinary forward pass over everything."""
    logprobs = lm.model(torch.tensor([[*ids, *more]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    target = torch.tensor(list(more))
    return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


# ---- likelihoods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("receiver", "sharer"), [("llama", "qwen3"), ("gemma3", "llama")])
def test_questions_score_as_in_our_own_evaluation(
    receiver: str, sharer: str, questions: list[Question], tmp_path: Path
) -> None:
    compare(pair_of(receiver, sharer), questions, tmp_path, ["receiver", "sharer", "c2c"], 1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_the_pair_and_of_stock_transformers(batch_size: int) -> None:
    """Shared contexts, out of order, more continuations than are scored at once, spaces at a context's end."""
    pair = pair_of()
    requests = [(text, choice) for choice in CHOICES for text in TEXTS]
    for method, lm in (("c2c", None), ("receiver", pair.receiver), ("sharer", pair.sharers[0])):
        found = likelihoods(HarnessLM(pair, method=method, batch_size=batch_size), *requests)  # type: ignore[arg-type]
        for (text, choice), (logprob, greedy) in zip(requests, found, strict=True):
            context = text.rstrip()
            choice = text[len(context) :] + choice
            if lm is None:
                score = pair.score(context, [choice])[0]
                expected = score.logprob, score.is_greedy
            else:
                expected = continued(lm, lm.need_tokenizer()(context)["input_ids"], lm.continuation_ids(choice))
            assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_the_receiver_scores_and_answers_as_with_the_harness_own_model() -> None:
    lm = lm_of("qwen2")
    mine = HarnessLM(C2C.from_models(lm, lm_of("llama"), FuserConfig(hidden_dim=8, intermediate_dim=8)))
    mine.method = "receiver"
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=3)
    requests = [(text, choice) for text in [*TEXTS, ""] for choice in CHOICES]
    for one, other in zip(likelihoods(mine, *requests), likelihoods(theirs, *requests), strict=True):
        assert one == (pytest.approx(other[0], abs=1e-3), other[1])
    options = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(text, options) for text in TEXTS]
    assert answers(mine, *prompts) == answers(theirs, *prompts)


def test_greedy_continuations_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    written = pair.generate(TEXTS[0], max_new_tokens=4, do_sample=False, eos_token_id=None)[0, -4:].tolist()
    ids = {"written": written, "begun": written[:2], "other": [*written[:3], (written[3] + 1) % 300]}
    monkeypatch.setattr(LM, "continuation_ids", lambda self, text: ids[text])
    found = likelihoods(HarnessLM(pair), *[(TEXTS[0], name) for name in ids])
    assert [greedy for _, greedy in found] == [True, True, False]


def test_a_context_is_fused_once_for_all_its_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    fused: list[int] = []
    monkeypatch.setattr(pair, "fuse", lambda batch, fuse=pair.fuse: fused.append(len(batch)) or fuse(batch))
    likelihoods(HarnessLM(pair, batch_size=3), *[(text, choice) for choice in CHOICES for text in TEXTS])
    assert fused == [3, 1]


def test_closed_gates_and_no_fusion_give_exactly_the_receiver() -> None:
    """The same numbers to the last bit, in likelihoods and in answers; an open fuser gives others."""
    requests = [(text, choice) for text in [*TEXTS, ""] for choice in CHOICES]
    prompts = [(text, {"until": ["e"], "max_gen_toks": 8}) for text in TEXTS]
    alone = HarnessLM(pair_of(), method="receiver", batch_size=2)
    closed = HarnessLM(pair_of(gate_init=0.0), batch_size=2)
    assert likelihoods(closed, *requests) == likelihoods(alone, *requests)
    assert answers(closed, *prompts) == answers(alone, *prompts)
    opened = HarnessLM(pair_of(), batch_size=2)
    assert likelihoods(opened, *requests) != likelihoods(alone, *requests)
    # A text by itself has no context that a sharer could have read.
    assert likelihoods(opened, *requests[-5:]) == likelihoods(alone, *requests[-5:])


def test_a_text_without_context_stands_behind_the_first_token() -> None:
    pair = pair_of()
    start = pair.receiver.need_tokenizer().bos_token_id
    (found,) = likelihoods(HarnessLM(pair), ("", "Plants need light"))
    expected = continued(pair.receiver, [start], pair.receiver.continuation_ids("Plants need light"))
    assert found == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_rolling_likelihood_is_refused() -> None:
    with pytest.raises(C2CError, match="no fused meaning"):
        HarnessLM(pair_of()).loglikelihood_rolling(asked("loglikelihood_rolling", ("Plants",)))


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("receiver", ["llama", "gemma3", "qwen2"])
def test_answers_end_at_the_first_stop_of_each_row(receiver: str) -> None:
    """As one prompt at a time without stops, cut afterwards; requests of unlike options keep their order."""
    pair = pair_of(receiver, "qwen3")
    model = HarnessLM(pair, batch_size=3)
    tokenizer = pair.receiver.need_tokenizer()
    requests = [
        (text, {"until": until, "max_gen_toks": new})
        for text in TEXTS
        for until, new in ((["e", "a", "\n\n"], 24), ([], 5), ("t", 16))
    ]
    found = answers(model, *requests)
    shorter = 0
    for (text, options), answer in zip(requests, found, strict=True):
        fused = pair.prefill(text)
        ids = pair.generate(fused, max_new_tokens=options["max_gen_toks"], do_sample=False)[0, fused.kv.length + 1 :]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        ends = [at for stop in options["until"] if (at := whole.find(stop)) >= 0]
        assert answer == whole[: min(ends, default=len(whole))]
        shorter += answer != whole
    assert 0 < shorter < len(requests)


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
def test_several_answers_to_a_prompt_are_refused(option: str) -> None:
    with pytest.raises(C2CError, match=f"{option} is 2; one answer is written for each prompt"):
        answers(HarnessLM(pair_of()), ("Plants", {"max_gen_toks": 2, "do_sample": True, option: 2}))


def test_sampled_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options of the request, and of unlike lengths."""
    model = HarnessLM(pair_of(), batch_size=8)
    seen: list[Any] = []
    generate = decode.generate
    monkeypatch.setattr(
        decode, "generate", lambda lm, prompts, **options: seen.append(options) or generate(lm, prompts, **options)
    )
    torch.manual_seed(0)
    stop = {"until": ["a", "e"], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 50}
    found = answers(model, *[("Plants need light", stop)] * 8)
    assert len(set(found)) > 1 and not any("a" in text or "e" in text for text in found)
    assert all((o["do_sample"], o["temperature"], o["top_k"]) == (True, 2.0, 50) for o in seen)


# ---- chats ----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'What is "water"? 水 {'}]


@pytest.mark.parametrize("start", ["", "The answer is", "It is {"])
def test_every_model_reads_a_chat_in_its_own_template(start: str) -> None:
    pair = pair_of("gemma3", "qwen3")
    expected = pair.encode(CHAT, prefix=start)
    opened = [{"role": "assistant", "content": start}] if start else []
    context = HarnessLM(pair).apply_chat_template([*CHAT, *opened], add_generation_prompt=not start)
    assert HarnessLM(pair)._read(context, 1) == expected
    for method, ids in (("receiver", expected.receiver), ("sharer", expected.sharers[0])):
        assert HarnessLM(pair, method=method)._read(context, 1).receiver == ids  # type: ignore[arg-type]
    # A task may add to a context: that is the start of the answer.
    more = HarnessLM(pair)._read(f"{context} so", 1)
    assert more == pair.encode(CHAT, prefix=f"{start} so")


def test_few_shot_chats_and_system_messages_arrive(questions: list[Question]) -> None:
    pair = pair_of()
    model = HarnessLM(pair)
    shots = {"fewshot_split": "test", "num_fewshot": 2}
    found = run_task(model, questions, shots, system_instruction="Be brief.", limit=1)
    (context, choice), *_ = found["samples"]["own"][0]["arguments"]
    chat, end = json.JSONDecoder().raw_decode(context)
    assert [m["role"] for m in chat["chat"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert (context[end:], choice) == (ANSWER_PREFIX, " A")
    assert found["config"]["receiver"]["name"] == pair.receiver.name and found["config"]["method"] == "c2c"


def test_chat_templates_as_the_harness_asks_for_them() -> None:
    model = HarnessLM(pair_of())
    assert model.chat_template(True) == model.tokenizer.chat_template and model.chat_template(False) == ""
    assert model.tokenizer_name != ""
    with pytest.raises(C2CError, match="give none by name"):
        model.chat_template("rag")
    with pytest.raises(C2CError, match="no answer to go on with"):
        model.apply_chat_template(CHAT, add_generation_prompt=False)


# ---- what is too long -----------------------------------------------------------------------------------------------


def test_a_long_context_loses_its_first_tokens() -> None:
    prompt = PromptIds([5, 6, 7, 8], [[1, 2, 3]], [[0, -1, 1, 2]], [1.0], [True, False, True, True])
    assert shortened(prompt, 4, [3]) is prompt
    with pytest.warns(UserWarning, match="4 tokens loses the first 1"):
        got = shortened(prompt, 3, [2])
    assert got == PromptIds([6, 7, 8], [[2, 3]], [[-1, 0, 1]], [1.0], [False, True, True])


def test_a_long_context_is_scored_on_what_fits() -> None:
    lm, sharer = lm_of("llama", max_position_embeddings=40), lm_of("qwen3", 7, max_position_embeddings=48)
    torch.manual_seed(0)
    pair = C2C.from_models(lm, sharer, FuserConfig(hidden_dim=8, intermediate_dim=8, gate_init=1.0))
    text = "Plants make food from sunlight, water and air. " * 3
    for method in ("receiver", "c2c"):
        with pytest.warns(UserWarning, match="to fit the models"):
            (found,) = likelihoods(HarnessLM(pair, method=method), (text, "iron"))  # type: ignore[arg-type]
        more = lm.continuation_ids(" iron")
        ids = lm.need_tokenizer()(text.rstrip())["input_ids"][len(more) - 40 :]
        expected = continued(lm, ids, more)[0]
        assert (found[0] == pytest.approx(expected, abs=1e-3)) == (method == "receiver")
    with pytest.warns(UserWarning, match="to fit the models"):
        assert answers(HarnessLM(pair), (text, {"max_gen_toks": 8})) != [""]
    with pytest.raises(C2CError, match="don't fit the context"):
        answers(HarnessLM(pair), (text, {"max_gen_toks": 40}))


# ---- how it is made -------------------------------------------------------------------------------------------------


def test_from_the_arguments_of_the_harness(tiny_pair_folder: Path, questions: list[Question]) -> None:
    models = tiny_pair_folder.parent
    given = f"fuser={tiny_pair_folder},receiver={models / 'llama'},sharer={models / 'qwen3'},method=receiver"
    found = run_task("c2c", questions, model_args=given, batch_size=2, limit=2)
    assert found["config"]["method"] == "receiver" and len(found["samples"]["own"]) == 2
    for arguments, words in (
        ({"fuser": str(tiny_pair_folder), "pretrained": "gpt2"}, "unknown model argument 'pretrained'"),
        ({"fuser": str(tiny_pair_folder), "method": "both"}, "unknown method 'both'"),
        ({"fuser": str(tiny_pair_folder), "batch_size": "auto"}, "batch size 'auto'"),
        ({"fuser": str(tiny_pair_folder), "batch_size": 0}, "batch size 0"),
    ):
        with pytest.raises(C2CError, match=words):
            HarnessLM.create_from_arg_obj(arguments)


def test_kept_answers_are_not_asked_for_again(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`use_cache` of the harness, which a run that was cut off goes on from: each answer is handed over as it comes."""
    pair = pair_of()
    model = HarnessLM(pair, batch_size=4)
    fuse = pair.fuse

    def cut_off(batch: Any, calls: list[int] = []) -> Any:  # noqa: B006
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fuse(batch)

    monkeypatch.setattr(pair, "fuse", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_task(model, questions, use_cache=str(tmp_path / "kept"))
    asked_for: list[int] = []
    monkeypatch.setattr(pair, "fuse", lambda batch: asked_for.append(len(batch)) or fuse(batch))
    again = run_task(model, questions, use_cache=str(tmp_path / "kept"))
    assert sum(asked_for) == 5
    monkeypatch.undo()
    whole = run_task(model, questions)
    for one, other in zip(again["samples"]["own"], whole["samples"]["own"], strict=True):
        assert [p for p, _ in one["filtered_resps"]] == pytest.approx([p for p, _ in other["filtered_resps"]], abs=1e-3)


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    with pytest.raises(C2CError, match=r"cache2cache\[lm-eval\]"):
        importlib.import_module(adapter.__name__)


def test_the_command(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def c2c(*arguments: object) -> int:
        with pytest.raises(SystemExit) as leaving:
            main(["lm-eval", str(tiny_pair_folder), *map(str, arguments)])
        return int(leaving.value.code or 0)

    rows = write_questions(tmp_path / "rows.jsonl", 7)
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{'ABC'.index(answer)}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(json.dumps(task))
    models = ["--receiver", tiny_pair_folder.parent / "llama", "--sharer", tiny_pair_folder.parent / "qwen3"]
    common = [*models, "--include-path", tmp_path / "tasks", "--output", tmp_path / "out"]
    assert c2c(*common, "--tasks", "mine", "--limit", 4, "--batch-size", 2, "--apply-chat-template") == 0
    assert "|mine" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["results"]["mine"]["acc,none"] <= 1 and results["config"]["method"] == "c2c"
    assert "samples" not in results
    assert len((tmp_path / "out" / "samples_mine.jsonl").read_text().splitlines()) == 4
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert c2c(*common, "--tasks", "mine", "--method", "receiver") == 1
    assert "out holds results already; choose another --output" in capsys.readouterr().err.replace("\n", "")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    common[-1] = tmp_path / "other"
    assert c2c(*common, "--tasks", "nothing") == 1
    assert "the harness has no task 'nothing'" in capsys.readouterr().err
