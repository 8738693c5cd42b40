"""The training loop: what the loss is, where gradients go, and that a run doesn't notice being interrupted."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache2cache import C2C, C2CError
from cache2cache.kv import CACHE, KV
from cache2cache.models import LM
from cache2cache.training import loop
from cache2cache.training.data import Example
from cache2cache.training.loop import Item, Prepared, Trainer, batches, optimizer_for, prepare, rate, response_loss
from cache2cache.training.store import Asked, Store
from tiny import FAMILIES
from training.runs import CHATS, config_of, items_of, lm_of, pair_of, recipe_of, write_models, write_recipe, write_rows

SHARER_OF = dict(zip(FAMILIES, [*FAMILIES[1:], FAMILIES[0]], strict=True))


def nll_of_stock(lm: LM, item: Item) -> torch.Tensor:
    """Negative log-likelihood of each response token, from one ordinary forward pass over prompt and response."""
    ids = [*item.prompt.receiver, *item.response]
    logprobs = lm.model(torch.tensor([ids])).logits[0, -len(item.response) - 1 : -1].log_softmax(-1)
    return -logprobs.gather(1, torch.tensor(item.response)[:, None])[:, 0]


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("receiver", FAMILIES)
def test_loss_with_closed_gates_is_that_of_stock_transformers(receiver: str) -> None:
    """Prompts and responses of unequal lengths in one batch; the second prompt is far beyond Gemma's window of 8."""
    pair = pair_of(receiver, SHARER_OF[receiver], gate_init=0.0)
    pair.fusers.eval()  # hard gates
    items = items_of(pair)
    assert len({len(i.prompt.receiver) for i in items}) == 4 and len({len(i.response) for i in items}) >= 3
    expected = [nll_of_stock(pair.receiver, item) for item in items]
    loss, _ = response_loss(pair, items, None)
    assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)
    loss, _ = response_loss(pair, items, None, per="example")
    assert loss.item() == pytest.approx(sum(e.mean().item() for e in expected) / 4, rel=1e-5)
    loss, _ = response_loss(pair, items, None, per="sum")
    assert loss.item() == pytest.approx(sum(e.sum().item() for e in expected) / 4, rel=1e-5)


@pytest.mark.parametrize("receiver", FAMILIES)
def test_loss_with_open_gates_is_what_the_pair_scores(receiver: str) -> None:
    """Training sees the very distribution that answers are drawn from, and knows which responses are greedy."""
    pair = pair_of(receiver, SHARER_OF[receiver], gating=False, dropout=0.0)
    items = items_of(pair)
    greedy = pair.generate(items[1].prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, -5:].tolist()
    items[1] = Item("greedy", items[1].prompt, greedy)
    scores = [pair.score(i.prompt, [i.response])[0] for i in items]
    closed = [nll_of_stock(pair.receiver, item).sum().item() for item in items]
    assert all(abs(s.logprob + c) > 0.01 for s, c in zip(scores, closed, strict=True))  # open gates do matter
    pair.fusers.train()
    loss, is_greedy = response_loss(pair, items, None)
    total = sum(len(i.response) for i in items)
    assert loss.item() == pytest.approx(-sum(s.logprob for s in scores) / total, rel=1e-4)
    loss, _ = response_loss(pair, items, None, per="example")
    assert loss.item() == pytest.approx(-sum(s.logprob / s.num_tokens for s in scores) / 4, rel=1e-4)
    assert is_greedy.tolist() == [s.is_greedy for s in scores] == [False, True, False, False]


# ---- the gradients --------------------------------------------------------------------------------------------------


def test_gradients_reach_the_fuser_only() -> None:
    pair = pair_of("gemma3", "qwen2", variant="c2c-c")
    pair.fusers.train()
    loss, _ = response_loss(pair, items_of(pair), None)
    loss.backward()
    for lm in (pair.receiver, *pair.sharers):
        for parameter in lm.model.parameters():
            assert not parameter.requires_grad and parameter.grad is None
    for name, parameter in pair.fusers.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("receiver", FAMILIES)
