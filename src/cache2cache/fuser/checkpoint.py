"""A fuser on disk: `config.json` and `fuser.safetensors` in one folder, on the hub or packaged with this library."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import FuserConfig
from ..errors import C2CError
from . import make_fuser
from .c2c import STATISTICS, C2CFuser

FORMAT_VERSION = 1
PACKAGED = Path(__file__).parent.parent / "fusers"
DEFAULT = "default"


def save(
    fuser: C2CFuser, folder: str | Path, *, dtype: torch.dtype | None = None, training: dict[str, Any] | None = None
) -> None:
    """Write a fuser. Each file appears whole or not at all.

    Args:
        fuser: what to write.
        folder: made if it isn't there.
        dtype: of the weights on disk (gates, blend and statistics stay float32); None keeps theirs.
        training: data, command, cost and measured figures, kept in the configuration for whoever reads it.
    """
    import transformers

    from .. import __version__

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().contiguous().to(dtype if dtype and _is_weight(name) else tensor.dtype)
        for name, tensor in fuser.state_dict().items()
    }
    config = {
        "format_version": FORMAT_VERSION,
        "versions": {"cache2cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "fuser": fuser.config.model_dump(mode="json"),
        "training": training or {},
    }
    partial = folder / f".fuser.safetensors.{os.getpid()}"
    try:
        save_file(tensors, partial)
        partial.chmod(0o644)  # safetensors lets only the owner read; a wheel or a shared folder is read by others
        os.replace(partial, folder / "fuser.safetensors")
    finally:
        partial.unlink(missing_ok=True)
    partial = folder / f".config.json.{os.getpid()}"
    try:
        partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        os.replace(partial, folder / "config.json")
    finally:
        partial.unlink(missing_ok=True)


def _is_weight(name: str) -> bool:
    return name not in (*STATISTICS, "gate_logit", "temperature", "blend")


def resolve(source: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a fuser: None or the name of a packaged one, a local folder, or a hub id (downloaded)."""
    name = str(source or DEFAULT)
    for folder in (PACKAGED / name,) if source is None else (Path(name), PACKAGED / name):
        if (folder / "config.json").is_file():
            return folder
    if Path(name).is_dir():
        raise C2CError(
            f"{name} holds no fuser: config.json is missing; give a folder written by save_pretrained or c2c train"
        )
    packaged = ", ".join(sorted(p.parent.name for p in PACKAGED.glob("*/config.json")))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise C2CError(
            f"no fuser at {name!r}; expected a folder, a hub id such as owner/name, or one that comes packaged: "
            f"{packaged}"
        )
    from ..models.load import download

    return download(name, revision, ["config.json", "fuser.safetensors"])


def read_config(folder: Path) -> tuple[FuserConfig, dict[str, Any]]:
    """A saved fuser's configuration and the rest of its `config.json`. Keys this version doesn't know only warn."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        fields = dict(saved["fuser"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise C2CError(
            f"{folder / 'config.json'} is no fuser configuration ({type(error).__name__}: {error}); write it again"
        ) from error
    if unknown := sorted(set(fields) - set(FuserConfig.model_fields)):
        warnings.warn(f"{folder}: ignored settings of a newer version: {', '.join(unknown)}", stacklevel=3)
    try:
        return FuserConfig(**{k: v for k, v in fields.items() if k in FuserConfig.model_fields}), saved
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "settings"
        raise C2CError(f"{folder / 'config.json'}: {place}: {first['msg']}") from error


def load(source: str | Path | None = None, *, revision: str | None = None) -> C2CFuser:
    """Read a fuser: float32, in evaluation mode.

    Raises:
        C2CError: nothing there, a damaged file, or tensors that are missing, superfluous or of another shape.
    """
    folder = resolve(source, revision)
    config, _ = read_config(folder)
    path = folder / "fuser.safetensors"
    if not path.is_file():
        pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".pt", ".bin", ".pth", ".pkl")]
        hint = f" (it has {pickled[0]}, a pickle, which is not read)" if pickled else ""
        raise C2CError(f"{folder} has no fuser.safetensors{hint}; write the fuser with save_pretrained")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise C2CError(f"{path} is damaged ({error}); fetch or train the fuser again") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in make_fuser(config).state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise C2CError(
                f"{path}: tensor {name} of shape {tuple(shape)} is missing; the file doesn't match its config.json"
            )
        if tensors[name].shape != shape:
            raise C2CError(
                f"{path}: tensor {name} has shape {tuple(tensors[name].shape)}, config.json asks for {tuple(shape)}"
            )
    if extra := sorted(set(tensors) - set(expected)):
        raise C2CError(
            f"{path}: tensor {extra[0]} is not part of a {config.variant} fuser; the file doesn't match its config.json"
        )
    fuser = make_fuser(config)
    fuser.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return fuser.eval()
