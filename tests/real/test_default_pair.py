"""The pair that comes along, with its real models: SmolLM2-135M-Instruct <- Qwen2.5-Coder-1.5B-Instruct; and Gemma 3.

The models are fetched on first use; where they can't be, the tests are skipped.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, FuserConfig
from cache2cache.evaluation.runner import evaluate
from cache2cache.fuser import checkpoint
from cache2cache.models import LM
from cache2cache.remote import RemoteSharer
from cache2cache.tasks import Question
from cache2cache.tasks.prompts import extract_letter, short_prompt
from real.conftest import fetched
from serving.wire import serve_process, stop, until_it_serves

ROOT = Path(__file__).resolve().parents[2]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}

QUESTIONS = [
    Question("ice", "What does ice turn into when it melts?", ("water", "steam", "salt", "sand"), 0),
    Question("sky", "Which object gives the Earth most of its light?", ("the Moon", "a cloud", "Mars", "the Sun"), 3),
    Question("nail", "Which of these does a magnet attract?", ("a plank", "an iron nail", "a glass", "a sock"), 1),
    Question("fish", "What does a fish use to breathe under water?", ("fins", "scales", "gills", "its tail"), 2),
    Question("leg", "How many legs does a spider have?", ("four", "six", "eight", "ten"), 2),
    Question("plant", "What do plants need to make their own food?", ("sunlight", "sugar", "plastic", "darkness"), 0),
    Question("bone", "Which organ pumps blood through the body?", ("the lung", "the heart", "the liver", "skin"), 1),
    Question("year", "How long does the Earth take around the Sun?", ("a day", "a week", "a month", "a year"), 3),
]  # fmt: skip


def chat_of(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": short_prompt(question)}]


def alone(lm: LM, ids: list[int], **options: Any) -> list[int]:
    """The new tokens of stock `generate`."""
    given = torch.tensor([ids], device=lm.device)
    out = lm.model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=lm.pad_token_id, **options)
    return out[0, len(ids) :].tolist()


# ---- the packaged fuser ---------------------------------------------------------------------------------------------


def test_the_fuser_names_its_models_and_its_training(smollm2: LM) -> None:
    folder = checkpoint.resolve(None)
    config, saved = checkpoint.read_config(folder)
    assert config.receiver is not None and config.sharer is not None
    assert (config.receiver.name, config.sharer.name) == ("smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct")
    assert config.receiver.fingerprint == smollm2.fingerprint
    assert saved["training"]["steps"] > 0 and saved["training"]["recipe"]["data"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25 * 10**6


def test_it_answers(pair: C2C) -> None:
    """One question, greedily: the same from `chat`, `generate` and `stream`, and a letter that it offers."""
    question = QUESTIONS[1]
    fused = pair.prefill(chat_of(question))
    # All but the receiver's own default system message, of which the sharer's template has another.
    assert fused.coverage[0][0] > 0.7 and fused.fused_positions[0] > 20 and fused.bytes_passed > 10**6
    tokens = pair.generate(fused, **GREEDY)[0, fused.input_ids.shape[1] :].tolist()
    chunks = list(pair.stream(fused, **GREEDY))
    assert [chunk.token for chunk in chunks if chunk.token is not None] == tokens
    text = "".join(chunk.text for chunk in chunks)
    assert text == pair.chat(chat_of(question), **GREEDY)
    assert text == pair.receiver.need_tokenizer().decode(tokens, skip_special_tokens=True)
    assert extract_letter(text, 4) == question.letter, text


def test_a_batch_is_its_rows(pair: C2C) -> None:
    chats = [chat_of(QUESTIONS[0]), chat_of(QUESTIONS[7]), [{"role": "user", "content": "What is ice?"}]]
    fused = pair.prefill(chats)
    together = pair.generate(fused, **GREEDY)[:, fused.input_ids.shape[1] :]
    end = pair.receiver.need_tokenizer().eos_token_id
    for row, chat in enumerate(chats):
        single = pair.prefill(chat)
        new = pair.generate(single, **GREEDY)[0, single.input_ids.shape[1] :].tolist()
        expected = together[row].tolist()
        assert new == expected[: len(new)]
        assert len(new) == len(expected) or new[-1] == end


def test_what_the_sharer_knows_arrives(pair: C2C, tmp_path: Path) -> None:
    check_that_content_arrives(pair, tmp_path)


@pytest.mark.filterwarnings("error")  # these are the weights that the fuser was trained for
def test_what_the_sharer_knows_arrives_in_gemma(gemma: LM, qwen: LM, tmp_path: Path) -> None:
    folder = ROOT / "fusers" / "gemma-3-270m"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25 * 10**6
    check_that_content_arrives(C2C.from_pretrained(folder, receiver=gemma, sharers=qwen), tmp_path)


def check_that_content_arrives(pair: C2C, folder: Path) -> None:
    """Easy questions: C2C knows more answers than the receiver alone and than with another question's cache."""
    answers = evaluate(
        pair,
        "easy",
        QUESTIONS,
        folder / "samples.jsonl",
        prompt="short",
        methods=["receiver", "c2c", "other"],
        batch_size=8,
    )
    right = {m: sum(a.correct for a in answers if a.method == m) for m in ("receiver", "c2c", "other")}
    chosen = {m: [a.choice for a in answers if a.method == m] for m in right}
    assert chosen["c2c"] != chosen["receiver"]
    assert right["c2c"] >= 5 and right["c2c"] > max(right["receiver"], right["other"]), right


