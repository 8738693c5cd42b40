"""The paper authors' fuser files, read and written: a folder of per-layer pickles (`final/projector_{i}.pt`).

Reading trusts nothing in them: a state dict is opened with `weights_only=True` and only after its pickle was seen to
name nothing but tensors; file sizes are compared with what the JSON beside it implies before any memory is taken.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..alignment.layers import layer_map
from ..config import MAX_LAYERS, FuserConfig, ModelIdentity
from ..errors import C2CError, short
from .c2c import STATISTICS, C2CFuser

CLASS = "C2CProjector"
DEFAULTS: dict[str, Any] = {
    "hidden_dim": 1024, "intermediate_dim": 1024, "num_layers": 3, "dropout": 0.1, "initial_temperature": 1.0,
    "final_temperature": 0.001, "anneal_steps": 1929, "dtype": "float32", "zero_init": False,
}  # fmt: skip
SHAPES = ("source_dim", "target_dim", "source_num_heads", "target_num_heads")
MAPPINGS = ("last_aligned", "k_nearest")
DTYPES = ("float32", "bfloat16", "float16", "float64")
JSON_BYTES = 4 << 20  # no JSON file of a fuser is larger
SLACK = 1 << 20  # bytes of a state dict that are not numbers: names, the pickle, padding
MAX_NESTED = 20_000  # tuples, lists and the like in a pickle; a state dict has eight for each of its entries
MAX_SHARING = 8
_GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double", "Int", "Long", "Short", "Byte", "Bool")
}
_PLAIN = ("GLOBAL", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING")
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")
NAME = "projector_config.json"
PUBLISHED_FILE = re.compile(r"projector_(config|[0-9]{1,5})\.json|projector_[0-9]{1,5}\.pt")


# ---- where the files are ---------------------------------------------------------------------------------------------


def pick(files: list[str]) -> str | None:
    """Which folder holds the projectors, from the paths in a fuser's folder: "final", "checkpoint-…" (the latest step,
    where there is no final one), "" for the folder itself; None where there are none.
    """
    folders = {path[: -len(NAME)].rstrip("/") for path in files if path == NAME or path.endswith(f"/{NAME}")}
    steps = [(int(m[1]), name) for name in folders if (m := _CHECKPOINT.fullmatch(name))]
    for choice in ("final", "", *(name for _, name in sorted(steps, reverse=True))):
        if choice in folders:
            return choice
    return None


def projectors(folder: Path) -> Path | None:
    """The folder with the projectors of a published fuser, or None if `folder` holds none."""
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob(NAME), *folder.glob(f"*/{NAME}"))]
    choice = pick(names)
    return None if choice is None else folder / choice


def is_whole(folder: Path) -> bool:
    """Whether all projectors that a published fuser names are there."""
    parts = projectors(folder)
    return parts is not None and all((parts / f"projector_{i}.pt").is_file() for _, _, i in _layers(parts / NAME))


def read_json(path: Path) -> Any:
    """A fuser's JSON file; NaN and Infinity, which are not JSON, are read as null."""
    try:
        if not path.is_file():  # also a pipe or a device, which would never end
            raise C2CError(f"{path} is missing or no file; fetch the fuser again")
        if path.stat().st_size > JSON_BYTES:
            raise C2CError(f"{path} has {path.stat().st_size:,} bytes; expected a small JSON file")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda constant: None)
    except OSError as error:
        raise C2CError(f"{path} can't be read ({error.strerror}); fetch the fuser again") from error
    except (ValueError, RecursionError) as error:
        raise C2CError(f"{path} is not valid JSON ({error}); fetch the fuser again") from error


def problem(error: ValidationError) -> str:
    """The first thing that is wrong with a file's settings, and where."""
    first = error.errors()[0]
    return f"{short('.'.join(map(str, first['loc'])) or 'settings', 100)}: {first['msg'][:300]}"


def _recipe(folder: Path, parts: Path) -> tuple[Path, dict[str, Any]] | None:
    """config.json of a published fuser, in its folder or in the one above its projectors."""
    for place in dict.fromkeys((folder, parts, parts.parent)):
        path = place / "config.json"
        if path.is_file():
            saved = read_json(path)
            if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
                return path, saved
            if place == folder:
                raise C2CError(f"{path} names no models; expected the published recipe with an entry 'model'")
    return None


