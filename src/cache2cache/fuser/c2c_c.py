"""C2C-C: the sharer's cache goes through a three-layer MLP to the receiver's width before it is fused.

The paper found it far better than C2C where the sharer is much stronger than the receiver.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .c2c import C2CFuser, StackedLinear


class C2CCFuser(C2CFuser):
    """A `C2CFuser` that reads in([MLP(sharer) ; receiver])."""

    def _build_input(self, groups: int, s: int, t: int, h: int) -> None:
        super()._build_input(groups, t, t, h)
        self.sharer_mlp1 = StackedLinear(groups, s, h)
        self.sharer_mlp2 = StackedLinear(groups, h, h)
        self.sharer_mlp3 = StackedLinear(groups, h, t)

    def _input(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        projected = self.sharer_mlp3(F.gelu(self.sharer_mlp2(F.gelu(self.sharer_mlp1(sharer)))))
        return super()._input(projected, receiver)

    @property
    def _sharer_entry(self) -> StackedLinear:
        return self.sharer_mlp1
