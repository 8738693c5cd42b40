"""c2c chat: a streaming chat with the fused pair."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli import options
from cache2cache.errors import C2CError

if TYPE_CHECKING:
    from cache2cache.pair import C2C, FusedCache


def chat(
    max_new_tokens: options.MaxNewTokens = 512,
    fuser: options.Fusers = None,
    subfolder: options.Subfolders = None,
    receiver: options.Receiver = None,
    sharer: options.Sharers = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    system: options.System = None,
    skip: options.Skip = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 answers greedily.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the fewest tokens that are together as likely as this.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=options.MAX_SEED, help="Of what is drawn.  [default: another each time]")
    ] = None,
) -> None:
    """Chat with the pair. /clear starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Where stdin is no terminal, each of its lines is one user turn.
    """
    if not temperature and (top_p < 1 or seed is not None):
        raise C2CError("--top-p and --seed are for answers that are drawn; give --temperature too, such as 0.7")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, **(drawn if temperature else {"do_sample": False})}
    pair = options.load_pair(fuser, subfolder, receiver, sharer, dtype, device)
    import torch

    torch.manual_seed(seed if seed is not None else torch.seed())
    typing = sys.stdin.isatty()
    if typing:
        import readline  # noqa: F401  (gives input() a history and an editable line)
    start = [{"role": "system", "content": system}] if system else []
    messages, past = list(start), None
    while (said := _read(typing)) is not None and said != "/exit":
        if said == "/clear":
            messages, past = list(start), None
        elif said:
            asked = [*messages, {"role": "user", "content": said}]
            try:
                text, past = _answer(pair, asked, past, how, typing, skip)
            except C2CError as error:  # such as a chat that has outgrown the context: /clear mends that
                if not typing:
                    raise
                print(f"error: {error}", file=sys.stderr)
                continue
            if text:
                messages = [*asked, {"role": "assistant", "content": text}]


def _read(typing: bool) -> str | None:
    """The next user turn, or None at the end of the input. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            return input("you> " if typing else "").strip()
        except EOFError:
            if typing:
                print()
            return None
        except KeyboardInterrupt:
            if not typing:
                raise
            print("\n(/exit or Ctrl-D leaves)")


def _answer(
    pair: C2C,
    messages: list[dict[str, str]],
    past: FusedCache | None,
    how: dict[str, Any],
    typing: bool,
    skip: float | None,
) -> tuple[str, FusedCache | None]:
    """Stream one answer to stdout; what had been written when Ctrl-C stopped it counts as the answer.

    Returns:
        The answer, and what the next turn can start from.
    """
    from cache2cache.cli.view import clean

    text = ""
    try:
        past = pair.prefill(messages, past=past, keep=True, skip=skip)  # reads only what is new
        with closing(pair.stream(past, **how)) as chunks:
            for chunk in chunks:
                text += chunk.text
                print(clean(chunk.text), end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        if not typing:
            raise
        print(" (stopped)", flush=True)
    return text, past
