"""c2c fuser, and the hub with a fake in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from cache2cache import C2C, C2CError
from cache2cache.cli import main
from cache2cache.fuser import checkpoint


def c2c(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def published(tiny_pair_folder: Path, tmp_path: Path) -> Path:
    checkpoint.convert(tiny_pair_folder, tmp_path / "theirs", "published")
    return tmp_path / "theirs"


def test_info(tiny_pair_folder: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, kind in ((tiny_pair_folder, "ours"), (published, "published")):
        assert c2c("fuser", "info", folder, "--json") == 0
        about = json.loads(capsys.readouterr().out)
        assert about["format"] == kind and about["gates_open"] == {"keys": 3, "values": 3}
        assert about["receiver"]["num_layers"] == 3 and about["sharer"]["num_kv_heads"] == 2
        assert about["layer_map"] == [[0, 1], [1, 2], [2, 3]] and about["parameters"] > 1000
        assert c2c("fuser", "info", folder) == 0
        said = capsys.readouterr().out
        assert "data        unknown\n" in said and "{" not in said
        assert "keys 3/3, values 3/3" in said and "0←1, 1←2, 2←3" in said and f"format {kind}" in said


def test_info_says_how_it_was_trained(tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c("fuser", "info", "default") == 0
    said = capsys.readouterr().out
    assert "arc-easy (train, all rows); " in said and "commonsenseqa (train, at most 1500 rows)" in said
    assert "batch_size 32, learning_rate 0.001, loss sum, seed 42\n" in said and "steps 600, holdout_loss 0.76" in said


def test_convert(tiny_pair_folder: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c("fuser", "convert", published, tmp_path / "back", "--to", "ours") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "back")
    assert (tmp_path / "back" / "fuser.safetensors").read_bytes() == (
        tiny_pair_folder / "fuser.safetensors"
    ).read_bytes()
    assert c2c("fuser", "convert", published, tmp_path / "back", "--to", "ours") == 1
    assert "there already" in capsys.readouterr().err
    assert c2c("fuser", "convert", published, tmp_path / "x", "--to", "onnx") == 1
    assert "unknown format 'onnx'" in capsys.readouterr().err and not (tmp_path / "x").exists()


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake hub: its repositories are folders here, and what is fetched is copied into `fetched`."""
    root, cache = tmp_path / "hub", tmp_path / "fetched"

    def model_info(self: Any, repo: str, **options: Any) -> Any:
        names = [p.relative_to(root / repo).as_posix() for p in sorted((root / repo).rglob("*")) if p.is_file()]
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision in (None, "main")
        for name in allow_patterns:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / repo / name, cache / name)
        return str(cache)

    def create_repo(self: Any, repo: str, *, private: bool, exist_ok: bool) -> None:
        (root / repo).mkdir(parents=True, exist_ok=exist_ok)
        (root / "private").write_text(str(private))

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    for function in (model_info, create_repo, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
    root.mkdir()
    return root


def test_only_the_needed_files_are_fetched(hub: Path, published: Path, tiny_pair_folder: Path, tmp_path: Path) -> None:
    repo = hub / "owner" / "fusers"
    for name in ("a+b_Fuser", "other"):
        shutil.copytree(published, repo / name)
    shutil.copytree(published / "final", repo / "a+b_Fuser" / "checkpoint-5")
    (repo / "a+b_Fuser" / "final" / "aggregator_0.pt").write_bytes(b"old")
    pair = C2C.from_pretrained("owner/fusers", subfolder="a+b_Fuser", revision="main")
    assert pair.fusers[0].config.receiver == checkpoint.load(tiny_pair_folder).config.receiver
    fetched = {p.relative_to(tmp_path / "fetched").as_posix() for p in (tmp_path / "fetched").rglob("*") if p.is_file()}
    parts = {f"projector_{i}.{kind}" for i in range(3) for kind in ("pt", "json")} | {"projector_config.json"}
    assert fetched == {"a+b_Fuser/config.json"} | {f"a+b_Fuser/final/{name}" for name in parts}
    assert checkpoint.load("owner/fusers", subfolder="a+b_Fuser/checkpoint-5").config.layer_map
    with pytest.raises(C2CError, match=r"no fuser at its top; subfolders with one: a\+b_Fuser, other"):
        checkpoint.load("owner/fusers")


def test_push(hub: Path, tiny_pair_folder: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c("fuser", "push", published, "me/mine", "--private") == 0
    assert capsys.readouterr().out.strip() == "https://huggingface.co/me/mine"
    assert (hub / "private").read_text() == "True"
    assert checkpoint.load("me/mine").config == checkpoint.load(tiny_pair_folder).config
    text = (hub / "me" / "mine" / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert data["library_name"] == "cache2cache" and "license" not in data
    assert "| Licence | unknown |" in text and "| Data | unknown |" in text
    assert c2c("fuser", "push", published, "no id") == 1
    assert "expected owner/name" in capsys.readouterr().err


def test_rows_that_were_trained_on_come_along(hub: Path, tiny_pair_folder: Path) -> None:
    mine = hub / "mine"
    shutil.copytree(tiny_pair_folder, mine)
    (mine / "training_ids.txt").write_text("rows:1\nrows:2\n")
    assert c2c("fuser", "push", mine, "me/listed") == 0
    assert checkpoint.training_ids(checkpoint.resolve("me/listed")) == {"rows:1", "rows:2"}
    assert checkpoint.training_ids(checkpoint.resolve(tiny_pair_folder)) == set()


def test_push_a_pair_with_its_record(hub: Path, tiny_pair_folder: Path) -> None:
    pair = C2C.from_pretrained(tiny_pair_folder)
    recipe = {"data": [{"task": "arc-easy", "split": "train", "limit": 5}], "epochs": 2}
    before = {"recipe": {"data": [{"rows": "o/n", "split": "train"}]}, "holdout_loss": 7.5}
    pair.fusers[0].record = {"recipe": recipe, "seconds": 1.5, "holdout_loss": 0.9, "licence": "apache-2.0"}
    pair.fusers[0].record["started_from"] = before
    pair.push_to_hub("me/pair")
    text = (hub / "me" / "pair" / "README.md").read_text()
    for part in ("arc-easy (train, at most 5 rows)", "epochs 2", "1.5 s", "holdout_loss 0.9", "| Licence | apache-2.0"):
        assert part in text
    assert "| Before that | trained on o/n (train, all rows) |" in text and "7.5" not in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert checkpoint.load("me/pair").record == pair.fusers[0].record


def test_a_refusal_is_one_line(hub: Path, tiny_pair_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*a: Any, **k: Any) -> None:
        raise RuntimeError("401 not logged in\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(C2CError, match=r"401 not logged in.*hf auth login"):
        C2C.from_pretrained(tiny_pair_folder).push_to_hub("me/mine")
