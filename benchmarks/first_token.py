"""What C2C costs: before the first token, while decoding, in memory, and against text-to-text. `make bench` runs it.

    python benchmarks/first_token.py                        # the default pair
    python benchmarks/first_token.py --lengths 64 --batches 1 --receiver PATH --sharer PATH --json result.json

Everything is a ratio of quantities that took turns in the same run, medians over the rounds:

- The matrix rate is that of one large product or of batched products of the fuser's shapes, whichever is higher. A
  fuser's floor is its multiply-adds at that rate; a prefill's floor is every weight of its layers once per token, and
  causal attention.
- C2C's own work before the first token is `pair.prefill(prompts)` less the two prefills inside it. So that the two
  prefills can't hide anything, they are timed on their own too, in plain transformers: `difference` subtracts those,
  and `apart` adds up encoding the prompts and fusing, both timed on their own.
- Decoding is stock `generate` on the fused cache, over the same on a cache that the receiver filled in plain
  transformers: once in our cache layers too, which says what fusing costs, and once in transformers' own, which copy
  themselves for every token.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch
from measure import medians, now, peak_rise, prefill_operations, product, take_turns
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import cache2cache.pair as pair_module
from cache2cache import C2C, C2CError
from cache2cache.alignment.chat import render
from cache2cache.alignment.tokens import span_map
from cache2cache.config import FuserConfig
from cache2cache.decode import generate
from cache2cache.fuser import C2CFuser, checkpoint
from cache2cache.kv import CACHE, KV, Prefilled, lowest_layers, pad_left, positions_of, prefill_prompts
from cache2cache.models.load import LM
from cache2cache.pair import FusedCache, PromptIds, sharer_lengths, where_to_fuse

RECEIVER, SHARER = "smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"
UNTRAINED = FuserConfig(hidden_dim=128, intermediate_dim=128, gating=False, normalize=True)
GREEDY = {"do_sample": False, "use_cache": True}


# ---- the quantities --------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_prefill(lm: LM, rows: list[list[int]], num_layers: int) -> DynamicCache:
    """A prefill as transformers does it, all prompts at once, through the backbone."""
    ids, mask = pad_left(rows, lm.pad_token_id, lm.device)
    cache = DynamicCache()
    decoder = lm.decoder if num_layers == lm.num_layers else lowest_layers(lm.decoder, num_layers)
    decoder(
        input_ids=ids,
        attention_mask=None if bool(mask.all()) else mask,
        position_ids=positions_of(mask),
        use_cache=True,
        **{CACHE: cache},
    )
    return cache


def again(cache: DynamicCache) -> DynamicCache:
    """A cache of the same tensors, which `generate` may append to."""
    other = DynamicCache()
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@contextmanager
def clocked(pair: C2C) -> Iterator[dict[str, float]]:
    """Seconds that a `pair.prefill` inside spends on its parts."""
    spent = dict.fromkeys(("receiver_inside", "sharer_inside", "encode_inside", "fuser_inside"), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += now() - start

        return run

    originals = (pair_module.prefill_prompts, pair_module.prefill)
    pair_module.prefill_prompts = timed("receiver_inside", prefill_prompts)
    pair_module.prefill = timed("sharer_inside", pair_module.prefill)
    pair.encode = timed("encode_inside", pair.encode)  # type: ignore[method-assign]
    for fuser in pair.fusers:
        fuser.forward = timed("fuser_inside", fuser.forward)
    try:
        yield spent
    finally:
        pair_module.prefill_prompts, pair_module.prefill = originals
        del pair.encode
        for fuser in pair.fusers:
            del fuser.forward


def fuser_weights(fuser: C2CFuser) -> int:
    """Entries of the matrices that each position must be multiplied with.

    The last one before the weights' head counts as the head: multiplied with each other first, they are as small.
    """
    matrices = {name: p for name, p in fuser.named_parameters() if name.endswith(".weight")}
    if fuser.config.weighting:
        matrices["scalar_mlp2.w2.weight"] = matrices["scalar_head.weight"]
    return sum(p[0].numel() for p in matrices.values()) * int(fuser.open_gates.sum())


def setting(pair: C2C, length: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """All quantities for `batch` prompts of `length` receiver tokens."""
    receiver, sharer, fuser = pair.receiver, pair.sharers[0], pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    kwargs = pair.chat_template_kwargs
    chats = [measure.chat(receiver.need_tokenizer(), kind, length, kwargs) for kind in range(batch)]
    encoded: list[PromptIds] = [pair.encode(chat) for chat in chats]
    rows = [list(p.receiver[:-1]) for p in encoded]
    lengths = sharer_lengths(encoded, 0)
    read = [list(p.sharers[0][:n]) for p, n in zip(encoded, lengths, strict=True)]  # what C2C reads of the sharer's
    depth = fuser.sharer_depth
    result: dict[str, Any] = {"tokens": length, "batch": batch}

    kept: list[FusedCache] = []

    def answer() -> None:
        kept.append(pair.prefill(chats))
        pair.generate(kept[0], **GREEDY, min_new_tokens=10, max_new_tokens=10)

    result["peak_bytes"] = peak_rise(answer)
    (fused,) = kept

    own = plain_prefill(receiver, rows, receiver.num_layers)
    ids, mask = fused.input_ids, fused.attention_mask
    clean, theirs = KV.from_cache(own), KV.from_cache(plain_prefill(sharer, read, depth))
    scratch = KV(clean.keys.clone(), clean.values.clone())
    where, _ = where_to_fuse(encoded, 0, clean.length, theirs.length, lengths)
    positions = where.shape[1]
    result["bytes"] = {"receiver": clean.nbytes, "sharer": theirs.nbytes}
    steps = {**GREEDY, "min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}

    def whole() -> Mapping[str, float]:
        with clocked(pair) as spent:
            start = now()
            pair.prefill(chats)
            took = now() - start
        return {**spent, "beyond": took - spent["receiver_inside"] - spent["sharer_inside"]}

    def decode_stock() -> None:
        receiver.model.generate(
            ids, attention_mask=mask, pad_token_id=receiver.pad_token_id, **{CACHE: again(own)}, **steps
        )

    alone = Prefilled(ids, mask, clean)

    config = sharer.text_config
    big, big_operations = product(1, 1024, config.hidden_size, config.intermediate_size, clean.keys)
    groups, hidden = int(fuser.open_gates.sum()), fuser.config.hidden_dim
    small, small_operations = product(groups, min(positions, 1024), hidden, fuser.config.intermediate_dim, clean.keys)
    with torch.no_grad():
        times = take_turns(
            {
                "large_product": big,
                "batched_product": small,
                "c2c_prefill": whole,
                "receiver_prefill": lambda: void(plain_prefill(receiver, rows, receiver.num_layers)),
                "sharer_prefill": lambda: void(plain_prefill(sharer, read, depth)),
                "encode": lambda: void([pair.encode(chat) for chat in chats]),
                "fuse": lambda: void(fuser(clean, theirs, where, scratch)),
                "decode_fused": lambda: void(generate(receiver, fused, **steps)),
                "decode_alone": lambda: void(generate(receiver, alone, **steps)),
                "decode_stock": decode_stock,
            },
            options.repeats,
            options.seconds,
        )
    t = medians(times)
    result |= {"rounds": len(times["c2c_prefill"]), "fused_positions": positions, "seconds": t, "all_seconds": times}
    rates = {"large": big_operations / t["large_product"], "batched": small_operations / t["batched_product"]}
    rate = max(rates.values())
    floor = 2 * fuser_weights(fuser) * positions / rate
    difference = t["c2c_prefill"] - t["receiver_prefill"] - t["sharer_prefill"]
    limit = 1.5 * floor + 0.020
    result["gflops"] = {name: value / 1e9 for name, value in rates.items()}
    result["beyond"] = {
        "floor_ms": 1e3 * floor,
        "ms": 1e3 * t["beyond"],
        "ratio": t["beyond"] / floor,
        "limit_ms": 1e3 * limit,
        "met": t["beyond"] <= limit,
        "difference_ms": 1e3 * difference,
        "apart_ms": 1e3 * (t["encode"] + t["fuse"]),
    }
    result["prefill"] = {
        "receiver": t["receiver_prefill"]
        * rate
        / prefill_operations(receiver, [length - 1] * batch, receiver.num_layers),
        "sharer": t["sharer_prefill"] * rate / prefill_operations(sharer, lengths, depth),
        "receiver_inside": t["receiver_inside"] / t["receiver_prefill"],
        "sharer_inside": t["sharer_inside"] / t["sharer_prefill"],
    }
    result["decode"] = {name: t["decode_fused"] / t[f"decode_{name}"] for name in ("alone", "stock")}
    allowed = 3 * (clean.nbytes + theirs.nbytes) + 300e6
    result["memory"] = None if result["peak_bytes"] is None else result["peak_bytes"] / allowed
    return result


def void(_: Any) -> None:
    """For quantities whose result is of no interest."""


def text_to_text(pair: C2C, options: argparse.Namespace) -> dict[str, Any]:
    """Text-to-text over C2C, whole answers: 128 prompt tokens, 64 tokens of message, 10 of answer."""
    from cache2cache.methods import Ask
    from cache2cache.methods.text_to_text import BACKGROUND

    receiver, sharer = pair.receiver, pair.sharers[0]
    tokens, message, answer = options.prompt_tokens, options.message_tokens, options.answer_tokens
    chat = measure.chat(receiver.need_tokenizer(), 0, tokens, pair.chat_template_kwargs)
    ask = Ask.of(chat[-1]["content"])
    instruction = BACKGROUND.format(question=ask.stem)

    def write(lm: LM, messages: list[dict[str, str]], count: int) -> str:
        ids = render(lm.need_tokenizer(), messages, chat_template_kwargs=pair.chat_template_kwargs).ids
        out = generate(lm, prefill_prompts(lm, [ids]), **GREEDY, min_new_tokens=count, max_new_tokens=count)
        assert out.shape[1] == len(ids) + count
        return str(lm.need_tokenizer().decode(out[0, len(ids) :], skip_special_tokens=True))

    def relay() -> None:
        said = write(sharer, ask.chat(("user", instruction)), message)
        write(receiver, ask.chat(("user", instruction), ("assistant", said), ("user", ask.prompt)), answer)

    def fused() -> None:
        pair.generate([ask.chat()], **GREEDY, min_new_tokens=answer, max_new_tokens=answer)

    times = take_turns({"text_to_text": relay, "c2c": fused}, options.repeats, options.seconds)
    t = medians(times)
    return {
        "prompt_tokens": tokens,
        "message_tokens": message,
        "answer_tokens": answer,
        "rounds": len(times["c2c"]),
        "seconds": t,
        "all_seconds": times,
        "ratio": t["text_to_text"] / t["c2c"],
    }


def token_map(pair: C2C, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rendering both chats and mapping their tokens, over the receiver's prefill of as many tokens."""
    receiver, sharer = pair.receiver, pair.sharers[0]
    chat = measure.chat(receiver.need_tokenizer(), 0, length, pair.chat_template_kwargs)

    def read() -> list[Any]:
        kwargs = pair.chat_template_kwargs
        return [render(lm.need_tokenizer(), chat, chat_template_kwargs=kwargs) for lm in (receiver, sharer)]

    mine, theirs = read()
    times = take_turns(
        {
            "render": lambda: void(read()),
            "map": lambda: void(span_map(mine, theirs)),
            "receiver_prefill": lambda: void(plain_prefill(receiver, [mine.ids[:-1]], receiver.num_layers)),
        },
        options.repeats,
        options.seconds,
    )
    t = medians(times)
    return {
        "tokens": length,
        "rounds": len(times["map"]),
        "seconds": t,
        "all_seconds": times,
        "ratio": (t["render"] + t["map"]) / t["receiver_prefill"],
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any], console: Console) -> None:
    """The ratios, their targets, and whether they are met."""
    console.print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    console.print(f"receiver {results['receiver']}, sharer {results['sharer']}, fuser {results['fuser']}\n")
    if results["settings"]:
        before = _table(
            "Before the first token, beyond the two prefills. Target: at most 1.5 floors + 20 ms",
            "prompts,rounds,GFLOP/s,floor ms,C2C ms,C2C / floor,limit ms,met,difference ms,apart ms",
        )
        rest = _table(
            "Prefills over their floors, and C2C's prefills over plain ones. Decoding over the receiver's, target: "
            "at most 1.05. Peak memory over the weights, target: at most three times both caches + 300 MB",
            "prompts,receiver,sharer,receiver in C2C,sharer in C2C,decode,met,over stock,peak MB,peak / limit,met",
        )
        for one in results["settings"]:
            name, b, p, memory = f"{one['batch']} x {one['tokens']}", one["beyond"], one["prefill"], one["memory"]
            numbers = (max(one["gflops"].values()), b["floor_ms"], b["ms"], b["ratio"], b["limit_ms"])
            cells = [f"{x:.{digits}f}" for x, digits in zip(numbers, (0, 1, 1, 2, 1), strict=True)]
            before.add_row(
                name,
                str(one["rounds"]),
                *cells,
                _met(b["met"]),
                f"{b['difference_ms']:.1f}",
                f"{b['apart_ms']:.1f}",
            )
            rest.add_row(
                name,
                *(f"{p[key]:.2f}" for key in ("receiver", "sharer", "receiver_inside", "sharer_inside")),
                f"{one['decode']['alone']:.3f}",
                _met(one["decode"]["alone"] <= 1.05),
                f"{one['decode']['stock']:.3f}",
                *(
                    ("not measured", "–", "–")
                    if memory is None
                    else (f"{one['peak_bytes'] / 1e6:.0f}", f"{memory:.2f}", _met(memory <= 1))
                ),
            )
        console.print(before, rest)
    whole = _table("Whole answers, and the token map", "what,rounds,ratio,target,met")
    if (text := results["text_to_text"]) is not None:
        counts = "prompt {prompt_tokens}, message {message_tokens}, answer {answer_tokens} tokens".format(**text)
        ratio = text["ratio"]
        name = f"text-to-text over C2C: {counts}"
        whole.add_row(name, str(text["rounds"]), f"{ratio:.2f}", "at least 4", _met(ratio >= 4))
    for one in results["token_map"]:
        name = f"rendering and mapping {one['tokens']} tokens over the receiver's prefill of them"
        whole.add_row(name, str(one["rounds"]), f"{one['ratio']:.4f}", "–", "–")
    console.print(whole)


