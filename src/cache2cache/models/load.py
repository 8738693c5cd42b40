"""From a name, a folder, a file or a loaded object to a frozen model with its tokenizer.

    lm = load_lm("smollm2-135m-instruct")                  # catalogue, fetched on first use
    lm = load_lm("Qwen/Qwen3-0.6B", revision="main")       # hub
    lm = load_lm("models/mine"), load_lm("mine.gguf")      # disk
    lm = load_lm(model, tokenizer=tokenizer)               # loaded already

Weights are read from safetensors or GGUF only: a pickle can run code when it is opened, so it never is.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..alignment.chat import begins_with_a_space, continuation_ids, end_of_turn
from ..config import ModelSpec
from ..errors import C2CError
from . import catalogue

HUB_SECONDS = 5.0  # how long the hub may take to say whether it has a model
FINGERPRINT_VALUES = 1024  # values read of each tensor

# Layers that hold one key and one value per position, which is what can be fused position by position.
_FUSABLE = ("full_attention", "sliding_attention", "chunked_attention")
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_READING_GGUF = threading.Lock()
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass
class LM:
    """A frozen causal language model.

    `model` is in evaluation mode without gradients; `tokenizer` may be None where only token ids are used. `name` says
    where it came from and `revision` which bytes: a hub commit, or the SHA-256 of a catalogue model's GGUF.

    Raises:
        C2CError: its cache can't be fused, see `check_fusable`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        check_fusable(self.text_config, self.decoder, self.name)
        self.model.eval().requires_grad_(False)

    @property
    def _embedding(self) -> Tensor:
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's activations, and so of its cache."""
        return self.model.dtype

    @property
    def text_config(self) -> Any:
        """The configuration of the language model proper."""
        return self.model.config.get_text_config()

    @property
    def num_layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def num_kv_heads(self) -> int:
        config = self.text_config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        config = self.text_config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def context_length(self) -> int:
        """The most positions the model was made for; very large where its config names none.

        With two sets of rotary factors (longrope: Phi-3, Phi-4-mini) those of the first: beyond them transformers reads
        everything again by the second, without what was fused.
        """
        rotary = getattr(self.text_config, "rope_parameters", None) or {}
        names = ["max_position_embeddings"]
        if rotary.get("rope_type") == "longrope":
            names.insert(0, "original_max_position_embeddings")
        found = (rotary.get(name) or getattr(self.text_config, name, None) for name in names)
        return int(next(filter(None, found), sys.maxsize))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return int(self._embedding.shape[0])

    @property
    def pad_token_id(self) -> int:
        """What fills up short rows of a batch, and rows of answers that have ended: where the model names none, the
        token that ends a text, as in transformers, so that it is skipped with the special tokens."""
        for name in ("pad_token_id", "eos_token_id"):
            for source in (self.tokenizer, self.model.generation_config, self.text_config):
                token = getattr(source, name, None)
                first = token[0] if isinstance(token, list) and token else token
                if isinstance(first, int) and 0 <= first < self.vocab_size:
                    return first
        return 0

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: those that the model's settings name, and the one that its chat template
        writes behind one, which the settings of base models with a template leave out."""
        ends: Any = self.model.generation_config.eos_token_id
        turns = None if self.tokenizer is None else end_of_turn(self.tokenizer)
        named = ends if isinstance(ends, (list, tuple)) else [ends]
        return frozenset(end for end in (*named, turns) if end is not None)

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or a C2CError that says what to give instead of text."""
        if self.tokenizer is None:
            raise C2CError(f"{self.name} has no tokenizer, so it can't read text; load it with one, or give token ids")
        return self.tokenizer

    def continuation_ids(self, continuation: str | Sequence[int]) -> list[int]:
        """Token ids of text that goes on behind a prompt (token ids pass through)."""
        if not isinstance(continuation, str):
            return [int(i) for i in continuation]
        return continuation_ids(self.need_tokenizer(), continuation)

    def text(self, ids: Sequence[int], behind: bool = False) -> str:
        """The text of tokens, without special ones. `behind`: another text, where the space that some decoders drop
        from a text's beginning belongs."""
        tokenizer = self.need_tokenizer()
        spaced = behind and begins_with_a_space(tokenizer)
        line = tokenizer("\n", add_special_tokens=False)["input_ids"] if spaced else []
        text = str(tokenizer.decode([*line, *ids], skip_special_tokens=True))
        return text[len(str(tokenizer.decode(line, skip_special_tokens=True))) :] if line else text

    @property
    def decoder(self) -> nn.Module:
        """The backbone without the LM head; of a multimodal model its language model."""
        return self.model.get_decoder()

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether logits are the LM head's products with the decoder's output and nothing else: no soft cap, no scale,
        no weights that lie elsewhere. Found out with a few tokens, as that of padding alone may give zeros."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or hasattr(head, "_hf_hook") or head.weight.dtype != self.dtype:
            return False
        ids = torch.arange(4, device=self.device)[None] * (self.vocab_size - 1) // 3
        with torch.no_grad():
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            return torch.equal(head(hidden), self.model(input_ids=ids, use_cache=False).logits)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, that tells weights apart without reading all of them.

        Over every parameter's name and shape and up to 1,024 evenly spaced values of it, rounded to bfloat16, so that
        a bfloat16 and a float32 load of the same file agree. Quantised weights give a hash of their own.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.named_parameters()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(_sample(self.model, name, tensor))
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """SHA-256, in hex, of what turns text into tokens; None without a tokenizer.

        Over the fast tokenizer's own JSON with sorted keys, less padding and truncation, which calls switch on and off.
        """
        if self.tokenizer is None:
            return None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a slow tokenizer
            return _digest([type(self.tokenizer).__name__, self.tokenizer.get_vocab()])
        return _digest({k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")})

    @property
    def template_fingerprint(self) -> str | None:
        """SHA-256, in hex, of the chat template and of the tokens that it may name; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return _digest([self.tokenizer.chat_template, self.tokenizer.bos_token, self.tokenizer.eos_token])


def check_fusable(config: PretrainedConfig, decoder: nn.Module, name: str) -> None:
    """Refuse a model whose cache isn't one key and one value per position and layer, or whose layers aren't found.

    Raises:
        C2CError: linear attention or state space layers, layers that share another layer's cache, compressed caches,
            heads that differ from layer to layer; a decoder without `layers`.
    """
    model, another = f"{name} ({config.model_type})", "choose another model"
    needs = f"fusing needs one key and one value per position in every layer ({', '.join(_FUSABLE)})"
    if getattr(config, "kv_lora_rank", None):
        raise C2CError(
            f"{model} keeps compressed keys and values (multi-head latent attention); fusing needs keys and values of "
            f"one size for every KV head; {another}"
        )
    odd = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in _LAYERS}
    if odd:
        raise C2CError(f"{model} keeps {', '.join(sorted(odd))} in its cache; {needs}; {another}")
    for what in ("head_dim", "num_key_value_heads"):
        try:
            getattr(config, what, None)
        except RuntimeError as error:  # as transformers says that layers differ
            raise C2CError(
                f"{model} has another {what} in some of its layers; {needs}, all of one size; {another}"
            ) from error
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise C2CError(
            f"{model} has its layers elsewhere than in `layers` of its decoder, where they are run from here; choose a "
            "model of another architecture"
        )


def _digest(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sample(model: nn.Module, name: str, tensor: Tensor) -> bytes:
    """The bytes of up to FINGERPRINT_VALUES values of a parameter."""
    if tensor.is_meta:  # offloaded by a device_map
        from accelerate.utils import align_module_device

        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module, "cpu"):
            return _sample(model, name, getattr(module, leaf).detach().clone())
    flat = tensor.detach().reshape(-1)
    count = min(FINGERPRINT_VALUES, flat.numel())
    # Whole-number arithmetic: the same positions whatever the device and the type.
    positions = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    values = flat[positions]
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def load_lm(
    source: str | Path | ModelSpec | PreTrainedModel | LM,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **overrides: Any,
) -> LM:
    """Load a model and freeze it.

    Args:
        source: an existing folder or .gguf file, else a name of the catalogue (fetched if it is not here), else a hub
            id `owner/name`; or a ModelSpec with one of these; or a loaded model, which is frozen in place; or an LM.
        tokenizer: used instead of the source's own. A loaded model has one only if it is given here.
        overrides: fields of ModelSpec, such as dtype="bfloat16", device="cuda", revision="v1", quantization="4bit".
    Returns:
        The model in evaluation mode, without gradients, with its tokenizer (None if the source holds none).
    Raises:
        C2CError: unknown name, hub not reachable, damaged or pickled weights, options that do not go together.
    """
    if isinstance(source, (LM, PreTrainedModel)):
        if overrides:
            raise C2CError(f"a loaded model takes no loading options; got {', '.join(overrides)}")
        if isinstance(source, LM):
            return source if tokenizer is None else replace(source, tokenizer=tokenizer)
        name = source.config.name_or_path or type(source).__name__
        _group_attention()
        return LM(source, tokenizer, name)

    if not isinstance(source, (str, Path, ModelSpec)):
        raise C2CError(
            f"a {type(source).__name__} is no model that can be loaded; expected a name, a folder, a ModelSpec or a "
            "transformers model (of a PEFT model: what its merge_and_unload() returns)"
        )
    spec = _spec(source, overrides)
    found = _find(spec)
    device = _device(spec)
    options: dict[str, Any] = {"dtype": _dtype(spec, device)}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.device_map is not None:
        _need_package("accelerate", "device_map")
        options["device_map"] = spec.device_map
    if spec.quantization is not None:
        if _is_gguf(found.path):
            raise C2CError(f"{found.name} is quantised already; quantization is for models with safetensors weights")
        options["quantization_config"] = _quantization(spec, options["dtype"])
        options.setdefault("device_map", {"": device})
    with quiet():
        read = read_gguf if _is_gguf(found.path) else _read_folder
        model, own_tokenizer = read(found.path, trust_remote_code=spec.trust_remote_code, **options)
        if "device_map" not in options:
            model = cast(Any, model).to(device)
    _group_attention()
    return LM(model, tokenizer or own_tokenizer, found.name, found.revision)


def _group_attention() -> None:
    """Let attention read the keys and values that query heads share as they are, in this process.

    Where there is a mask, transformers copies them for every query head, which the kernels of GPUs want. A CPU's takes
    them as they are, to the same bits: padded batches, and answers that are trained on or scored behind a prompt.
    """
    # Measured with torch 2.13. Kernels of others may fall back to one that holds all of the attention's weights.
    if torch.__version__ >= "2.13" and not torch.accelerator.is_available():
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def weight_bytes(source: str | Path | ModelSpec, **overrides: Any) -> int:
    """How much memory the weights of a model will take, by its files' headers; fetches it if need be.

    Args:
        source, overrides: as for `load_lm`; quantization is not counted.
    """
    spec = _spec(source, overrides)
    path, itemsize = _find(spec).path, _dtype(spec, _device(spec)).itemsize
    if _is_gguf(path):
        from gguf import GGUFReader

        return itemsize * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    numbers = 0
    for file in _weight_files(path)[0]:
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:  # loading says what is wrong with it
            numbers += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return itemsize * numbers


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


# --- options ----------------------------------------------------------------------------------------------------------


def _spec(source: str | Path | ModelSpec, overrides: dict[str, Any]) -> ModelSpec:
    if isinstance(overrides.get("dtype"), torch.dtype):
        overrides["dtype"] = str(overrides["dtype"]).removeprefix("torch.")
    given = source.model_dump() if isinstance(source, ModelSpec) else {"source": str(source)}
    try:
        spec = ModelSpec.model_validate({**given, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        raise C2CError(
            f"loading option {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            f"expected fields of ModelSpec: {', '.join(ModelSpec.model_fields)}"
        ) from error
    if spec.device is not None and spec.device_map is not None:
        raise C2CError(f"{spec.source}: device and device_map are both given; give one of them")
    return spec


def _device(spec: ModelSpec) -> torch.device:
    try:
        device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise C2CError(f"unknown device {spec.device!r}; expected cpu, cuda or cuda:N") from error
    if device.type != "cpu":
        try:
            there = torch.get_device_module(device)
            count = there.device_count() if there.is_available() else 0
        except (RuntimeError, AttributeError):  # a kind of device that torch has nothing for
            count = 0
        if (device.index or 0) >= count:
            seen = f"{count or 'no'} GPU{'' if count == 1 else 's'} of that kind"
            raise C2CError(
                f"device {spec.device!r} is asked for, but torch sees {seen} here; use another device, or cpu"
            )
    return device


def _dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        on_gpu = device.type == "cuda" and spec.device_map != "cpu"
        return torch.bfloat16 if on_gpu else torch.float32
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise C2CError(f"unknown dtype {spec.dtype!r}; expected auto, float32, bfloat16 or float16")
    return dtype


def _quantization(spec: ModelSpec, dtype: torch.dtype) -> Any:
    if isinstance(spec.quantization, dict):
        return dict(spec.quantization)
    if spec.quantization not in ("4bit", "8bit"):
        raise C2CError(f"unknown quantization {spec.quantization!r}; expected 4bit, 8bit or a mapping of options")
    _need_package("bitsandbytes", f"quantization {spec.quantization}")
    _need_package("accelerate", f"quantization {spec.quantization}")
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def _need_package(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise C2CError(f"{purpose} needs the package {package}; install it with: pip install {package}")


# --- finding the files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    path: Path  # a folder, or a .gguf file
    name: str
    revision: str | None


def _find(spec: ModelSpec) -> _Found:
    """Where the files are, after fetching them if need be: disk before catalogue before hub."""
    source = Path(spec.source).expanduser()
    if source.is_dir():
        if spec.gguf_file is None:
            return _Found(source, *_origin(source, spec.source))
        source = source / spec.gguf_file
    if source.is_file():
        if not _is_gguf(source):
            raise C2CError(
                f"{source} is a file that is no GGUF; give a folder, a .gguf file, a catalogue name or a hub id"
            )
        return _Found(source, str(source), None)
    if spec.source in (one.name for one in catalogue.entries()):
        pinned = catalogue.entry(spec.source).sha256
        # The SHA-256 itself is let pass: it is the revision that a fuser remembers of such a model.
        if spec.revision not in (None, pinned) or spec.gguf_file is not None:
            raise C2CError(
                f"{spec.source} is a catalogue name, which pins its bytes; revision and gguf_file are for hub ids"
            )
        return _Found(catalogue.pull(spec.source), spec.source, pinned)
    if _is_gguf(source) or source.is_absolute() or spec.source.startswith((".", "~")):
        raise C2CError(f"{source} does not exist; give an existing folder or .gguf file, a catalogue name or a hub id")
    if not _HUB_ID.fullmatch(spec.source):
        raise C2CError(
            f"unknown model {spec.source!r}, neither a folder nor a catalogue name nor a hub id (owner/name); "
            f"{catalogue.suggest(spec.source)}"
        )
    return _from_hub(spec)


def _origin(folder: Path, given: str) -> tuple[str, str | None]:
    """A converted catalogue model keeps its name when it is given as a folder."""
    try:
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        return str(source["catalogue_name"]), str(source["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return given, None


def _from_hub(spec: ModelSpec) -> _Found:
    """From the local hub cache if that revision is complete there, which asks nobody; else from the hub."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if cached := _in_hub_cache(spec):
        return cached
    if constants.HF_HUB_OFFLINE:
        raise C2CError(
            f"{spec.source} is not in the local hub cache and HF_HUB_OFFLINE is set; {_instead(spec.source)}"
        )
    info = _ask_hub(spec)
    files = [sibling.rfilename for sibling in info.siblings or []]
    if spec.gguf_file is not None:
        if spec.gguf_file not in files:
            offers = ", ".join(name for name in files if name.endswith(".gguf")) or "no GGUF files"
            raise C2CError(f"{spec.source} has no file {spec.gguf_file}; it holds {offers}")
    elif not any(name.endswith(".safetensors") and "/" not in name for name in files):
        pickles = any(name.endswith(_PICKLES) for name in files)
        raise C2CError(
            f"{spec.source} holds {'only pickled weights, which are never opened' if pickles else 'no weights'}; "
            "expected safetensors, or name one of its GGUF files with gguf_file"
        )
    code = ["*.py"] if spec.trust_remote_code else []
    silence = not sys.stderr.isatty() and not are_progress_bars_disabled()
    try:
        if silence:
            disable_progress_bars()
        if spec.gguf_file is not None:
            path = Path(hf_hub_download(spec.source, spec.gguf_file, revision=spec.revision))
        else:
            # Folders inside a repository hold the same weights in other formats.
            ignored = ["*/*", "consolidated*"]
            path = Path(
                snapshot_download(
                    spec.source, revision=spec.revision, allow_patterns=_HUB_FILES + code, ignore_patterns=ignored
                )
            )
    except Exception as error:
        raise C2CError(
            f"fetching {spec.source} from the hub failed ({_line(error)}); "
            "run the same command again: what has arrived is kept"
        ) from error
    finally:
        if silence:
            enable_progress_bars()
    return _Found(path, spec.source, _commit_of(path, spec))


def download(
    repo: str,
    revision: str | None,
    anchor: str,
    choose: Callable[[list[str]], list[str]],
    whole: Callable[[Path], bool],
) -> Path:
    """The folder of a hub repository with the files that `choose` picks from its list; for fusers.

    Args:
        repo, revision: where.
        anchor: a file that belongs to what is sought. If the local hub cache has it, and with it all that `choose`
            picks from what is there, nobody is asked.
        choose: the wanted files among those given; raises C2CError where they are not all there.
        whole: whether what a fetch has left in a folder is all of it.

    Raises:
        C2CError: no such repository, or the hub does not answer within HUB_SECONDS.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, anchor, revision=revision)
    if isinstance(cached, str):
        root = Path(cached).parents[anchor.count("/")]
        with suppress(C2CError):
            choose(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))
            if whole(root):
                return root
    if constants.HF_HUB_OFFLINE:
        raise C2CError(f"{repo} is not in the local hub cache and HF_HUB_OFFLINE is set; give a local folder")
    info = _ask_hub(
        ModelSpec(source=repo, revision=revision), "give the fuser's folder (there is none of that name here)"
    )
    wanted = choose([sibling.rfilename for sibling in info.siblings or []])
    try:
        # By the name that was given, which is what it is found by the next time.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))
    except Exception as error:
        raise C2CError(f"fetching {repo} from the hub failed ({_line(error)}); run the same command again") from error


def _in_hub_cache(spec: ModelSpec) -> _Found | None:
    from huggingface_hub import constants, try_to_load_from_cache

    def cached(file: str) -> Path | None:
        found = try_to_load_from_cache(spec.source, file, revision=spec.revision)
        return Path(found) if isinstance(found, str) else None

    if spec.gguf_file is not None:
        path = cached(spec.gguf_file)
        return _Found(path, spec.source, _commit_of(path, spec)) if path else None
    config = cached("config.json")
    if config is None:
        return None
    files, absent = _weight_files(config.parent)
    # A fetch that was cut short has some files: of shards without their index it is not known how many are missing.
    named = any((config.parent / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    whole = named and any((config.parent / name).is_file() for name in _TOKENIZER_FILES)
    if not files or absent or not (whole or constants.HF_HUB_OFFLINE):
        return None
    return _Found(config.parent, spec.source, _commit_of(config.parent, spec))


def _commit_of(path: Path, spec: ModelSpec) -> str:
    """The hub cache names a snapshot's folder after its commit."""
    depth = len(Path(spec.gguf_file).parts) if spec.gguf_file is not None else 0
    return [path, *path.parents][depth].name


def _ask_hub(spec: ModelSpec, instead: str = "") -> Any:
    """The hub's description of a repository, within HUB_SECONDS however the connection fails to answer. `instead`: what
    to do without it; for a model other ways to name one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(spec.source, revision=spec.revision, timeout=HUB_SECONDS))
        except Exception as error:
            answer.append(error)

    # A thread, since a timeout of the request bounds neither the name look-up nor several slow answers in a row.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    reply = answer[0] if answer else TimeoutError(f"no answer in {HUB_SECONDS:g} s")
    instead = instead or _instead(spec.source)
    if isinstance(reply, GatedRepoError):
        raise C2CError(f"{spec.source} needs its licence accepted on the hub and a login (hf auth login)") from reply
    if isinstance(reply, RevisionNotFoundError):
        raise C2CError(
            f"{spec.source} has no revision {spec.revision!r} on the hub; expected a branch, tag or commit"
        ) from reply
    if isinstance(reply, RepositoryNotFoundError):
        raise C2CError(f"the hub has no model {spec.source!r} (or it is private: hf auth login); {instead}") from reply
    if isinstance(reply, Exception):
        raise C2CError(f"the hub cannot be reached for {spec.source} ({_line(reply)}); {instead}") from reply
    return reply


def _instead(hub_id: str) -> str:
    """What to use where a hub id cannot be had."""
    for one in catalogue.entries():
        if one.hub_id.lower() == hub_id.lower():
            return f"the catalogue has this model in 4-bit as {one.name}"
    names = ", ".join(one.name for one in catalogue.entries())
    return f"use a local folder, a .gguf file, or one of the catalogue: {names}"


# --- reading ----------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a model folder, and the names of those that its index lists but that are not there."""
    if (single := folder / "model.safetensors").is_file():
        return [single], []
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        return sorted(folder.glob("*.safetensors")), []
    except (ValueError, KeyError, AttributeError) as error:
        raise C2CError(f"{folder}/model.safetensors.index.json is damaged; fetch the model again") from error
    return [folder / shard for shard in shards], [shard for shard in shards if not (folder / shard).is_file()]


def _check_folder(folder: Path) -> None:
    """The common ways in which a model folder is broken, each with a clear word, before transformers opens anything."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise C2CError(f"{folder} has no config.json that can be read; expected a transformers model folder") from error
    except ValueError as error:
        raise C2CError(f"{folder}/config.json is not valid JSON ({_line(error)}); fetch the model again") from error
    files, absent = _weight_files(folder)
    if absent:
        raise C2CError(f"{folder} lacks {len(absent)} of its weight files ({absent[0]}, …); fetch the model again")
    if not files:
        pickles = [file.name for file in folder.iterdir() if file.suffix in _PICKLES]
        if pickles:
            raise C2CError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code and are never opened; "
                "expected safetensors: convert them where you trust them"
            )
        raise C2CError(f"{folder} holds no weights; expected model.safetensors")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise C2CError(f"{file} is damaged or incomplete ({_line(error)}); fetch the model again") from error


def _read_folder(folder: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    _check_folder(folder)
    return _read(folder, folder, options)


def read_gguf(file: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A GGUF file as an ordinary dense model, as if it had never been quantised, and its tokenizer.

    Args:
        options: as from_pretrained takes them; dtype above all.
    Raises:
        C2CError: no such architecture in transformers, truncated or damaged file, package missing.
    """
    for package in ("gguf", "accelerate"):
        _need_package(package, "reading a GGUF file")
    with open(file, "rb") as start:
        if start.read(4) != b"GGUF":
            raise C2CError(f"{file} is no GGUF file (it does not start with GGUF); fetch it again")
    options["gguf_file"] = file.name
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers before 5.2x always unpacks
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with _parsed_once():
        model, tokenizer = _read(file, file.parent, options)
    # Unpacked as it is, the model still carries the marks of its file: they would forbid save_pretrained, and a saved
    # config with them would ask for the file again.
    cast(Any, model).hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers read a GGUF file's fields quickly.

    It parses them three times, for config, weights and tokenizer, and `gguf` slices each token of the vocabulary out of
    a memory map. That was half of the time that a model of the catalogue took to convert (docs/LOG.md).
    """
    import gguf

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self.plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self.plain = np.asarray(mapped)  # the same bytes, without what a memory map carries through each slice

    module: Any = gguf
    with _READING_GGUF:
        original, module.GGUFReader = module.GGUFReader, cache(Reader)
        try:
            yield
        finally:
            module.GGUFReader = original


def _read(
    source: Path, folder: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    shared = {key: options[key] for key in ("gguf_file", "trust_remote_code") if key in options}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
        model, report = loaded
        tokenizer = None
        if "gguf_file" in options or any((folder / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **shared)
    except Exception as error:
        raise C2CError(f"{source} cannot be loaded ({_line(error)}); {_remedy(error)}") from error
    # transformers would fill what is missing with random values and go on.
    if missing := sorted(report["missing_keys"]):
        raise C2CError(f"{source} lacks {len(missing)} weights ({missing[0]}, …); it is damaged: fetch the model again")
    return model, tokenizer


def _remedy(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "it brings its own code: read it, and set trust_remote_code if you trust it"
    if isinstance(error, torch.OutOfMemoryError) or "alloc" in text:
        return "it does not fit into memory: try a smaller dtype, quantization, or a device_map"
    if isinstance(error, ImportError):
        return "install the missing package"
    return "it may be damaged or of a kind that transformers cannot read: fetch it again, or use another"


def _line(error: Exception) -> str:
    """An exception's first line, for use inside a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".:;") if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing warnings and progress bars while something is read."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging
    from transformers.utils.logging import tqdm as silenceable

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf_bar = getattr(gguf_reader, "tqdm", None)  # this one ignores disable_progress_bar
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if gguf_bar is not None:
        gguf_reader.tqdm = silenceable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if gguf_bar is not None:
            gguf_reader.tqdm = gguf_bar
