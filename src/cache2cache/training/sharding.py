"""Frozen models spread over the processes of a run, for those that don't fit on one GPU (FSDP2).

Each process holds a part of every layer; a layer is gathered when it is run, by all processes at once, and let go
again. An LM head that shares the embedding's weights becomes a tensor of its own. The fuser stays whole in each
process, and DDP sums its gradients as ever. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..errors import C2CError
from ..models.load import LM


def is_sharded(lm: LM) -> bool:
    """Whether a model is spread over processes: these then have to run it equally often."""
    return isinstance(lm.model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(models: Sequence[LM], device: torch.device) -> None:
    """Spread models over all processes, in place. They may lie in host memory: one layer at a time goes to `device`.

    Raises:
        C2CError: there is one process only.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        raise C2CError(
            "shard spreads the frozen models over several processes and one was started; start it with torchrun or "
            "accelerate launch, or leave shard out"
        )
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for lm in {id(lm.model): lm for lm in models}.values():
        _ = lm.fingerprint  # read from whole weights, and kept
        for part in _parts(lm):
            fully_shard(part, mesh=mesh)
        fully_shard(lm.model, mesh=mesh)  # what is left, the LM head
        # The first run says which module is the outermost; a prefill calls one inside it.
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([[0]], device=device))


def _parts(lm: LM) -> list[nn.Module]:
    """What a pass through the decoder calls one after the other: embedding, layers, norm."""
    parts: list[nn.Module] = []
    for child in lm.decoder.children():
        some = list(child) if isinstance(child, nn.ModuleList) else [child]
        parts += [part for part in some if any(True for _ in part.parameters())]
    return parts
