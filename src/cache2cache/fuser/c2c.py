"""The C2C fuser (paper section 3.3): projection, dynamic weighting, learnable gate, residual; all layers stacked.

Keys and values of a fused layer have separate weights, so a fuser over n layers consists of G = 2n equal modules: the
keys of its layers in ascending order, then the values. The same weight of all modules is one tensor with G in front,
and fusing is a handful of batched products over (G, N, width), N being the positions to fuse. With S and T the widths
(heads times head size) of sharer and receiver, h hidden_dim and m intermediate_dim:

    z         = in([sharer ; receiver]);  z = FFN_m(z)            FFN_w(x) = x + W2 GELU(W1 RMSNorm(x)), inner width w
    projected = out(FFN_m^(num_layers-2)(z))                      (T) as (receiver heads, head size)
    weight    = sigmoid(head(FFN_h(z)))                           one number per receiver head
    fused     = receiver + gate * weight * projected
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..alignment.layers import layer_map
from ..config import FuserConfig, ModelIdentity
from ..errors import C2CError
from ..kv import KV
from ..rotary import Rotary

# Positions fused at once: few enough that the activations stay in the processor's cache, and with gradients equal
# buffers from batch to batch, which a heap serves without holes.
CHUNK = 256


class StackedLinear(nn.Module):
    """G linear layers in one: (G, N, fan_in) to (G, N, fan_out)."""

    def __init__(self, groups: int, fan_in: int, fan_out: int, bias: bool = True, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else 1 / math.sqrt(fan_in)  # torch.nn.Linear's initialisation
        self.weight = nn.Parameter(torch.empty(groups, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, fan_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)


class StackedFFN(nn.Module):
    """G residual blocks x + W2 GELU(W1 RMSNorm(x)) of inner width `inner`, without biases."""

    def __init__(self, groups: int, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm: nn.Parameter | None = nn.Parameter(torch.ones(groups, 1, dim))
        self.w1 = StackedLinear(groups, dim, inner, bias=False)
        self.w2 = StackedLinear(groups, inner, dim, bias=False)
        self.dropout = dropout

    def fold(self) -> None:
        """Put the norm's weight into the product behind it (inference only)."""
        self.w1.weight = nn.Parameter(self._normed(), requires_grad=False)
        self.norm = None

    def _normed(self) -> Tensor:
        """W1 with the norm's weight in it: one pass over x less, and three less backward."""
        if self.norm is None:
            return self.w1.weight
        groups, _, dim = self.norm.shape
        # A view, whose gradient lies as DDP wants it, and not a transpose.
        return self.w1.weight * self.norm.view(groups, dim, 1)

    def inner(self, x: Tensor) -> Tensor:
        """GELU(W1 RMSNorm(x)), (G, N, inner)."""
        # RMSNorm in two passes over x; torch's own takes five on a CPU.
        whole = torch.promote_types(x.dtype, torch.float32)  # squares of a long vector are beyond float16
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=whole)
        scale = (norm.square() / x.shape[-1] + 1e-6).rsqrt().to(x.dtype)
        inner = F.gelu(torch.bmm(x * scale, self._normed()))
        return dropout(inner, self.dropout) if self.training and self.dropout else inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x, self.inner(x), self.w2.weight)


def dropout(x: Tensor, p: float) -> Tensor:
    """Each number of x with probability p made 0, else divided by 1 - p, with p to 16 bits on a CPU.

    There torch draws a whole random number for each, a twentieth of a training step; here four share one.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def with_defaults(config: FuserConfig, defaults: dict[str, Any]) -> FuserConfig:
    """A configuration with a variant's own defaults where the user set nothing."""
    return config.model_copy(update={k: v for k, v in defaults.items() if k not in config.model_fields_set})


