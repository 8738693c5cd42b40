"""The baselines: the receiver fine-tuned alone with LoRA, and the receiver as its own sharer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cache2cache import C2C, C2CError
from cache2cache.cli import main
from cache2cache.config import LoraSpec
from cache2cache.decode import score
from cache2cache.evaluation.runner import evaluate
from cache2cache.kv import prefill_prompts
from cache2cache.tasks import load
from cache2cache.training.items import Item, prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.loss import loss_of, token_losses
from cache2cache.training.objective import targets
from cache2cache.training.single import Alone, SingleObjective, load_single, single_loss
from tiny import FAMILIES
from training.runs import (
    CHATS,
    RESPONSES,
    config_of,
    lm_of,
    pair_of,
    write_models,
    write_questions,
    write_recipe,
    write_rows,
)

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
SPEC = LoraSpec(rank=4, alpha=8)


def items_of(receiver: Any) -> list[Item]:
    tokenizer, alone = receiver.need_tokenizer(), Alone(receiver)
    return [
        Item(
            str(i), alone.encode([{"role": "user", "content": chat}]), tokenizer(r, add_special_tokens=False).input_ids
        )
        for i, (chat, r) in enumerate(zip(CHATS, RESPONSES, strict=True))
    ]


def scores_of(lm: Any, items: list[Item]) -> list[float]:
    """The responses' log-likelihoods as they are computed when answering: on a prefilled cache."""
    clean = prefill_prompts(lm, [item.prompt.receiver for item in items])
    return [group[0].logprob for group in score(lm, clean, [[item.response] for item in items])]


def trainer_of(folder: Path, **changes: Any) -> Trainer:
    receiver = lm_of("llama")
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}
    config = config_of(folder, **{"method": "single", "lora": lora, "weights_on_disk": "float32", **changes})
    data = prepare(Alone(receiver), config)
    torch.manual_seed(config.seed)
    return Trainer(SingleObjective(receiver, config.lora), config, None, data)


def shake(objective: SingleObjective) -> None:
    """An adapter that does something: a new one's second factors are zero."""
    torch.manual_seed(1)
    for parameter in objective.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


# ---- the loss --------------------------------------------------------------------------------------------------------


@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_with_a_new_adapter_is_what_the_receiver_scores(family: str) -> None:
    receiver = lm_of(family)
    items = items_of(receiver)
    loss, _ = SingleObjective(receiver, SPEC)(items, "sum")
    torch.testing.assert_close(-loss.item() * len(items), sum(scores_of(receiver, items)), rtol=1e-5, atol=1e-4)


@needs_peft
@pytest.mark.parametrize("per", ["token", "example", "sum"])
def test_loss_of_a_batch_is_that_of_its_items(per: str) -> None:
    receiver = lm_of("gemma3")
    objective, items = SingleObjective(receiver, SPEC), items_of(receiver)
    shake(objective)
    weights = [len(item.response) if per == "token" else 1 for item in items]
    alone = [objective([item], per)[0].item() for item in items]
    expected = sum(w * x for w, x in zip(weights, alone, strict=True)) / sum(weights)
    torch.testing.assert_close(objective(items, per)[0].item(), expected, rtol=1e-5, atol=1e-5)


@needs_peft
def test_gradients_are_those_of_prompt_and_response_read_as_one_text() -> None:
    """A prompt read without gradients, as a frozen receiver reads it, would give others."""
    receiver = lm_of("qwen3")
    objective = SingleObjective(receiver, SPEC)
    shake(objective)
    items, weights = items_of(receiver), list(objective.parameters())

    def texts() -> torch.Tensor:
        """Each text by itself, without padding."""
        total = torch.zeros(())
        for item in items:
            ids = torch.tensor([[*item.prompt.receiver, *item.response]])
            logprobs = objective.adapted[0](input_ids=ids).logits[0, :-1].log_softmax(-1)
            total -= logprobs[-len(item.response) :].gather(1, torch.tensor(item.response)[:, None]).sum()
        return total / sum(len(item.response) for item in items)

    got = torch.autograd.grad(objective(items, "token")[0], weights)
    expected = torch.autograd.grad(texts(), weights)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in receiver.model.parameters())


