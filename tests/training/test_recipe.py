"""Recipes: defaults, then YAML, then settings; and what is wrong is said with the key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cache2cache import C2CError
from cache2cache.config import TrainConfig
from cache2cache.training.items import prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.recipe import keys, read_recipe
from mirror import mirror
from training.runs import pair_of

ROOT = Path(__file__).parents[2]
SMALL = "receiver: {source: a}\nsharer: {source: b}\ndata: [{task: arc-easy}]\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL + "epochs: 3\nfuser: {hidden_dim: 64}\n")
    return path


def test_defaults_then_yaml_then_settings(recipe: Path) -> None:
    plain = read_recipe(recipe)
    assert plain.batch_size == TrainConfig.model_fields["batch_size"].default == 16
    assert (plain.epochs, plain.fuser.hidden_dim, plain.fuser.intermediate_dim) == (3, 64, 1024)
    settings = ["epochs=5", "fuser.hidden_dim=32", "sharer.dtype=bfloat16", "fuser.gating=false", "learning_rate=1e-3"]
    settings += ["fuser.layer_map=[[0, 1], [2, 3]]", "store=some/folder", "data=[{rows: a/b, limit: 4}]"]
    changed = read_recipe(recipe, settings)
    assert (changed.epochs, changed.fuser.hidden_dim, changed.sharer.dtype) == (5, 32, "bfloat16")
    assert changed.fuser.gating is False and changed.learning_rate == 1e-3
    assert changed.fuser.layer_map == [(0, 1), (2, 3)] and changed.store == Path("some/folder")
    assert changed.data[0].rows == "a/b" and changed.data[0].limit == 4
    assert read_recipe(recipe) == plain  # nothing sticks


def test_settings_of_one_entry_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("receiver: {source: a}\nsharer: {source: b}\ndata: [{task: arc-easy, limit: 3}, {rows: c/d}]\n")
    settings = ["data.1.limit=5", "data.0.take=first", "data.0.task=openbookqa", "fuser.layer_map=[[0, 1], [2, 3]]"]
    changed = read_recipe(path, [*settings, "fuser.layer_map.1=[2, 4]"])
    first, second = changed.data
    assert (first.task, first.limit, first.take, second.rows, second.limit) == ("openbookqa", 3, "first", "c/d", 5)
    assert changed.fuser.layer_map == [(0, 1), (2, 4)]
    assert read_recipe(path, ["data.1={task: mmlu}"]).data[1].task == "mmlu"


def written(config: BaseModel, above: str = "") -> dict[str, Any]:
    """The values of a configuration by the names of its keys."""
    found: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, BaseModel):
            found |= written(value, f"{above}{name}.")
        elif value and isinstance(value, list) and isinstance(value[0], BaseModel):
            found |= written(value[0], f"{above}{name}.N.")
        else:
            found[above + name] = value
    return found


def test_the_keys_are_those_that_a_recipe_takes(recipe: Path) -> None:
    config = read_recipe(recipe)
    values = written(config)
    assert "sharer[.N].source" in {key.name for key in keys()}
    found = {key.name.replace("[.N]", ""): key for key in keys()}
    assert list(found) == list(values) and len(found) > 60
    for name, key in found.items():
        assert key.description and key.type, f"{name} has no description"
        if key.default and name != "data.N.task":  # each default can be set as it is printed
            changed = written(read_recipe(recipe, [f"{name.replace('.N.', '.0.')}={key.default}"]))
            given = {"epochs": 1, "fuser.hidden_dim": 1024}  # what the recipe sets
            assert changed == values | {n: v for n, v in given.items() if n == name}, name
    assert (found["receiver.source"].default, found["fuser.hidden_dim"].default) == ("", "1024")
    assert found["data.N.limit"].type == "int | None" and "(> 0)" in found["data.N.limit"].description


def test_a_later_setting_wins(recipe: Path) -> None:
    assert read_recipe(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/[!r]*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along(path: Path) -> None:
    config = read_recipe(path)
    assert config.output.parts[0] == "runs" and config.holdout > 0


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/[!r]*.yaml")), ids=lambda path: path.name)
def test_two_steps_of_the_recipes_that_come_along(path: Path, tmp_path: Path) -> None:
    """Each runs on tiny models and rows in the layouts of its data sets, with a fuser of its own kind and settings."""
    plain = read_recipe(path)
    small = [
        "fuser.hidden_dim=8",
        "fuser.intermediate_dim=6",
        "epochs=1",
        "holdout=3",
        "store=null",
        "accumulate=1",
        "start_from=null",
    ]
    config = read_recipe(path, [*small, f"output={tmp_path / 'run'}"])
    recipe = yaml.safe_load(path.read_text())
    config = config.model_copy(update={"data_dir": mirror(tmp_path / "data", recipe["data"], 12)})
    settings = config.fuser.model_dump(exclude={"receiver", "sharer"}, exclude_unset=True)
    # By the map same the sharer has to know the receiver's tokens.
    receiver = "qwen3" if config.fuser.token_map == "same" else "llama"
    sharers = ["qwen2", "gemma3"] if receiver == "qwen3" else ["qwen3", "qwen2"]
    pair = pair_of(receiver, sharers[: len(config.sharers)], **settings)
    found = prepare(pair, config)
    assert not found.too_long and len(found.train) >= 6
    config = config.model_copy(update={"batch_size": math.ceil(len(found.train) / 2)})
    trainer = Trainer(pair, config, None, found)
    records: list[dict[str, Any]] = []
    assert trainer.run(records.append).is_dir()
    assert [r["step"] for r in records] == [1, 2] and all(math.isfinite(r["loss"]) for r in records)
    assert plain.fuser.anneal_steps >= 2 and plain.accumulate <= plain.batch_size


def test_every_published_run_has_a_twin() -> None:
    names = {path.stem for path in ROOT.glob("recipes/*.yaml")}
    assert {"default", "paper-openhermes", "paper-mmlu", "paper-longbench", "paper-gsm8k"} <= names
    for name in (n.removeprefix("paper-") for n in names if n.startswith("paper-")):
        paper, twin = (read_recipe(ROOT / "recipes" / f"{kind}-{name}.yaml") for kind in ("paper", "cpu"))
        assert twin.fuser.hidden_dim < paper.fuser.hidden_dim and twin.batch_size < paper.batch_size
        assert twin.fuser.layer_map == paper.fuser.layer_map and twin.fuser.gate_noise == paper.fuser.gate_noise


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("epoch=2", "unknown key epoch; did you mean epochs\\?"),
        ("fuser.hiden_dim=2", "unknown key fuser.hiden_dim; did you mean hidden_dim\\?"),
        ("sharer.sauce=2", "unknown key sharer.sauce; did you mean source\\?"),
        ("data=[{task: a, limits: 2}]", "unknown key data.0.limits; did you mean limit\\?"),
        ("fuser.token_map=first", "training is on the token maps span and same, not yet on first; leave token_map out"),
        ("xyzzy=2", "unknown key xyzzy; expected one of receiver, sharer, fuser, start_from, data, "),
        ("epochs=many", "epochs: .*integer.*, given 'many'"),
        ("epochs=0", "epochs: .*greater than 0, given 0"),
        ("epochs=2.5", "epochs: .*given 2.5"),
        ("loss=mean", "loss: .*'token', 'example' or 'sum'"),
        ("fuser.dropout=1", "fuser.dropout: .*less than 1"),
        ("fuser.residual=false", "fuser: .*gating without residual"),
        ("data=[]", "data: .*at least 1 item"),
        ("data=[{task: a, rows: b/c}]", "data.0: .*exactly one of task, rows and jsonl"),
        ("receiver=smollm2", "receiver: .*given 'smollm2'"),
        ("fusr.hidden_dim=2", "unknown key fusr; did you mean fuser\\?"),
        ("sharer=[{source: b}, {sauce: c}]", "unknown key sharer.1.sauce; did you mean source\\?"),
        ("sharer=[]", "sharer: .*at least 1 item"),
        ("sharer=[b]", "sharer.0: .*given 'b'"),
        ("store=3", "store: .*given 3"),
        ("store=[a, b]", "store names 2 folders for 1 sharers; give each sharer one, in the same order"),
        ("data.0.limt=2", "unknown key data.0.limt; did you mean limit\\?"),
        ("data.0.limit=0", "data.0.limit: .*greater than 0"),
        ("data.1.limit=2", "data has 1 entries, counted from 0; '1' of the setting 'data.1.limit=2' is none of them"),
        ("data.-1.limit=2", "'-1' of the setting .* is none of them"),
        ("data.limit=2", "'limit' of the setting 'data.limit=2' is none of them"),
        ("data.0.task.more=2", "task of the setting 'data.0.task.more=2' has no keys of its own"),
        ("receiver={sauce: a}", "unknown key receiver.sauce; did you mean source\\?"),  # and not: source is missing
        ("epochs", "'epochs' is no setting; expected KEY=VALUE, such as epochs=2"),
        ("epochs.more=1", "epochs of the setting 'epochs.more=1' has no keys of its own"),
        ("seed=[1", r"the value of the setting 'seed=\[1' is no valid YAML"),
    ],
)
def test_wrong_settings(recipe: Path, setting: str, words: str) -> None:
    with pytest.raises(C2CError, match=words) as error:
        read_recipe(recipe, [setting])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds NoneType; expected keys and values"),
        ("- a\n- b\n", "holds list; expected keys and values"),
        ("epochs: [1\n", "is no valid YAML"),
        ("epochs: 3\nseed: 1\nepochs: 1\n", "the key epochs comes twice.*line 3"),
        ("fuser:\n  dropout: 0\n  dropout: 0.1\n", "the key dropout comes twice"),
        ("epochs: 2\n", "receiver: Field required"),
        (SMALL + "learnin_rate: 1\n", "unknown key learnin_rate; did you mean learning_rate"),
        (b"epochs: \xff\n", "is no valid YAML"),
        ("epochs: !!python/object/apply:os.system [touch evil]\n", "is no valid YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str | bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(C2CError, match=words) as error:
        read_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    more = "output: ~/run\nstore: [~/store]\ndata: [{jsonl: ~/rows.jsonl}]\n"
    (tmp_path / "recipe.yaml").write_text("receiver: {source: a}\nsharer: [{source: b}]\n" + more)
    config = read_recipe(tmp_path / "recipe.yaml")
    assert config.output == tmp_path / "run" and config.stores == [tmp_path / "store"]
    assert config.data[0].jsonl == tmp_path / "rows.jsonl"


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(C2CError, match=r"no recipe at .* \(.* directory\); give the path of a YAML file"):
            read_recipe(path)
