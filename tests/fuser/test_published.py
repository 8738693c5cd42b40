"""The authors' files: golden cases, a plain per-layer implementation beside ours, damaged and hostile folders."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cache2cache import C2C, C2CError, FuserConfig, load_lm
from cache2cache.config import ModelIdentity
from cache2cache.fuser import checkpoint, make_fuser, published
from cache2cache.kv import CACHE
from cache2cache.pair import PromptIds
from tiny import tiny_model

GOLDEN = Path(__file__).parents[2].resolve().parent / "shared" / "golden"
# Whatever cases are there; two are known, and skipped by name where the folder isn't.
CASES = sorted(
    {"open_qwen3_from_llama", "open_llama_from_qwen2", *(path.parent.name for path in GOLDEN.glob("*/case.json"))}
)
SIZES: dict[str, Any] = {"hidden_dim": 12, "intermediate_dim": 10}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    case = GOLDEN / name
    if not case.is_dir():
        pytest.skip("no folder shared/golden beside the checkout")
    about, expected = json.loads((case / "case.json").read_text()), load_file(case / "expected.safetensors")
    receiver, count = load_lm(case / "receiver"), len(list(case.glob("fuser_*")))
    fusers, sharers = ([case / f"{what}_{i}" for i in range(count)] for what in ("fuser", "sharer"))
    pair = C2C.from_pretrained(fusers, receiver=receiver, sharers=sharers, mode=about["mode"])
    ids = expected["input_ids.0"].tolist()
    others = [expected[f"input_ids.{i + 1}"].tolist() if about["per_model_ids"] else ids for i in range(count)]
    prompt, mask = PromptIds(ids, others, [range(len(ids))] * count), about["sharer_mask"]
    fused = pair.prefill(prompt, sharer_mask=mask)
    for layer in range(receiver.num_layers):
        for kind, ours in (("key", fused.kv.keys), ("value", fused.kv.values)):
            torch.testing.assert_close(ours[layer, 0], expected[f"fused_{kind}.{layer}"], atol=2e-4, rtol=0)
    inputs = fused.inputs()
    out = receiver.model(**{**inputs, "input_ids": inputs["input_ids"][:, -1:]})
    torch.testing.assert_close(out.logits[0, -1], expected["logits"], atol=2e-3, rtol=0)
    alone = receiver.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(alone, expected["receiver_only_logits"], atol=2e-3, rtol=0)
    options = {"max_new_tokens": about["max_new_tokens"], "do_sample": False, "eos_token_id": None}
    generated = pair.generate(prompt, sharer_mask=mask, **options)
    assert torch.equal(generated[0], expected["generated"])


@pytest.mark.parametrize(
    ("receiver", "sharer", "numbers"),
    [((28, 8, 128), (24, 2, 64), 477_848_056), ((28, 8, 128), (28, 2, 128), 485_188_088)],
)
def test_published_sizes(receiver: tuple[int, int, int], sharer: tuple[int, int, int], numbers: int) -> None:
    models = {
        role: ModelIdentity(name=role, num_layers=n, num_kv_heads=h, head_dim=d)
        for role, (n, h, d) in (("receiver", receiver), ("sharer", sharer))
    }
    config = FuserConfig(layer_map="last_aligned", **models)  # type: ignore[arg-type]
    with torch.device("meta"):
        fuser = make_fuser(config)
    assert sum(p.numel() for p in fuser.parameters()) == numbers
    shapes = published.expected_shapes(config)
    assert len(shapes) == 33
    each = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 28 * (each - 1) == numbers and published._numbers(config) == each  # all but gate_temperature are parameters


# ---- folders of our own, and what they compute, straight from the format's description -------------------------------


class FFN(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.w1, self.w2 = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.w2(nn.functional.gelu(self.w1(self.norm(x))))
        return out


class FFNs(nn.Module):
    def __init__(self, count: int, dim: int, inner: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FFN(dim, inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Projector(nn.Module):
    """One layer, as published."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int], h: int, m: int, num_layers: int) -> None:
        super().__init__()
        self.target = target
        s, t = source[0] * source[1], target[0] * target[1]
        for x in ("key", "value"):
            self.register_parameter(f"{x}_gate_logit", nn.Parameter(torch.randn(())))
            for name, module in {
                "in": nn.Linear(s + t, h),
                "mlp1": FFNs(1, h, m),
                "scalar_mlp2": FFNs(1, h, h),
                "scalar_head": nn.Linear(h, target[0]),
                "proj_mlp2": FFNs(num_layers - 2, h, m),
                "proj_out": nn.Linear(h, t),
            }.items():
                self.add_module(f"{x}_{name}", module)
        self.register_buffer("gate_temperature", torch.tensor(0.25))
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.uniform_(p, 0.5, 1.5)

    def forward(self, x: str, source: Tensor, target: Tensor) -> Tensor:
        """One kind of one layer: (H, N, D) of both models."""
        part = lambda name: getattr(self, f"{x}_{name}")  # noqa: E731
        flat = [cache.transpose(0, 1).flatten(1) for cache in (source, target)]
        z = part("mlp1")(part("in")(torch.cat(flat, -1)))
        projected = part("proj_out")(part("proj_mlp2")(z)).unflatten(-1, self.target).transpose(0, 1)
        weight = part("scalar_head")(part("scalar_mlp2")(z)).sigmoid().T.unsqueeze(-1)
        out: Tensor = target + (part("gate_logit") > 0) * weight * projected
        return out


