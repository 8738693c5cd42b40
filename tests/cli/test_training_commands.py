"""c2c precompute, train and evaluate from end to end on tiny models: files, exit codes, reruns, and bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cache2cache.cli import main
from cache2cache.cli.train import status
from cache2cache.errors import C2CError
from cache2cache.evaluation.answers import read_answers
from cache2cache.kv import KV
from cache2cache.pair import C2C
from cache2cache.training import store
from cache2cache.training.loop import Trainer
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer
from training.runs import recipe_of, write_models, write_questions, write_recipe


def c2c(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:
    """A recipe with a store, its models being those of the module."""
    sources = {role: recipe_of(models)[role] for role in ("receiver", "sharer")}
    return write_recipe(tmp_path, store=str(tmp_path / "store"), **sources)


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a trained fuser."""
    folder = tmp_path_factory.mktemp("trained")
    sources = {role: recipe_of(models)[role] for role in ("receiver", "sharer")}
    assert c2c("train", write_recipe(folder, **sources)) == 0
    return folder / "run"


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(command, …): the one line it fails with, after making sure of exit code 1 and of no traceback."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert c2c(*arguments) == 1
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err and printed.out == ""
        line = printed.err.rstrip("\n").rpartition("\n")[2]
        assert line.startswith("error: ") and "unexpected" not in line, printed.err
        return line

    return run


# ---- from rows to a table -------------------------------------------------------------------------------------------


