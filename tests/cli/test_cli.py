"""The command line: help, exit codes, one-line errors, and what the commands print, on a tiny random pair."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache.cli import ask as ask_module
from cache2cache.cli import main
from cache2cache.cli.view import clean
from cache2cache.decode import Chunk
from cache2cache.errors import C2CError
from cache2cache.methods import METHODS
from cache2cache.models import load_lm
from cache2cache.pair import C2C, FusedCache
from cache2cache.tasks import load
from serving.wire import served
from training.runs import write_recipe


def c2c(*arguments: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    return int(leaving.value.code or 0)


def one_line(error: str) -> str:
    """The last line of stderr, after making sure that there is no traceback."""
    assert "Traceback" not in error
    return error.rstrip("\n").rpartition("\n")[2]


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["ask"],
        ["chat"],
        ["models"],
        ["models", "list"],
        ["models", "pull"],
        ["models", "path"],
        ["sharer", "serve"],
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c(*command, "--help") == 0
    assert " ".join(["Usage: c2c", *command]) in capsys.readouterr().out


def test_help_and_version_load_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from cache2cache.cli import main\n"
        "try:\n    main([sys.argv[1]])\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub', 'safetensors', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"cache2cache \d+\.\d+\.\d+\n", done.stdout)


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["ask", "--nonsense"], ["ask", "hi", "--max-new-tokens", "0"], ["models", "path"]):
        assert c2c(*arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (C2CError("this was given;\nthat is expected"), 1, "error: this was given; that is expected"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/some/file"),
            1,
            "error: no space left .*: /some/file; free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), 1, "error: no permission .*: /some/file; "),
        (OSError(errno.EIO, "Input/output error"), 1, "error: Input/output error.* --debug"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB. Process 1 …"),
            1,
            "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB; take fewer rows at once",
        ),
        (ZeroDivisionError("by zero"), 1, "error: unexpected ZeroDivisionError: by zero; run again with --debug"),
    ],
)
def test_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail(name: str) -> Path:
        raise error

    monkeypatch.setattr("cache2cache.models.catalogue.path", fail)
    assert c2c("models", "path", "x") == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(said, printed.err) and printed.err.count("\n") == 1
    if code == 1:
        with pytest.raises(type(error)):
            main(["models", "path", "x", "--debug"])


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(name: str) -> Path:
        warnings.warn("beware\nof it", stacklevel=1)
        return Path("folder")

    monkeypatch.setattr("cache2cache.models.catalogue.path", warn)
    assert c2c("models", "path", "x") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("folder\n", "warning: beware of it\n")


def test_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("C2C_CACHE", str(tmp_path))
    assert c2c("models", "list") == 0
    listed = capsys.readouterr().out
    assert re.search(r"^smollm2-135m-instruct +\d+ MB +not fetched +Apache-2.0$", listed, re.M)
    assert "Qwen/Qwen2.5-Coder-1.5B-Instruct" in listed
    assert c2c("models", "path", "smollm2-135m-instruct") == 1
    assert one_line(capsys.readouterr().err).startswith("error: smollm2-135m-instruct is not in")
    for command in ("path", "pull"):
        assert c2c("models", command, "smollm2-135m") == 1
        assert "did you mean smollm2-135m-instruct" in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_ask_json(tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c("ask", "What is it?", "--json", "--fuser", str(tiny_pair_folder), "--max-new-tokens", "5") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["receiver"].endswith("llama") and [name[-5:] for name in result["sharers"]] == ["qwen3"]
    (asked,) = result["questions"]
    assert asked["prompt"] == "What is it?"
    assert [answer["method"] for answer in asked["answers"]] == ["c2c", "receiver", "sharer", "text"]
    for answer in asked["answers"]:
        assert set(answer) == {
            "method", "text", "message", "first_token_s", "total_s", "new_tokens", "message_tokens", "bytes_passed",
            "transfer_bytes", "transfer_s",
            "skipped",
        }  # fmt: skip
        assert 0 < answer["first_token_s"] <= answer["total_s"]
        assert 1 <= answer["new_tokens"] <= 5
    passed = {answer["method"]: answer["bytes_passed"] for answer in asked["answers"]}
    assert passed["receiver"] == passed["sharer"] == 0 < passed["c2c"]


def test_ask_and_chat_that_skip_the_sharer(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--fuser", str(tiny_pair_folder), "--max-new-tokens", "6", "--skip")
    methods = ("--only", "c2c", "--only", "receiver")
    for skip, skipped in (("0", True), ("1", False)):
        assert c2c("ask", "What is it?", *common, skip, *methods, "--json") == 0
        fused, alone = json.loads(capsys.readouterr().out)["questions"][0]["answers"]
        assert (fused["text"] == alone["text"]) == (fused["bytes_passed"] == 0) == fused["skipped"] == skipped
        assert c2c("ask", "What is it?", *common, skip, *methods) == 0
        assert capsys.readouterr().out.count("skipped") == skipped
    said = []
    for skip in ("0", "1"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd now?\n"))
        assert c2c("chat", *common, skip) == 0
        said.append(capsys.readouterr().out)
    pair = C2C.from_pretrained(tiny_pair_folder)
    chat: list[dict[str, str]] = [{"role": "user", "content": "Hello"}]
    alone, fused = (
        clean(str(pair.chat(chat, sharer_mask=mask, do_sample=False, max_new_tokens=6))).rstrip("\ufffd")
        for mask in (0, 1)
    )
    assert alone != fused and said[0].startswith(alone) and said[1].startswith(fused)
    for command in ("ask", "chat", "evaluate"):
        assert c2c(command, "--skip", "1.5") == 2


def test_ask_without_a_question(tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--fuser", str(tiny_pair_folder), "--max-new-tokens", "2", "--only", "receiver"]
    assert c2c("ask", *options, "--json") == 0
    asked = json.loads(capsys.readouterr().out)["questions"]
    assert len(asked) == 3
    assert all(question["right"] in "ABCD" and "letter" in question["answers"][0] for question in asked)
    assert c2c("ask", *options) == 0
    printed = capsys.readouterr().out
    assert "Question 3 of 3" in printed and f"right: {asked[2]['right']}" in printed


def test_ask_into_a_pipe_has_no_control_codes(tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        c2c(
            "ask",
            "What?",
            "--fuser",
            str(tiny_pair_folder),
            "--max-new-tokens",
            "40",
            "--only",
            "c2c",
            "--only",
            "text",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)
    assert printed.index("[C2C]") < printed.index("[Text-to-text]") < printed.index("bytes passed")
    assert "Receiver alone" not in printed


def test_ask_on_a_terminal_shows_panels(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("cache2cache.methods.text_to_text.MAX_MESSAGE_TOKENS", 8)
    assert c2c("ask", "[bold]What[/bold]?", "--fuser", str(tiny_pair_folder), "--max-new-tokens", "3") == 0
    printed = capsys.readouterr().out
    assert "[bold]What[/bold]?" in printed, "the question is no markup"
    for label in ("C2C", "Receiver alone", "Sharer alone", "Text-to-text"):
        assert f" {label} " in printed
    assert "first token" in printed


def test_ask_refuses_before_it_loads_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert c2c("ask", "Hi", "--only", "telepathy", "--fuser", "/nowhere") == 1
    assert "unknown method 'telepathy'; expected one of c2c, receiver" in one_line(capsys.readouterr().err)
    assert c2c("ask", "  ", "--fuser", "/nowhere") == 1
    assert "the question is empty" in one_line(capsys.readouterr().err)


def test_unknown_fuser_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["ask", "Hi"], ["chat"]):
        assert c2c(*command, "--fuser", str(tmp_path / "none")) == 1
        assert one_line(capsys.readouterr().err).startswith("error: ")


def test_every_method_has_a_label_and_every_demo_question_an_answer() -> None:
    assert set(ask_module.LABELS) == set(METHODS)
    questions = load(str(ask_module._DEMO))
    assert len({question.letter for question in questions}) == len(questions) == 3


def _watch_turns(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[dict[str, str]]], list[Any]]:
    """The messages and the past of every turn of a chat from now on."""
    seen: list[list[dict[str, str]]] = []
    pasts: list[Any] = []
    prefill = C2C.prefill

    def watched(self: C2C, prompts: Any, **options: Any) -> FusedCache:
        if options.get("keep"):
            seen.append(prompts)
            pasts.append(options["past"])
        return prefill(self, prompts, **options)

    monkeypatch.setattr(C2C, "prefill", watched)
    return seen, pasts


def test_piped_chat(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = C2C.from_pretrained(tiny_pair_folder)
    first = [{"role": "user", "content": "Hello"}]
    said = str(pair.chat(first, do_sample=False, max_new_tokens=6))
    seen, pasts = _watch_turns(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd now?\n/clear\nHello\n/exit\nnever read\n"))
    assert c2c("chat", "--fuser", str(tiny_pair_folder), "--max-new-tokens", "6") == 0
    assert [[message["role"] for message in chat] for chat in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert seen[1][1]["content"].rstrip("\ufffd") == said.rstrip("\ufffd")
    assert seen[2] == first
    assert [past is not None for past in pasts] == [False, True, False]  # the second turn reads only what is new
    lines = capsys.readouterr().out
    assert lines.count("you>") == 0


def test_outputs_are_tried_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where a folder has to be, or the other way round; and a folder that nobody may write."""
    (tmp_path / "file").touch()
    below, picture = tmp_path / "file" / "run", str(tmp_path)
    recipe = write_recipe(tmp_path, output=str(below), data=[{"task": "none"}], store=str(below))
    commands = [
        ["train", recipe],
        ["precompute", recipe],
        ["rewrite", recipe, below, "--teacher", "none"],
        ["inspect", "Why?", "--output", tmp_path],
        ["ask", "Why?", "--picture", picture],
        ["evaluate", "--task", "none", "--output", below],
        ["evaluate", "--task", "none", "--results", below],
    ]
    for command in ("chat-quality", "analyze rank", "analyze gates", "oracle enrich", "oracle structure", "lm-eval"):
        commands.append([*command.split(), "--output", below])
    there = sorted(tmp_path.rglob("*"))
    for command in commands:
        assert c2c(*map(str, command)) == 1, command
        said = capsys.readouterr().err
        assert "is a file; choose another output" in said or "is a folder; expected a file" in said, (command, said)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert c2c("train", str(recipe), "--output", str(tmp_path / "new")) == 1
    assert f"{tmp_path} can't be written to; choose another output than" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == there