def make(
    folder: Path,
    layers: dict[int, tuple[int, int]],
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 3,
    mapping: str = "k_nearest",
    seed: int = 0,
    parts: str = "final",
    **model: Any,
) -> dict[int, Projector]:
    """Write a published folder; `layers` names sharer layer and projector of each receiver layer."""
    torch.manual_seed(seed)
    (folder / parts).mkdir(parents=True, exist_ok=True)
    made = {}
    for i in sorted({i for _, i in layers.values()}):
        made[i] = Projector(source, target, SIZES["hidden_dim"], SIZES["intermediate_dim"], num_layers).to(dtype)
        torch.save(made[i].state_dict(), folder / parts / f"projector_{i}.pt")
        args = {
            "source_dim": source[1], "source_num_heads": source[0], "target_dim": target[1],
            "target_num_heads": target[0], "num_layers": num_layers, **SIZES,
            "dtype": {"__type__": "torch.dtype", "value": str(dtype).removeprefix("torch.")},
        }  # fmt: skip
        (folder / parts / f"projector_{i}.json").write_text(json.dumps({"class": "C2CProjector", "init_args": args}))
    pairs = {str(t): [[s, i], [0, 999]] for t, (s, i) in layers.items()}  # only the first counts
    (folder / parts / "projector_config.json").write_text(json.dumps({"0": {"1": pairs}}))
    recipe = {"base_model": "its receiver", "teacher_model": "its sharer", "mapping": mapping, **model}
    (folder / "config.json").write_text(json.dumps({"model": recipe}))
    return {t: made[i].float() for t, (_, i) in layers.items()}


QWEN3, LLAMA, QWEN2 = (2, 16), (3, 8), (1, 12)  # KV heads and sizes of the tiny families: 4, 3 and 5 layers
IDS = list(range(20, 31))


def loaded(family: str, seed: int = 0) -> Any:
    return load_lm(tiny_model(family, seed))


def clean(lm: Any) -> list[Tensor]:
    """Keys and values (2, H, T - 1, D) of every layer, by stock transformers."""
    cache = lm.model(torch.tensor([IDS[:-1]]), use_cache=True)[CACHE]
    return [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]


@torch.no_grad()
def reference(into: list[Tensor], reads: list[Tensor], sharer: list[Tensor], layers: Any, made: Any) -> list[Tensor]:
    out = [cache.clone() for cache in into]
    for t, (s, _) in layers.items():
        for k, x in enumerate(("key", "value")):
            out[t][k] += made[t](x, sharer[s][k], reads[t][k]) - reads[t][k]
    return out