def test_status() -> None:
    """Tokens a second and the time left from the last steps, the first of them being where their clock starts."""
    recent = [
        {"step": 10 + n, "loss": 2.0 + n, "gates_open": 5, "tokens": 100 * (n + 1), "seconds": 60.0 + 2 * n}
        | {"mean_weight": 0.25 + n / 8}
        for n in range(3)
    ]
    console = Console(width=100)
    for count, expected in (
        (1, ["10 of 40", "2.000", "5", "0.250"]),
        (3, ["12 of 40", "3.000", "5", "0.500", "125", "0:00:56"]),
    ):
        with console.capture() as printed:
            console.print(status(recent[:count], 40))
        row = printed.get().splitlines()[3]
        assert [cell.strip() for cell in row.strip("│").split("│") if cell.strip()] == expected


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Every key, without a recipe."""
    assert c2c("train", "--keys") == 0
    printed = capsys.readouterr().out
    assert "\nfuser.hidden_dim: int = 1024\n    width of the hidden states (> 0)\n" in printed
    assert (
        printed.startswith("receiver.source: str, to be given\n    ")
        and "\ndata.N.limit: int | None = null\n" in printed
    )
    assert max(map(len, printed.splitlines())) <= 120


def test_dry_run_of_training(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(tmp_path)
    assert c2c("train", recipe, "--live", "--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["parameters", "memory", "examples", "steps", "time", "disk"]
    assert re.search(r"memory +\d.* a process: receiver \d.*, sharer \d.*, activations [1-9][\d.]* [kM]B", printed[1])
    assert re.search(r"examples +22, \d+\.\d kB of main memory a process", printed[2])
    assert printed[3].split()[1] == "12," and "0:00:" in printed[4]
    assert files(tmp_path) == before


def test_precision_is_that_of_models_which_name_none(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(self: Trainer, *arguments: Any) -> None:
        pair = self.objective.pair
        seen.append((pair.receiver.dtype, pair.sharers[0].dtype, pair.fusers[0].dtype))
        raise C2CError("seen")

    monkeypatch.setattr(Trainer, "run", look)
    for settings in ([], ["precision=bfloat16"], ["precision=bfloat16", "receiver.dtype=float32"]):
        assert c2c("train", recipe, "--live", *(word for setting in settings for word in ("--set", setting))) == 1
    half, full = torch.bfloat16, torch.float32
    assert seen == [(full, full, full), (half, half, full), (full, half, full)]


def test_from_end_to_end(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c("precompute", recipe, "--dry-run") == 0
    assert not (tmp_path / "store").exists()
    assert "22 prompts, " in capsys.readouterr().err
    assert c2c("precompute", recipe) == 0
    said = capsys.readouterr().err
    assert "relative error of int8" in said and f"{tmp_path / 'store'}: 22 prompts" in said.replace("\n", "")
    shards = files(tmp_path / "store")
    assert sorted(Path(name).suffix for name in shards) == [".json", ".safetensors"]

    assert c2c("train", recipe) == 0
    printed = capsys.readouterr()
    fuser = tmp_path / "run" / "fuser"
    assert printed.out == f"{fuser}\n"
    assert "16 examples, 6 held out, 0 too long, 12 steps" in printed.err.replace("\n", " ")
    assert "step 12: hold-out loss " in printed.err
    assert sorted(files(tmp_path / "run")) == sorted(
        [".lock", "checkpoint.pt", "log.jsonl", "recipe.json"]
        + [f"fuser/{name}" for name in ("config.json", "fuser.safetensors", "training_ids.txt")]
    )
    assert C2C.from_pretrained(fuser).chat([{"role": "user", "content": "What is it?"}], max_new_tokens=3)

    questions = write_questions(tmp_path / "questions.jsonl")
    command = ("evaluate", fuser, "--task", questions, "--output", tmp_path / "out", "--batch-size", 4)
    assert c2c(*command) == 0
    assert "gain of C2C over the receiver" in capsys.readouterr().out
    assert len(read_answers(tmp_path / "out" / "samples.jsonl")) == 36
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["likelihood"]["tasks"][str(questions)]) >= {
        "receiver",
        "sharer",
        "c2c",
        "other",
        "gain",
        "presence",
    }

    before = files(tmp_path)
    for again in (("precompute", recipe), ("train", recipe), command):
        assert c2c(*again) == 0
    assert files(tmp_path) == before  # nothing was left to do


def test_options_over_the_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert c2c("precompute", recipe, "--store", "kept", "--precision", "int8", "--dtype", "bfloat16") == 0
    kept = json.loads(Path("kept/store.json").read_text())
    assert (kept["precision"], kept["computed_in"]) == ("int8", "bfloat16")
    assert c2c("train", recipe, "--set", "store=kept", "--set", "epochs=1", "--output", "mine") == 0
    saved = json.loads(Path("mine/fuser/config.json").read_text())["training"]
    assert (saved["steps"], saved["recipe"]["epochs"]) == (4, 1)
    assert c2c("train", recipe, "--live", "--output", "live") == 0  # the recipe's store doesn't exist
    assert sorted(p.name for p in Path().iterdir()) == ["kept", "live", "mine"]
    assert not (tmp_path / "store").exists() and not (tmp_path / "run").exists()


def test_a_sharer_on_several_devices_is_trained_with_from_its_store(recipe: Path, tmp_path: Path) -> None:
    assert c2c("precompute", recipe) == 0
    assert c2c("train", recipe, "--set", "sharer.device_map=cpu", "--set", "epochs=1") == 0
    assert (tmp_path / "run" / "fuser" / "config.json").is_file()


def test_stores_of_both_models_are_computed_in_what_is_said(recipe: Path, tmp_path: Path) -> None:
    def computed_in(*words: str) -> list[str]:
        places = [tmp_path / f"{'-'.join(words)}{who}" for who in ("sharer", "receiver")]
        command = ["--set", f"store={places[0]}", "--set", f"receiver_store={places[1]}", *words]
        assert c2c("precompute", recipe, *command) == 0
        return [json.loads((place / "store.json").read_text())["computed_in"] for place in places]

    half, full = "bfloat16", "float32"
    assert computed_in() == [full, full]
    assert computed_in("--dtype", half) == [half, half]
    assert computed_in("--set", f"precision={half}") == [half, half]
    assert computed_in("--set", f"precision={half}", "--set", f"receiver.dtype={full}") == [half, full]


def test_two_sharers_from_end_to_end(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stores, plan, training, and an answer from what is left; then nothing is left to do."""
    second = write_models(tmp_path / "more", ["qwen2"]) / "qwen2"
    sharers = [{"source": str(models / "qwen3")}, {"source": str(second)}]
    stores = [str(tmp_path / "one"), str(tmp_path / "other")]
    recipe = write_recipe(tmp_path, receiver={"source": str(models / "llama")}, sharer=sharers, store=stores)
    assert c2c("precompute", recipe, "--dry-run") == 0 and not (tmp_path / "one").exists()
    assert c2c("precompute", recipe) == 0
    said = capsys.readouterr().err.replace("\n", "")
    for folder, spec in zip(stores, sharers, strict=True):
        assert f"{folder}: 22 prompts" in said
        assert json.loads((Path(folder) / "store.json").read_text())["sharer"]["name"] == spec["source"]
    assert c2c("train", recipe, "--dry-run") == 0
    assert c2c("train", recipe) == 0
    printed = capsys.readouterr()
    fusers = tmp_path / "run" / "fuser"
    assert printed.out.splitlines()[-1] == str(fusers)
    assert sorted(files(fusers)) == [
        f"{j}/{name}" for j in (0, 1) for name in ("config.json", "fuser.safetensors", "training_ids.txt")
    ]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["mean_weight"] < 1 for row in log)
    both = ("--fuser", fusers / "0", "--fuser", fusers / "1")
    assert c2c("ask", "What is it?", "--only", "c2c", "--json", "--max-new-tokens", 3, *both) == 0
    assert json.loads(capsys.readouterr().out)["sharers"] == [spec["source"] for spec in sharers]
    before = files(tmp_path)
    assert c2c("precompute", recipe) == 0 and c2c("train", recipe) == 0 and files(tmp_path) == before
    # From the first one's fuser on, beside a new second one.
    further = ("--set", f"start_from=[{fusers / '0'}, null]", "--set", "epochs=1", "--output", tmp_path / "further")
    assert c2c("train", recipe, *further) == 0
    training = [json.loads((tmp_path / f"further/fuser/{j}/config.json").read_text())["training"] for j in (0, 1)]
    assert training[0]["started_from"]["steps"] == 12 and "started_from" not in training[1]
    # The stores may be named on the command line, once each.
    more = ("--store", tmp_path / "third")
    capsys.readouterr()
    assert c2c("precompute", recipe, *more) == 1
    assert "names 2 sharers, --store 1 folders; give --store FOLDER, once for each" in capsys.readouterr().err
    assert c2c("precompute", recipe, *more, "--store", tmp_path / "fourth") == 0
    assert (tmp_path / "fourth" / "store.json").exists()