# ---- training --------------------------------------------------------------------------------------------------------


@needs_peft
def test_the_adapter_learns_and_is_read_back(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    trainer = trainer_of(tmp_path, epochs=4)
    objective = trainer.objective
    assert isinstance(objective, SingleObjective)
    receiver, items = objective.receiver, trainer.data.holdout
    before, plain = receiver.fingerprint, scores_of(receiver, items)
    losses: list[float] = []
    folder = trainer.run(lambda record: losses.append(record["loss"]))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert folder == tmp_path / "run" / "adapter"
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")] == [".lock"]

    # The receiver is untouched; the adapter read back scores as the trained one.
    assert scores_of(receiver, items) == plain and lm_of("llama").fingerprint == before
    tuned = load_single(lm_of("llama"), folder)
    objective.eval()
    with torch.no_grad():
        expected = -single_loss(objective.adapted[0], receiver, items, "sum")[0].item() * len(items)
    torch.testing.assert_close(sum(scores_of(tuned, items)), expected, rtol=1e-5, atol=1e-4)
    assert sum(scores_of(tuned, items)) > sum(plain) + 1
    assert not any(p.requires_grad for p in tuned.model.parameters())

    record = json.loads((folder / "training.json").read_text())
    assert record["receiver"]["fingerprint"] == before and record["training"]["steps"] == 16
    assert "sharer" not in record["training"]["recipe"] and record["training"]["holdout_loss"] > 0
    assert (folder / "training_ids.txt").read_text().split() == sorted(item.id for item in trainer.data.train)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


@needs_peft
def test_peft_alone_reads_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    write_rows(tmp_path / "rows.jsonl")
    folder = trainer_of(tmp_path, epochs=1).run()
    other = lm_of("llama")
    model = PeftModel.from_pretrained(lm_of("llama").model, str(folder)).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load_single(other, folder).model(input_ids=ids).logits)
        assert not torch.equal(model(input_ids=ids).logits, other.model(input_ids=ids).logits)


