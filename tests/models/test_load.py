"""Loading: where a source leads, what is refused, what an LM says about itself. Tiny models, a hub on the loopback."""

from __future__ import annotations

import http.server
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.utils import logging

from cache2cache.config import ModelSpec
from cache2cache.errors import C2CError
from cache2cache.fuser import checkpoint
from cache2cache.models import LM, catalogue, load_lm
from cache2cache.models import load as load_module
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from tiny_gguf import write_gguf

SHAPES = {"qwen3": (4, 2, 16), "llama": (3, 3, 8), "qwen2": (5, 1, 12), "gemma3": (6, 2, 10)}


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of the user, no real hub."""
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "c2c"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    point_hub_at(monkeypatch, 1)


def point_hub_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def folder(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("llama")


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_a_frozen_model(family: str, tiny_folder: Callable[..., Path]) -> None:
    lm = load_lm(tiny_folder(family))
    assert (lm.num_layers, lm.num_kv_heads, lm.head_dim) == SHAPES[family]
    assert lm.context_length == 2048
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    original = tiny_model(family)
    ids = torch.tensor([lm.tokenizer.encode("What is the capital of France?", add_special_tokens=False)])
    with torch.no_grad():
        assert torch.equal(lm.model(ids.to(lm.device)).logits.cpu(), original(ids).logits)
        hidden = lm.decoder(ids.to(lm.device)).last_hidden_state
    assert hidden.shape == (1, ids.shape[1], original.config.hidden_size)
    assert not hasattr(lm.decoder, "lm_head")


def test_dtype_and_device(folder: Path) -> None:
    lm = load_lm(folder, device="cpu")
    assert (lm.dtype, lm.device) == (torch.float32, torch.device("cpu"))
    assert load_lm(folder, dtype=torch.float16).dtype == torch.float16
    assert load_lm(ModelSpec(source=str(folder), dtype="bfloat16"), dtype="float64").dtype == torch.float64
    assert load_lm(folder, attn_implementation="eager").model.config._attn_implementation == "eager"
    pytest.importorskip("accelerate")
    assert load_lm(folder, device_map="cpu").device == torch.device("cpu")


def test_loaded_models_are_taken_as_they_are() -> None:
    model, tokenizer = tiny_model("qwen3").train().requires_grad_(True), tiny_tokenizer()
    lm = load_lm(model, tokenizer=tokenizer)
    assert lm.model is model and lm.tokenizer is tokenizer and lm.name == "Qwen3ForCausalLM"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_lm(lm) is lm
    other = tiny_tokenizer("plain")
    assert load_lm(lm, tokenizer=other).tokenizer is other and lm.tokenizer is tokenizer
    assert load_lm(model).tokenizer is None
    with pytest.raises(C2CError, match="takes no loading options; got dtype"):
        load_lm(model, dtype="bfloat16")


def test_a_given_tokenizer_replaces_the_source_s_own(folder: Path) -> None:
    other = tiny_tokenizer("plain")
    assert load_lm(folder, tokenizer=other).tokenizer is other


def test_a_folder_without_a_tokenizer_has_none(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert load_lm(folder).tokenizer is None


def test_the_language_model_of_a_multimodal_one() -> None:
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "hidden_size": 16, "intermediate_size": 16, "vocab_size": 64, "max_position_embeddings": 77}  # fmt: skip
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    lm = load_lm(Gemma3ForConditionalGeneration(config))
    assert (lm.num_layers, lm.num_kv_heads, lm.head_dim, lm.context_length) == (2, 1, 8, 77)
    assert type(lm.decoder).__name__ == "Gemma3TextModel"


def test_loading_prints_nothing_and_restores_the_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_lm(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


# --- the fingerprint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_does_not_depend_on_the_dtype(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    prints = {load_lm(tmp_path / "m", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16", "float64")}
    assert len(prints) == 1
    tiny_model(family).save_pretrained(tmp_path / "full")  # float32 on disk
    assert prints == {load_lm(tmp_path / "full", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")}


def test_the_fingerprint_tells_weights_apart() -> None:
    first = load_lm(tiny_model("llama")).fingerprint
    assert len(first) == 64 and first == load_lm(tiny_model("llama")).fingerprint
    assert first != load_lm(tiny_model("llama", seed=1)).fingerprint
    for name, parameter in tiny_model("llama").named_parameters():
        changed = tiny_model("llama")
        # Every parameter counts, and in each its first value is among those that are read.
        changed.get_parameter(name).data.view(-1)[0] += 1
        assert load_lm(changed).fingerprint != first, (name, parameter.shape)


# --- bad files -------------------------------------------------------------------------------------------------------


def refused(source: object, **options: object) -> str:
    with pytest.raises(C2CError) as caught:
        load_lm(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), "w"))


def test_pickles_are_refused_unopened(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "the code ran"
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    load_lm(folder)  # beside good weights they are ignored
    (folder / "model.safetensors").unlink()
    assert "only pickled weights" in refused(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    assert "model.safetensors is damaged or incomplete" in refused(folder)
    assert not marker.exists()
    with open(folder / "pytorch_model.bin", "rb") as file:
        pickle.load(file)
    assert marker.exists(), "the test's pickle must be able to do harm"


def test_code_in_a_folder_is_not_run_unasked(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "the code ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    assert "set trust_remote_code if you trust it" in refused(folder)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_safetensors(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert "model.safetensors is damaged or incomplete" in refused(folder)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    assert "lacks 1 weights (model.layers.1.self_attn.k_proj.weight" in refused(folder)


def test_missing_shards_and_damaged_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    assert "lacks 1 of its weight files (model-00002-of-00002.safetensors" in refused(folder)
    index.write_text("{")
    assert "index.json is damaged" in refused(folder)


def test_other_broken_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in refused(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 48', '"hidden_size": 96'))
    assert "cannot be loaded" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)
    (tmp_path / "file.txt").write_text("text")
    assert "is a file that is no GGUF" in refused(tmp_path / "file.txt")
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "does not exist" in refused("./nothing")
    assert "does not exist" in refused("nothing.gguf")


@pytest.mark.parametrize("keep", [0, 3, 10, 500, 3000, 0.5, 0.98])
def test_truncated_gguf(tmp_path: Path, keep: float) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert "tiny.gguf" in refused(file)


def test_a_gguf_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For config, weights and tokenizer; and gguf is left as it was, after a failure too."""
    opened = []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    file = write_gguf(tmp_path / "tiny.gguf")
    assert load_lm(file).need_tokenizer()("hello")["input_ids"] and len(opened) == 1
    assert gguf.GGUFReader is Reader
    file.write_bytes(file.read_bytes()[:2000])
    refused(file)
    assert gguf.GGUFReader is Reader