# ---- configuration ---------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> tuple[FuserConfig, dict[str, Any]]:
    """A published fuser's configuration, from its JSON files alone, and its recipe (`config.json`)."""
    config, recipe, _ = _read_config(folder)
    return config, recipe


def _read_config(folder: Path) -> tuple[FuserConfig, dict[str, Any], list[int]]:
    """As `read_config`; also which projector each entry of the layer map has."""
    parts = projectors(folder)
    if parts is None:
        raise C2CError(f"{folder} holds no published fuser: final/{NAME} is missing; give the folder of one pair")
    entries = _layers(parts / NAME)
    init = _init_args(parts, sorted({index for _, _, index in entries}))
    pairs = [(t, s) for t, s, _ in entries]
    found = _recipe(folder, parts)
    if found is None:
        warnings.warn(
            f"{folder} has no config.json, so the models of this fuser and its token map are not known; give both",
            stacklevel=4,
        )
        path, recipe = parts / "config.json", dict[str, Any]()
        model: dict[str, Any] = {"base_model": "(not named)", "teacher_model": "(not named)"}
    else:
        path, recipe = found
        model = recipe["model"]
    mapping = model.get("mapping")
    if mapping is not None and mapping not in MAPPINGS:
        raise C2CError(f"{path}: unknown mapping {short(mapping)}; expected {' or '.join(MAPPINGS)}")
    own = recipe.get("cache2cache")
    remembered = own.get("fuser", {}) if isinstance(own, dict) else {}
    remembered = remembered if isinstance(remembered, dict) else {}
    depths = _depths(parts, pairs, mapping)
    fields = {
        "receiver": _identity(path, model, "base_model", init, "target", depths[0], remembered.get("receiver")),
        "sharer": _identity(path, model, "teacher_model", init, "source", depths[1], remembered.get("sharer")),
        "layer_map": pairs,
        "token_map": _token_map(path, model) if found else "span",
        "gate_noise": "gumbel",
        "fuse_response": bool(model.get("include_response")),
        **{key: init[key] for key in DEFAULTS if key != "dtype"},
        # What this library wrote into its own corner of the recipe; sizes are the files' own.
        **{key: remembered[key] for key in ("token_map", "gate_noise", "gate_init") if key in remembered},
    }
    try:
        return FuserConfig(**fields), recipe, [index for _, _, index in entries]
    except ValidationError as error:
        raise C2CError(f"{path}: {problem(error)}") from error


def _layers(path: Path) -> list[tuple[int, int, int]]:
    """(receiver layer, sharer layer, projector), ascending. Of a layer's list only the first pair counts."""
    level = read_json(path)
    for what in ("receiver", "sharer"):
        filled = [value for value in level.values() if value != {}] if isinstance(level, dict) else []
        if len(filled) != 1 or not isinstance(filled[0], dict):
            raise C2CError(
                f'{path} names {len(filled)} {what}s; expected one pair, as in {{"0": {{"1": {{"0": [[0, 0]]}}}}}}'
            )
        level = filled[0]
    entries = []
    for layer, pairs in level.items():
        first = pairs[0] if isinstance(pairs, list) and pairs else None
        good = (
            isinstance(first, list) and len(first) == 2 and all(type(x) is int and 0 <= x < MAX_LAYERS for x in first)
        )
        if not re.fullmatch(r"[0-9]{1,4}", layer) or not good:
            raise C2CError(
                f"{path}: layer {short(layer)} has {short(pairs)}; expected a layer number with [[sharer layer, "
                "projector]], both whole numbers"
            )
        assert first is not None
        entries.append((int(layer), first[0], first[1]))
    entries.sort()
    if len({t for t, _, _ in entries}) != len(entries):
        raise C2CError(f"{path} names a receiver layer twice; write it again")
    return entries


