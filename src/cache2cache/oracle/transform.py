"""Cache transformation: can a sharer's cache be turned into the receiver's (paper, oracle experiment 2)?

A three-layer MLP is trained to predict the receiver's keys from the sharer's keys, and values from values, layer by
layer (of the layer map, stacked), at the positions that a token map pairs. Its baselines are ridge regression and the
receiver's mean. On other questions:

    R² and cosine, per kind and layer
    the error in the receiver's attention output when one layer at a time reads the transformed cache
    accuracy when the receiver answers from the transformed cache alone
    where the transformed vectors lie: t-SNE, neighbours, coverage, effective rank (`clouds`, `rank`)

The transformed cache is that of a fuser which replaces instead of adding, so it is made and read as any fused cache.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..alignment.chat import FROZEN
from ..alignment.layers import layer_map as pairs_of
from ..analysis.effective_rank import effective_rank, gram
from ..analysis.runs import check_ids
from ..config import FuserConfig
from ..decode import score
from ..errors import C2CError
from ..evaluation.letters import letter_logprobs, likeliest
from ..evaluation.statistics import accuracy
from ..evaluation.writing import add_rows, read_rows
from ..files import replacing, save_tensors
from ..fuser import C2CFuser, RidgeFuser
from ..fuser.c2c import KINDS, STATISTICS, StackedLinear
from ..kv import CACHE, KV, Prefilled, pad_left, prefill, prefill_prompts, prefilled
from ..models.load import LM
from ..pair import C2C, PromptIds, where_to_fuse
from ..progress import Bar
from ..tasks.base import Question
from ..tasks.prompts import ANSWER_PREFIX, short_prompt
from . import clouds, study

MAPS = ("mlp", "ridge", "mean")
HOLDOUT = 8  # every eighth training question chooses ridge's penalty


# ---- the maps -------------------------------------------------------------------------------------------------------


class MLPFuser(C2CFuser):
    """A fuser that puts MLP(sharer) in the place of the receiver's cache: three linear layers with ReLU between them,
    inputs and outputs in units of their channels' deviation (on the training data)."""

    defaults: ClassVar[dict[str, Any]] = {"gating": False, "weighting": False, "dropout": 0.0}

    def _build(self, s: int, t: int) -> None:
        g, h = self.groups, self.config.hidden_dim
        self.layer1, self.layer2 = StackedLinear(g, s, h), StackedLinear(g, h, h)
        self.proj_out = StackedLinear(g, h, t)
        # Parameters, because a fuser's state is parameters, module by module.
        for name, value, width in zip(STATISTICS, (0.0, 1.0, 0.0, 1.0), (s, s, t, t), strict=True):
            setattr(self, name, nn.Parameter(torch.full((g, 1, width), value), requires_grad=False))

    def predict(self, sharer: Tensor) -> Tensor:
        """(G, N, S) to (G, N, T), both in units of deviation."""
        return self.proj_out(F.relu(self.layer2(F.relu(self.layer1(sharer)))))

    def change(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        predicted = self.predict((sharer - self.sharer_mean) / self.sharer_std)
        return predicted * self.receiver_std + self.receiver_mean - receiver

    @torch.no_grad()
    def measure(self, x: Tensor, y: Tensor) -> None:
        """Set the statistics from training data (G, N, S) and (G, N, T)."""
        for name, data in (("sharer", x), ("receiver", y)):
            std = data.std(1, keepdim=True)
            getattr(self, f"{name}_mean").copy_(data.mean(1, keepdim=True))
            # A channel that hardly moves would be blown up beyond all others.
            getattr(self, f"{name}_std").copy_(std.clamp(min=1e-3 * std.mean(-1, keepdim=True).clamp(min=1e-6)))

    def check_start(self) -> None:
        """Raise a C2CError where `start_from` would have too few hidden units."""
        t = self.proj_out.weight.shape[2]
        if 2 * t > self.config.hidden_dim:
            raise C2CError(
                f"{self.config.hidden_dim} hidden units can't start as a linear map to {t} channels; give at least "
                f"{2 * t}, or start at random"
            )

    @torch.no_grad()
    def start_from(self, ridge: RidgeFuser) -> None:
        """Start as the ridge regression: ReLU(z) - ReLU(-z) = z, on twice T of the hidden units. What training adds is
        then what a linear map can't do. The rest of the hidden units starts at random, unread."""
        weight, bias = ridge.proj_out.weight, ridge.proj_out.bias
        assert bias is not None and self.layer1.bias is not None and self.layer2.bias is not None
        assert self.proj_out.bias is not None
        self.check_start()
        t = weight.shape[2]
        own = self.sharer_std.transpose(1, 2) * weight / self.receiver_std
        shift = (torch.bmm(self.sharer_mean, weight) + bias - self.receiver_mean) / self.receiver_std
        for sign, start in ((1, 0), (-1, t)):
            self.layer1.weight[..., start : start + t] = sign * own
            self.layer1.bias[..., start : start + t] = sign * shift
        one = torch.eye(t, device=weight.device)
        self.layer2.weight[..., : 2 * t] = 0
        self.layer2.weight[:, : 2 * t, : 2 * t] = torch.eye(2 * t, device=weight.device)
        self.layer2.bias[..., : 2 * t] = 0
        self.proj_out.weight.zero_()
        self.proj_out.weight[:, : 2 * t] = torch.cat([one, -one])
        self.proj_out.bias.zero_()


def train_mlp(
    fuser: MLPFuser,
    x: Tensor,
    y: Tensor,
    path: Path,
    *,
    epochs: int,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int], None] = lambda epochs: None,
) -> float:
    """Minimise the mean squared error, in units of deviation, with AdamW and a cosine schedule.

    Args:
        fuser: its statistics are set.
        x, y: (G, N, S) and (G, N, T); brought to units of deviation in place, as they may be large.
        path: safetensors file that is written behind each epoch; a run that was cut short goes on from there.
        seed: of the order of positions.
        progress: called with 1 for each epoch, those found done included.

    Returns:
        The last epoch's mean loss.
    """
    weights = {name: p for name, p in fuser.named_parameters() if name not in STATISTICS}
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
    count = x.shape[1]
    steps = math.ceil(count / batch_size)
    x.sub_(fuser.sharer_mean).div_(fuser.sharer_std)
    y.sub_(fuser.receiver_mean).div_(fuser.receiver_std)
    begin, loss = _load_training(path, weights, optimizer)
    progress(begin)
    for epoch in range(begin, epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        total = 0.0
        for step, index in enumerate(order.split(batch_size)):
            rate = 0.5 * learning_rate * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Every module is a regression of its own, so their losses are summed: none slows down another.
            error = (fuser.predict(x[:, index]) - y[:, index]).square().mean((1, 2))
            optimizer.zero_grad(set_to_none=True)
            error.sum().backward()
            optimizer.step()
            total += error.mean().item() * len(index)
        loss = total / count
        _save_training(path, weights, optimizer, epoch + 1, loss)
        progress(1)
    return loss


def _save_training(
    path: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, epoch: int, loss: float
) -> None:
    tensors = {name: p.detach().contiguous() for name, p in weights.items()}
    for name, p in weights.items():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[p].items()}
    _save(path, tensors, {"epoch": str(epoch), "loss": repr(loss)})


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with replacing(path) as partial:
        save_tensors(tensors, partial, metadata)


