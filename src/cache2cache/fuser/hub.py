"""Fusers to the hub: this library's format and a model card that says what is known of the fuser, and what is not."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import C2CError
from . import checkpoint
from .checkpoint import UNKNOWN

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(folders: Sequence[Path], repo_id: str, *, private: bool = False) -> str:
    """Upload fusers (several into folders 0, 1, …), with a model card, and return the address.

    A README.md that lies in the folder of a single fuser is taken as the card.

    Raises:
        C2CError: no valid id, no fuser, or the hub refuses.
    """
    from huggingface_hub import HfApi

    if not _HUB_ID.fullmatch(repo_id):
        raise C2CError(f"{repo_id!r} is no hub id; expected owner/name")
    with tempfile.TemporaryDirectory() as partial:
        places = [Path(partial) / (str(i) if len(folders) > 1 else "fuser") for i in range(len(folders))]
        for folder, place in zip(folders, places, strict=True):
            checkpoint.convert(folder, place, "ours")
        root = places[0] if len(places) == 1 else Path(partial)
        readme = folders[0] / "README.md"
        if len(folders) == 1 and readme.is_file():
            shutil.copyfile(readme, root / "README.md")
        else:
            (root / "README.md").write_text(card(places, repo_id), encoding="utf-8")
        try:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=root, commit_message="Fuser")
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise C2CError(f"the hub did not take {repo_id} ({line}); log in with: hf auth login") from error
    return f"https://huggingface.co/{repo_id}"


def card(folders: Sequence[Path], repo_id: str) -> str:
    """The model card of the fusers in `folders`."""
    from huggingface_hub import ModelCardData

    about = [checkpoint.describe(folder) for folder in folders]
    names = [one[role]["name"] for one in about for role in ("receiver", "sharer")]
    licences = {_licence(one["training"]) for one in about}
    data = ModelCardData(
        library_name="cache2cache",
        license=licences.pop() if len(licences) == 1 and UNKNOWN not in licences else None,
        base_model=sorted({name for name in names if _HUB_ID.fullmatch(name)}) or None,
        tags=["cache2cache", "kv-cache"],
    )
    parts = [_section(one) for one in about]
    use = f'from cache2cache import C2C\n\npair = C2C.from_pretrained("{repo_id}"'
    if len(about) > 1:
        use += f", subfolder={[str(i) for i in range(len(about))]}"
    use += ')\nprint(pair.chat([{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=64))'
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.partition('/')[2]}\n\n"
        "A Cache-to-Cache fuser ([arXiv 2510.03215](https://arxiv.org/abs/2510.03215)) for "
        "[cache2cache](https://pypi.org/project/cache2cache/): it rewrites the receiver's key-value cache with what "
        f"the sharer read in the same prompt.\n\n```python\n{use}\n```\n\n" + "\n\n".join(parts) + "\n"
    )


def _licence(training: dict[str, Any]) -> str:
    value = training.get("licence", training.get("license"))
    return value if isinstance(value, str) and value else UNKNOWN


def _model(identity: dict[str, Any]) -> str:
    shape = f"{identity['num_layers'] or UNKNOWN} layers, {identity['num_kv_heads']} KV heads of {identity['head_dim']}"
    return f"`{identity['name']}` ({shape}; revision {identity['revision'] or UNKNOWN})"


def _section(about: dict[str, Any]) -> str:
    training = about["training"]
    origin = " It was converted from the paper authors' format." if "published" in training else ""
    rows = {
        "Receiver": _model(about["receiver"]),
        "Sharer": _model(about["sharer"]),
        "Fuser": f"{about['variant']}, {about['parameters']:,} parameters, {about['fused_layers']} layers, "
        f"token map {about['token_map']}.{origin}",
        **checkpoint.history(training),
        "Licence": _licence(training),
    }
    table = "\n".join(f"| {key} | {' '.join(str(value).split()).replace('|', '/')} |" for key, value in rows.items())
    return (
        f"| | |\n| --- | --- |\n{table}\n\n"
        "**Limits.** It works for these two models only, and was measured on nothing but what stands under Figures. "
        "The licences of both models and of the data apply besides its own."
    )