def test_a_gguf_is_named_inside_a_folder_too(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    lm = load_lm(tmp_path, gguf_file="tiny.gguf", dtype="bfloat16")
    assert lm.fingerprint == load_lm(file).fingerprint and lm.dtype == torch.bfloat16
    assert "quantised already" in refused(file, quantization="4bit")


# --- bad options -----------------------------------------------------------------------------------------------------


def test_options_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected auto, float32, bfloat16 or float16" in refused(folder, dtype="int8")
    assert "unknown device 'gpu'" in refused(folder, device="gpu")
    assert "give one of them" in refused(folder, device="cpu", device_map="auto")
    assert "fields of ModelSpec: source, revision" in refused(folder, speed="fast")
    assert "loading option dtype" in refused(folder, dtype=3)
    assert "expected 4bit, 8bit or a mapping" in refused(folder, quantization="3bit")
    assert "which pins its bytes" in refused("smollm2-135m-instruct", revision="main")
    monkeypatch.setattr(load_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in refused(folder, quantization="4bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in refused(folder, device="cuda")
    assert "torch sees no GPU" in refused(folder, device="meta")
    for kind in ("xpu", "mps"):
        if not torch.get_device_module(kind).is_available():
            assert "torch sees no GPU" in refused(folder, device=kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "torch sees 1 GPU of that kind" in refused(folder, device="cuda:1")


# --- names and the hub -----------------------------------------------------------------------------------------------


def test_a_name_is_a_folder_before_it_is_a_catalogue_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "pull", lambda name: folder)
    assert load_lm("gemma-3-270m").name == "gemma-3-270m"
    monkeypatch.chdir(tmp_path)
    tiny_model("qwen3").save_pretrained(tmp_path / "gemma-3-270m")
    assert load_lm("gemma-3-270m").num_layers == SHAPES["qwen3"][0]


def test_unknown_names_are_answered_with_the_closest() -> None:
    assert "did you mean smollm2-135m-instruct?" in refused("smollm2-135m-instrukt")
    assert "expected one of smollm2" in refused("zzz")
    assert "neither a folder nor a catalogue name nor a hub id" in refused("a/b/c")


def test_what_is_no_model_is_named() -> None:
    class PeftModel:
        pass

    with pytest.raises(C2CError, match=r"a PeftModel is no model that can be loaded.*merge_and_unload"):
        load_lm(PeftModel())  # type: ignore[arg-type]


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_hub_that_cannot_be_reached_is_noticed_in_time(
    monkeypatch: pytest.MonkeyPatch, silent: socket.socket
) -> None:
    monkeypatch.setattr(load_module, "HUB_SECONDS", 0.5)
    for port, limit in ((1, 5.0), (silent.getsockname()[1], 5.0)):
        point_hub_at(monkeypatch, port)
        start = time.monotonic()
        message = refused("qwen/qwen2.5-coder-1.5b-instruct")
        assert time.monotonic() - start < limit
        assert "the hub cannot be reached" in message
        assert "the catalogue has this model in 4-bit as qwen2.5-coder-1.5b-instruct" in message


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch, silent: socket.socket) -> None:
    point_hub_at(monkeypatch, silent.getsockname()[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; use a local folder" in refused("someone/something")
    silent.settimeout(0)
    with pytest.raises(BlockingIOError):  # nobody knocked
        silent.accept()


class Hub:
    """The few answers of a model hub that a download needs, for one repository with one commit."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes]):
        self.files, self.asked = files, []
        hub = self

        revisions = ("main", "v1", hub.commit)
        resolvable = tuple(f"/me/mine/resolve/{revision}/" for revision in revisions)
        describable = ("/api/models/me/mine", *(f"/api/models/me/mine/revision/{revision}" for revision in revisions))

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.asked.append(self.path)
                path = self.path.partition("?")[0]
                if path.startswith(resolvable):
                    name = path.removeprefix("/me/mine/resolve/").partition("/")[2]
                    if (body := hub.files.get(name)) is not None:
                        return self.reply(body, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": hub.commit})
                elif path in describable:
                    siblings = [{"rfilename": name} for name in hub.files]
                    return self.reply(json.dumps({"id": "me/mine", "sha": hub.commit, "siblings": siblings}).encode())
                elif path.startswith("/api/models/me/mine/tree/"):
                    tree = [
                        {"type": "file", "path": name, "size": len(body), "oid": f"{index:040x}"}
                        for index, (name, body) in enumerate(hub.files.items())
                    ]
                    return self.reply(json.dumps(tree).encode())
                code = "RevisionNotFound" if path.startswith("/api/models/me/mine/revision") else "RepoNotFound"
                self.reply(b"{}", {"X-Error-Code": code}, status=404)

            do_GET = do_HEAD

            def reply(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({file.name: file.read_bytes() for file in folder.iterdir()})
    hub.files |= {"README.md": b"no", "onnx/model.safetensors": b"no", "pytorch_model.bin": b"no"}
    point_hub_at(monkeypatch, hub.server.server_port)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_hub_model_is_fetched_once(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_lm("me/mine")
    assert (lm.name, lm.revision) == ("me/mine", Hub.commit)
    assert lm.fingerprint == load_lm(folder).fingerprint and lm.tokenizer is not None
    assert not any(word in path for path in hub.asked for word in ("README", "onnx", "pytorch_model"))
    hub.asked.clear()
    for revision in (None, "main", Hub.commit):
        assert load_lm("me/mine", revision=revision).revision == Hub.commit
    assert hub.asked == [], "what is complete in the cache needs no hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_lm("me/mine").revision == Hub.commit


def test_a_branch_of_a_hub_model(hub: Hub) -> None:
    assert load_lm("me/mine", revision="v1").revision == Hub.commit
    hub.asked.clear()
    load_lm("me/mine", revision="v1")
    assert hub.asked == []
    load_lm("me/mine")
    assert hub.asked != [], "main may be another commit than v1"


def test_a_hub_fuser_is_fetched_once_and_completed(
    hub: Hub, tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    checkpoint.convert(tiny_pair_folder, published, "published")
    hub.files = {p.relative_to(published).as_posix(): p.read_bytes() for p in published.rglob("*") if p.is_file()}
    expected = checkpoint.load("me/mine").state_dict()
    for revision in (None, "v1", Hub.commit):
        checkpoint.load("me/mine", revision=revision)
        hub.asked.clear()
        checkpoint.load("me/mine", revision=revision)
        assert hub.asked == [], "what is complete in the cache needs no hub"
    next(tmp_path.glob("hub/models--me--mine/snapshots/*/final/projector_1.pt")).unlink()
    again = checkpoint.load("me/mine").state_dict()
    assert hub.asked and all(torch.equal(again[name], expected[name]) for name in expected)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint.load("me/mine")


def test_a_snapshot_without_its_weights_is_completed(hub: Hub, tmp_path: Path) -> None:
    lm = load_lm("me/mine")
    next(tmp_path.glob("hub/models--me--mine/snapshots/*/model.safetensors")).unlink()
    assert load_lm("me/mine").fingerprint == lm.fingerprint


@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json"])
def test_a_fetch_that_was_cut_short_is_completed(hub: Hub, tmp_path: Path, lost: str) -> None:
    """Weights that are there say nothing of what was to come behind them."""
    lm = load_lm("me/mine")
    (folder,) = tmp_path.glob("hub/models--me--mine/snapshots/*")
    for file in folder.glob("*token*"):
        file.unlink()
    again = load_lm("me/mine")
    assert again.tokenizer_fingerprint == lm.tokenizer_fingerprint and (folder / lost).exists()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")  # of two, without their index
    assert load_lm("me/mine").fingerprint == lm.fingerprint and (folder / "model.safetensors").exists()


def test_a_gguf_by_a_name_in_capitals(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    fingerprint = load_lm(file).fingerprint
    assert load_lm(file.rename(tmp_path / "TINY.GGUF")).fingerprint == fingerprint


def test_what_the_hub_may_answer(hub: Hub) -> None:
    assert "no revision 'v9'" in refused("me/mine", revision="v9")
    message = refused("google/gemma-3-270m")
    assert "the hub has no model" in message and "as gemma-3-270m" in message
    del hub.files["model.safetensors"]
    assert "only pickled weights" in refused("me/mine")


def test_a_gguf_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    hub.files["sub/tiny.gguf"] = file.read_bytes()
    lm = load_lm("me/mine", gguf_file="sub/tiny.gguf")
    assert (lm.name, lm.revision) == ("me/mine", Hub.commit) and lm.fingerprint == load_lm(file).fingerprint
    hub.asked.clear()
    assert load_lm("me/mine", gguf_file="sub/tiny.gguf").revision == Hub.commit and hub.asked == []
    assert "no file none.gguf; it holds sub/tiny.gguf" in refused("me/mine", gguf_file="none.gguf")


TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
ODD = {
    "mamba": ({"state_size": 4}, "keeps LinearAttentionLayer in its cache"),
    "deepseek_v3": ({"kv_lora_rank": 8, "first_k_dense_replace": 2}, "compressed keys and values"),
    "gemma4_text": ({"head_dim": 8, "global_head_dim": 16}, "another head_dim in some of its layers"),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, "has its layers elsewhere"),
}


@pytest.mark.parametrize("kind", ODD)
def test_models_whose_caches_cannot_be_fused(kind: str, tmp_path: Path) -> None:
    """Said when they are loaded, from wherever, and not by what reads their caches."""
    more, words = ODD[kind]
    try:
        config = AutoConfig.for_model(kind, **{**TINY, **more})
        model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        pytest.skip(f"this transformers makes no such model: {error}")
    expected = rf"\({kind}\).* {words}.*; choose (another model|a model of another architecture)"
    with pytest.raises(C2CError, match=expected):
        load_lm(model)
    with pytest.raises(C2CError, match=expected):
        LM(model, None, "mine")
    model.save_pretrained(tmp_path)
    with pytest.raises(C2CError, match=expected):
        load_lm(tmp_path)


def test_lm_can_be_made_by_hand() -> None:
    lm = LM(tiny_model("qwen2"), None, "mine")
    assert lm.head_dim == 12 and lm.revision is None


@pytest.mark.skipif(
    torch.__version__ < "2.13" or torch.accelerator.is_available(), reason="of a CPU, from torch 2.13 on"
)
def test_attention_reads_grouped_keys_and_values_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind padding too, where transformers would repeat them for every query head, to the same bits."""
    lm = load_lm(folder)
    ids = torch.arange(5, 17).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    read: list[int] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        read.append(key.shape[1])
        return attention(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)

    def logits() -> torch.Tensor:
        return lm.model(input_ids=ids, attention_mask=mask).logits

    grouped = logits()
    assert set(read) == {lm.num_kv_heads}
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
    repeated = logits()
    assert read[-1] == lm.text_config.num_attention_heads > lm.num_kv_heads
    assert torch.equal(grouped[mask.bool()], repeated[mask.bool()])
