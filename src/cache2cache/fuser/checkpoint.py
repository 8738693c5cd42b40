"""A fuser on disk: `config.json` and `fuser.safetensors` in one folder, on the hub or packaged with this library."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import FuserConfig
from ..errors import C2CError, short
from ..files import file_hash, replace_text, replacing, save_tensors
from . import make_fuser, published
from .c2c import STATISTICS, C2CFuser

FORMAT_VERSION = 1
PACKAGED = Path(__file__).parent.parent / "fusers"
DEFAULT = "default"
UNKNOWN = "unknown"
IDS = "training_ids.txt"  # the examples that it was trained on, a line each


def save(
    fuser: C2CFuser, folder: str | Path, *, dtype: torch.dtype | None = None, training: dict[str, Any] | None = None
) -> None:
    """Write a fuser, with the list of what it was trained on. Each file appears whole or not at all.

    Args:
        fuser: what to write.
        folder: made if it isn't there.
        dtype: of the weights on disk (gates, blend and statistics stay float32); None keeps theirs.
        training: data, command, cost and measured figures, kept in the configuration for whoever reads it; None: the
            record that the fuser was read with.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous().to(dtype if dtype and _is_weight(name) else tensor.dtype)
        for name, tensor in fuser.state_dict().items()
    }
    write(fuser.config, tensors, Path(folder), fuser.record if training is None else training)
    write_ids(Path(folder), fuser.trained_on)


def write_ids(folder: Path, ids: Collection[str]) -> None:
    """Put the ids of the examples trained on beside what was trained; without any, no list of another stays."""
    if ids:
        replace_text(folder / IDS, "".join(f"{name}\n" for name in sorted(ids)))
    else:
        (folder / IDS).unlink(missing_ok=True)


def write(config: FuserConfig, tensors: dict[str, Tensor], folder: Path, training: dict[str, Any]) -> None:
    """Write what `read` gives, as it is."""
    import transformers

    from .. import __version__

    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        "format_version": FORMAT_VERSION,
        "versions": {"cache2cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "fuser": config.model_dump(mode="json"),
        "training": training,
    }
    with replacing(folder / "fuser.safetensors") as partial:
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    replace_text(folder / "config.json", json.dumps(saved, indent=2, ensure_ascii=False) + "\n")


