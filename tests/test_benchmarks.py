"""The benchmark scripts run, on tiny random models, and what they compute is what they say. No time is judged."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cache2cache import pair as pair_module
from cache2cache.alignment.chat import render
from cache2cache.cli import app
from cache2cache.config import FuserConfig
from cache2cache.kv import KV, prefill_prompts
from cache2cache.models import packed
from cache2cache.models.load import LM
from cache2cache.pair import C2C
from cache2cache.training.objective import response_loss
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer
from training.runs import FUSER, items_of, pair_of, write_models, write_questions, write_recipe

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("measure")


@pytest.fixture
def first_token(measure: ModuleType) -> ModuleType:
    return importlib.import_module("first_token")


def script(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_first_token(tiny_pair_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    models = ["--fuser", tiny_pair_folder]
    for role, family in (("receiver", "llama"), ("sharer", "qwen3")):
        models += [f"--{role}", tiny_pair_folder.parent / family]
    sizes = ["--lengths", 96, "--batches", 1, 2, "--map-lengths", 128, "--prompt-tokens", 96]
    done = script("first_token.py", *models, *sizes, "--quick", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "text-to-text over C2C" in done.stdout
    results = json.loads(file.read_text())
    assert [(one["batch"], one["tokens"]) for one in results["settings"]] == [(1, 96), (2, 96)]
    for one in results["settings"]:
        assert all(value > 0 for values in one["all_seconds"].values() for value in values)
        assert 0 < one["fused_positions"] <= one["batch"] * 95  # the last token of a prompt is never fused
        seconds, beyond = one["seconds"], one["beyond"]
        floor = 2 * results["fuser_weights"] * one["fused_positions"] / max(one["gflops"].values()) / 1e9
        assert beyond["floor_ms"] == pytest.approx(1e3 * floor)
        assert beyond["met"] == (beyond["ms"] <= 1.5 * beyond["floor_ms"] + 20)
        parts = seconds["encode_inside"] + seconds["fuser_inside"]
        assert parts < seconds["beyond"] < seconds["c2c_prefill"]
        for ratio in (beyond["ratio"], *one["decode"].values(), *one["prefill"].values()):
            assert math.isfinite(ratio) and ratio > 0
        per_token = one["bytes"]["receiver"] / (one["batch"] * 95)
        assert per_token == 3 * 2 * 3 * 8 * 4  # layers, keys and values, heads, head size, float32
    assert results["text_to_text"]["ratio"] > 0 and results["token_map"][0]["tokens"] == 128


def test_a_prompt_that_cannot_be_made_is_one_line(tiny_pair_folder: Path) -> None:
    models = ["--receiver", tiny_pair_folder.parent / "llama", "--sharer", tiny_pair_folder.parent / "qwen3"]
    done = script("first_token.py", *models, "--fuser", tiny_pair_folder, "--quick", "--lengths", 3)
    assert done.returncode == 1
    assert done.stderr.rstrip().rpartition("\n")[2].startswith("error: no prompt of 3 tokens")
    assert "Traceback" not in done.stderr


def test_fuser_alone() -> None:
    done = script("fuser.py", "--positions", 8, "--chunks", 4, 8, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    assert "CHUNK 4" in done.stdout


def test_store(tmp_path: Path) -> None:
    sizes = ["--shape", 3, 2, 8, "--batches", 2, "--rounds", 1]
    done = script("store.py", "--folder", tmp_path, *sizes)
    assert done.returncode == 0, done.stderr
    for word in ("int8", "bfloat16", "on a device", "on this processor"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_response(tiny_pair_folder: Path) -> None:
    models = ["--receiver", tiny_pair_folder.parent / "llama", "--sharer", tiny_pair_folder.parent / "qwen3"]
    done = script("response.py", "--fuser", tiny_pair_folder, *models, "--questions", 2, "--new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prompt and answer fused") == 3 and "of 2 right" in done.stdout


def test_harness(tiny_pair_folder: Path) -> None:
    sizes = ["--requests", 6, "--batch-size", 2, "--new-tokens", 3, "--rounds", 1]
    done = script("harness.py", "--model", tiny_pair_folder.parent / "qwen3", *sizes)
    assert done.returncode == 0, done.stderr
    letters, texts, answers = done.stdout.splitlines()
    for line in (letters, texts):
        assert "6 requests" in line and float(line.rpartition(" ")[2]) < 1e-3
    assert answers.endswith("6 alike")


def test_evaluate(tiny_pair_folder: Path) -> None:
    sizes = ["--questions", 6, "--batch-size", 2, "--new-tokens", 3, "--batch-tokens", 4, "--rounds", 1]
    models = ["--model", tiny_pair_folder.parent / "qwen3", "--sharer", tiny_pair_folder.parent / "llama"]
    done = script("evaluate.py", *models, *sizes)
    assert done.returncode == 0, done.stderr
    _, asked, share, over, *batches = done.stdout.splitlines()
    assert asked.startswith("6 questions") and "over hf" in over and len(batches) == 2
    assert 0 < float(share.split(": ")[1].split()[0]) < 1


@pytest.mark.skipif(not packed.possible(), reason="no packed weights on this processor")
def test_packed() -> None:
    done = script("packed.py", "--layers", "24x16", "--rows", 1, 3, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    layer, *ratios = done.stdout.splitlines()[-1].split()
    assert layer == "24x16" and len(ratios) == 2 and all(float(r) > 0 for r in ratios)


def test_adapter(tiny_pair_folder: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "own.jsonl", 5)
    given = ("--fuser", tiny_pair_folder, "--task", questions, "--batch-size", 3, "--output", tmp_path / "out")
    done = script("adapter.py", *given)
    assert done.returncode == 0, done.stderr
    for method, line in zip(("receiver", "c2c"), done.stdout.splitlines()[-2:], strict=True):
        assert line.startswith(f"{method}, ") and "(5)" in line and "answers that differ 0" in line
        assert float(line.rpartition(" ")[2]) < 1e-3
    file = tmp_path / "out" / "harness-c2c.jsonl"
    first, *rows = map(json.loads, file.read_text().splitlines())
    # What an interrupted run has written is taken as it stands: here a row that was made wrong.
    file.write_text(json.dumps({**first, "acc": 1 - first["acc"]}) + "\n")
    again = script("adapter.py", *given)
    assert again.returncode == 1 and "answers that differ 1" in again.stdout.splitlines()[-1], again.stderr
    kept, *new = map(json.loads, file.read_text().splitlines())
    assert kept["acc"] != first["acc"] and [row["acc"] for row in new] == [row["acc"] for row in rows]


def test_batch_prefill(tiny_pair_folder: Path) -> None:
    model = tiny_pair_folder.parent / "qwen3"
    done = script("batch_prefill.py", "--model", model, "--rows", 2, 3, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-4:]
    for count, once, apart in zip((2, 3), lines[::2], lines[1::2], strict=True):
        for line in (once, apart):
            assert f", {count} questions of " in line and float(line.rpartition(" ")[2]) > 0
        assert 0 < float(once.partition("alike: ")[2].partition("%")[0]) < 100
        numbers = re.search(r"alike: ([\d.]+) positions a token in one batch, ([\d.]+) in", apart)
        assert numbers and float(numbers[1]) >= float(numbers[2]) >= 1


@pytest.mark.parametrize("kind", ["bytes", "words", "pieces"])
@pytest.mark.parametrize("chat", range(4))
def test_prompts_have_exactly_the_length_that_is_asked_for(measure: ModuleType, kind: str, chat: int) -> None:
    tokenizer = tiny_tokenizer(kind)
    for tokens in (150, 301, 600):
        assert len(render(tokenizer, measure.chat(tokenizer, chat, tokens, {})).ids) == tokens


def test_quantities_take_turns(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantity once a round; the first round is dropped if there is time for others, and else kept."""
    clock = 0.0
    calls: list[str] = []

    def work(name: str, seconds: float, further: dict[str, float] | None = None) -> Any:
        def run() -> dict[str, float] | None:
            nonlocal clock
            clock += seconds
            calls.append(name)
            return further

        return run

    monkeypatch.setattr(measure, "now", lambda: clock)
    quantities = {"a": work("a", 1.0), "b": work("b", 2.0, {"inside": 0.5})}
    assert measure.take_turns(quantities, 2, 100) == {"a": [1, 1], "b": [2, 2], "inside": [0.5, 0.5]}
    assert "".join(calls) == "ababab"
    assert measure.take_turns(quantities, 5, 7) == {"a": [1, 1], "b": [2, 2], "inside": [0.5, 0.5]}
    assert measure.take_turns(quantities, 5, 2) == {"a": [1], "b": [2], "inside": [0.5]}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_the_peak_is_seen_though_it_is_gone(measure: ModuleType) -> None:
    rise = measure.peak_rise(lambda: torch.ones(50_000_000))  # 200 MB, freed at once
    if rise is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert 195e6 < rise < 260e6
    assert measure.peak_rise(lambda: None) < 20e6


