"""Fusers: modules that rewrite a receiver's cache with what a sharer's cache holds."""

from __future__ import annotations

from ..config import FuserConfig
from ..errors import C2CError, short
from .bottleneck import BottleneckFuser
from .c2c import C2CFuser, Fusers
from .c2c_c import C2CCFuser
from .ridge import RidgeFuser

# A variant is one file in this folder and one line here; one of your own puts itself in (docs/variants.md).
VARIANTS: dict[str, type[C2CFuser]] = {
    "c2c": C2CFuser,
    "c2c-c": C2CCFuser,
    "bottleneck": BottleneckFuser,
    "ridge": RidgeFuser,
}


def make_fuser(config: FuserConfig) -> C2CFuser:
    """An untrained fuser of the configured variant."""
    if config.variant not in VARIANTS:
        raise C2CError(f"unknown fuser variant {short(config.variant)}; expected one of {', '.join(VARIANTS)}")
    return VARIANTS[config.variant](config)


__all__ = ["VARIANTS", "BottleneckFuser", "C2CCFuser", "C2CFuser", "Fusers", "RidgeFuser", "make_fuser"]