NEAREST_3 = {0: (0, 0), 1: (1, 1), 2: (1, 2), 3: (2, 3)}  # 4 receiver layers, 3 sharer layers
NEAREST_5 = {0: (0, 0), 1: (1, 1), 2: (3, 2), 3: (4, 3)}
PARTIAL = {1: (2, 7), 3: (0, 7)}  # one projector for two layers, the others stay unfused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [NEAREST_3, PARTIAL], ids=["all", "partial"])
@pytest.mark.parametrize("num_layers", [3, 5])
def test_one_sharer(layers: Any, dtype: torch.dtype, num_layers: int, tmp_path: Path) -> None:
    made = make(tmp_path, layers, LLAMA, QWEN3, dtype=dtype, num_layers=num_layers)
    receiver, sharer = loaded("qwen3"), loaded("llama", 1)
    pair = C2C.from_pretrained(tmp_path, receiver=receiver, sharers=sharer)
    before = clean(receiver)
    expected = reference(before, before, clean(sharer), layers, made)
    fused = pair.prefill(torch.tensor(IDS)).kv
    for t, cache in enumerate(expected):
        torch.testing.assert_close(torch.stack([fused.keys[t, 0], fused.values[t, 0]]), cache, atol=2e-4, rtol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(expected, before, strict=True))
    assert pair.fusers[0].temperature == 0.25 and pair.fusers[0].config.gate_noise == "gumbel"


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_two_sharers(mode: Any, tmp_path: Path) -> None:
    a = make(tmp_path / "a", NEAREST_3, LLAMA, QWEN3, dtype=torch.bfloat16)
    b = make(tmp_path / "b", NEAREST_5, QWEN2, QWEN3, seed=5)
    receiver, one, two = loaded("qwen3"), loaded("llama", 1), loaded("qwen2", 2)
    pair = C2C.from_pretrained(tmp_path, subfolder=["a", "b"], receiver=receiver, sharers=[one, two], mode=mode)
    before = clean(receiver)
    middle = reference(before, before, clean(one), NEAREST_3, a)
    reads = before if mode == "parallel" else middle
    expected = reference(middle, reads, clean(two), NEAREST_5, b)
    fused = pair.prefill(torch.tensor(IDS)).kv
    for t, cache in enumerate(expected):
        torch.testing.assert_close(torch.stack([fused.keys[t, 0], fused.values[t, 0]]), cache, atol=2e-4, rtol=1e-4)


def test_the_models_are_checked(tmp_path: Path) -> None:
    make(tmp_path, NEAREST_3, LLAMA, QWEN3)
    config, _ = published.read_config(tmp_path)
    assert config.receiver is not None and config.sharer is not None
    assert (config.receiver.name, config.receiver.num_layers) == ("its receiver", 4)
    assert (config.sharer.name, config.sharer.num_layers) == ("its sharer", 3)
    with pytest.raises(C2CError, match=r"its receiver \(4 layers, 2 KV heads of 16\).* 3 layers, 3 KV heads of 8"):
        C2C.from_pretrained(tmp_path, receiver=loaded("llama"), sharers=loaded("qwen3"))
    make(tmp_path / "cut", PARTIAL, LLAMA, QWEN3)  # proves no depth, but the pairs must be there
    assert published.read_config(tmp_path / "cut")[0].receiver.num_layers is None  # type: ignore[union-attr]
    shallow = load_lm(tiny_model("qwen3", num_hidden_layers=3))
    with pytest.raises(C2CError, match=r"its receiver \(at least 4 layers"):
        C2C.from_pretrained(tmp_path / "cut", receiver=shallow, sharers=loaded("llama"))


def test_the_recipe(tmp_path: Path) -> None:
    for model, token_map in (
        ({}, "same"),
        ({"is_do_alignment": False, "alignment_strategy": "longest"}, "same"),
        ({"is_do_alignment": True, "alignment_strategy": "longest"}, "longest"),
        ({"is_do_alignment": True}, "first"),
    ):
        make(tmp_path, NEAREST_3, LLAMA, QWEN3, **model)
        assert checkpoint.read_config(tmp_path)[0].token_map == token_map
    for wrong in ({"mapping": "nearest"}, {"is_do_alignment": True, "alignment_strategy": "x"}, {"base_model": 3}):
        make(tmp_path, NEAREST_3, LLAMA, QWEN3, **wrong)
        with pytest.raises(C2CError, match=r"config\.json"):
            checkpoint.load(tmp_path)
    make(tmp_path, NEAREST_3, LLAMA, QWEN3, include_response=True, is_do_alignment=True)
    with pytest.warns(UserWarning, match="include_response and the token map first"):
        checkpoint.load(tmp_path)


def test_a_fuser_trained_with_responses(tmp_path: Path) -> None:
    make(tmp_path / "a", NEAREST_3, LLAMA, QWEN3, include_response=True)
    assert checkpoint.load(tmp_path / "a").config.fuse_response
    for to in ("ours", "published"):
        checkpoint.convert(tmp_path / "a", tmp_path / to, to)
        assert checkpoint.load(tmp_path / to).config.fuse_response