def test_operations_are_counted_from_shapes(measure: ModuleType) -> None:
    lm = LM(tiny_model("llama"), None, "llama")  # 3 layers of width 48, 6 heads of 8, 3 of keys and values, MLP of 64
    per_layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 64 + 2 * 48
    expected = sum(2 * 3 * per_layer * n + 3 * 2 * 48 * n * n for n in (5, 9))
    assert measure.pass_operations(lm, [5, 9], 3) == expected
    # A cache of three layers needs two of them, and of the third the keys and values.
    expected = sum(2 * (2 * per_layer + 2 * 48 * 24) * n + 2 * 2 * 48 * n * n for n in (5, 9))
    assert measure.prefill_operations(lm, [5, 9], 3) == expected


def test_the_plain_prefill_reads_the_same(first_token: ModuleType) -> None:
    lm = LM(tiny_model("qwen3"), None, "qwen3")
    rows = [[5, 6, 7, 8, 9], [20, 21, 22]]
    ours = prefill_prompts(lm, [[*row, 1] for row in rows]).kv
    plain = KV.from_cache(first_token.plain_prefill(lm, rows, lm.num_layers))
    lower = KV.from_cache(first_token.plain_prefill(lm, rows, 2))
    for row, padding in enumerate((0, 2)):
        torch.testing.assert_close(plain.keys[:, row, :, padding:], ours.keys[:, row, :, padding:])
        torch.testing.assert_close(lower.values[:, row, :, padding:], ours.values[:2, row, :, padding:])


