"""A model's rotary position embedding: taken off cached keys, and put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import C2CError
from .kv import CACHE, KV
from .models.load import LM

_PROBE = (0, 5, 37)  # positions at which one and the same token is read


@dataclass(frozen=True)
class Rotary:
    """What a model does to its keys by position: channels i and i + R/2 of the first R turn by position * inv_freq[i],
    then everything in them is multiplied by `scaling`.

    Attributes:
        inv_freq: (L, R/2) float32; zero in a layer without rotary embedding.
        scaling: (L,) float32, 1 for most models (YaRN scales).
    """

    inv_freq: Tensor
    scaling: Tensor

    def turns_as(self, other: Rotary) -> bool:
        """Whether two models turn their keys alike."""
        pairs = ((self.inv_freq, other.inv_freq), (self.scaling, other.scaling))
        return all(a.shape == b.shape and torch.allclose(a.cpu(), b.cpu()) for a, b in pairs)

    @classmethod
    def of(cls, lm: LM) -> Rotary:
        """The rotary embedding of a model, its frequencies taken from its own module.

        A token that is read alone attends to nothing but itself, so its keys at two positions differ by the rotary
        embedding alone. That says which of the module's frequencies a layer uses, and whether it is understood at all.

        Raises:
            C2CError: no rotary embedding, one whose frequencies depend on the length, or one that pairs channels in
                another way.
        """
        candidates = _candidates(lm)
        keys = _probe(lm)  # (L, positions, H, D)
        # Half-precision models round the sines and the keys; a wrong frequency is off by the size of the keys.
        tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
        chosen = []
        for layer, ours in enumerate(keys):
            errors = []
            for inv_freq, scaling in candidates:
                rotary = cls(inv_freq[None], torch.tensor([scaling]))
                turned = rotary.turn(ours.float()[None], torch.tensor([0]), torch.tensor(_PROBE), back=True)[0]
                errors.append(((turned - turned[:1]).norm() / turned.norm()).item())
            best = min(range(len(errors)), key=errors.__getitem__)
            if not errors[best] < tolerance:
                raise C2CError(
                    f"the keys of {lm.name}, layer {layer}, don't follow its rotary embedding (off by "
                    f"{errors[best]:.1%}; channels paired in another way?); use key_space rotated"
                )
            chosen.append(candidates[best])
        return cls(torch.stack([f for f, _ in chosen]), torch.tensor([s for _, s in chosen]))

    def turn(self, keys: Tensor, layers: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Keys with the rotary embedding put on, or with `back` taken off.

        Args:
            keys: (n, N, H, D).
            layers: (n,) which layer each is of.
            positions: (N,) how many tokens of the same prompt come before each.
        """
        inv_freq, scaling = (x.to(keys.device)[layers] for x in (self.inv_freq, self.scaling))
        angle = positions[:, None, None] * inv_freq[:, None, None]  # (n, N, 1, R/2)
        size = (1 / scaling if back else scaling)[:, None, None, None]
        cos, sin = angle.cos() * size, angle.sin() * (-size if back else size)
        half = self.inv_freq.shape[1]
        a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(keys.dtype)


def _candidates(lm: LM) -> list[tuple[Tensor, float]]:
    """Every set of frequencies that the model holds, with its scaling, and none at all."""
    found: list[tuple[Tensor, float]] = []
    for module in lm.decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            prefix = name.removesuffix("inv_freq")
            if prefix == name or prefix.endswith("original_"):
                continue
            kind = getattr(module, "rope_type", "default")
            kind = kind if isinstance(kind, str) else kind[prefix.removesuffix("_")]
            if "dynamic" in kind or kind == "longrope":
                raise C2CError(
                    f"the rotary embedding of {lm.name} is {kind}: its frequencies depend on the prompt's length, so "
                    "cached keys can't be freed of it; use key_space rotated"
                )
            found.append((buffer.detach().float().cpu(), float(getattr(module, f"{prefix}attention_scaling", 1.0))))
    if not found:
        raise C2CError(f"{lm.name} ({lm.text_config.model_type}) has no rotary embedding; use key_space rotated")
    if len(sizes := {len(inv_freq) for inv_freq, _ in found}) > 1:
        raise C2CError(
            f"the layers of {lm.name} rotate {' or '.join(str(2 * n) for n in sorted(sizes))} channels of a head; "
            "expected as many in all layers; use key_space rotated"
        )
    return [*found, (torch.zeros_like(found[0][0]), 1.0)]


@torch.no_grad()
def _probe(lm: LM) -> Tensor:
    """The keys of one token alone at the positions of `_PROBE`: (L, positions, H, D), on the CPU."""
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.full((len(_PROBE), 1), min(lm.vocab_size - 1, 100), device=lm.device)
    positions = torch.tensor(_PROBE, device=lm.device)[:, None]
    lm.decoder(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE: cache})
    return KV.from_cache(cache).keys[:, :, :, 0].cpu()