def test_ctrl_c_during_precompute(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "PROMPTS_PER_SHARD", 5)
    compute, calls = store.prefill, []

    def stop(*arguments: Any, past: Any = None) -> KV:
        if past is not None:  # a batch of prompts, not what they all begin with
            calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return compute(*arguments, past=past)

    monkeypatch.setattr(store, "prefill", stop)
    assert c2c("precompute", recipe, "--batch-tokens", 1) == 130
    assert capsys.readouterr().err.rstrip().endswith("interrupted")
    before = files(tmp_path / "store")
    assert len(before) == 3 and not any(name.startswith(".") for name in before)  # ten prompts and store.json
    calls.clear()
    assert c2c("precompute", recipe, "--dry-run") == 0  # size and time of what is still to be done
    assert "12 prompts to be computed, " in capsys.readouterr().err.replace("\n", " ")
    assert c2c("precompute", recipe, "--batch-tokens", 1) == 0
    assert len(calls) == 12
    assert {name: files(tmp_path / "store")[name] for name in before} == before


def test_ctrl_c_during_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    step = Trainer._train_step

    def stop(self: Trainer, *batch: Any) -> dict[str, Any]:
        if self.step == 4:
            os.kill(os.getpid(), 2)
        return step(self, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", stop)
        assert c2c("train", recipe, "--live") == 130
    said = capsys.readouterr().err
    assert "the same command goes on from the last checkpoint" in said and said.rstrip().endswith("interrupted")
    assert sorted(files(tmp_path / "run")) == [".lock", "checkpoint.pt", "log.jsonl", "recipe.json"]
    assert c2c("train", recipe, "--live") == 0
    assert "going on behind step 5" in capsys.readouterr().err
    assert c2c("train", recipe, "--live") == 0
    assert "this run had come to its end, at step 12" in capsys.readouterr().err
    assert files(tmp_path / "run")["fuser/fuser.safetensors"] == files(trained)["fuser/fuser.safetensors"]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_recipes(recipe: Path, tmp_path: Path, refused: Refused) -> None:
    before = files(tmp_path)
    for command, *more in (["precompute"], ["train", "--live"]):
        assert "no recipe at none.yaml" in refused(command, "none.yaml")
        assert "unknown key epoch; did you mean epochs?" in refused(command, recipe, "--set", "epoch=2")
        assert "epochs: " in refused(command, recipe, "--set", "epochs=many")
        for content, words in (("", "no rows are left"), ("{half", "cannot be read as JSON"), ("[]", "is list")):
            (tmp_path / "bad.jsonl").write_text(content)
            assert words in refused(command, recipe, *more, "--set", f"data=[{{jsonl: {tmp_path / 'bad.jsonl'}}}]")
        # Before any model is loaded, which can take long: this one is nowhere.
        nowhere = ("--set", "data=[{jsonl: none.jsonl}]", "--set", "sharer.source=nowhere/at-all")
        assert "none.jsonl cannot be read" in refused(command, recipe, *more, *nowhere)
    assert "is no prefill store" in refused("train", recipe, "--set", "sharer.source=nowhere/at-all")
    (tmp_path / "bad.jsonl").unlink()
    assert files(tmp_path) == before


def test_bad_models(recipe: Path, tmp_path: Path, refused: Refused) -> None:
    before = files(tmp_path)
    for command in (["precompute"], ["train", "--live"]):
        line = refused(*command, recipe, "--set", "receiver.source=smollm2-135m")
        assert "did you mean smollm2-135m-instruct" in line
        assert str(tmp_path / "none") in refused(*command, recipe, "--set", f"sharer.source={tmp_path / 'none'}")
        line = refused(*command, recipe, "--set", "fuser.variant=c3c")
        assert "unknown fuser variant 'c3c'; expected one of c2c, c2c-c" in line
    assert files(tmp_path) == before


def test_bad_stores(recipe: Path, models: Path, tmp_path: Path, refused: Refused) -> None:
    assert "is no prefill store" in refused("train", recipe)
    assert "names no store; give --store" in refused("precompute", recipe, "--set", "store=null")
    assert "unknown precision 'int4'; expected bfloat16 or int8" in refused("precompute", recipe, "--precision", "int4")
    assert "GB, the limit is 0.0 GB" in refused("precompute", recipe, "--max-gb", "0.0001")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "rows.jsonl"]

    assert c2c("precompute", recipe) == 0
    before = files(tmp_path)
    other = tmp_path / "other"
    tiny_model("qwen3", 5).save_pretrained(other)
    tiny_tokenizer(TOKENIZER_OF["qwen3"]).save_pretrained(other)
    for command in ("precompute", "train"):
        line = refused(command, recipe, "--set", f"sharer.source={other}")
        assert str(models / "qwen3") in line and str(other) in line
    shutil.rmtree(other)
    assert "holds bfloat16, int8 was asked for" in refused("precompute", recipe, "--precision", "int8")
    more = {"instruction": "What is not in the store?", "response": "This."}
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    assert "lacks 1 of the recipe's" in refused("train", recipe, "--output", tmp_path / "more")
    shutil.rmtree(tmp_path / "more", ignore_errors=True)
    (shard,) = (tmp_path / "store").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-9])
    for command in ("precompute", "train"):
        assert f"{shard.name} is damaged" in refused(command, recipe)
    assert set(files(tmp_path)) == set(before)