class C2CFuser(nn.Module):
    """Fuses a sharer's cache into a receiver's. Built untrained from a configuration that names both models.

    A variant overrides `_build` (its weights) and `change` (what they compute). Its state is parameters whose first
    dimension is the module, so that closed ones can be left out.

    Attributes:
        defaults: settings of the configuration that this variant would have otherwise where the user names none.
        kind_axis: how modules and kinds go together. 0: keys and values have modules of their own, G = 2n, first those
            of the keys. -1: one module a layer, G = n, reads and writes both side by side, so S and T are twice as wide
            and `heads` twice as many.
        receiver_layers, sharer_layers: (n,) int64, the layer map.
        record: how it was trained, as far as the file it was read from says.
        trained_on: the ids of the examples that it was trained on, as far as the list beside that file says.
        loaded: whether its weights were read from a file, so that training goes on from them.
        gate_logit: (2n,) the gates of the keys, then of the values; without training noise a gate is open where its
            logit is above 0.
        rotary: of the receiver and of the sharer, which only `key_space: unrotated` needs.
        temperature: (), the present gate temperature (training only).
        sharer_mean, sharer_std (G, 1, S), receiver_mean, receiver_std (G, 1, T): with `normalize`, the statistics of
            the calibration pass.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    kind_axis: ClassVar[int] = 0

    def __init__(self, config: FuserConfig) -> None:
        super().__init__()
        config = with_defaults(config, self.defaults)
        receiver, sharer = config.receiver, config.sharer
        if receiver is None or sharer is None:
            raise C2CError(
                "a fuser needs to know its models; build it with C2C.from_models, or set receiver and sharer"
            )
        pairs = layer_map(config.layer_map, receiver.num_layers, sharer.num_layers)
        self.config = config.model_copy(update={"layer_map": pairs})
        self.record: dict[str, Any] = {}
        self.trained_on: frozenset[str] = frozenset()
        self.loaded = False
        self.register_buffer("receiver_layers", torch.tensor([t for t, _ in pairs]), persistent=False)
        self.register_buffer("sharer_layers", torch.tensor([s for _, s in pairs]), persistent=False)
        self.receiver_layers: Tensor
        self.sharer_layers: Tensor
        n, side_by_side = len(pairs), 1 if self.kind_axis == 0 else 2
        self.groups = 2 * n // side_by_side
        self.heads, self.head_dim = side_by_side * receiver.num_kv_heads, receiver.head_dim
        s, t = side_by_side * sharer.width, side_by_side * receiver.width
        self._build(s, t)
        if config.gating:
            self.gate_logit = nn.Parameter(torch.full((2 * n,), float(config.gate_init)))
        self.register_buffer("temperature", torch.tensor(config.initial_temperature))
        self.temperature: Tensor
        self.rotary: tuple[Rotary, Rotary] | None = None
        self._kept: tuple[Any, list[Part]] | None = None  # see _inference
        self._weights: tuple[Tensor | float, int] = 0.0, 0  # see take_weights
        self.sharer_mean: Tensor
        self.sharer_std: Tensor
        self.receiver_mean: Tensor
        self.receiver_std: Tensor
        if config.normalize:
            for name, width in (("sharer", s), ("receiver", t)):
                self.register_buffer(f"{name}_mean", torch.zeros(self.groups, 1, width))
                self.register_buffer(f"{name}_std", torch.ones(self.groups, 1, width))

    def _build(self, s: int, t: int) -> None:
        """Make the weights of `groups` modules that read S sharer and T receiver numbers a position and write T."""
        c, groups = self.config, self.groups
        h, m = c.hidden_dim, c.intermediate_dim
        self._build_input(groups, s, t, h)
        self.mlp1 = StackedFFN(groups, h, m, c.dropout)
        self.proj_mlp2 = nn.ModuleList(StackedFFN(groups, h, m, c.dropout) for _ in range(c.num_layers - 2))
        self.proj_out = StackedLinear(groups, h, t, zero=c.zero_init)
        if c.weighting:
            self.scalar_mlp2 = StackedFFN(groups, h, h, c.dropout)
            self.scalar_head = StackedLinear(groups, h, self.heads)

    def _build_input(self, groups: int, s: int, t: int, h: int) -> None:
        # in([sharer ; receiver]) as two products and a sum, which saves writing the concatenation.
        self.in_sharer = StackedLinear(groups, s, h)
        self.in_receiver = StackedLinear(groups, t, h, bias=False)
        for part in (self.in_sharer, self.in_receiver):
            nn.init.uniform_(part.weight, -1 / math.sqrt(s + t), 1 / math.sqrt(s + t))

    @property
    def models(self) -> tuple[ModelIdentity, ModelIdentity]:
        """Receiver and sharer, by the shapes of their caches."""
        receiver, sharer = self.config.receiver, self.config.sharer
        assert receiver is not None and sharer is not None
        return receiver, sharer

    # ---- what is open -------------------------------------------------------------------------------------------

    @property
    def open_gates(self) -> Tensor:
        """(2n,) bool: what takes part in inference. Without gating everything does."""
        if not self.config.gating:
            return torch.ones(2 * len(self.receiver_layers), dtype=torch.bool, device=self.receiver_layers.device)
        return self.gate_logit.detach() > 0

    @property
    def sharer_depth(self) -> int:
        """How many of the sharer's lowest layers inference reads: above them the sharer need not compute."""
        layers = self.sharer_layers.repeat(2)[self.open_gates]
        return int(layers.max()) + 1 if len(layers) else 0

    @property
    def sharer_reads(self) -> int:
        """How many of the sharer's layers inference reads, keys and values counted apart."""
        per_kind = self.open_gates.view(2, -1)
        return sum(len(self.sharer_layers[is_open].unique()) for is_open in per_kind)

    def set_progress(self, step: int) -> None:
        """Anneal the gate temperature geometrically: step 0 has the initial, `anneal_steps` and later the final one."""
        c = self.config
        done = min(step / c.anneal_steps, 1.0)
        self.temperature.fill_(c.initial_temperature * (c.final_temperature / c.initial_temperature) ** done)

    def take_weights(self) -> tuple[float, int]:
        """Sum and number of the dynamic weights of all training passes since this was last asked: of every position,
        head and module. A variant that computes its change otherwise may have none."""
        (total, count), self._weights = self._weights, (0.0, 0)
        return float(total), count

    # ---- the equations ------------------------------------------------------------------------------------------

    def _input(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        return torch.baddbmm(self.in_sharer(sharer), receiver, self.in_receiver.weight)

    def change(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        """gate * weight * projected.

        Args:
            sharer: (G, N, S).
            receiver: (G, N, T).

        Returns:
            (G, N, T).
        """
        projected = z = self._hidden(sharer, receiver)
        for block in self.proj_mlp2:
            projected = block(projected)
        assert self.proj_out.bias is not None
        out: Tensor = self.proj_out.weight
        bias: Tensor = self.proj_out.bias
        if self.config.normalize:  # back to the receiver's units, in the weights: one pass over `projected` less
            out, bias = out * self.receiver_std, bias * self.receiver_std
            if not self.config.residual:
                bias = bias + self.receiver_mean
        projected = torch.baddbmm(bias, projected, out)
        weight = self._weight(z)
        if self.training and self.config.weighting:
            total, count = self._weights
            self._weights = total + weight.detach().sum(dtype=torch.float32), count + weight.numel()
        factor = weight * self._gate(z)
        return (projected.unflatten(-1, (self.heads, self.head_dim)) * factor.unsqueeze(-1)).flatten(-2)

    def weights(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        """The dynamic weights at the positions of `inputs`, whether or not the gates are open; 1 without weighting.

        Returns:
            (2n, N, receiver heads), the keys of the fused layers, then the values.
        """
        z = self._hidden(sharer, receiver) if self.config.weighting else receiver  # some variants have nothing hidden
        weight = self._weight(z).expand(self.groups, sharer.shape[1], self.heads)
        return torch.cat(weight.chunk(2, -1)) if self.kind_axis else weight

    def _hidden(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        """(G, N, hidden_dim), what projection and weight are computed from."""
        if self.config.normalize:
            sharer = (sharer - self.sharer_mean) / self.sharer_std
            receiver = (receiver - self.receiver_mean) / self.receiver_std
        hidden: Tensor = self.mlp1(self._input(sharer, receiver))
        return hidden

    def _weight(self, z: Tensor) -> Tensor:
        """(G, N, heads), or (1, 1, 1) without weighting."""
        if not self.config.weighting:
            return z.new_ones(1, 1, 1)
        # head(z + W2 inner) with W2 and the head multiplied first: heads are few, so this saves a whole product.
        w2_head = torch.bmm(self.scalar_mlp2.w2.weight, self.scalar_head.weight)
        return torch.baddbmm(self.scalar_head(z), self.scalar_mlp2.inner(z), w2_head).sigmoid()

    def _gate(self, z: Tensor) -> Tensor:
        """(G, N or 1, heads or 1): hard in inference, noisy and soft in training."""
        if not self.config.gating:
            return z.new_ones(1, 1, 1)
        logit = self.gate_logit[:, None, None]
        if self.kind_axis:  # (n, 1, heads of the keys and of the values)
            logit = self.gate_logit.view(2, -1).T.repeat_interleave(self.heads // 2, 1)[:, None]
        if not self.training:
            return (logit > 0).to(z.dtype)
        noise = torch.zeros(())
        if self.config.gate_noise != "none":
            uniform = torch.rand(len(z), z.shape[1], self.heads, device=z.device).clamp(1e-6, 1 - 1e-6)
            if self.config.gate_noise == "logistic":  # the difference of two Gumbel variables
                noise = uniform.log() - (-uniform).log1p()
            else:
                noise = -(-uniform.log()).log()
        return ((logit + noise.to(z.device)) / self.temperature).sigmoid()

    def forward(
        self,
        receiver: KV,
        sharer: KV,
        where: Tensor,
        out: KV | None = None,
        sharer_layers: tuple[int, int] | None = None,
    ) -> KV:
        """The receiver's cache with the sharer's fused in.

        Args:
            receiver: (L_receiver, B, H, T, D), read.
            sharer: (at least `sharer_depth` layers, B', H', T', D'), read.
            where: (4, N) int64, what to fuse: row and position in the receiver's cache, row and position in the
                sharer's. No receiver position twice. With unrotated keys (6, N): then the position ids of both.
            out: the cache that the changes are added to, in place (may be `receiver` itself), contiguous; None: a copy.
            sharer_layers: fuse only what reads sharer layers from the first to before the second, while others are
                still on their way (inference only); None: all.

        Returns:
            `out`, or a new cache. Gradients flow into the fuser's parameters when they are enabled.
        """
        if sharer.keys.shape[0] < (self.sharer_depth if sharer_layers is None else sharer_layers[1]):
            raise C2CError(
                f"the sharer's cache has {sharer.keys.shape[0]} layers; this fuser reads {self.sharer_depth}"
            )
        untouched = out is None or out is receiver
        receiver, sharer = _contiguous(receiver), _contiguous(sharer)
        if out is None:
            out = receiver.clone()
        if where.shape[1] == 0:
            return out
        parts = self._parts(receiver)
        if sharer_layers is not None:
            parts = [part for whole in parts if (part := self._reading(whole, *sharer_layers)) is not None]
        grads = torch.is_grad_enabled()
        chunk = where.shape[1] if grads and where.device.type != "cpu" else CHUNK
        for fuser, layers in parts:
            written: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
            for piece in where.split(chunk, dim=1):
                theirs, read, before, places = self._read_both(receiver, sharer, piece, layers, fuser.dtype)
                change = fuser.change(theirs, read)
                changes = change.split([len(p) for p in places]) if self.kind_axis == 0 else change.chunk(2, -1)
                for i, ((kind, index), place, old, new) in enumerate(zip(layers, places, before, changes, strict=True)):
                    if kind == "keys" and self._unrotated:
                        new = self._turn(0, new, self.receiver_layers[index], piece[-2])
                    if self.config.residual:
                        new = new + (old if untouched else _read(out, kind, place, fuser.dtype))
                    if grads:
                        written[i].append((place, new))
                    else:
                        _write(out, kind, place, new)
            for (kind, _), pieces in zip(layers, written, strict=True):
                if pieces:  # at once: before a second write the gradient of the whole cache would be copied
                    _write(out, kind, *(torch.cat(some, 1) for some in zip(*pieces, strict=True)))
        return out

    def _parts(self, receiver: KV) -> list[Part]:
        """What computes the changes: fusers, and of which kind and which entries of the layer map their modules are."""
        if self.training:
            every = torch.arange(len(self.receiver_layers), device=self.receiver_layers.device)
            return [(self, [(kind, every) for kind in KINDS])]
        # Half precision only where it is the hardware's pace; a CPU computes the few products in float32.
        return self._inference(receiver.keys.dtype if receiver.keys.is_cuda else torch.float32)

    def _reading(self, part: Part, start: int, end: int) -> Part | None:
        """The modules of a part that read sharer layers from `start` to before `end`."""
        fuser, layers = part
        reads = self.sharer_layers[layers[0][1]]
        chosen = ((reads >= start) & (reads < end)).nonzero().flatten()
        if len(chosen) in (0, len(reads)):
            return part if len(chosen) else None
        index: Tensor | slice = chosen
        if int(chosen[-1] - chosen[0]) == len(chosen) - 1:  # neighbours, as in all layer maps by name: views will do
            index = slice(int(chosen[0]), int(chosen[-1]) + 1)
        return _some_modules(fuser, index), [(kind, entries[chosen]) for kind, entries in layers]

    def inputs(self, receiver: KV, sharer: KV, where: Tensor) -> tuple[Tensor, Tensor]:
        """What all modules read at the given positions: the sharer's (G, N, S) and the receiver's (G, N, T)."""
        every = torch.arange(len(self.receiver_layers), device=self.receiver_layers.device)
        receiver, sharer = _contiguous(receiver), _contiguous(sharer)
        return self._read_both(receiver, sharer, where, [(kind, every) for kind in KINDS], self.dtype)[:2]

    def _read_both(
        self, receiver: KV, sharer: KV, where: Tensor, layers: Sequence[tuple[str, Tensor]], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """The inputs of some modules, (G, N, S) and (G, N, T), and for each kind what the receiver's cache holds,
        (layers, N, H * D), and where, see `_vectors`."""
        row, t, sharer_row, s = where[:4]
        ours = [_vectors(receiver, self.receiver_layers[index], row, t) for _, index in layers]
        theirs = [_vectors(sharer, self.sharer_layers[index], sharer_row, s) for _, index in layers]
        before = [_read(receiver, kind, place, dtype) for (kind, _), place in zip(layers, ours, strict=True)]
        known = [_read(sharer, kind, place, dtype) for (kind, _), place in zip(layers, theirs, strict=True)]
        read = list(before)
        if self._unrotated and layers[0][0] == "keys":
            if len(where) != 6:
                raise C2CError(f"`where` has {len(where)} rows; unrotated keys need 6, the last two position ids")
            index = layers[0][1]
            read[0] = self._turn(0, read[0], self.receiver_layers[index], where[-2], back=True)
            known[0] = self._turn(1, known[0], self.sharer_layers[index], where[-1], back=True)
        join = (lambda x: x[0]) if len(layers) == 1 else (lambda x: torch.cat(x, self.kind_axis))
        return join(known), join(read), before, ours

    @property
    def _unrotated(self) -> bool:
        return self.config.key_space == "unrotated"

    def _turn(self, whose: int, keys: Tensor, layers: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Keys (layers, N, H * D) of the receiver (0) or the sharer (1), with their rotary embedding put on or off."""
        if self.rotary is None:
            raise C2CError(
                "this fuser fuses unrotated keys and doesn't know the models' rotary embeddings; use it in a C2C pair, "
                "or set fuser.rotary = (Rotary.of(receiver), Rotary.of(sharer))"
            )
        dim = self.models[whose].head_dim
        return self.rotary[whose].turn(keys.unflatten(-1, (-1, dim)), layers, positions, back=back).flatten(-2)

    # ---- inference ----------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def train(self, mode: bool = True) -> C2CFuser:
        """See `torch.nn.Module.train`."""
        self._kept = None
        return super().train(mode)

    def _inference(self, dtype: torch.dtype) -> list[Part]:
        """The open modules alone, with normalisation folded into their weights.

        Made once and kept until a parameter changes, as far as torch counts that: behind a change by `.data`, which it
        doesn't, call `train()` or `eval()`.
        """
        every = (*self.parameters(), *self.buffers())
        if any(x.is_inference() for x in every):  # whose changes aren't counted
            return self._lean_parts(dtype)
        key = (dtype, tuple((id(x), x.device, x._version) for x in every))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._lean_parts(dtype))
        return self._kept[1]

    def _lean_parts(self, dtype: torch.dtype) -> list[Part]:
        n = len(self.receiver_layers)
        is_open = self.open_gates.view(2, n)
        if self.kind_axis == 0:  # the keys come first and then the values, so that activations stay few
            indices = [each.nonzero().flatten() for each in is_open]
            leans = [self._lean(slice(k * n, k * n + n), index, dtype) for k, index in enumerate(indices)]
            return [(lean, [(kind, i)]) for kind, lean, i in zip(KINDS, leans, indices, strict=True) if len(i)]
        index = is_open.any(0).nonzero().flatten()
        lean = self._lean(slice(0, n), index, dtype)
        # One kind of a layer may be closed: what is written for it is nothing.
        factor = is_open[:, index].T.repeat_interleave(self.heads // 2 * self.head_dim, 1)[:, None].to(dtype)
        if not factor.all():
            for leaf in ("weight", "bias"):
                closed = getattr(lean.proj_out, leaf) * factor
                setattr(lean.proj_out, leaf, nn.Parameter(closed, requires_grad=False))
        return [(lean, [(kind, index) for kind in KINDS])] if len(index) else []

    def _lean(self, modules: slice, index: Tensor, dtype: torch.dtype) -> C2CFuser:
        """Of the modules in a range, those at `index`, ready for inference."""

        def pick(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()[modules]
            return tensor if len(index) == len(tensor) else tensor[index]

        with torch.no_grad(), torch.device("meta"):
            lean = type(self)(self.config.model_copy(update={"gating": False, "normalize": False}))
        for name, _ in list(lean.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(lean.get_submodule(owner), leaf, nn.Parameter(pick(self.get_parameter(name)), requires_grad=False))
        if self.config.normalize:
            with torch.no_grad():
                lean._fold(dtype, *(pick(getattr(self, name)) for name in STATISTICS))
        with torch.no_grad():
            for block in lean.modules():
                if isinstance(block, StackedFFN):
                    block.fold()
        return lean.to(dtype).eval()

    def _fold(
        self, dtype: torch.dtype, sharer_mean: Tensor, sharer_std: Tensor, receiver_mean: Tensor, receiver_std: Tensor
    ) -> None:
        """Put the normalisation of inputs and output into the weights that read and write them."""
        entry = self._sharer_entry
        for part, takes_shift, mean, std in (
            (entry, entry, sharer_mean, sharer_std),
            (self.in_receiver, self.in_sharer, receiver_mean, receiver_std),
        ):
            # Rounded first: a key's large constant part then cancels exactly against the bias whatever the dtype.
            part.weight = nn.Parameter((part.weight / std.transpose(1, 2)).to(dtype).to(std.dtype), requires_grad=False)
            assert takes_shift.bias is not None
            takes_shift.bias = nn.Parameter(takes_shift.bias - torch.bmm(mean, part.weight), requires_grad=False)
        out = self.proj_out
        out.weight = nn.Parameter(out.weight * receiver_std, requires_grad=False)
        assert out.bias is not None
        bias = out.bias * receiver_std
        out.bias = nn.Parameter(bias if self.config.residual else bias + receiver_mean, requires_grad=False)

    def fold(self) -> None:
        """Fold the normalisation into the weights for good: the same function, without `normalize`."""
        with torch.no_grad():
            self._fold(self.dtype, *(getattr(self, name) for name in STATISTICS))
        self.config = self.config.model_copy(update={"normalize": False})

    @property
    def _sharer_entry(self) -> StackedLinear:
        """The first layer that a sharer's numbers meet."""
        return self.in_sharer


KINDS = ("keys", "values")
_M = TypeVar("_M", bound=nn.Module)
Part = tuple[C2CFuser, list[tuple[str, Tensor]]]
STATISTICS = ("sharer_mean", "sharer_std", "receiver_mean", "receiver_std")


def _some_modules(module: _M, index: Tensor | slice) -> _M:
    """A shallow copy with some of the stacked modules: all parameters' entries at `index`."""
    chosen = copy.copy(module)
    chosen._parameters = {
        name: None if p is None else nn.Parameter(p.detach()[index], requires_grad=False)
        for name, p in module._parameters.items()
    }
    chosen._modules = {name: m and _some_modules(m, index) for name, m in module._modules.items()}
    return chosen


def _contiguous(kv: KV) -> KV:
    """The cache itself, unless it is a view with gaps (some rows of a batch): then a copy."""
    return kv.map(Tensor.contiguous)


def _flat(kv: KV, kind: str) -> Tensor:
    """All head vectors of the keys or of the values, one after the other: (L * B * H * T, D), a view."""
    tensor: Tensor = getattr(kv, kind)
    return tensor.view(-1, tensor.shape[-1])


def _vectors(kv: KV, layers: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Which rows of `_flat` the given layers hold at the given positions: (layers, N, H)."""
    _, batch, heads, length, _ = kv.keys.shape
    head = torch.arange(heads, device=layers.device)
    return ((layers[:, None, None] * batch + row[:, None]) * heads + head) * length + position[:, None]


def _read(kv: KV, kind: str, place: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of `_flat` at `place` (layers, N, H): (layers, N, H * D)."""
    return _flat(kv, kind).index_select(0, place.flatten()).view(*place.shape[:2], -1).to(dtype)


def _write(kv: KV, kind: str, place: Tensor, new: Tensor) -> None:
    """Put (layers, N, H * D) into the rows of `_flat` at `place` (layers, N, H)."""
    tensor: Tensor = getattr(kv, kind)
    _Written.apply(tensor, place.flatten(), new.reshape(-1, tensor.shape[-1]).to(tensor.dtype))


class _Written(torch.autograd.Function):
    """A cache (L, B, H, T, D) with `new` (n, D) in the rows `place` (n) of `_flat`, in place.

    The gradient of `new` is read at those rows; that of an assignment to a view copies the whole cache.
    """

    @staticmethod
    def forward(ctx: Any, cache: Tensor, place: Tensor, new: Tensor) -> Tensor:
        cache.view(-1, cache.shape[-1])[place] = new
        ctx.save_for_backward(place)
        ctx.mark_dirty(cache)
        return cache

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (place,) = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        kept = None
        if ctx.needs_input_grad[0]:  # an earlier sharer's change
            kept = gradient.index_fill(0, place, 0.0).view(gradients[0].shape)
        return kept, None, gradient[place]


class Fusers(nn.ModuleList):
    """The fusers of a pair, one per sharer."""

    if TYPE_CHECKING:  # what a module list can't say of itself

        def __iter__(self) -> Iterator[C2CFuser]: ...

        @overload
        def __getitem__(self, index: slice) -> Fusers: ...
        @overload
        def __getitem__(self, index: int) -> C2CFuser: ...
        def __getitem__(self, index: int | slice) -> C2CFuser | Fusers: ...