def convert(source: Path, destination: Path, to: str) -> None:
    """Write a fuser's folder again in this library's format ("ours") or the paper authors' ("published"), in the same
    number format, with the list of what it was trained on. `destination` must not be there yet; it appears whole or
    not at all.
    """
    if to not in ("ours", "published"):
        raise C2CError(f"unknown format {to!r}; expected ours or published")
    if destination.exists():
        raise C2CError(f"{destination} is there already; choose another folder, or remove it")
    config, tensors, training = read(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        partial.mkdir()
        (write if to == "ours" else published.write)(config, tensors, partial, training)
        if (source / IDS).is_file():
            shutil.copyfile(source / IDS, partial / IDS)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_weight(name: str) -> bool:
    return name not in (*STATISTICS, "gate_logit", "temperature", "blend")


def resolve(source: str | Path | None, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of a fuser: None or the name of a packaged one, a local folder, or a hub id (downloaded).

    `subfolder` is where in the folder or the hub's repository it is.
    """
    name, inside = str(source or DEFAULT), _inside(subfolder)
    for folder in (PACKAGED / name,) if source is None else (Path(name), PACKAGED / name):
        if os.path.isdir(folder / inside) and _layout(folder / inside):
            return folder / inside
    if os.path.isdir(name):
        place = Path(name) / inside
        below: list[Path] = []
        with suppress(OSError):  # a name too long for any folder
            below = sorted(p.parent for pattern in ("*", "fuser/*") for p in place.glob(f"{pattern}/config.json"))
        if there := [p.as_posix() for p in below if _layout(p)]:
            does = f"{', '.join(there[:20])} do; name each" if len(there) > 1 else f"{there[0]} does; name that"
            raise C2CError(f"{place} holds no fuser itself, but {does}")
        raise C2CError(
            f"{place} holds no fuser: config.json is missing, and there is no {published.NAME}; give a folder written "
            "by save_pretrained or c2c train, or one as the paper's authors publish them"
        )
    packaged = ", ".join(sorted(p.parent.name for p in PACKAGED.glob("*/config.json")))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        where = f"{short(name, 300)}, subfolder {short(inside, 300)}" if inside else short(name, 300)
        raise C2CError(
            f"no fuser at {where}; expected a folder, a hub id such as owner/name, or one that comes "
            f"packaged: {packaged}"
        )
    from ..models.load import download

    anchor = f"{inside}/config.json".lstrip("/")
    return (
        download(name, revision, anchor, lambda files: _needed(files, inside, name), lambda root: _whole(root / inside))
        / inside
    )


def resolve_all(
    sources: Sequence[str | Path | None], subfolders: Sequence[str | None], revision: str | None = None
) -> list[Path]:
    """The folders of several fusers; a single source or subfolder goes with each of the others."""
    count = max(len(sources), len(subfolders))
    if not sources or not subfolders or {len(sources), len(subfolders)} - {1, count}:
        raise C2CError(f"{len(sources)} fusers and {len(subfolders)} subfolders; give one subfolder for each fuser")
    pairs = zip(*(x if len(x) == count else [*x] * count for x in (sources, subfolders)), strict=True)
    return [resolve(source, revision, subfolder) for source, subfolder in pairs]


def _whole(folder: Path) -> bool:
    """Whether a folder has all files of its fuser."""
    return _layout(folder) != "published" or published.is_whole(folder)


def _inside(subfolder: str | None) -> str:
    parts = Path(subfolder or "").parts
    outside = Path(subfolder or "").is_absolute() or ".." in parts
    if outside or not (subfolder or "").isprintable() or len(subfolder or "") > 1000:
        what = "leads outside" if outside else "is no path"
        raise C2CError(f"subfolder {short(subfolder)} {what}; give one inside the fuser's folder or repository")
    return "/".join(parts)


def _layout(folder: Path) -> str | None:
    """ "ours", "published" or None, by the files that are there."""
    if (folder / "fuser.safetensors").is_file():
        return "ours"
    if published.projectors(folder) is not None:
        return "published"
    return "ours" if (folder / "config.json").is_file() else None


def _needed(files: list[str], inside: str, repo: str) -> list[str]:
    """Of a repository's files those of the fuser in folder `inside`: never the checkpoints beside a final one."""
    prefix = f"{inside}/" if inside else ""
    own = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    if {"config.json", "fuser.safetensors"} <= {*own}:
        return [prefix + file for file in ("config.json", "fuser.safetensors", IDS) if file in own]
    place = published.pick(own)
    if place is None:
        there = sorted({file.split("/final/")[0] for file in files if file.endswith(f"/final/{published.NAME}")})
        there += sorted(file.rpartition("/")[0] for file in files if file.endswith("/fuser.safetensors"))
        hint = f"subfolders with one: {', '.join(there[:20])}" if there else "give another repository or a local folder"
        raise C2CError(f"{repo} holds no fuser at {inside or 'its top'}; {hint}")
    start = f"{prefix}{place}/" if place else prefix
    wanted = [
        file for file in files if file.startswith(start) and published.PUBLISHED_FILE.fullmatch(file[len(start) :])
    ]
    if not any(file.endswith(".pt") for file in wanted):
        raise C2CError(f"{repo} holds no projectors in {start or 'its top'}; give another subfolder")
    recipes = [prefix + "config.json"]
    if not place and inside:  # the folder of the projectors was named: the recipe lies above
        recipes.append(f"{inside.rpartition('/')[0]}/config.json".lstrip("/"))
    return [file for file in recipes if file in files] + wanted


def read_config(folder: Path) -> tuple[FuserConfig, dict[str, Any]]:
    """A saved fuser's configuration and the rest of its `config.json`. Keys this version doesn't know only warn."""
    if _layout(folder) == "published":
        config, recipe = published.read_config(folder)
        return config, {"training": _record(recipe)}
    saved = published.read_json(folder / "config.json")
    fields = saved.get("fuser") if isinstance(saved, dict) else None
    if not isinstance(fields, dict):
        raise C2CError(f"{folder / 'config.json'} is no fuser configuration: it has no entry 'fuser'; write it again")
    if (version := saved.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        raise C2CError(
            f"{folder} has fuser format {short(version)}, this version reads {FORMAT_VERSION}; update cache2cache"
        )
    if unknown := sorted(set(fields) - set(FuserConfig.model_fields)):
        names = short(", ".join(unknown), 200)
        warnings.warn(f"{folder}: ignored settings of a newer version: {names}", stacklevel=3)
    try:
        return FuserConfig(**{k: v for k, v in fields.items() if k in FuserConfig.model_fields}), saved
    except ValidationError as error:
        raise C2CError(f"{folder / 'config.json'}: {published.problem(error)}") from error


def _record(recipe: dict[str, Any]) -> dict[str, Any]:
    """The training record of a published fuser: our own, if we wrote it, or the authors' recipe as it stands."""
    own = recipe.get("cache2cache")
    if isinstance(own, dict) and isinstance(own.get("training"), dict):
        return dict(own["training"])
    return {"published": recipe} if recipe else {}


def fuser_hash(folder: Path) -> str:
    """SHA-256 of a fuser's one file, or, of a published one, of the hashes of its files."""
    hashes = [file_hash(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load(source: str | Path | None = None, *, revision: str | None = None, subfolder: str | None = None) -> C2CFuser:
    """Read a fuser in either format: float32, in evaluation mode.

    Raises:
        C2CError: nothing there, a damaged file, or tensors that are missing, superfluous or of another shape.
    """
    folder = resolve(source, revision, subfolder)
    config, tensors, record = read(folder)
    if config.fuse_response and config.moves_tokens:
        # No error: the prompt is fused just as in training, and the published evaluation fuses no more than that.
        warnings.warn(
            f"{folder} was trained with include_response and the token map {config.token_map}, for which the tokens of "
            "the answer are not fused here, only the prompt",
            stacklevel=2,
        )
    fuser = make_fuser(config)
    fuser.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    fuser.record, fuser.loaded, fuser.trained_on = record, True, frozenset(training_ids(folder))
    return fuser.eval()


def read(folder: Path) -> tuple[FuserConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration, tensors as they lie on disk (our names, stacked) and training record, in either format."""
    if _layout(folder) == "published":
        config, tensors, recipe = published.read(folder)
        return config, tensors, _record(recipe)
    config, saved = read_config(folder)
    path = folder / "fuser.safetensors"
    if not path.is_file():
        pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".pt", ".bin", ".pth", ".pkl")]
        hint = f" (it has {pickled[0]}, a pickle, which is not read)" if pickled else ""
        raise C2CError(f"{folder} has no fuser.safetensors{hint}; write the fuser with save_pretrained")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise C2CError(f"{path} is damaged ({short(str(error), 200)}); fetch or train the fuser again") from error
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in make_fuser(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:  # torch on sizes that no tensor has
        raise C2CError(f"{folder / 'config.json'} asks for sizes that no fuser has; fetch the fuser again") from error
    for name, shape in expected.items():
        if name not in tensors:
            raise C2CError(
                f"{path}: tensor {name} of shape {tuple(shape)} is missing; the file doesn't match its config.json"
            )
        if tensors[name].shape != shape:
            raise C2CError(
                f"{path}: tensor {name} has shape {tuple(tensors[name].shape)}, config.json asks for {tuple(shape)}"
            )
        published.check_numbers(path, name, tensors[name])
    if extra := sorted(set(tensors) - set(expected)):
        raise C2CError(
            f"{path}: tensor {short(extra[0])} is not part of a {config.variant} fuser; the file doesn't match its "
            "config.json"
        )
    if not tensors["temperature"] > 0:
        raise C2CError(f"{path}: temperature is {tensors['temperature'].item()}; expected a number above 0")
    record = saved.get("training")
    return config, tensors, record if isinstance(record, dict) else {}


def history(training: Mapping[str, Any]) -> dict[str, str]:
    """How a fuser was trained, in words: data, recipe, command, cost and figures, as far as its record says."""
    recipe = training.get("recipe") or {}
    known = ("recipe", "published", "seconds", "command", "licence", "license", "started_from")
    figures = {k: v for k, v in training.items() if k not in known}
    settings = ("method", "max_steps", "epochs", "batch_size", "learning_rate", "loss", "seed")
    chosen = ", ".join(f"{key} {recipe[key]}" for key in settings if recipe.get(key) is not None)
    seconds, command = training.get("seconds"), training.get("command")
    rows = {
        "Data": _data_of(training),
        "Recipe": chosen or UNKNOWN,
        "Command": f"`{command}`" if command else UNKNOWN,
        "Cost": f"{seconds} s of training" if seconds is not None else UNKNOWN,
        "Figures": ", ".join(f"{key} {value}" for key, value in figures.items()) or UNKNOWN,
    }
    if isinstance(before := training.get("started_from"), dict):
        rows["Before that"] = f"trained on {_data_of(before)}"
    return rows


def _data_of(training: Mapping[str, Any]) -> str:
    sources = []
    for source in (training.get("recipe") or {}).get("data", []):
        name = source.get("task") or source.get("rows") or source.get("jsonl")
        limit = f"at most {source['limit']}" if source.get("limit") else "all"
        sources.append(f"{name} ({source.get('split')}, {limit} rows)")
    return "; ".join(sources) or UNKNOWN


def training_ids(folder: Path) -> set[str]:
    """The ids of the examples that a fuser was trained on, as far as its folder says."""
    path = folder / IDS
    return set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a fuser's numbers."""
    if _layout(folder) == "published":
        parts = published.projectors(folder)
        assert parts is not None
        return sorted(parts.glob("projector_*.pt"))
    return [folder / "fuser.safetensors"]


def describe(folder: Path) -> dict[str, Any]:
    """What a fuser is, for a reader: everything but its weights, after checking them."""
    config, tensors, record = read(folder)
    with torch.device("meta"):
        fuser = make_fuser(config)
    gates = tensors.get("gate_logit")
    per_kind = None if gates is None else (gates > 0).view(2, -1).sum(1).tolist()
    pairs = list(zip(fuser.config.layer_map, [] if gates is None else gates.view(2, -1).T.tolist(), strict=False))
    return {
        "format": _layout(folder),
        **config.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in fuser.parameters()),
        "fused_layers": len(fuser.config.layer_map),
        "gates_open": None if per_kind is None else {"keys": per_kind[0], "values": per_kind[1]},
        "gate_logits": {str(t): logits for (t, _), logits in pairs},
        "dtype": str(tensors["proj_out.weight"].dtype).removeprefix("torch."),
        "bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "training": record,
    }