def test_where_the_files_may_be(tmp_path: Path) -> None:
    make(tmp_path / "x", NEAREST_3, LLAMA, QWEN3, parts="checkpoint-90")
    make(tmp_path / "x", NEAREST_3, LLAMA, QWEN3, parts="checkpoint-100", seed=3)
    latest = checkpoint.load(tmp_path / "x").state_dict()
    assert torch.equal(latest["gate_logit"], checkpoint.load(tmp_path / "x" / "checkpoint-100").gate_logit)
    earlier = checkpoint.load(tmp_path, subfolder="x/checkpoint-90")
    assert not torch.equal(latest["gate_logit"], earlier.gate_logit)
    assert earlier.config.receiver.name == "its receiver"  # type: ignore[union-attr]
    shutil.move(tmp_path / "x" / "checkpoint-90", tmp_path / "bare")
    with pytest.warns(UserWarning, match="no config.json"):
        assert torch.equal(checkpoint.load(tmp_path / "bare").gate_logit, earlier.gate_logit)
    with pytest.raises(C2CError, match="leads outside"):
        checkpoint.load(tmp_path / "x", subfolder="../bare")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}:{name}": tensor
        for path in sorted((folder / "final").glob("*.pt"))
        for name, tensor in torch.load(path, weights_only=True).items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path / "a", NEAREST_3, LLAMA, QWEN3, dtype=dtype)
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "ours")
    checkpoint.convert(tmp_path / "b", tmp_path / "c", "published")
    assert same(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))
    checkpoint.convert(tmp_path / "c", tmp_path / "d", "ours")
    assert same(load_file(tmp_path / "b" / "fuser.safetensors"), load_file(tmp_path / "d" / "fuser.safetensors"))
    assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "d" / "config.json").read_text()
    with pytest.raises(C2CError, match="there already"):
        checkpoint.convert(tmp_path / "a", tmp_path / "b", "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]  # nothing half-written


@pytest.mark.parametrize("settings", [{"layer_map": "terminal"}, {"normalize": True, "gating": False}], ids=str)
def test_a_fuser_of_ours_as_published(settings: dict[str, Any], tmp_path: Path) -> None:
    receiver, sharer = loaded("qwen3"), loaded("llama", 1)
    pair = C2C.from_models(receiver, sharer, FuserConfig(**SIZES, gate_init=1.0, **settings))
    if "normalize" in settings:
        for name in ("sharer", "receiver"):
            getattr(pair.fusers[0], f"{name}_mean").normal_()
            getattr(pair.fusers[0], f"{name}_std").uniform_(0.5, 4)
    pair.save_pretrained(tmp_path / "ours")
    checkpoint.convert(tmp_path / "ours", tmp_path / "theirs", "published")
    again = C2C.from_pretrained(tmp_path / "theirs", receiver=receiver, sharers=sharer)
    a, b = pair.prefill(torch.tensor(IDS)).kv, again.prefill(torch.tensor(IDS)).kv
    torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)
    assert again.fusers[0].config.receiver == pair.fusers[0].config.receiver  # with revision and fingerprint
    assert again.fusers[0].config.token_map == "span"


@pytest.mark.parametrize("token_map", ["same", "first", "longest"])
def test_a_published_token_map_stays(token_map: str, tmp_path: Path) -> None:
    """In their recipe too, without what this library puts beside it."""
    fuser = FuserConfig(**SIZES, token_map=token_map)  # type: ignore[arg-type]
    C2C.from_models(loaded("qwen3"), loaded("llama", 1), fuser).save_pretrained(tmp_path / "ours")
    checkpoint.convert(tmp_path / "ours", tmp_path / "theirs", "published")
    file = tmp_path / "theirs" / "config.json"
    recipe = json.loads(file.read_text())
    del recipe["cache2cache"]
    file.write_text(json.dumps(recipe))
    assert checkpoint.read_config(tmp_path / "theirs")[0].token_map == token_map


@pytest.mark.parametrize("settings", [{"variant": "c2c-c"}, {"weighting": False}, {"key_space": "unrotated"}], ids=str)
def test_what_the_format_cannot_hold(settings: dict[str, Any], tmp_path: Path) -> None:
    pair = C2C.from_models(loaded("qwen3"), loaded("llama"), FuserConfig(**SIZES, **settings))
    pair.save_pretrained(tmp_path / "ours")
    with pytest.raises(C2CError, match="can't hold this fuser"):
        checkpoint.convert(tmp_path / "ours", tmp_path / "theirs", "published")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# ---- damage and malice -----------------------------------------------------------------------------------------------