@needs_peft
@pytest.mark.parametrize("cut", [3, 7])
def test_interrupted_is_uninterrupted(tmp_path: Path, cut: int) -> None:
    """To the bit, with dropout, and at a step behind the last checkpoint."""
    write_rows(tmp_path / "rows.jsonl")
    whole = trainer_of(tmp_path, output=tmp_path / "whole", epochs=2, keep="best")

    class Cut(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == cut:
            raise Cut

    with pytest.raises(Cut):
        trainer_of(tmp_path, output=tmp_path / "cut", epochs=2, keep="best").run(stop)
    again = trainer_of(tmp_path, output=tmp_path / "cut", epochs=2, keep="best")
    folders = [whole.run(), again.run()]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    logs = [[json.loads(x) for x in (f.parent / "log.jsonl").read_text().splitlines()] for f in folders]
    assert [{**r, "seconds": 0} for r in logs[0]] == [{**r, "seconds": 0} for r in logs[1]]
    assert [r["step"] for r in logs[0]] == list(range(1, 9))


@needs_peft
def test_best_and_patience_look_at_the_adapter(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    settings = {"keep": "best", "patience": 2, "evaluate_every": 1, "learning_rate": 0.5, "clip": 1e3, "epochs": 5}
    trainer = trainer_of(tmp_path, **settings)
    records: list[dict[str, Any]] = []
    folder = trainer.run(records.append)
    assert trainer.out_of_patience and len(records) < trainer.steps
    best = min(records, key=lambda record: record["holdout_loss"])
    assert trainer.best_step == best["step"] < len(records)
    tuned, items = load_single(lm_of("llama"), folder), trainer.data.holdout
    with torch.no_grad():
        per_example = sum(single_loss(tuned.model, tuned, [item])[0].item() for item in items) / len(items)
    torch.testing.assert_close(per_example, best["holdout_loss"], rtol=1e-4, atol=1e-4)


@needs_peft
def test_dropout_is_the_adapters_and_only_in_training() -> None:
    receiver = lm_of("llama", attention_dropout=0.5)
    objective, items = SingleObjective(receiver, LoraSpec(dropout=0.5)), items_of(receiver)
    assert objective.train()(items, "token")[0] == objective(items, "token")[0]  # a new adapter adds nothing
    shake(objective)
    assert objective.train()(items, "token")[0] != objective(items, "token")[0]
    assert objective.eval()(items, "token")[0] == objective(items, "token")[0]
    assert not receiver.model.training


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@needs_peft
def test_wrong_adapters_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    folder = trainer_of(tmp_path, epochs=1).run()
    with pytest.raises(C2CError, match="holds no adapter"):
        load_single(lm_of("llama"), tmp_path)
    with pytest.raises(C2CError, match="doesn't fit"):
        load_single(lm_of("qwen3"), folder)
    with pytest.warns(UserWarning, match="trained for weights"):
        load_single(lm_of("llama", seed=5), folder)
    with pytest.raises(C2CError, match="target_modules"):
        SingleObjective(lm_of("llama"), LoraSpec(target_modules=["no_such_layer"]))
    # A configuration that asks for terabytes takes no memory: the file's tensors decide.
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 10**10}))
    with pytest.raises(C2CError, match="doesn't fit"):
        load_single(lm_of("llama"), folder)
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4}))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(C2CError, match="no weights for"):
        load_single(lm_of("llama"), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(C2CError, match="doesn't fit"):
        load_single(lm_of("llama"), folder)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(C2CError, match=r"cache2cache\[lora\]"):
        SingleObjective(lm_of("llama"), SPEC)


def test_the_baselines_need_no_sharer_and_ignore_one(tmp_path: Path) -> None:
    base = config_of(tmp_path).model_dump(mode="json")
    for method in ("single", "identical"):
        named = config_of(tmp_path, method=method, store=str(tmp_path / "store"))
        assert named.sharer == named.receiver
        assert (named.store is None) == (method == "single")
        without = {k: v for k, v in base.items() if k != "sharer"}
        assert type(named).model_validate({**without, "method": method}).sharer == named.receiver
    with pytest.raises(ValidationError, match="sharer"):
        type(named).model_validate({k: v for k, v in base.items() if k != "sharer"})


# ---- evaluation and the command line ---------------------------------------------------------------------------------


@needs_peft
def test_evaluation_leaves_the_other_methods_as_they_are(tmp_path: Path) -> None:
    questions = load(str(write_questions(tmp_path / "questions.jsonl")), "test", None)
    write_rows(tmp_path / "rows.jsonl")
    folder = trainer_of(tmp_path).run()
    methods = ("receiver", "sharer", "c2c", "other")
    pair = pair_of()
    before = evaluate(pair, "mine", questions, tmp_path / "before.jsonl", methods=methods, batch_size=4)
    tuned = load_single(pair.receiver, folder)
    after = evaluate(
        pair, "mine", questions, tmp_path / "after.jsonl", methods=["single", *methods], single=tuned, batch_size=4
    )
    assert [a for a in after if a.method != "single"] == before
    mine = {a.id: a.logprobs for a in after if a.method == "single"}
    plain = {a.id: a.logprobs for a in before if a.method == "receiver"}
    assert mine.keys() == plain.keys() and all(mine[i] != plain[i] for i in mine)
    with pytest.raises(C2CError, match="single"):
        evaluate(pair, "mine", questions, tmp_path / "none.jsonl", methods=["single"])


@needs_peft
def test_single_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, epochs=1, lora={"rank": 2})
    questions = write_questions(tmp_path / "questions.jsonl")
    main_ok("train", recipe, "--set", "method=single", "--output", tmp_path / "alone", "--dry-run")
    assert not (tmp_path / "alone").exists() and "what is trained" in capsys.readouterr().out
    main_ok("train", recipe, "--set", "method=single", "--output", tmp_path / "alone")
    assert capsys.readouterr().out.strip() == str(tmp_path / "alone" / "adapter")
    main_ok("train", recipe)
    evaluation = ["evaluate", tmp_path / "run" / "fuser", "--task", questions, "--output", tmp_path / "scores"]
    main_ok(*evaluation, "--method", "receiver")
    main_ok(*evaluation, "--method", "receiver", "--single", tmp_path / "alone" / "adapter")
    result = json.loads((tmp_path / "scores" / "summary.json").read_text())["likelihood"]["tasks"][str(questions)]
    assert set(result) == {"receiver", "single"} and "receiver fine-tuned alone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["precompute", str(recipe), "--set", "method=single"])
    assert "nothing to precompute" in capsys.readouterr().err