def test_folders_that_cannot_be_written(recipe: Path, trained: Path, tmp_path: Path, refused: Refused) -> None:
    below = tmp_path / "file" / "folder"
    below.parent.write_text("a file, not a folder")
    questions = write_questions(tmp_path / "questions.jsonl", 3)
    for command in (
        ("precompute", recipe, "--store", below),
        ("train", recipe, "--live", "--output", below),
        ("evaluate", trained / "fuser", "--task", questions, "--output", below),
    ):
        line = refused(*command)
        assert f"{below} can't be a folder: {below.parent} is a file; choose another output" in line


def test_bad_evaluations(trained: Path, models: Path, tmp_path: Path, refused: Refused) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", 3)
    fuser, output = trained / "fuser", tmp_path / "out"
    common = ("evaluate", fuser, "--output", output, "--task")
    assert "unknown task 'arc-hard'; expected one of" in refused(*common, "arc-hard")
    assert "no file none.jsonl" in refused(*common, "none.jsonl")
    assert "unknown prompt 'long'" in refused(*common, questions, "--prompt", "long")
    assert "unknown method 'words'" in refused(*common, questions, "--method", "words")
    assert "has no split 'train' under" in refused(*common, "arc-easy", "--data-dir", tmp_path, "--split", "train")
    assert not output.exists()
    (tmp_path / "bad.jsonl").write_text('{"question": "?", "options": ["x"], "answer": 0}\n')
    assert "bad.jsonl, line 1" in refused(*common, tmp_path / "bad.jsonl")
    assert c2c("evaluate", fuser, "--batch-size", 0) == 2 and c2c("evaluate", fuser, "--limit", 0) == 2

    other = tmp_path / "qwen2"
    tiny_model("qwen2").save_pretrained(other)
    tiny_tokenizer(TOKENIZER_OF["qwen2"]).save_pretrained(other)
    line = refused(*common, questions, "--receiver", other)
    assert f"{models / 'llama'} (3 layers, 3 KV heads of 8)" in line and f"{other} has 5 layers, 1 KV heads" in line
    line = refused(*common, questions, "--sharer", other)
    assert f"{models / 'qwen3'} (4 layers, 2 KV heads of 16)" in line and f"{other} has 5 layers" in line
    assert not output.exists()

    assert c2c(*common, questions) == 0
    assert "another prompt; choose another --output" in refused(*common, questions, "--prompt", "short")