def test_clocking_leaves_the_pair_as_it_was(first_token: ModuleType, tiny_pair_folder: Path) -> None:
    models = {
        family: LM(tiny_model(family), tiny_tokenizer(TOKENIZER_OF[family]), family) for family in ("llama", "qwen3")
    }
    pair = C2C.from_pretrained(tiny_pair_folder, receiver=models["llama"], sharers=models["qwen3"])
    before = pair_module.prefill, pair_module.prefill_prompts
    with first_token.clocked(pair) as spent:
        pair.prefill("What is the capital of France?")
    assert all(seconds > 0 for seconds in spent.values())
    assert (pair_module.prefill, pair_module.prefill_prompts) == before
    assert "encode" not in vars(pair) and "forward" not in vars(pair.fusers[0])
    kept = dict(spent)
    pair.prefill("What is the capital of France?")
    assert spent == kept


def test_remote(tiny_pair_folder: Path) -> None:
    models = ["--fuser", tiny_pair_folder]
    for role, family in (("receiver", "llama"), ("sharer", "qwen3")):
        models += [f"--{role}", tiny_pair_folder.parent / family]
    done = script("remote.py", *models, "--lengths", 96, "--quick")
    assert done.returncode == 0, done.stderr
    for numbers in ("float32", "bfloat16", "int8"):
        assert numbers in done.stdout