def _init_args(parts: Path, indices: list[int]) -> dict[str, Any]:
    """The arguments that all projectors share, defaults filled in."""
    shared: dict[str, Any] = {}
    for index in indices:
        path = parts / f"projector_{index}.json"
        saved = read_json(path)
        if not isinstance(saved, dict) or saved.get("class") != CLASS:
            kind = saved.get("class") if isinstance(saved, dict) else type(saved).__name__
            raise C2CError(f"{path}: projector class {short(kind)} is not known; this library reads {CLASS}")
        given = saved.get("init_args")
        if not isinstance(given, dict):
            raise C2CError(f"{path} has no init_args; fetch the fuser again")
        if unknown := sorted(set(given) - {*DEFAULTS, *SHAPES}):
            raise C2CError(
                f"{path}: unknown init_args {short(', '.join(unknown), 200)}; expected "
                + ", ".join((*SHAPES, *DEFAULTS))
            )
        dtype = given.get("dtype", DEFAULTS["dtype"])
        if isinstance(dtype, dict):
            dtype = dtype.get("value")
        init = {**DEFAULTS, **given, "dtype": str(dtype).removeprefix("torch.")}
        _check_init(path, init)
        if shared and init != shared:
            key = next(k for k in init if init[k] != shared[k])
            raise C2CError(
                f"{path}: {key} is {init[key]!r}, but {shared[key]!r} in projector_{indices[0]}.json; all layers of a "
                "fuser have the same"
            )
        shared = init
    return shared


def _check_init(path: Path, init: Mapping[str, Any]) -> None:
    for key in (*SHAPES, *DEFAULTS):
        if key not in init:
            raise C2CError(f"{path}: init_args lack {key}; fetch the fuser again")
        value, default = init[key], DEFAULTS.get(key, 1)
        if key == "dtype":
            good = value in DTYPES
        elif isinstance(default, bool):
            good = isinstance(value, bool)
        elif isinstance(default, int):
            good = type(value) is int and (1 if key == "num_layers" else 0) < value < 1 << 62
        else:
            good = type(value) in (int, float) and 0 <= value < 1e9
        if not good:
            raise C2CError(f"{path}: {key} is {short(value)}; expected something like {default!r}")


def _depths(parts: Path, pairs: list[tuple[int, int]], mapping: str | None) -> tuple[int | None, int | None]:
    """Layers of both models, where the files prove them: a mapping that names every layer pairs top with top."""
    t, s = (max(layers) + 1 for layers in zip(*pairs, strict=True))
    files = sum(bool(re.fullmatch(r"projector_[0-9]+\.pt", path.name)) for path in parts.iterdir())
    # More files than layers: the map was cut, and the top of the models may be missing in it.
    proven = mapping is not None and files <= t and pairs == layer_map(mapping, t, s)
    return (t, s) if proven else (None, None)


def _identity(
    path: Path, model: Mapping[str, Any], key: str, init: Mapping[str, Any], side: str, depth: int | None, known: Any
) -> ModelIdentity:
    name = model.get(key)
    if not isinstance(name, str) or not name.strip() or len(name) > 500 or not name.isprintable():
        raise C2CError(f"{path}: model.{key} is {short(name)}; expected the name of a model")
    shape = {"num_kv_heads": init[f"{side}_num_heads"], "head_dim": init[f"{side}_dim"]}
    fields = {"name": name, "num_layers": depth, **shape}
    if isinstance(known, dict) and known.get("name") == name:
        fields = {**known, **shape}
    try:
        return ModelIdentity(**fields)
    except ValidationError as error:
        raise C2CError(f"{path}: {key}: {problem(error)}") from error


def _token_map(path: Path, model: Mapping[str, Any]) -> str:
    """Without alignment both models read the receiver's tokens, in its template."""
    if not model.get("is_do_alignment", False):
        return "same"
    strategy = model.get("alignment_strategy", "first")
    if strategy not in ("first", "longest"):
        raise C2CError(f"{path}: unknown alignment_strategy {short(strategy)}; expected first or longest")
    return str(strategy)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _names(config: FuserConfig) -> list[tuple[str, str]]:
    """Their weights (behind `key_` or `value_`) and our stacked ones, but for the input, which we split."""
    blocks = [("mlp1.blocks.0", "mlp1"), ("scalar_mlp2.blocks.0", "scalar_mlp2")]
    blocks += [(f"proj_mlp2.blocks.{j}", f"proj_mlp2.{j}") for j in range(config.num_layers - 2)]
    names = [("gate_logit", "gate_logit")]
    names += [
        (f"{part}.{leaf}", f"{part}.{leaf}") for part in ("scalar_head", "proj_out") for leaf in ("weight", "bias")
    ]
    for theirs, ours in blocks:
        names += [(f"{theirs}.norm.weight", f"{ours}.norm")]
        names += [(f"{theirs}.{w}.weight", f"{ours}.{w}.weight") for w in ("w1", "w2")]
    return names