def _met(good: bool) -> str:
    return "yes" if good else "NO"


def _table(title: str, columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns.split(","):
        table.add_column(column, justify="left" if column in ("prompts", "what") else "right")
    return table


def load_pair(options: argparse.Namespace) -> tuple[C2C, str]:
    """The pair, and what its fuser is."""
    packaged = (checkpoint.PACKAGED / checkpoint.DEFAULT / "config.json").is_file()
    if options.fuser == "untrained" or (options.fuser is None and not packaged):
        pair, name = C2C.from_models(options.receiver or RECEIVER, options.sharer or SHARER, UNTRAINED), "untrained"
    else:
        sharers = None if options.sharer is None else [options.sharer]
        pair = C2C.from_pretrained(options.fuser, receiver=options.receiver, sharers=sharers)
        name = options.fuser or "packaged"
    if pair.fusers[0].sharer_depth == 0:  # type: ignore[operator]
        raise C2CError(f"the fuser {name} has no open gate, so there is nothing to time; give a trained one")
    return pair, name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--receiver", help=f"catalogue name, hub id, folder or GGUF file (default: {RECEIVER})")
    add("--sharer", help=f"likewise (default: {SHARER})")
    add("--fuser", help="folder, hub id, or 'untrained' (default: the packaged one, else untrained)")
    add("--lengths", type=int, nargs="*", default=[64, 256, 1024], help="prompt lengths in receiver tokens")
    add("--batches", type=int, nargs="+", default=[1, 8], help="prompts at once")
    add("--map-lengths", type=int, nargs="*", default=[1024, 8000], help="prompt lengths for the token map")
    add("--prompt-tokens", type=int, default=128, help="prompt of the comparison with text-to-text")
    add("--message-tokens", type=int, default=64, help="and its message; 0 leaves the comparison out")
    add("--answer-tokens", type=int, default=10, help="and its answer")
    add("--new-tokens", type=int, default=32, help="tokens decoded to time decoding")
    add("--repeats", type=int, default=7, help="rounds, of which the median is taken")
    add("--seconds", type=float, default=90, help="begin no further round of a setting after that long")
    add("--quick", action="store_true", help="the first length only, one round, few tokens")
    add("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.lengths, options.map_lengths = options.lengths[:1], options.map_lengths[:1]
        options.repeats, options.new_tokens, options.message_tokens, options.answer_tokens = 1, 4, 4, 2
    warnings.filterwarnings("ignore", message=".*[Cc]ontrol token.*")

    console = Console() if sys.stdout.isatty() else Console(width=116)
    try:
        pair, fuser = load_pair(options)
        results: dict[str, Any] = {
            "machine": measure.machine(),
            "receiver": pair.receiver.name,
            "sharer": pair.sharers[0].name,
            "fuser": fuser,
            "fuser_weights": fuser_weights(pair.fusers[0]),  # type: ignore[arg-type]
            "settings": [],
            "text_to_text": None,
            "token_map": [],
        }
        pair.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2, do_sample=False)  # pages, threads, folding
        for length in options.lengths:
            for batch in options.batches:
                print(f"{batch} x {length} tokens …", file=sys.stderr, flush=True)
                results["settings"].append(setting(pair, length, batch, options))
        if options.message_tokens:
            print("text-to-text …", file=sys.stderr, flush=True)
            results["text_to_text"] = text_to_text(pair, options)
        for length in options.map_lengths:
            print(f"token map of {length} …", file=sys.stderr, flush=True)
            results["token_map"].append(token_map(pair, length, options))
    except C2CError as error:
        sys.exit(f"error: {error}")
    show(results, console)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