@torch.no_grad()
def _load_training(
    path: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put back what an earlier run left; the epochs done and its loss."""
    if not path.exists():
        return 0, math.nan
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    for name, p in weights.items():
        p.copy_(tensors.pop(name))
        optimizer.state[p] = {key: tensors.pop(f"{name}/{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(about["epoch"]), float(about["loss"])


def mean_fuser(config: FuserConfig, y: Tensor) -> RidgeFuser:
    """The map that says the receiver's mean whatever it reads."""
    fuser = RidgeFuser(config).eval()
    assert fuser.proj_out.bias is not None
    with torch.no_grad():
        fuser.proj_out.bias.copy_(y.mean(1, keepdim=True))
        fuser.blend.fill_(1.0)
    return fuser


# ---- caches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """One question's prompt, read by both models, and the positions that are paired (see `where_to_fuse`)."""

    prompt: PromptIds
    clean: Prefilled
    sharer: KV
    where: Tensor


def encode(pair: C2C, question: Question) -> PromptIds:
    return pair.encode([{"role": "user", "content": short_prompt(question)}], prefix=ANSWER_PREFIX)


@torch.no_grad()
def read_both(pair: C2C, prompt: PromptIds) -> Both:
    clean = prefill_prompts(pair.receiver, [prompt.receiver])
    sharer = pair.sharers[0]
    cache = prefill(sharer, *pad_left([list(prompt.sharers[0])], sharer.pad_token_id, sharer.device))
    where, _ = where_to_fuse([prompt], 0, clean.kv.length, cache.length, [len(prompt.sharers[0])])
    return Both(prompt, clean, cache, where)


def sample(pair: C2C, both: Both, positions: int, seed: str, *, content: bool = False) -> tuple[Tensor, Tensor]:
    """What sharer and receiver hold at `positions` of the paired positions, drawn by a seed: (G, n, S), (G, n, T).

    `content`: only of those that hold a message's content. The template in front of it gives the same vectors in every
    prompt, so whatever was trained on them knows them by heart, which would flatter it.
    """
    paired = both.where[1].tolist()
    known = [i for i, t in enumerate(paired) if not content or both.prompt.content[t]]
    index = sorted(random.Random(seed).sample(known, min(positions, len(known))))
    fuser = pair.fusers[0]
    with torch.no_grad():
        return fuser.inputs(both.clean.kv, both.sharer, both.where[:, index].to(pair.receiver.device))


def collect(
    pair: C2C,
    questions: Sequence[Question],
    folder: Path,
    positions: int,
    seed: int,
    progress: Callable[[int], None] = lambda questions: None,
) -> list[tuple[Tensor, Tensor]]:
    """Samples of every question's caches, kept as files, so that none is read twice."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, question in enumerate(questions):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            _keep(path, sample(pair, read_both(pair, encode(pair, question)), positions, f"{seed}:{question.id}"))
        made.append(_kept(path))
        progress(1)
    return made


def _keep(path: Path, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    _save(path, {"sharer": x.contiguous().cpu(), "receiver": y.contiguous().cpu()})


def _kept(path: Path) -> tuple[Tensor, Tensor]:
    tensors = load_file(path)
    return tensors["sharer"], tensors["receiver"]


# ---- what a transformed cache does ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One test question.

    Attributes:
        logprobs: of the letters, per cache: receiver (its own), sharer (the sharer answers), and each map's.
        mapped: share of the receiver's cached positions that have a sharer token and so are transformed.
        error, norm: per map, per fused layer, the squared norm of the error in the attention output that the prompt's
            last token gets, and of the output itself.
    """

    id: str
    answer: int
    logprobs: dict[str, list[float]]
    mapped: float
    error: dict[str, list[float]]
    norm: list[float]

    def right(self, name: str) -> bool:
        return likeliest(self.logprobs[name]) == self.answer


@torch.no_grad()
def attention_outputs(lm: LM, prompt: Prefilled, caches: Mapping[str, KV], layers: Sequence[int]) -> dict[str, Tensor]:
    """What the attention of each layer gives the prompt's last token (L, width): `own` from the prompt's cache, and
    from each of `caches`, all layers being fed what they are fed with their own cache."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in ("own", *caches)}
    calls: dict[int, tuple[Any, Any]] = {}

    def remember(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[layer] = args, kwargs

        return hook

    hooks = [
        study.attention(lm, layer).register_forward_pre_hook(remember(layer), with_kwargs=True) for layer in layers
    ]
    try:
        score(lm, prompt, [[[0]]])  # one step behind the prompt; which token is scored doesn't matter
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        args, kwargs = calls[layer]
        for name, kv in (("own", prompt.kv), *caches.items()):
            outputs[name].append(study.attention(lm, layer)(*args, **{**kwargs, CACHE: kv.to_cache()})[0][0, -1])
    return {name: torch.stack(rows).float() for name, rows in outputs.items()}


def answer(pairs: Mapping[str, C2C], question: Question, both: Both) -> Row:
    """One test question answered from every cache. `pairs` are the same two models with each of the maps."""
    pair = next(iter(pairs.values()))
    receiver, sharer, fuser = pair.receiver, pair.sharers[0], pair.fusers[0]
    known = [(both.sharer, [both.sharer.length])]
    states: dict[str, Prefilled] = {"receiver": both.clean}
    for name, each in pairs.items():
        states[name] = each.fuse([both.prompt], clean=both.clean, sharers=known)
    logprobs = {name: letter_logprobs(receiver, state, [question])[0] for name, state in states.items()}
    alone = prefilled(sharer, [both.prompt.sharers[0]], both.sharer)
    logprobs["sharer"] = letter_logprobs(sharer, alone, [question])[0]
    made = {name: states[name].kv for name in pairs}
    outputs = attention_outputs(receiver, both.clean, made, fuser.receiver_layers.tolist())
    own = outputs.pop("own")

    def squares(x: Tensor) -> list[float]:
        return [float(f"{v:.6g}") for v in x.square().sum(-1).tolist()]

    mapped = both.where.shape[1] / max(1, both.clean.kv.length)
    error = {name: squares(output - own) for name, output in outputs.items()}
    return Row(question.id, question.answer, logprobs, round(mapped, 4), error, squares(own))


# ---- figures --------------------------------------------------------------------------------------------------------


def fit_figures(y: Tensor, predicted: Tensor, mean: Tensor) -> dict[str, list[float]]:
    """R² and cosine of predictions, per module.

    Args:
        y, predicted: (G, N, T).
        mean: (G, 1, T), which R² is 0 for.

    Returns:
        r2: over all channels in their own units, so large ones count most; r2_channels: the mean of the channels'
        own, so all count alike; cosine: the mean over positions.
    """
    error, total = (y - predicted).double().square().sum(1), (y - mean).double().square().sum(1)  # (G, T)
    moving = total > 1e-12 * total.mean(-1, keepdim=True)  # a channel that never moves has no R²
    own = (1 - error / total.clamp_min(1e-300)).where(moving, 0).sum(-1) / moving.sum(-1).clamp_min(1)
    return {
        "r2": _rounded(1 - error.sum(-1) / total.sum(-1).clamp_min(1e-300)),
        "r2_channels": _rounded(own),
        "cosine": _rounded(F.cosine_similarity(y.double(), predicted.double(), dim=-1).mean(1)),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 5) for x in values.tolist()]


def side_by_side(modules: Tensor) -> Tensor:
    """Keys and values of a layer as one vector: (2n, N, W), keys first, to (n, N, 2W)."""
    keys, values = modules.chunk(2)
    return torch.cat([keys, values], dim=-1)


def region(x: Tensor, y: Tensor, made: Mapping[str, Tensor], seed: int) -> list[dict[str, Any]]:
    """Per layer, where sharer and transformed vectors (keys and values side by side) lie, see `clouds`.

    The positions are halved. The receiver's vectors of the first half are the reference; everything of the second half
    is compared with it, the receiver's own too, which is the most that can be expected. `neighbours`: the nearest ones
    among the receiver's and the sharer's of the first half.
    """
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
    first, second = order.chunk(2)
    every = {"receiver": side_by_side(y), "sharer": side_by_side(x)}
    every |= {name: side_by_side(each) for name, each in made.items()}
    rows = []
    for layer in range(len(every["receiver"])):
        known = [every[name][layer, first] for name in ("receiver", "sharer")]
        reference, rival, *points = clouds.in_one_space(*known, *(each[layer, second] for each in every.values()))
        row: dict[str, Any] = {}
        for name, cloud in zip(every, points, strict=True):
            found = clouds.overlap(cloud, reference)
            found["neighbours"] = clouds.neighbour_share(cloud, reference, rival)
            row[name] = {key: round(value, 4) for key, value in found.items()}
        rows.append(row)
    return rows


def summarize(
    pairs: Mapping[str, C2C], rows: Sequence[Row], x: Tensor, y: Tensor, seed: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All numbers but t-SNE's, and what each map makes of the samples x (G, N, S) and y (G, N, T)."""
    fusers = {name: fuser for name, pair in pairs.items() for fuser in pair.fusers}
    with torch.no_grad():
        made = {name: fuser.change(x, y) + y for name, fuser in fusers.items()}
    # The test vectors' own mean, the strictest reference: the training data's is farther from them.
    mean = y.mean(1, keepdim=True)
    figures = {name: fit_figures(y, predicted, mean) for name, predicted in made.items()}
    ranks = {
        name: _rounded(effective_rank(gram(each)))
        for name, each in {"receiver": y, "sharer": x, **{m: made[m] for m in MAPS if m != "mean"}}.items()
    }
    regions = region(x, y, made, seed)
    fuser = fusers["mean"]
    n = len(fuser.receiver_layers)
    layers = []
    for i, (t, s) in enumerate(zip(fuser.receiver_layers.tolist(), fuser.sharer_layers.tolist(), strict=True)):
        norm = sum(row.norm[i] for row in rows)
        layer: dict[str, Any] = {"receiver_layer": t, "sharer_layer": s}
        for k, kind in enumerate(KINDS):
            layer[kind] = {name: {key: values[k * n + i] for key, values in figures[name].items()} for name in figures}
            layer[kind]["rank"] = {name: values[k * n + i] for name, values in ranks.items()}
        layer["attention_error"] = {
            name: round(math.sqrt(sum(row.error[name][i] for row in rows) / norm), 5) for name in pairs
        }
        layers.append({**layer, "region": regions[i]})
    right = {name: [row.right(name) for row in rows] for name in ("receiver", "sharer", *pairs)}
    answers = {name: accuracy(marks) for name, marks in right.items()}
    for name in ("sharer", *pairs):
        answers[name]["against_receiver"] = study.against(right[name], right["receiver"])
    average = {
        name: {
            **{
                f"{kind}_{key}": round(sum(layer[kind][name][key] for layer in layers) / n, 5)
                for kind in KINDS
                for key in ("r2", "r2_channels", "cosine")
            },
            "attention_error": round(sum(layer["attention_error"][name] for layer in layers) / n, 5),
        }
        for name in pairs
    }
    mapped = round(sum(row.mapped for row in rows) / len(rows), 4)
    return {"answers": answers, "mapped": mapped, "average": average, "layers": layers}, made


def chosen_layers(pairs: list[tuple[int, int]], layers: Sequence[int] | None) -> list[tuple[int, int]]:
    """Of a layer map, the pairs of the given receiver layers; None: all."""
    if layers is None:
        return pairs
    known = [t for t, _ in pairs]
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(known):
        raise C2CError(
            f"receiver layers {list(layers)} were asked for; expected different ones of the layer map, {known[0]} to "
            f"{known[-1]}"
        )
    return [pair for pair in pairs if pair[0] in layers]


# ---- the study ------------------------------------------------------------------------------------------------------


def run(
    receiver: LM,
    sharer: LM,
    train: Sequence[Question],
    test: Sequence[Question],
    output: Path,
    *,
    layers: Sequence[int] | None = None,
    layer_map: str = "terminal",
    key_space: str = "unrotated",
    hidden_dim: int = 512,
    start: str = "ridge",
    epochs: int = 10,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    train_positions: int = 32,
    test_positions: int = 16,
    tsne_layer: int | None = None,
    tsne_samples: int = 300,
    perplexity: float = 50.0,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The study; writes its folder's rows and numbers, and returns these. A second run finds what was read and trained.

    Args:
        receiver, sharer: the models.
        train, test: questions that the maps are fitted on, and others that they are measured on.
        output: folder.
        layers: receiver layers; None: all of the layer map.
        layer_map, key_space: as of a fuser; unrotated keys are predicted without their rotary embedding.
        hidden_dim: of the MLP.
        start: of the MLP: ridge (see `MLPFuser.start_from`) or random.
        epochs, batch_size, learning_rate: of its training.
        train_positions, test_positions: drawn from each question's prompt, to test on from its content alone.
        tsne_layer: the receiver layer of the map; None: the highest one.
        tsne_samples: positions in it. perplexity: its own.
        seed: of draws, order, first weights and t-SNE.
        data: what the settings say of where the questions come from.
        command: how the study was called, for the record.
    """
    if start not in ("ridge", "random"):
        raise C2CError(f"unknown start {start!r}; expected ridge or random")
    if len(train) < 2 * HOLDOUT or not test:
        raise C2CError(
            f"{len(train)} questions to train on and {len(test)} to test on; expected {2 * HOLDOUT} or more, and one"
        )
    check_ids("what is tested on", test)
    if shared := {q.question for q in train} & {q.question for q in test}:
        raise C2CError(f"{len(shared)} questions are both trained and tested on; give other splits")
    which = chosen_layers(pairs_of(layer_map, receiver.num_layers, sharer.num_layers), layers)
    top = which[-1][0] if tsne_layer is None else tsne_layer
    if top not in [t for t, _ in which]:
        raise C2CError(f"t-SNE layer {top} is not among the receiver layers {[t for t, _ in which]}; choose one")
    if (most := test_positions * len(test)) < 4:  # halves of two, see `region`
        raise C2CError(f"{most} positions to test on; expected 4 or more: give more questions or positions")
    clouds.check(3 * min(tsne_samples, test_positions * len(test)), perplexity)
    torch.manual_seed(seed)
    config = FuserConfig.model_validate({"variant": "ridge", "layer_map": which, "key_space": key_space})
    pair = C2C.from_models(receiver, sharer, config, chat_template_kwargs=FROZEN)
    ridge = pair.fusers[0]
    assert isinstance(ridge, RidgeFuser)
    mlp = MLPFuser(ridge.config.model_copy(update={"hidden_dim": hidden_dim})).to(receiver.device)
    if start == "ridge":
        mlp.check_start()
    settings = {
        "receiver": study.described(receiver),
        "sharer": study.described(sharer),
        **(data or {}),
        "train_questions": len(train),
        "test_questions": len(test),
        "layer_map": [list(p) for p in which],
        "key_space": key_space,
        "hidden_dim": hidden_dim,
        "start": start,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "train_positions": train_positions,
        "test_positions": test_positions,
        "tsne_layer": top,
        "tsne_samples": tsne_samples,
        "perplexity": perplexity,
    }
    about = study.begin(output, settings, "transform", [*train, *test], seed, command)
    if (output / "result.json").exists():
        return study.earlier([output], "transform")[0][1]
    work, device = output / "work", receiver.device
    with Bar() as bar:
        reading = bar.add_task("read to train on", total=len(train))
        training = bar.add_task("train", total=epochs)
        testing = bar.add_task("test", total=len(test))
        pieces = collect(pair, train, work / "train", train_positions, seed, lambda n: bar.advance(reading, n))
        pieces = [(x.to(device), y.to(device)) for x, y in pieces]
        holdout = pieces[::HOLDOUT]
        ridge.fit([piece for i, piece in enumerate(pieces) if i % HOLDOUT], holdout)
        x, y = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
        del pieces, holdout
        mlp.measure(x, y)
        if start == "ridge":
            mlp.start_from(ridge)
        mean = mean_fuser(ridge.config, y).to(device)
        loss = train_mlp(
            mlp, x, y, work / "mlp.safetensors", epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
            seed=seed, progress=lambda n: bar.advance(training, n),
        )  # fmt: skip
        positions = x.shape[1]
        del x, y
        maps = {"mlp": mlp.eval(), "ridge": ridge, "mean": mean}
        pairs = {name: C2C(receiver, [sharer], [fuser], chat_template_kwargs=FROZEN) for name, fuser in maps.items()}
        rows, samples = _test(pairs, test, output, test_positions, seed, lambda n: bar.advance(testing, n))
    x, y = (torch.cat(parts, dim=1).to(device) for parts in zip(*samples, strict=True))
    results, made = summarize(pairs, rows, x, y, seed)
    layer = [t for t, _ in which].index(top)
    drawn = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:tsne_samples]
    perplexity = min(perplexity, 3 * len(drawn) - 1.0)  # short prompts have fewer positions than were asked for
    points = {
        name: side_by_side(each)[layer, drawn].cpu()
        for name, each in (("receiver", y), ("transformed", made["mlp"]), ("sharer", x))
    }
    results = {
        "positions": {"train": positions, "test": x.shape[1]},
        "loss": round(loss, 6),
        **results,
        "tsne": {"layer": top, "samples": len(drawn), "perplexity": perplexity, "seed": seed,
                 "points": clouds.tsne(points, perplexity, seed)},
    }  # fmt: skip
    result = study.finish(output, about, results)
    shutil.rmtree(work)
    return result


def _test(
    pairs: Mapping[str, C2C],
    questions: Sequence[Question],
    output: Path,
    positions: int,
    seed: int,
    progress: Callable[[int], None],
) -> tuple[list[Row], list[tuple[Tensor, Tensor]]]:
    """Every test question's answers and samples; those that are there already are not computed again."""
    folder = output / "work" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    pair = pairs["ridge"]
    rows = {row.id: row for row in read_rows(output / "rows.jsonl", Row)}
    samples = []
    for number, question in enumerate(questions):
        path = folder / f"{number:05d}.safetensors"
        if question.id not in rows or not path.exists():
            both = read_both(pair, encode(pair, question))
            _keep(path, sample(pair, both, positions, f"{seed}:{question.id}", content=True))
            if question.id not in rows:
                rows[question.id] = answer(pairs, question, both)
                add_rows(output / "rows.jsonl", [rows[question.id]])
        samples.append(_kept(path))
        progress(1)
    return [rows[q.id] for q in questions], samples
