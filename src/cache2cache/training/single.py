"""The baseline without a sharer: the receiver alone, fine-tuned with LoRA on what a fuser would be trained on.

Data, split, loss, batches, schedule, checkpoints and log are those of `loop`; PEFT adds the adapter and its format. The
prompt is read with gradients here, as it is the receiver that learns.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..alignment.chat import FROZEN, render
from ..config import LoraSpec, TrainConfig
from ..errors import C2CError
from ..files import save_tensors
from ..fuser import checkpoint
from ..models.load import LM, quiet
from ..pair import PromptIds, identity
from .items import Item, Prepared
from .loss import loss_of, token_losses
from .objective import Objective, targets
from .start import recipe_of


class Alone:
    """A receiver without sharers, for `prepare`: prompts are encoded as a pair encodes them."""

    def __init__(self, receiver: LM) -> None:
        self.receiver = receiver
        self.sharers: list[LM] = []

    def encode(self, prompt: Any, *, prefix: str = "") -> PromptIds:
        rendered = render(self.receiver.need_tokenizer(), prompt, prefix=prefix, chat_template_kwargs=FROZEN)
        return PromptIds(rendered.ids, [], [])


class SingleObjective(Objective):
    """`single_loss` of a receiver with a new adapter, which alone is trained, in float32.

    Args:
        receiver: stays as it is.
        spec: the adapter; its first weights are drawn from torch's generator.
    """

    folder = "adapter"

    def __init__(self, receiver: LM, spec: LoraSpec) -> None:
        super().__init__()
        peft = _peft()
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules),
        )
        try:
            with quiet():
                model = peft.get_peft_model(twin(receiver).model, lora)
        except ValueError as error:
            raise C2CError(
                f"no adapter for {receiver.name} with target_modules {spec.target_modules}: {error}"
            ) from error
        lora.base_model_name_or_path = receiver.name
        self.adapted = [model]  # in a list: no submodule of this one
        self.receiver, self.frozen = receiver, {"receiver": receiver.model}
        self.trained = _Weights(self.adapted[0])
        self.dropouts = [m for name, m in self.adapted[0].named_modules() if name.endswith(".lora_dropout")]

    def train(self, mode: bool = True) -> SingleObjective:
        """Switch the adapter's dropout; the receiver's own layers stay in evaluation mode."""
        super().train(mode)
        for dropout in self.dropouts:
            dropout.train(mode)
        return self

    def models(self) -> list[LM]:
        return [self.receiver]

    def forward(self, items: Sequence[Item], per: str) -> tuple[Tensor, Tensor]:
        return single_loss(self.adapted[0], self.receiver, items, per)

    def write(self, config: TrainConfig, data: Prepared, measured: dict[str, Any], ids: Set[str]) -> Path:
        """Put the adapter into `adapter/` of the run in PEFT's format, with a record of what it was made from
        (`training.json`) and the ids of the examples. Each file appears whole or not at all."""
        from peft import __version__ as peft_version
        from peft import get_peft_model_state_dict

        from .. import __version__

        folder, model = config.output / self.folder, self.adapted[0]
        folder.mkdir(parents=True, exist_ok=True)
        recipe = {k: v for k, v in recipe_of(config).items() if k not in ("sharer", "fuser")}
        record = {
            "versions": {"cache2cache": __version__, "torch": torch.__version__, "peft": peft_version},
            "receiver": identity(self.receiver).model_dump(mode="json"),
            "training": {"recipe": recipe, "examples": len(data.train), **measured},
        }
        dtype = getattr(torch, config.weights_on_disk)
        # By itself PEFT asks the hub whether the embedding, which isn't trained, has changed.
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in state.items()}
        with tempfile.TemporaryDirectory(dir=config.output, prefix=".adapter.") as partial:
            save_tensors(tensors, Path(partial) / "adapter_model.safetensors", {"format": "pt"})
            model.peft_config["default"].save_pretrained(partial)
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            (Path(partial) / "training.json").write_text(text, encoding="utf-8")
            for path in sorted(Path(partial).iterdir()):
                path.chmod(0o644)  # safetensors lets only the owner read
                os.replace(path, folder / path.name)
        checkpoint.write_ids(folder, ids)
        return folder


def single_loss(model: nn.Module, receiver: LM, items: Sequence[Item], per: str = "token") -> tuple[Tensor, Tensor]:
    """As `objective.response_loss` without a sharer: prompt and response in one pass, gradients through both.

    Args:
        model: the receiver's, with an adapter.
        receiver: what else is to be known of it.
        items, per: as for `response_loss`.
    """
    target = targets(items).to(receiver.device)
    # Padding stands on the right, where each of its positions sees what is before it: a position that sees nothing, as
    # on the left, has gradients that are no numbers in some of CUDA's attention kernels.
    rows = [[*item.prompt.receiver, *item.response[:-1]] for item in items]
    width, first = max(map(len, rows)), min(len(item.prompt.receiver) for item in items) - 1
    ids = torch.tensor([row + [receiver.pad_token_id] * (width - len(row)) for row in rows], device=receiver.device)
    lengths = torch.tensor([len(row) for row in rows], device=receiver.device)
    places = torch.arange(width, device=receiver.device)
    logits = model(
        input_ids=ids,
        attention_mask=(places < lengths[:, None]).long(),
        position_ids=places.expand(len(rows), -1),
        use_cache=False,
        logits_to_keep=width - first,
    ).logits
    # Of each row those from its last prompt token on; behind a response's end any will do.
    begins = torch.tensor([len(item.prompt.receiver) - 1 - first for item in items], device=receiver.device)
    wanted = begins[:, None] + torch.arange(target.shape[1], device=receiver.device)
    logits = logits[torch.arange(len(rows), device=receiver.device)[:, None], wanted.clamp(max=logits.shape[1] - 1)]
    return loss_of(*token_losses(logits, target), target, per)


class _Weights(nn.Module):
    """The parameters of a model that are trained, under their own names (with / for dots)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


