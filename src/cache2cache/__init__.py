"""Language models that talk through their key-value caches.

    from cache2cache import C2C
    pair = C2C.from_pretrained()        # the fuser that comes along, with the models it was trained for
    print(pair.chat([{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=64))

Everything is imported on first use, so that `import cache2cache` and the command line's help stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import FuserConfig, ModelSpec
    from .errors import C2CError
    from .models import LM, load_lm
    from .pair import C2C

__version__ = "0.1.0"
__all__ = ["C2C", "LM", "C2CError", "FuserConfig", "ModelSpec", "load_lm"]

_HOME = {
    "C2C": ".pair",
    "C2CError": ".errors",
    "FuserConfig": ".config",
    "LM": ".models",
    "ModelSpec": ".config",
    "load_lm": ".models",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