def test_chat_that_draws(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*more: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd now?\n"))
        assert c2c("chat", "--fuser", str(tiny_pair_folder), "--max-new-tokens", "12", *more) == 0
        return capsys.readouterr().out

    greedy, drawn = said(), ("--temperature", "1.5", "--seed")
    assert said(*drawn, "1") == said(*drawn, "1") != greedy
    assert said(*drawn, "1") != said(*drawn, "2")
    assert said("--temperature", "1.5") != said("--temperature", "1.5")
    assert said(*drawn, "3", "--top-p", "0") == greedy  # of the likeliest token alone
    assert said("--temperature", "0") == greedy
    for wrong in (("--seed", "1"), ("--top-p", "0.9")):
        assert c2c("chat", "--fuser", str(tiny_pair_folder), *wrong) == 1
        assert "give --temperature too" in capsys.readouterr().err
    assert c2c("chat", "--temperature", "3") == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_chat_at_a_terminal(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C stops an answer and drops a line, an error is shown and the chat goes on, the end of the input leaves."""
    seen, _ = _watch_turns(monkeypatch)

    def stream(self: C2C, fused: FusedCache, **options: Any) -> Iterator[Chunk]:
        yield Chunk("half an", 1)
        raise [KeyboardInterrupt(), C2CError("too long; use /clear")][len(seen) - 1]

    typed: Iterator[Any] = iter(["hi", KeyboardInterrupt(), "again", EOFError()])

    def read(prompt: str) -> str:
        item = next(typed)
        if isinstance(item, BaseException):
            raise item
        return str(item)

    monkeypatch.setattr(C2C, "stream", stream)
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert c2c("chat", "--fuser", str(tiny_pair_folder), "--system", "Be kind.") == 0
    printed = capsys.readouterr()
    assert "half an (stopped)" in printed.out and "Ctrl-D leaves" in printed.out
    assert "error: too long; use /clear" in printed.err
    assert seen[1] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "half an"},
        {"role": "user", "content": "again"},
    ]


def test_a_gradio_that_is_too_old_for_the_page(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, the page is refused before anything is loaded; otherwise serving goes on without it, and says so."""
    from cache2cache.cli import serve
    from cache2cache.serving import openai

    made: list[Any] = []
    monkeypatch.setattr(openai, "serve", lambda engines, *_, make, **__: made.append(make()))
    for found, said in (("5.49.1", "5.49.1"), (None, "none")):
        monkeypatch.setattr(serve, "_installed", lambda package, found=found: found)
        assert c2c("serve", str(tiny_pair_folder), "--ui") == 1
        assert f"the page needs gradio 6.12 or newer, {said} is installed" in one_line(capsys.readouterr().err)
        assert c2c("serve", str(tiny_pair_folder)) == 0
        assert ("no page: it needs gradio 6.12 or newer" in capsys.readouterr().err) == (found is not None)
        assert not any(getattr(route, "path", "").startswith("/ui") for route in made.pop().routes)
    bounds = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"gradio>={serve.GRADIO}"' in bounds


def test_a_served_sharer(
    tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharer = tiny_pair_folder.parent / "qwen3"
    monkeypatch.delenv("C2C_SHARER_KEY", raising=False)
    assert c2c("sharer", "serve", str(sharer), "--host", "0.0.0.0") == 1
    assert "so a key is needed; set C2C_SHARER_KEY" in one_line(capsys.readouterr().err)
    assert c2c("sharer", "serve", "nothing-like-it") == 1
    assert "unknown model 'nothing-like-it'" in one_line(capsys.readouterr().err)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert c2c("sharer", "serve", str(sharer), "--port", str(taken.getsockname()[1])) == 1
    assert "can't listen on 127.0.0.1:" in one_line(capsys.readouterr().err)

    address = served(load_lm(sharer))
    pair = ["--fuser", str(tiny_pair_folder), "--max-new-tokens", "5"]
    assert c2c("ask", "What is it?", "--json", "--only", "c2c", *pair) == 0
    (here,) = json.loads(capsys.readouterr().out)["questions"][0]["answers"]
    assert c2c("ask", "What is it?", "--json", "--sharer", address, *pair) == 0
    there, alone = json.loads(capsys.readouterr().out)["questions"][0]["answers"]
    assert (there["method"], alone["method"]) == ("c2c", "receiver") and there["text"] == here["text"]
    assert there["transfer_bytes"] > there["bytes_passed"] == here["bytes_passed"] and there["transfer_s"] > 0
    assert here["transfer_bytes"] == 0
    assert c2c("ask", "What is it?", "--sharer", address, *pair) == 0
    assert re.search(r"^over the wire: 0\.\d\d MB in \d+\.\d\d s$", capsys.readouterr().out, re.M)
    assert c2c("ask", "What is it?", "--only", "sharer", "--sharer", address, *pair) == 1
    assert "which only reads prompts for a pair" in one_line(capsys.readouterr().err)


def test_several_fusers_and_subfolders(tiny_pair_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny_pair_folder.parent
    more = ["--max-new-tokens", "3", "--only", "c2c", "--json"]
    fusers = ["--fuser", str(root), "--subfolder", "fuser", "--subfolder", "fuser"]
    assert c2c("ask", "What is it?", *fusers, *more) == 0
    result = json.loads(capsys.readouterr().out)
    assert [name[-5:] for name in result["sharers"]] == ["qwen3", "qwen3"]
    (both,) = result["questions"][0]["answers"]
    sharers = ["--sharer", str(root / "qwen3"), "--sharer", served(load_lm(root / "qwen3"))]
    assert c2c("ask", "What is it?", *fusers, *sharers, *more) == 0
    (mixed,) = json.loads(capsys.readouterr().out)["questions"][0]["answers"]
    assert mixed["text"] == both["text"] and mixed["bytes_passed"] == both["bytes_passed"]
    assert c2c("ask", "What is it?", "--fuser", str(tiny_pair_folder), *sharers, *more) == 1
    assert "2 sharers for 1 fusers" in one_line(capsys.readouterr().err)