def test_gradients_agree_with_finite_differences(receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, with dropout and gate noise drawn alike each time: along each weight's own gradient."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the logits stay double
    pair = pair_of(receiver, SHARER_OF[receiver], torch.float64, dropout=0.2, normalize=True)
    fuser = pair.fusers[0].double().train()
    items = items_of(pair)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return response_loss(pair, items, None, "example")[0]

    value = loss()
    assert value.dtype == torch.float64
    value.backward()
    for name, parameter in fuser.named_parameters():
        gradient = parameter.grad.clone()
        size = gradient.norm().item()
        step = 4e-3 * gradient / size
        with torch.no_grad():
            parameter.add_(step)
            above = loss().item()
            parameter.sub_(2 * step)
            below = loss().item()
            parameter.add_(step)
        assert (above - below) / 8e-3 == pytest.approx(size, rel=1e-3, abs=1e-4), name


# ---- the store ------------------------------------------------------------------------------------------------------


def test_only_what_the_fuser_reads_comes_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other layers are not read, and what is in their place doesn't matter."""
    write_rows(tmp_path / "rows.jsonl")
    pair = pair_of(layer_map=[(0, 1), (2, 2)])
    data = prepare(pair, config_of(tmp_path))
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    store.fill(pair.sharers[0], [list(i.prompt.sharers[0]) for i in data.train + data.holdout])
    read, asked = Store._read, []

    def poisoned(self: Store, what: Asked, out: torch.Tensor) -> KV:
        asked.append(what.layers)
        kv = read(self, what, out)
        for x in (kv.keys, kv.values):
            x[0] = x[3] = math.nan
        return kv

    whole = loop.response_loss(pair, data.train[:4], store)[0]
    monkeypatch.setattr(Store, "_read", poisoned)
    assert torch.equal(loop.response_loss(pair, data.train[:4], store)[0], whole)
    assert asked == [(1, 3)]


def test_training_from_the_store_is_training_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses step by step, the live sharer's caches being rounded to bfloat16 as the store keeps them."""
    write_rows(tmp_path / "rows.jsonl")
    settings = {"normalize": True, "dropout": 0.1}
    pair = pair_of(**settings)
    data = prepare(pair, config_of(tmp_path))
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    store.fill(pair.sharers[0], [list(i.prompt.sharers[0]) for i in data.train + data.holdout])

    def losses(name: str, store: Store | None) -> list[float]:
        seen: list[float] = []
        config = config_of(tmp_path, output=tmp_path / name, epochs=2)
        Trainer(pair_of(**settings), config, store, data).run(lambda record: seen.append(record["loss"]))
        return seen

    compute = loop.prefill

    def never(*_: Any) -> KV:
        raise AssertionError("the sharer has nothing to compute")

    monkeypatch.setattr(loop, "prefill", never)
    stored = losses("stored", store)
    monkeypatch.setattr(loop, "prefill", lambda *a: compute(*a).to(torch.bfloat16).to(torch.float32))
    live = losses("live", None)
    monkeypatch.setattr(loop, "prefill", lambda *a: KV(*(torch.zeros_like(x) for x in vars(compute(*a)).values())))
    silent = losses("silent", None)
    assert len(stored) == 8 and stored == pytest.approx(live, rel=1e-4)
    assert stored != pytest.approx(silent, rel=1e-3)  # the losses do depend on what the sharer says


# ---- order and rates ------------------------------------------------------------------------------------------------


def test_batches() -> None:
    pair = pair_of()
    base = items_of(pair)[0]
    items = [Item(str(n), base.prompt, [1] * (1 + n * 7 % 50)) for n in range(150)]
    epochs = [batches(items, 4, seed=3, epoch=epoch) for epoch in range(2)]
    assert epochs[0] == batches(list(items), 4, seed=3, epoch=0)  # the same in every run
    order = [[item.id for batch in epoch for item in batch] for epoch in epochs]
    for ids, made in zip(order, epochs, strict=True):
        assert sorted(ids) == sorted(item.id for item in items)  # each once an epoch
        assert sorted(len(batch) for batch in made) == [2] + [4] * 37
        spread = [max(i.length for i in batch) - min(i.length for i in batch) for batch in made]
        assert sum(spread) / len(spread) < 6  # like lengths together; at random it would be about 30
    assert order[0] != order[1]
    other = batches(items, 4, seed=4, epoch=0)
    assert [item.id for batch in other for item in batch] != order[0]


def test_rate() -> None:
    """Up in a tenth of the steps, then straight down to zero."""
    assert [rate(step, 20, 0.1) for step in (0, 1, 2, 11, 20)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert [rate(step, 10, 0.0) for step in (0, 1, 10)] == [1.0, 1.0, 0.0]
    assert [rate(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(0, 1, 0.1) == 1.0


@pytest.mark.parametrize("variant", ["c2c", "c2c-c"])
def test_decay_is_on_matrices_only(tmp_path: Path, variant: str) -> None:
    fuser = pair_of(variant=variant).fusers[0]
    config = config_of(tmp_path, weight_decay=0.5, learning_rate=0.1, gate_learning_rate=0.7)
    optimizer = optimizer_for(fuser, config)  # type: ignore[arg-type]
    before = {name: parameter.detach().clone() for name, parameter in fuser.named_parameters()}
    for parameter in fuser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrices = 0
    for name, parameter in fuser.named_parameters():
        is_matrix = parameter.dim() == 3 and parameter.shape[1] > 1  # (G, fan in, fan out); vectors are (G, 1, n)
        matrices += is_matrix
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if is_matrix else 1.0))
    assert matrices >= 10
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in fuser.named_parameters() if rates[id(p)] == 0.7} == {"gate_logit"}
    assert len(rates) == len(before)


# ---- items ----------------------------------------------------------------------------------------------------------


def test_prepare_cuts_leaves_out_and_sets_aside(tmp_path: Path) -> None:
    rows = [
        {"prompt": "short", "completion": "one two three four five six seven eight nine ten " * 3},
        {"prompt": "The capital of France is Paris. " * 2, "completion": "x"},  # too long for the receiver alone
        *({"prompt": f"row {n}", "completion": "yes"} for n in range(8)),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = pair_of("qwen3", "llama")  # one token a byte
    data = prepare(pair, config_of(tmp_path, max_tokens=60, holdout=3))
    assert (len(data.train), len(data.holdout), data.too_long) == (6, 3, 1)
    assert not {i.id for i in data.train} & {i.id for i in data.holdout}
    by_id = {i.id.rpartition(":")[2]: i for i in data.train + data.holdout}
    assert by_id["0"].length == 60 and "1" not in by_id
    tokenizer = pair.receiver.need_tokenizer()
    assert tokenizer.decode(by_id["5"].response) == "yes<|im_end|>"  # the end of the turn is learned too
    again = prepare(pair, config_of(tmp_path, max_tokens=60, holdout=3))
    assert again == data
    with pytest.raises(C2CError, match="9 examples are left \\(1 longer than max_tokens 60\\), 9 of them"):
        prepare(pair, config_of(tmp_path, max_tokens=60, holdout=9))


def test_a_response_that_does_not_end_has_no_end_token() -> None:
    tokenizer = lm_of("qwen3").need_tokenizer()
    example = Example("x:1", ({"role": "user", "content": "?"},), "The answer is", " B", ends=False)
    assert tokenizer.decode(loop.response_ids(tokenizer, example)) == " B"
    with pytest.raises(C2CError, match="x:1 has no tokens"):
        loop.response_ids(tokenizer, Example("x:1", (), "", "", ends=False))


# ---- runs that stop and go on ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def train(recipe: Path, output: Path, *more: str, dies: str = "") -> subprocess.CompletedProcess[str]:
    """`c2c train` in a process of its own; `dies` is the name of a signal that it sends itself in its seventh step."""
    code = (
        "import os, signal, sys\n"
        "from cache2cache.cli import main\n"
        "from cache2cache.training.loop import Trainer\n"
        "def step(self, batch, original=Trainer._train_step):\n"
        "    if self.step == 6 and sys.argv[1]:\n"
        "        os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "    return original(self, batch)\n"
        "Trainer._train_step = step\n"
        "main(sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", code, dies, "train", str(recipe), "--output", str(output), *more]
    return subprocess.run(command, capture_output=True, text=True)


def log_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_an_interrupted_run_ends_as_if_it_had_not_been(models: Path, tmp_path: Path) -> None:
    """After Ctrl-C and after kill -9, bit for bit: weights, statistics, log and what was measured."""
    recipe = write_recipe(tmp_path, **{k: v for k, v in recipe_of(models).items() if k in ("receiver", "sharer")})
    whole = train(recipe, tmp_path / "whole")
    assert whole.returncode == 0 and whole.stdout == f"{tmp_path / 'whole' / 'fuser'}\n", whole.stderr
    expected = (tmp_path / "whole" / "fuser" / "fuser.safetensors").read_bytes()
    log = log_of(tmp_path / "whole")
    assert [row["step"] for row in log] == list(range(1, 13))
    assert [row["step"] for row in log if "holdout_loss" in row] == [5, 10, 12]
    assert len({row["loss"] for row in log}) == 12
    for name, code, saved in (("SIGINT", 130, 7), ("SIGKILL", -9, 6)):
        output = tmp_path / name
        stopped = train(recipe, output, dies=name)
        assert stopped.returncode == code, stopped.stderr
        if name == "SIGINT":
            assert stopped.stderr.rstrip().endswith("interrupted") and "Traceback" not in stopped.stderr
        assert not (output / "fuser").exists()
        assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == saved
        (output / "log.jsonl").open("a").write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # done, but not saved
        (output / ".checkpoint.pt").write_bytes(b"half")
        again = train(recipe, output)
        assert again.returncode == 0, again.stderr
        assert (output / "fuser" / "fuser.safetensors").read_bytes() == expected
        assert log_of(output) == log
        assert not (output / ".checkpoint.pt").exists()
        one, other = (json.loads((o / "fuser" / "config.json").read_text()) for o in (tmp_path / "whole", output))
        assert one["training"].pop("seconds") > 0 < other["training"].pop("seconds")
        assert one == other and one["training"]["holdout_loss"] == log[-1]["holdout_loss"]


class Run:
    """A run in this process: the same tiny data each time, other settings as asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_rows(folder / "rows.jsonl")

    def trainer(self, rows: int = 22, **changes: Any) -> Trainer:
        write_rows(self.folder / "rows.jsonl", rows)
        pair = pair_of(dropout=0.1, normalize=True)
        config = config_of(self.folder, **changes)
        return Trainer(pair, config, None, prepare(pair, config))


@pytest.fixture
def runs(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_training_changes_the_fuser_and_no_model(runs: Run) -> None:
    trainer = runs.trainer()
    pair = trainer.pair
    frozen = [lm.model.state_dict() for lm in (pair.receiver, *pair.sharers)]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in frozen]
    first = {name: tensor.clone() for name, tensor in trainer.fuser.state_dict().items()}
    records: list[dict[str, Any]] = []
    folder = trainer.run(records.append)
    assert all(same_weights(a, b) for a, b in zip(frozen, before, strict=True))
    assert not any(p.requires_grad or p.grad is not None for lm in (pair.receiver, pair.sharers[0]) for p in lm.model.parameters())  # fmt: skip # noqa: E501
    for name, tensor in trainer.fuser.state_dict().items():
        assert not torch.equal(tensor, first[name]), name
    assert records[-1]["holdout_loss"] < records[4]["holdout_loss"]
    assert records[0]["rate"] == 1e-2 and records[-1]["rate"] == 0  # what the next step would have
    assert (folder / "training_ids.txt").read_text().split("\n")[:-1] == sorted(i.id for i in trainer.data.train)
    saved = json.loads((folder / "config.json").read_text())["training"]
    assert (saved["examples"], saved["steps"], saved["recipe"]["epochs"]) == (16, 12, 3)
    again = C2C.from_pretrained(folder, receiver=pair.receiver, sharers=pair.sharers)
    pair.fusers.eval()
    torch.testing.assert_close(again.prefill(CHATS[0]).kv.keys, pair.prefill(CHATS[0]).kv.keys, atol=0.05, rtol=0.05)


def test_calibration_measures_what_is_fused(runs: Run) -> None:
    """Mean and deviation of each channel over the positions that the first prompts fuse, computed one by one."""
    trainer = runs.trainer()
    pair, fuser, items = trainer.pair, trainer.fuser, trainer.data.train[:5]
    loop.calibrate(pair, items, None, batch_size=2)
    keys: list[torch.Tensor] = []
    for item in items:
        mine, other, index = item.prompt.receiver[:-1], item.prompt.sharers[0], item.prompt.maps[0][:-1]
        cache = pair.receiver.model(torch.tensor([mine]))[CACHE].layers[2].keys
        theirs = pair.sharers[0].model(torch.tensor([other]))[CACHE].layers[3].keys
        for t, s in enumerate(index):
            if s >= 0:
                keys.append(torch.cat([cache[0, :, t].flatten(), theirs[0, :, s].flatten()]))
    x = torch.stack(keys)
    last = list(fuser.receiver_layers.tolist()).index(2)
    width = fuser.receiver_mean.shape[-1]
    assert fuser.config.layer_map[last] == (2, 3)
    got = torch.cat([fuser.receiver_mean[last, 0], fuser.sharer_mean[last, 0]])
    torch.testing.assert_close(got, x.mean(0), atol=1e-4, rtol=1e-4)
    got = torch.cat([fuser.receiver_std[last, 0], fuser.sharer_std[last, 0]])
    torch.testing.assert_close(got, x.std(0), atol=1e-4, rtol=1e-4)
    assert width == 24


def test_a_finished_run_is_left_alone(runs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.trainer().run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def never(*_: Any) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(Trainer, "_train_step", never)
    assert runs.trainer().run() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_seed_decides(runs: Run, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = runs.trainer(output=tmp_path / name, seed=seed, epochs=1)
        torch.manual_seed(ord(name))  # whatever was drawn before, dropout and noise are the run's own
        folder = trainer.run()
        weights.append(load_file(folder / "fuser.safetensors"))
    assert same_weights(weights[0], weights[1]) and not same_weights(weights[0], weights[2])


def test_another_recipe_or_other_data_in_the_same_folder(runs: Run, tmp_path: Path) -> None:
    runs.trainer().run()
    before = (tmp_path / "run" / "fuser" / "fuser.safetensors").read_bytes()
    with pytest.raises(C2CError, match="holds a run of another recipe; choose another output"):
        runs.trainer(epochs=4).run()
    with pytest.raises(C2CError, match=r"the data of the run in .* has changed"):
        runs.trainer(rows=23).run()
    assert (tmp_path / "run" / "fuser" / "fuser.safetensors").read_bytes() == before


def test_a_loss_that_is_no_number(runs: Run, tmp_path: Path) -> None:
    trainer = runs.trainer(save_every=2)

    def spoil(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            with torch.no_grad():
                trainer.fuser.proj_out.weight[0, 0, 0] = float("nan")

    with pytest.raises(C2CError, match=r"the loss is nan .* at step 4; lower the learning rate; .* kept in"):
        trainer.run(spoil)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in state["fuser"].values())
    assert not (tmp_path / "run" / "fuser").exists()


def test_a_gradient_that_is_no_number(runs: Run) -> None:
    trainer = runs.trainer()
    trainer.fuser.proj_out.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = trainer.fuser.gate_logit.detach().clone()
    with pytest.raises(C2CError, match=r"its gradient (nan|inf) at step 1;"):
        trainer.run()
    assert torch.equal(trainer.fuser.gate_logit, before)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (os.environ["EVIL_FILE"], "w"))


def test_a_damaged_checkpoint(runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.trainer(epochs=1).run()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    touched = tmp_path / "touched"
    monkeypatch.setenv("EVIL_FILE", str(touched))
    torch.save({"items": Evil()}, tmp_path / "evil.pt")
    code = pickle.dumps(Evil(), protocol=2)
    torch.save({"step": 3}, tmp_path / "odd.pt")
    for content in (
        whole[:5000],
        b"",
        b"nonsense",
        code,
        *((tmp_path / n).read_bytes() for n in ("evil.pt", "odd.pt")),
    ):
        path.write_bytes(content)
        with pytest.raises(C2CError, match=r"checkpoint.pt is damaged \(\w+\); remove it"):
            runs.trainer(epochs=1).run()
    assert not touched.exists()
    pickle.loads(code).close()
    assert touched.exists()  # it does run when it is unpickled
    path.unlink()
    runs.trainer(epochs=1).run()  # as the message says


def test_several_sharers_are_refused(tmp_path: Path) -> None:
    one = pair_of()
    both = C2C(one.receiver, [one.sharers[0]] * 2, [one.fusers[0]] * 2)  # type: ignore[list-item]
    with pytest.raises(C2CError, match="one sharer at a time, 2 were given"):
        Trainer(both, config_of(tmp_path), None, Prepared([], [], 0))
