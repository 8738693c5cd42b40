"""A fuser some 25 to 50 times smaller than the published one: keys and values of a layer share one narrow trunk.

    z                                  = FFN_m(in([sharer keys ; sharer values ; receiver keys ; receiver values]))
    [projected keys ; projected values] = out(FFN_m^(num_layers-2)(z)),  weights = sigmoid(head(FFN_h(z)))

Gates, weights and everything behind them are the published fuser's.
"""

from __future__ import annotations

from .c2c import C2CFuser


class BottleneckFuser(C2CFuser):
    """A `C2CFuser` with one narrow module a layer instead of a wide one for its keys and one for its values."""

    defaults = {"hidden_dim": 128, "intermediate_dim": 128}  # noqa: RUF012
    kind_axis = -1