def test_closed_gates_are_smollm2_alone(smollm2: LM, qwen: LM) -> None:
    closed = C2C.from_models(smollm2, qwen, FuserConfig(hidden_dim=16, intermediate_dim=16))
    for question in QUESTIONS[:2]:
        ids = list(closed.encode(chat_of(question)).receiver)
        expected = alone(smollm2, ids, do_sample=False, max_new_tokens=16)
        fused = closed.prefill(chat_of(question))
        assert closed.generate(fused, do_sample=False, max_new_tokens=16)[0, len(ids) :].tolist() == expected
        assert fused.bytes_passed == 0


# ---- a different family ---------------------------------------------------------------------------------------------

# Beyond the window of 512 positions that five of six layers of Gemma 3 see.
LONG = [{"role": "user", "content": "Plants make food from sunlight, water and air. " * 70 + "What do plants make?"}]
SHORT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize("gemma_receives", [True, False])
def test_gemma_beyond_its_window(gemma: LM, smollm2: LM, gemma_receives: bool) -> None:
    receiver, sharer = (gemma, smollm2) if gemma_receives else (smollm2, gemma)
    closed = C2C.from_models(receiver, sharer, FuserConfig(hidden_dim=16, intermediate_dim=16))
    assert gemma.text_config.sliding_window == 512
    encoded = [closed.encode(chat) for chat in (LONG, SHORT)]
    assert min(len(encoded[0].receiver), len(encoded[0].sharers[0])) > 600
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    fused = closed.prefill([LONG, SHORT])
    together = closed.generate(fused, **options)[:, fused.input_ids.shape[1] :]
    for row, prompt in enumerate(encoded):
        assert together[row].tolist() == alone(receiver, list(prompt.receiver), **options)

    torch.manual_seed(0)
    opened = C2C.from_models(receiver, sharer, FuserConfig(hidden_dim=16, intermediate_dim=16, gate_init=1.0))
    cache = opened.prefill([LONG, SHORT])
    assert cache.fused_positions[0] > 600 and cache.coverage[0][0] > 0.9
    changed = (cache.kv.values - fused.kv.values).abs().amax((0, 2, 4))  # (rows, positions)
    padding = cache.kv.length + 1 - len(encoded[1].receiver)
    assert int((changed[0] > 0).sum()) == cache.fused_positions[0]
    assert int((changed[1, padding:] > 0).sum()) == cache.fused_positions[1] and not changed[1, :padding].any()
    single = opened.prefill(SHORT)
    torch.testing.assert_close(cache.kv.values[:, 1, :, padding:], single.kv.values[:, 0], atol=1e-3, rtol=1e-3)
    out = opened.generate(single, **options)[0, single.input_ids.shape[1] :].tolist()
    assert [c.token for c in opened.stream(single, **options) if c.token is not None] == out and len(out) == 8


# ---- several sharers, and one in another process --------------------------------------------------------------------


def test_two_sharers_of_unlike_size(pair: C2C, smollm2: LM) -> None:
    """The packaged fuser and one for the 0.5B, which knows nothing of it, at once."""
    small = fetched("qwen2.5-coder-0.5b-instruct", "bfloat16" if pair.sharers[0].dtype == torch.bfloat16 else "auto")
    torch.manual_seed(0)
    config = FuserConfig(hidden_dim=16, intermediate_dim=16, gate_init=1.0)
    other = C2C.from_models(smollm2, small, config)
    both = C2C(smollm2, [*pair.sharers, small], [*pair.fusers, *other.fusers])  # type: ignore[list-item]
    swapped = C2C(smollm2, [small, *pair.sharers], [*other.fusers, *pair.fusers])  # type: ignore[list-item]
    chats = [chat_of(QUESTIONS[1]), chat_of(QUESTIONS[4])]
    fused = both.prefill(chats)
    torch.testing.assert_close(fused.kv.values, swapped.prefill(chats).kv.values, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(fused.kv.values, both.prefill(chats, mode="sequential").kv.values, atol=1e-3)
    assert both.chat(chats, sharer_mask=0b01, **GREEDY) == pair.chat(chats, **GREEDY)
    one_each = both.chat(chats, sharer_mask=[0b10, 0b01], **GREEDY)
    assert one_each == [other.chat(chats[0], **GREEDY), pair.chat(chats[1], **GREEDY)]
    assert fused.bytes_passed == sum(both.prefill(chats, sharer_mask=m).bytes_passed for m in (1, 2))


def test_gemma_in_another_process(gemma: LM, smollm2: LM) -> None:
    """The same tokens as with Gemma here, also after its process was killed and started again."""
    torch.manual_seed(0)
    config = FuserConfig(hidden_dim=16, intermediate_dim=16, gate_init=1.0)
    here = C2C.from_models(smollm2, gemma, config)
    expected = [here.generate(chat, **GREEDY).tolist() for chat in (LONG, SHORT)]
    first = serve_process("gemma-3-270m", 0)
    processes = [first]
    try:
        remote = RemoteSharer(until_it_serves(first), attempts=12)
        away = C2C(smollm2, [remote], list(here.fusers))  # type: ignore[arg-type]
        assert away.generate(LONG, **GREEDY).tolist() == expected[0]
        transfer = away.prefill(SHORT).transfers[0]
        assert transfer.attempts == 1 and transfer.nbytes > away.prefill(SHORT).bytes_passed
        # Killed while the long prompt is under way; the same request is answered by its successor.
        killer = threading.Timer(0.1, first.kill)
        killer.start()
        restarted = threading.Timer(0.5, lambda: processes.append(serve_process("gemma-3-270m", remote._port or 0)))
        restarted.start()
        for _ in range(3):
            assert away.generate(LONG, **GREEDY).tolist() == expected[0]
            assert away.generate(SHORT, **GREEDY).tolist() == expected[1]
        restarted.join()
        assert first.wait(10) != 0 and len(processes) == 2
    finally:
        for process in processes:
            stop(process)
