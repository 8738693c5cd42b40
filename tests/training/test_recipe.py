"""Recipes: defaults, then YAML, then settings; and what is wrong is said with the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache2cache import C2CError
from cache2cache.config import TrainConfig
from cache2cache.training.recipe import read_recipe

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


def test_a_later_setting_wins(recipe: Path) -> None:
    assert read_recipe(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along(path: Path) -> None:
    config = read_recipe(path)
    assert config.output.parts[0] == "runs" and config.holdout > 0


def test_there_is_a_recipe() -> None:
    assert (ROOT / "recipes" / "default.yaml").is_file()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("epoch=2", "unknown key epoch; did you mean epochs\\?"),
        ("fuser.hiden_dim=2", "unknown key fuser.hiden_dim; did you mean hidden_dim\\?"),
        ("sharer.sauce=2", "unknown key sharer.sauce; did you mean source\\?"),
        ("data=[{task: a, limits: 2}]", "unknown key data.0.limits; did you mean limit\\?"),
        ("fuser.token_map=first", "training is on the token map span, not yet on first; leave token_map out"),
        ("xyzzy=2", "unknown key xyzzy; expected one of receiver, sharer, fuser, data, "),
        ("epochs=many", "epochs: .*integer.*, given 'many'"),
        ("epochs=0", "epochs: .*greater than 0, given 0"),
        ("epochs=2.5", "epochs: .*given 2.5"),
        ("loss=mean", "loss: .*'token', 'example' or 'sum'"),
        ("fuser.dropout=1", "fuser.dropout: .*less than 1"),
        ("fuser.residual=false", "fuser: .*gating without residual"),
        ("data=[]", "data: .*at least 1 item"),
        ("data=[{task: a, rows: b/c}]", "data.0: .*exactly one of task, rows and jsonl"),
        ("receiver=smollm2", "receiver: .*given 'smollm2'"),
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


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(C2CError, match=r"no recipe at .* \(.* directory\); give the path of a YAML file"):
            read_recipe(path)