class Bad:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def resave(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(final: Path) -> None:
        path = final / "projector_1.pt"
        state = torch.load(path, weights_only=True)
        new = change(state)
        torch.save(state if new is None else new, path)

    return damage


def rejson(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(final: Path) -> None:
        content = json.loads((final / name).read_text())
        new = change(content)
        (final / name).write_text(new if isinstance(new, str) else json.dumps(content))

    return damage


def args(**values: Any) -> Callable[[Path], None]:
    def damage(final: Path) -> None:
        for path in final.glob("projector_[0-9].json"):
            rejson(path.name, lambda c: c["init_args"].update(values))(final)

    return damage


def layers_of(content: Any) -> Any:
    return content["0"]["1"]


def bomb(final: Path) -> None:
    """The same entries, packed: a small file that would unpack to much."""
    path = final / "projector_1.pt"
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, content)
        new.writestr("projector_1/data/999", bytes(1 << 24))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        resave(lambda s: {k: v for k, v in s.items() if k != "key_in.bias"}),
        r"projector_1.pt: tensor key_in.bias.*\(12,\)",
    ),
    "extra tensor": (resave(lambda s: s.update(more=torch.ones(2))), r"projector_1.pt: tensor 'more' \(\(2,\)\)"),
    "shape": (resave(lambda s: s.update({"key_in.bias": torch.ones(5)})), r"shape \(5,\); expected \(12,\)"),
    "expanded": (
        resave(lambda s: s.update({"key_in.bias": torch.ones(1).expand(10**12)})),
        r"shape \(1000000000000,\)",
    ),
    "int": (resave(lambda s: s.update({"key_in.bias": torch.ones(12).int()})), "int32; expected"),
    "nan": (resave(lambda s: s.update({"key_in.bias": torch.full((12,), torch.nan)})), "not finite"),
    "no tensor": (resave(lambda s: s.update({"key_in.bias": 3})), "key_in.bias is a int"),
    "list": (resave(lambda s: list(s.values())), "holds a list"),
    "code": (resave(lambda s: s.update(more=Bad())), "system.*nothing of it was run"),
    "truncated": (lambda f: os.truncate(f / "projector_1.pt", 9000), "projector_1.pt"),
    "empty": (lambda f: os.truncate(f / "projector_1.pt", 0), "0 bytes"),
    "noise": (lambda f: (f / "projector_1.pt").write_bytes(os.urandom(15_000)), "projector_1.pt is damaged"),
    "packed": (bomb, "no state dict"),
    "no file": (lambda f: (f / "projector_1.pt").unlink(), "projector_1.pt is missing"),
    "no json": (lambda f: (f / "projector_1.json").unlink(), "projector_1.json is missing"),
    "class": (rejson("projector_1.json", lambda c: c.update({"class": "Other"})), "class 'Other'"),
    "differing": (rejson("projector_1.json", lambda c: c["init_args"].update(dropout=0.3)), "dropout is 0.3, but"),
    "unknown": (args(activation="relu"), "unknown init_args 'activation'"),
    "huge": (args(hidden_dim=10**9), "init_args imply"),
    "deep": (args(num_layers=10**12), "num_layers"),
    "text": (args(hidden_dim="12"), "hidden_dim is '12'"),
    "negative": (args(target_dim=-1), "target_dim is -1"),
    "dtype": (args(dtype="int8"), "dtype is 'int8'"),
    "bad json": (rejson("projector_config.json", lambda c: "{"), "not valid JSON"),
    "nested json": (rejson("projector_config.json", lambda c: "[" * 10**5), "JSON"),
    "path": (rejson("projector_config.json", lambda c: layers_of(c).update({"1": [[0, "../../x"]]})), "layer '1' has"),
    "layer": (rejson("projector_config.json", lambda c: layers_of(c).update({"../1": [[0, 0]]})), "layer '../1'"),
    "twice": (rejson("projector_config.json", lambda c: layers_of(c).update({"01": [[0, 0]]})), "twice"),
    "no layers": (rejson("projector_config.json", lambda c: c.update({"0": {}})), "0 receivers"),
    "two sharers": (rejson("projector_config.json", lambda c: c["0"].update({"2": layers_of(c)})), "2 sharers"),
    "list map": (rejson("projector_config.json", lambda c: "[]"), "0 receivers"),
    "huge layer": (rejson("projector_config.json", lambda c: layers_of(c).update({"3": [[10**20, 0]]})), "layer '3'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_hostile(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, NEAREST_3, LLAMA, QWEN3)
    monkeypatch.chdir(tmp_path)
    damage, said = DAMAGE[kind]
    checkpoint.load(tmp_path)
    damage(tmp_path / "final")
    with pytest.raises(C2CError, match=said) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "was-run").exists()


def test_flipped_bytes(tmp_path: Path) -> None:
    """Damage anywhere ends in a C2CError or in finite numbers of the right shapes, never in another exception."""
    make(tmp_path, {0: (0, 0)}, QWEN2, QWEN2)
    path = tmp_path / "final" / "projector_0.pt"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(whole)
        for place in torch.randint(len(whole), (8,), generator=generator).tolist():
            broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            fuser = checkpoint.load(tmp_path)
            assert all(torch.isfinite(p).all() for p in fuser.parameters())
        except C2CError:
            refused += 1
    assert refused > 5