def expected_shapes(config: FuserConfig) -> dict[str, tuple[int, ...]]:
    """Every entry of a projector's state dict and its shape."""
    assert config.receiver is not None and config.sharer is not None
    s, t, heads = config.sharer.width, config.receiver.width, config.receiver.num_kv_heads
    h, m = config.hidden_dim, config.intermediate_dim
    shapes: dict[str, tuple[int, ...]] = {"gate_temperature": ()}
    for kind in ("key", "value"):
        shapes |= {f"{kind}_gate_logit": (), f"{kind}_in.weight": (h, s + t), f"{kind}_in.bias": (h,)}
        blocks = {"mlp1.blocks.0": m, "scalar_mlp2.blocks.0": h}
        blocks |= {f"proj_mlp2.blocks.{j}": m for j in range(config.num_layers - 2)}
        for block, inner in blocks.items():
            name = f"{kind}_{block}"
            shapes |= {f"{name}.norm.weight": (h,), f"{name}.w1.weight": (inner, h), f"{name}.w2.weight": (h, inner)}
        shapes |= {f"{kind}_scalar_head.weight": (heads, h), f"{kind}_scalar_head.bias": (heads,)}
        shapes |= {f"{kind}_proj_out.weight": (t, h), f"{kind}_proj_out.bias": (t,)}
    return shapes


def _numbers(config: FuserConfig) -> int:
    """How many numbers a projector holds; in closed form, so that a huge claim costs nothing."""
    assert config.receiver is not None and config.sharer is not None
    s, t, heads = config.sharer.width, config.receiver.width, config.receiver.num_kv_heads
    h, m = config.hidden_dim, config.intermediate_dim
    blocks = (config.num_layers - 1) * (h + 2 * h * m) + h + 2 * h * h
    return 1 + 2 * (1 + h * (s + t) + h + blocks + heads * (h + 1) + t * (h + 1))