def twin(lm: LM) -> LM:
    """A second model with the same weights in the same memory; what is put into its layers, the first doesn't see."""
    _ = lm.fingerprint  # of the weights as they are, before there is an adapter
    shared = {id(tensor): tensor for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    return LM(copy.deepcopy(lm.model, shared), lm.tokenizer, lm.name, lm.revision)


def load_single(receiver: LM, folder: str | Path) -> LM:
    """The receiver with an adapter in PEFT's format, such as `c2c train` writes with `method: single`.

    The receiver itself stays as it is; both share their weights.

    Raises:
        C2CError: the folder holds no adapter, or one that doesn't fit; PEFT is missing.
    """
    peft, folder = _peft(), Path(folder)
    if not all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise C2CError(
            f"{folder} holds no adapter (adapter_config.json, adapter_model.safetensors); give the folder adapter/ of "
            "a run with method: single"
        )
    lm = twin(receiver)
    try:
        # On the meta device first: memory is taken for what the file holds, not for what its configuration says.
        with quiet():
            model = peft.PeftModel.from_pretrained(lm.model, str(folder), low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise C2CError(f"the adapter in {folder} doesn't fit {receiver.name}: {error}") from error
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise C2CError(f"the adapter in {folder} has no weights for {left[0]} of {receiver.name}")
    record = folder / "training.json"
    made_for = receiver.fingerprint
    if record.exists():
        made_for = json.loads(record.read_text(encoding="utf-8"))["receiver"]["fingerprint"]
    if made_for != receiver.fingerprint:
        warnings.warn(
            f"the adapter in {folder} was trained for weights {made_for[:12]}, but {receiver.name} has weights "
            f"{receiver.fingerprint[:12]}; answers may be worse",
            stacklevel=2,
        )
    return LM(model.base_model.model, lm.tokenizer, lm.name, lm.revision)


def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise C2CError("the baseline single needs PEFT, which is not installed; pip install 'cache2cache[lora]'")
    import peft

    return peft
