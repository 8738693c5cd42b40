"""Which model a cache belongs to, for caches that leave the process."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .load import LM

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0, lt=1 << 31)]


class Owner(BaseModel):
    """A model's shapes and the hashes of `LM` (None without a tokenizer)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    num_layers: Count
    num_kv_heads: Count
    head_dim: Count
    weights: Hash
    tokenizer: Hash | None
    template: Hash | None

    @classmethod
    def of(cls, lm: LM) -> Owner:
        return cls(
            name=lm.name,
            num_layers=lm.num_layers,
            num_kv_heads=lm.num_kv_heads,
            head_dim=lm.head_dim,
            weights=lm.fingerprint,
            tokenizer=lm.tokenizer_fingerprint,
            template=lm.template_fingerprint,
        )

    def differences(self, other: Owner) -> list[str]:
        """What this model has other than `other`, each with both values; what only one of them has is no difference."""
        shapes = [(one.num_layers, one.num_kv_heads, one.head_dim) for one in (self, other)]
        found = []
        if shapes[0] != shapes[1]:
            (a, b, c), (x, y, z) = shapes
            found.append(f"shapes ({a} layers, {b} KV heads of {c} against {x} layers, {y} KV heads of {z})")
        for field, name in (("weights", "weights"), ("tokenizer", "tokenizer"), ("template", "chat template")):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine and theirs and mine != theirs:
                found.append(f"{name} ({mine[:12]} against {theirs[:12]})")
        return found
