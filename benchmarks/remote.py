"""A sharer in another process of this machine: prefill and fusing against the same sharer here.

python benchmarks/remote.py                       # the default pair
python benchmarks/remote.py --lengths 64 --quick  # one length, few rounds

Per number format: time over the local one's, what goes over the wire, and how long the bare loopback takes for as many
bytes. Both processes share the processor, so the receiver's prefill and the sharer's, which overlap, gain nothing here.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading

import measure
from measure import medians, take_turns
from rich.console import Console
from rich.table import Table

from cache2cache import C2C, heap
from cache2cache.remote import RemoteSharer

FORMATS = ("float32", "bfloat16", "int8")


def serve(model: str, dtype: str | None) -> tuple[subprocess.Popen[str], str]:
    """`c2c sharer serve` in a process of its own, and its address."""
    command = [sys.executable, "-c", "from cache2cache.cli import main; main()", "sharer", "serve", model]
    command += ["--port", "0", "--keep-mb", "0", *(["--dtype", dtype] if dtype else [])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if " at http://" in line:
            # Whatever else it says must not fill the pipe.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, line.partition(" at ")[2].partition(";")[0]
    raise SystemExit(f"the server ended with {process.wait()}")


def loopback(nbytes: int) -> None:
    """Send that many bytes through a local connection."""
    chunk = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def send() -> None:
            with socket.create_connection(listener.getsockname()) as sender:
                for start in range(0, nbytes, len(chunk)):
                    sender.sendall(chunk[: nbytes - start])

        thread = threading.Thread(target=send)
        thread.start()
        receiver, _ = listener.accept()
        with receiver:
            buffer, left = bytearray(1 << 20), nbytes
            while left:
                left -= receiver.recv_into(buffer, min(left, len(buffer)))
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuser")
    parser.add_argument("--receiver")
    parser.add_argument("--sharer")
    parser.add_argument("--dtype")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    heap.keep()
    others = None if options.sharer is None else [options.sharer]
    pair = C2C.from_pretrained(options.fuser, receiver=options.receiver, sharers=others, dtype=options.dtype)
    console = Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    process, address = serve(options.sharer or pair.sharers[0].name, options.dtype)
    try:
        away = {
            numbers: C2C(pair.receiver, [RemoteSharer(f"{address}?numbers={numbers}")], list(pair.fusers))  # type: ignore[arg-type]
            for numbers in FORMATS
        }
        columns = ("format", "here ms", "over here", "MB", "first layer at", "loopback ms", "error")
        table = Table("tokens", *columns)
        for tokens in options.lengths:
            chat = measure.chat(pair.receiver.need_tokenizer(), 0, tokens, pair.chat_template_kwargs)
            prompt = pair.encode(chat)
            sent = {name: other.fuse([prompt]).transfers[0] for name, other in away.items()}
            quantities = {"here": lambda prompt=prompt: pair.fuse([prompt]) and None}
            for name, other in away.items():
                quantities[name] = lambda prompt=prompt, other=other: other.fuse([prompt]) and None
                quantities[f"wire {name}"] = lambda n=sent[name].nbytes: loopback(n)
            t = medians(take_turns(quantities, 2 if options.quick else 7, 20 if options.quick else 120))
            for name, transfer in sent.items():
                table.add_row(
                    str(tokens),
                    name,
                    f"{1e3 * t['here']:.0f}",
                    f"{t[name] / t['here']:.2f}",
                    f"{transfer.nbytes / 1e6:.2f}",
                    f"{transfer.first_layer_s / transfer.seconds:.0%}",
                    f"{1e3 * t[f'wire {name}']:.1f}",
                    f"{transfer.error:.4f}",
                )
        console.print(table)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