def read(folder: Path) -> tuple[FuserConfig, dict[str, Tensor], dict[str, Any]]:
    """A published fuser as our configuration, our stacked tensors (in the files' own number format) and its recipe.

    Raises:
        C2CError: anything that is missing, superfluous, misshapen, not finite or no tensor, with the file's name.
    """
    config, recipe, indices = _read_config(folder)
    parts = projectors(folder)
    assert parts is not None
    files = [parts / f"projector_{index}.pt" for index in indices]
    distinct = list(dict.fromkeys(files))
    for path in distinct:
        _check_size(path, _numbers(config))
    # Layers may share a projector, but a small file must not become much memory.
    if len(files) > MAX_SHARING * len(distinct) and 4 * len(files) * _numbers(config) > 1 << 30:
        raise C2CError(
            f"{parts / NAME} names {len(distinct)} projectors for {len(files)} layers, which would take "
            f"{4 * len(files) * _numbers(config) / 1e9:.0f} GB; expected about one each"
        )
    shapes = expected_shapes(config)
    tensors: dict[str, Tensor] = {}
    temperatures: list[Tensor] = []
    n = len(files)
    state: dict[str, Tensor] = {}
    for i, path in enumerate(files):
        if i == 0 or path != files[i - 1]:
            state = _read_state(path, shapes)
        temperatures.append(state["gate_temperature"])
        for g, kind in ((i, "key"), (i + n, "value")):
            for name, part in _stacked(config, state, kind).items():
                if name not in tensors:
                    tensors[name] = torch.empty(2 * n, *part.shape, dtype=part.dtype)
                if tensors[name].dtype != part.dtype:
                    tensors[name] = tensors[name].to(torch.promote_types(tensors[name].dtype, part.dtype))
                tensors[name][g] = part
    tensors["temperature"] = temperatures[0].clone()
    if not all(temperature.float() == temperatures[0].float() for temperature in temperatures):
        warnings.warn(f"{folder}: the layers' gate temperatures differ; that of the first is kept", stacklevel=3)
    if not temperatures[0] > 0:
        raise C2CError(f"{files[0]}: gate_temperature is {temperatures[0].item()}; expected a number above 0")
    return config, tensors, recipe


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (getattr(torch, dtype) for dtype in DTYPES):
        raise C2CError(f"{path}: tensor {name} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    if not torch.isfinite(tensor).all():
        raise C2CError(f"{path}: tensor {name} holds numbers that are not finite; fetch the fuser again")


def _stacked(config: FuserConfig, state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """One module of ours from a projector's keys or values: matrices turned, the input split, vectors as (1, width)."""
    assert config.sharer is not None
    out = {ours: _turned(state[f"{kind}_{theirs}"]) for theirs, ours in _names(config)}
    whole, s = state[f"{kind}_in.weight"].T, config.sharer.width
    out |= {"in_sharer.weight": whole[:s], "in_receiver.weight": whole[s:]}
    out["in_sharer.bias"] = _turned(state[f"{kind}_in.bias"])
    return out


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 else tensor.unsqueeze(0) if tensor.dim() == 1 else tensor


def _check_size(path: Path, numbers: int) -> None:
    """Compare the file, and what it unpacks to, with what the JSON implies; look into its pickle without running it."""
    if not path.is_file():
        raise C2CError(f"{path} is missing or no file; fetch the fuser again")
    size = path.stat().st_size
    if not 2 * numbers <= size <= 8 * numbers + SLACK:
        raise C2CError(
            f"{path} has {size:,} bytes, but its init_args imply {numbers:,} numbers, that is {2 * numbers:,} to "
            f"{8 * numbers + SLACK:,} bytes; fetch the fuser again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if packed or len(pickles) != 1 or pickles[0].file_size > SLACK:
                raise C2CError(f"{path} is no state dict written by torch.save; fetch the fuser again")
            script = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise C2CError(
            f"{path} is damaged or no file of torch.save ({short(str(error), 200)}); fetch the fuser again"
        ) from error
    plain, before, nested = set[Any](), "", 0
    try:
        for opcode, argument, _ in pickletools.genops(script):
            asks = opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX")
            if asks or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
                what = short(str(argument).replace(" ", ".")) if argument else opcode.name
                raise C2CError(
                    f"{path} asks for {what}, which is code and no tensor; nothing of it was run: don't trust where it "
                    "came from"
                )
            # Tuples of tuples, each used twice or very many inside each other, would keep hashing or printing one busy
            # for ever or overflow the stack. A state dict refers back to names and types only.
            nested += opcode.name.startswith(("TUPLE", "EMPTY", "MARK"))
            if "PUT" in opcode.name and before in _PLAIN:
                plain.add(argument)
            elif "PUT" in opcode.name:
                plain.discard(argument)
            if opcode.name == "MEMOIZE" or ("GET" in opcode.name and argument not in plain) or nested > MAX_NESTED:
                raise C2CError(f"{path} is no state dict written by torch.save; fetch the fuser again")
            before = opcode.name
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise C2CError(f"{path} is damaged (its pickle: {short(str(error), 200)}); fetch the fuser again") from error


def _read_state(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        # Mapped, so that nothing is read that isn't used, and no claim inside can take memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        line = short(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
        raise C2CError(f"{path} can't be opened as a state dict ({line}); fetch the fuser again") from error
    if not isinstance(state, dict):
        raise C2CError(f"{path} holds a {type(state).__name__}; expected a state dict of named tensors")
    for name, shape in shapes.items():
        if name not in state:
            raise C2CError(f"{path}: tensor {name} of shape {shape} is missing (found: nothing, expected: {shape})")
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise C2CError(f"{path}: {name} is a {type(tensor).__name__}; expected a tensor of shape {shape}")
        if tuple(tensor.shape) != shape:
            raise C2CError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}; expected {shape}")
        check_numbers(path, name, tensor)
    if extra := sorted(map(str, set(state) - set(shapes))):
        found = next(value for key, value in state.items() if str(key) == extra[0])
        shape_found = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise C2CError(
            f"{path}: tensor {short(extra[0], 80)} ({shape_found}) is not part of a {CLASS} with these init_args "
            "(expected: nothing)"
        )
    return state


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(config: FuserConfig, tensors: Mapping[str, Tensor], folder: Path, training: Mapping[str, Any]) -> None:
    """Write a fuser into an empty folder as the authors publish theirs.

    Args:
        config, tensors: as `checkpoint.read` gives them.
        folder: there already.
        training: the training record; with the recipe of a published fuser in it, that is written again as it was.
    """
    config, tensors = plain(config, tensors)
    assert config.receiver is not None and config.sharer is not None
    parts = folder / "final"
    parts.mkdir()
    pairs = layer_map(config.layer_map, config.receiver.num_layers, config.sharer.num_layers)
    n, dtype = len(pairs), str(tensors["proj_out.weight"].dtype).removeprefix("torch.")
    init = {
        "source_dim": config.sharer.head_dim,
        "target_dim": config.receiver.head_dim,
        "source_num_heads": config.sharer.num_kv_heads,
        "target_num_heads": config.receiver.num_kv_heads,
        **{key: getattr(config, key) for key in DEFAULTS if key not in ("dtype", "zero_init")},
        "dtype": {"__type__": "torch.dtype", "value": dtype},
    }
    if config.zero_init:
        init["zero_init"] = True
    for i in range(n):
        state = {"gate_temperature": tensors["temperature"].clone()}
        for g, kind in ((i, "key"), (i + n, "value")):
            for theirs, ours in _names(config):
                part = tensors[ours][g]
                is_vector = part.dim() == 2 and not theirs.endswith(
                    ("w1.weight", "w2.weight", "head.weight", "out.weight")
                )
                state[f"{kind}_{theirs}"] = (part[0] if is_vector else part.T if part.dim() == 2 else part).clone()
            whole = torch.cat([tensors["in_sharer.weight"][g], tensors["in_receiver.weight"][g]])
            state |= {f"{kind}_in.weight": whole.T, f"{kind}_in.bias": tensors["in_sharer.bias"][g, 0].clone()}
        ordered = {name: state[name].contiguous() for name in expected_shapes(config)}
        torch.save(ordered, parts / f"projector_{i}.pt")
        _dump(parts / f"projector_{i}.json", {"class": CLASS, "init_args": init})
    _dump(parts / NAME, {"0": {"1": {str(t): [[s, i]] for i, (t, s) in enumerate(pairs)}}})
    _dump(folder / "config.json", training.get("published") or _new_recipe(config, pairs, init, training))


def _new_recipe(
    config: FuserConfig, pairs: list[tuple[int, int]], init: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """A recipe for a fuser of ours. Their programs know no `span`; `longest` is nearest to it."""
    assert config.receiver is not None and config.sharer is not None
    model = {
        "base_model": config.receiver.name,
        "teacher_model": config.sharer.name,
        "is_do_alignment": config.token_map != "same",
        "alignment_strategy": config.token_map if config.token_map in ("first", "longest") else "longest",
        "include_response": config.fuse_response,
        "projector": {"type": CLASS, "params": {k: v for k, v in init.items() if k not in (*SHAPES, "dtype")}},
    }
    depths = (config.receiver.num_layers, config.sharer.num_layers)
    for mapping in MAPPINGS:
        if depths[0] and depths[1] and pairs == layer_map(mapping, *depths):
            model["mapping"] = mapping
    return {
        "model": model,
        "cache2cache": {"fuser": config.model_dump(mode="json", exclude={"layer_map"}), "training": dict(training)},
    }


def plain(config: FuserConfig, tensors: Mapping[str, Tensor]) -> tuple[FuserConfig, dict[str, Tensor]]:
    """The same function without what the published files can't hold: normalisation goes into the weights, as it does
    for inference, and a fuser without gates gets open ones.

    Raises:
        C2CError: another variant, or no residual or weighting.
    """
    wrong = [f"variant {config.variant}"] * (config.variant != "c2c")
    wrong += [f"{name} off" for name in ("residual", "weighting") if not getattr(config, name)]
    wrong += [f"key_space {config.key_space}"] * (config.key_space != "rotated")
    if wrong:
        raise C2CError(
            f"the published format can't hold this fuser ({', '.join(wrong)}); keep it in this library's own"
        )
    out = dict(tensors)
    if config.normalize:
        fuser = C2CFuser(config)
        fuser.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        fuser.fold()
        out |= fuser.state_dict()
        for name in STATISTICS:
            del out[name]
    if not config.gating:
        out["gate_logit"] = torch.ones(len(tensors["proj_out.weight"]))
    return config.model_copy(update={"normalize": False, "gating": True}), out


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