def main_ok(*arguments: object) -> None:
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        assert not leave.code


def test_identical_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path with the receiver as its own sharer, which is in memory once."""
    import cache2cache.models.load as loading

    write_models(tmp_path)
    recipe = write_recipe(tmp_path, epochs=1, weights_on_disk="float32", method="identical")
    read: list[Path] = []
    original = loading._read_folder

    def counted(folder: Path, **options: Any) -> Any:
        read.append(folder)
        return original(folder, **options)

    monkeypatch.setattr(loading, "_read_folder", counted)
    main_ok("precompute", recipe, "--store", tmp_path / "store")
    main_ok("train", recipe, "--set", f"store={tmp_path / 'store'}", "--output", tmp_path / "stored")
    main_ok("train", recipe, "--output", tmp_path / "live")
    questions = write_questions(tmp_path / "questions.jsonl")
    main_ok("evaluate", tmp_path / "live" / "fuser", "--task", questions, "--output", tmp_path / "scores")
    assert read == [tmp_path / "llama"] * 4  # one a command
    saved = json.loads((tmp_path / "live" / "fuser" / "config.json").read_text())["fuser"]
    assert saved["sharer"] == saved["receiver"]
    answers = [json.loads(row) for row in (tmp_path / "scores" / "samples.jsonl").read_text().splitlines()]
    by = {m: {a["id"]: a["logprobs"] for a in answers if a["method"] == m} for m in ("receiver", "sharer", "c2c")}
    for name, own in by["receiver"].items():
        torch.testing.assert_close(own, by["sharer"][name], rtol=1e-4, atol=1e-4)
        assert by["c2c"][name] != own
    stored, live = ([json.loads(x)["loss"] for x in (tmp_path / n / "log.jsonl").open()] for n in ("stored", "live"))
    torch.testing.assert_close(stored, live, rtol=1e-2, atol=1e-2)  # the store holds bfloat16


def test_a_model_named_twice_is_loaded_once(tmp_path: Path) -> None:
    write_models(tmp_path)
    main_model = str(tmp_path / "llama")
    torch.manual_seed(0)
    pair_of("llama", "llama").save_pretrained(tmp_path / "fuser")
    with pytest.warns(UserWarning, match="trained for sharer"):
        same = C2C.from_pretrained(tmp_path / "fuser", receiver=main_model, sharers=Path(main_model))
    assert same.receiver is same.sharers[0]


def test_loss_of_counts_each_token_once() -> None:
    item = [Item("a", Alone(lm_of("llama")).encode("x"), [3, 4]), Item("b", Alone(lm_of("llama")).encode("x"), [5])]
    target = targets(item)
    assert target.tolist() == [[3, 4], [5, -100]]
    logits = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(0))
    nll = -logits.log_softmax(-1)
    a, b, c = nll[0, 0, 3], nll[0, 1, 4], nll[1, 0, 5]
    torch.testing.assert_close(loss_of(*token_losses(logits, target), target, "token")[0], (a + b + c) / 3)
    torch.testing.assert_close(loss_of(*token_losses(logits, target), target, "example")[0], ((a + b) / 2 + c) / 2)
    torch.testing.assert_close(loss_of(*token_losses(logits, target), target, "sum")[0], (a + b + c) / 2)