def test_long_prompt(tiny_pair_folder: Path) -> None:
    model = tiny_pair_folder.parent / "qwen3"
    done = script("long_prompt.py", "--model", model, "--tokens", 64, "--chunks", 16, 64, "--new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert "tokens at once" in done.stdout and "of that together, padded" in done.stdout
    assert "with transformers' own cache" in done.stdout and "with keys and values repeated" in done.stdout


def test_methods(measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four kinds of method with two seeds: the table holds what training and evaluation wrote, nothing is done twice,
    and what runs came to is enough for the table, or refused where other settings are asked for."""
    methods = importlib.import_module("methods")
    models = write_models(tmp_path)
    stores = {"store": str(tmp_path / "sharer"), "receiver_store": str(tmp_path / "receiver")}
    recipe = write_recipe(tmp_path, **stores)
    asked = write_questions(tmp_path / "questions.jsonl", 6)
    done: list[str] = []

    def run(*words: Any) -> str:
        done.append(str(words[0]) + (" --dry-run" if "--dry-run" in words else ""))
        made = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert made.exit_code == 0, made.output
        return made.stdout

    run("precompute", recipe)
    C2C.from_models(models / "llama", models / "qwen3", FuserConfig(**FUSER)).save_pretrained(tmp_path / "untrained")
    monkeypatch.setattr(methods, "command", run)
    names = ["recipe", "identical", "ridge", "single"]
    line = ["methods.py", "--data-dir", tmp_path, "--recipe", recipe, "--only", *names, "--seeds", 1, 2, "--jobs", 1]
    line += ["--tasks", asked, "--fuser", tmp_path / "untrained", "--budget", 0.001, "--output", tmp_path / "methods"]
    line += ["--results", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", [*map(str, line)])
    done.clear()
    methods.main()
    assert sorted(done) == ["evaluate"] * 9 + ["train"] * 8 + ["train --dry-run"] * 3
    table = (tmp_path / "results" / "methods.md").read_text()
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in table.splitlines()[2:]}
    assert [name for name in rows if name in names] == names
    for name in names:
        assert rows[name][1] == "2"
    runs = [tmp_path / "methods" / f"recipe-{seed}" for seed in (1, 2)]
    made = [json.loads((run / "fuser" / "config.json").read_text())["training"] for run in runs]
    steps = json.loads((tmp_path / "methods" / "recipe.json").read_text())["steps"]
    assert [one["steps"] for one in made] == [steps, steps] and rows["recipe"][2] == str(steps)
    assert made[0]["holdout_loss"] != made[1]["holdout_loss"]
    loss = sum(one["holdout_loss"] for one in made) / 2
    assert rows["recipe"][4] == f"{loss:.3f}"
    right = [json.loads((run / "evaluation" / "summary.json").read_text())["likelihood"]["tasks"] for run in runs]
    accuracies = [rows["c2c"]["accuracy"] for one in right for rows in one.values()]
    assert rows["recipe"][6].startswith(f"{sum(accuracies) / 2:.1f} (")
    points = float(rows["ridge"][6].split()[0]) - sum(accuracies) / 2
    given, low, high = map(float, re.findall(r"[+-][\d.]+", rows["ridge"][9]))
    assert abs(given - points) < 0.11 and low <= given <= high  # both are rounded
    shutil.rmtree(tmp_path / "methods")
    methods.main()
    assert len(done) == 20 and (tmp_path / "results" / "methods.md").read_text() == table
    # What is known, of whichever seeds: one run of `recipe` is not.
    (tmp_path / "results" / "recipe-1.json").rename(tmp_path / "results" / "kept")
    monkeypatch.setattr(sys, "argv", [*map(str, line), "--known"])
    methods.main()
    (tmp_path / "results" / "kept").rename(tmp_path / "results" / "recipe-1.json")
    known = {
        row.split(" | ")[0][2:]: row.split(" | ")
        for row in (tmp_path / "results" / "methods.md").read_text().splitlines()[2:]
    }
    assert [known[name][1] for name in names] == ["1", "2", "2", "2"] and known["identical"][2:9] == rows["identical"][
        2:9
    ]
    assert len(done) == 20
    (tmp_path / "results" / "methods.md").write_text(table)
    monkeypatch.setattr(sys, "argv", [*map(str, line), "--set", "fuser.dropout=0.2"])
    with pytest.raises(SystemExit, match="other settings"):
        methods.main()
    assert (tmp_path / "results" / "methods.md").read_text() == table


def test_train_step(tiny_pair_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    models = ["--receiver", tiny_pair_folder.parent / "llama", "--sharer", tiny_pair_folder.parent / "qwen3"]
    sizes = ["--batch", 3, "--tokens", 96, "--response-tokens", 4, "--rounds", 1, "--live-rounds", 1]
    done = script("train_step.py", *models, *sizes, "--json", file)
    assert done.returncode == 0, done.stderr
    for words in ("from the sharer's store", "live", "plain", "peak memory"):
        assert words in done.stdout
    result = json.loads(file.read_text())
    ratios, count = result["ratios"], result["operations"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    times, live = result["all_seconds"]
    seconds = times["store"][-1] / 3  # three steps
    assert ratios["store"] == pytest.approx(seconds * result["gflops"] * 1e9 / sum(count.values()))
    assert ratios["plain over live"] == pytest.approx(live["plain"][-1] / live["live"][-1])
    assert set(result["peaks"]) == {"store", "both stores", "live", "plain"}


def test_the_plain_step_is_a_step_and_its_floor_is_counted_from_shapes(measure: ModuleType) -> None:
    train_step = importlib.import_module("train_step")
    pair = pair_of(dropout=0.0, gating=False)
    items = items_of(pair)
    ours, _ = response_loss(pair, items, None)
    plain, _ = train_step.Plain(pair)(items, "token")
    torch.testing.assert_close(plain, ours)
    fuser, receiver = pair.fusers[0], pair.receiver
    count = train_step.operations(pair, items)
    fused = sum(s >= 0 for item in items for s in item.prompt.maps[0][:-1])
    weights = {name: p[0].numel() for name, p in fuser.named_parameters() if name.endswith(".weight")}
    weights["scalar_mlp2.w2.weight"] = weights["scalar_head.weight"]  # multiplied with each other first
    inputs = weights["in_sharer.weight"] + weights["in_receiver.weight"]
    # Forward, the weights' gradients, and the gradients that go on, which the inputs don't need.
    assert count["fuser"] == 2 * fused * fuser.groups * (3 * sum(weights.values()) - inputs)
    (item,) = items[:1]
    one = train_step.operations(pair, [item])["response"]
    layer = sum(p.numel() for p in receiver.decoder.layers[0].parameters())
    reads = len(item.response) * (3 * layer + receiver.vocab_size * receiver.text_config.hidden_size)
    before, behind = len(item.prompt.receiver) - 1, len(item.prompt.receiver) - 1 + len(item.response)
    width = receiver.text_config.num_attention_heads * receiver.head_dim
    assert one == 2 * (2 * reads + 3 * 2 * width * (behind**2 - before**2))