def test_calibrate_and_evaluate_what_it_says(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuser, both = trained / "fuser", ("--method", "receiver", "--method", "c2c")
    for name, count in (("seen", 9), ("new", 6)):
        questions = write_questions(tmp_path / f"{name}.jsonl", count)
        questions.write_text(questions.read_text().replace("number", f"{name} number"))
        assert c2c("evaluate", fuser, "--task", questions, *both, "--output", tmp_path / name) == 0
    command = ("calibrate", tmp_path / "seen", "--check", tmp_path / "new", "--tolerance", 100)
    capsys.readouterr()
    assert c2c(*command, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["calibrated"]["skipped"]["share"] == 100 and result["tolerance"] == 100
    assert result["calibrated"]["skip"] == result["calibrated"]["receiver"]
    assert c2c(*command) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"--skip {result['threshold']}"
    assert "calibrated on (9)" in printed and "checked on (6)" in printed and "as many skipped at random" in printed

    again = ("evaluate", fuser, "--task", tmp_path / "new.jsonl", *both, "--output", tmp_path / "new", "--skip")
    assert c2c(*again, result["threshold"]) == 0
    assert "C2C that skips the sharer" in capsys.readouterr().out
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    summary = summary["likelihood"]["tasks"][str(tmp_path / "new.jsonl")]
    assert summary["skip"]["accuracy"] == result["checked"]["skip"]["accuracy"]
    assert summary["skip"]["skipped"] == result["checked"]["skipped"]["share"]
    before = files(tmp_path)
    assert c2c(*again, result["threshold"]) == 0 and files(tmp_path) == before


def test_bad_calibrations(trained: Path, tmp_path: Path, refused: Refused) -> None:
    assert "none holds no evaluation" in refused("calibrate", "none")
    common = (
        "evaluate",
        trained / "fuser",
        "--task",
        write_questions(tmp_path / "q.jsonl", 4),
        "--output",
        tmp_path / "out",
    )
    assert "the method skip needs a threshold" in refused(*common, "--method", "skip")
    assert not (tmp_path / "out").exists()
    assert c2c(*common, "--method", "receiver", "--skip", 0.5) == 0
    assert "4 answers of the receiver and 0 of C2C, 4 without the other" in refused("calibrate", tmp_path / "out")
    assert "another skip; choose another --output" in refused(*common, "--method", "receiver", "--skip", 0.25)
    assert c2c(*common, "--method", "receiver") == 0 and c2c(*common, "--method", "skip", "--skip", 0.5) == 0


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (os.environ["EVIL_FILE"], "w"))


def test_bad_fusers(trained: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "touched"))
    evil = pickle.dumps(Evil())
    questions = write_questions(tmp_path / "questions.jsonl", 3)
    folder = tmp_path / "fuser"
    shutil.copytree(trained / "fuser", folder)
    command = ("evaluate", folder, "--task", questions, "--output", tmp_path / "out")
    weights = folder / "fuser.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-100], whole[:40], b"", evil):
        weights.write_bytes(content)
        assert "fuser.safetensors is damaged" in refused(*command)
    weights.unlink()
    (folder / "fuser.bin").write_bytes(evil)
    assert "has fuser.bin, a pickle, which is not read" in refused(*command)
    assert not (tmp_path / "touched").exists()
    pickle.loads(evil).close()
    assert (tmp_path / "touched").exists()  # it does run when it is unpickled
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refused(*command)
    (folder / "config.json").unlink()
    assert "holds no fuser: config.json is missing" in refused(*command)
    assert "no fuser at" in refused("evaluate", "none", *command[2:])
    assert not (tmp_path / "out").exists()
