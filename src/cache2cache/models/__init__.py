"""A causal language model and its tokenizer: from a hub id, a folder, a GGUF file or the built-in catalogue.

    lm = load_lm("smollm2-135m-instruct")     # fetched on first use
    catalogue.pull("qwen2.5-coder-1.5b-instruct")

torch and transformers are imported only when `LM` or `load_lm` is asked for, so that the command line stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import catalogue

if TYPE_CHECKING:
    from .load import LM, load_lm

__all__ = ["LM", "catalogue", "load_lm"]


def __getattr__(name: str) -> Any:
    if name in ("LM", "load_lm"):
        from . import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
