"""Everything that README.md and docs/*.md tell a reader to type is typed here, as it stands.

The catalogue's names stand for tiny random models, the packaged fuser for a tiny open one, `data` for a small mirror of
rows made up below, and the network is shut. A command that this file does not know how to run fails its test, so that
nothing in the docs goes untested. Then: links, options named in the text, and paths.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
import torch
import typer
import yaml

import cache2cache.config
from cache2cache.cli import app, main
from cache2cache.config import FuserConfig
from cache2cache.fuser import checkpoint
from cache2cache.models import catalogue
from cache2cache.oracle import documents, structure
from cache2cache.pair import C2C
from cache2cache.serving import engine
from cache2cache.training.data import read_chat
from mirror import mirror
from serving.conftest import Here
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = [path for folder in (checkpoint.PACKAGED, ROOT / "fusers") for path in sorted(folder.glob("*/README.md"))]
# The cards' commands take the real models: see tests/real.
every_page = pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: page.relative_to(ROOT).as_posix())


# ---- reading a page --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its first line's number in the page, and what is in it."""

    language: str
    line: int
    text: str


_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```[ \t]*$", re.M | re.S)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(m[1].strip(), text[: m.start(2)].count("\n") + 1, m[2]) for m in _FENCED.finditer(text)]
    assert len(re.findall(r"```|~~~", text)) == 2 * len(found), f"{page}: a fence that is not understood here"
    return found


def lines(block: Block) -> list[tuple[int, str]]:
    """The lines of a bash block with their numbers, continued ones joined; without blank lines and comments."""
    joined, number = [], block.line
    for line in re.split(r"(?<!\\)\n", block.text):
        if line.strip() and not line.lstrip().startswith("#"):
            joined.append((number, line.replace("\\\n", " ")))
        number += line.count("\n") + 1
    return joined


def words(line: str) -> list[str]:
    """A command line as the shell would split it. Anything that needs a shell proper is refused."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    split = list(lexer)
    assert not any(set(word) <= set("();<>|&") for word in split if word), f"no test knows how to run {line!r}"
    return split


def prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def code_spans(page: Path) -> list[str]:
    """What stands in backticks in the text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# ---- the reader's machine, made tiny ---------------------------------------------------------------------------------

_FAMILY = {"smollm": "llama", "qwen": "qwen2", "gemma": "gemma3"}


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ with every model of the catalogue, fusers/default for the default recipe's pair, and data/."""
    root = tmp_path_factory.mktemp("world")
    for entry in catalogue.entries():
        family = next(f for prefix, f in _FAMILY.items() if entry.name.startswith(prefix))
        folder = root / "cache" / "models" / entry.name
        # A random model's tokens are often several bytes of nonsense each, which a second turn has to read again.
        tiny_model(family, max_position_embeddings=8192).save_pretrained(folder)
        tiny_tokenizer(TOKENIZER_OF[family]).save_pretrained(folder)
        source = {"catalogue_name": entry.name, "sha256": entry.sha256}
        (folder / "source.json").write_text(json.dumps(source))
    recipe = yaml.safe_load((ROOT / "recipes" / "default.yaml").read_text(encoding="utf-8"))
    receiver, sharer = (root / "cache" / "models" / recipe[role]["source"] for role in ("receiver", "sharer"))
    torch.manual_seed(0)
    pair = C2C.from_models(receiver, sharer, FuserConfig(hidden_dim=16, intermediate_dim=16, gate_init=1.0))
    for name in (checkpoint.DEFAULT, "smollm2-135m-cpu"):
        pair.save_pretrained(root / "fusers" / name)
    make_mirror(root / "data")
    return root


def make_mirror(folder: Path) -> None:
    """Rows for the recipes that a reader runs, enough for a hold-out and two batches each; and questions to ask."""
    typed = "".join(block.text for page in PAGES for block in blocks(page) if block.language == "bash")
    counts: dict[tuple[str, str, str], int] = {}
    for path in (ROOT / "recipes").glob("[!pr]*.yaml"):
        if f"recipes/{path.name}" not in typed:
            continue
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        count = max(8, math.ceil((recipe["holdout"] + 2 * recipe["batch_size"]) / len(recipe["data"])))
        for source in recipe["data"]:
            kind = "task" if "task" in source else "rows"
            key = kind, source[kind], source.get("split", "train")
            counts[key] = max(count, counts.get(key, 0))
    for (kind, name, split), count in counts.items():
        mirror(folder, [{kind: name, "split": split}], count)
    for task in ("arc-easy", "arc-challenge", "openbookqa"):
        mirror(folder, [{"task": task, "split": split} for split in ("validation", "test")], 6, start=1000)
    mirror(folder, [{"task": "mmlu-redux", "split": "test"}, {"task": "c-eval", "split": "val"}], 6, start=1000)
    mirror(folder, [{"task": "mmlu", "split": "dev"}, {"task": "c-eval", "split": "dev"}], 6)
    mirror(folder, [{"task": "mmlu", "split": "validation"}], 6, start=1000)  # an exemplar is not asked


@pytest.fixture
def desk(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a reader who starts a page: the recipes and `data`, and nothing from another page."""

    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        if address[0] != "127.0.0.1":
            raise OSError("the docs' commands need no network where the models are fetched and the data is local")
        connect(self, address)

    def from_the_mirror(path: str, name: str, **options: Any) -> Any:
        """What the lm-evaluation-harness would have from the hub."""
        splits = {}
        for file in (small_world / "data" / path / name).glob("*.jsonl.gz"):
            rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
            splits[file.name.partition(".")[0]] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)

    all_tasks = lm_eval.tasks.TaskManager

    def only_arc(include_path: str | None = None, **options: Any) -> Any:
        """The harness, which takes 20 seconds for the index of all its tasks."""
        folder = Path(lm_eval.tasks.__file__).parent / "arc"
        return all_tasks(include_path=include_path or str(folder), include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_arc)
    # A tiny model shows as much with a few documents as with 210.
    few = documents.generate
    monkeypatch.setattr(structure, "generate", lambda count, seed: few(min(count, 10), seed))
    monkeypatch.setattr(datasets, "load_dataset", from_the_mirror)
    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(checkpoint, "PACKAGED", small_world / "fusers")
    monkeypatch.setattr(engine, "PairEngine", Here)  # a worker in this process, which sees what is patched here
    monkeypatch.setenv("C2C_CACHE", str(small_world / "cache"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(small_world / "data", tmp_path / "data")
    shutil.copytree(small_world / "fusers", tmp_path / "fusers")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- running a page --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_snippets(
    page: Path, desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page from top to bottom. Its Python blocks share one namespace, as in one session."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        place = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.language == "python":
            # Blank lines in front, so that a traceback names the line of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec"), namespace)
            printed = capsys.readouterr()
            assert "print(" not in block.text or printed.out.strip(), f"{place}: nothing was printed"
        elif block.language == "bash":
            for number, line in lines(block):
                monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd what else?\n"))
                run_line(line, f"{page.relative_to(ROOT)}, line {number}", capsys)
        elif block.language == "json":  # rows of one's own to train on
            for line in block.text.splitlines():
                messages, response = read_chat(json.loads(line), place)[-1]
                assert messages[-1]["role"] == "user" and messages[-1]["content"] and response
        else:
            assert block.language == "text" and not re.search(r"^\W*(c2c|make|pip|python)\b", block.text, re.M), (
                f"{place}: no test knows what to do with a block of {block.language!r}; make it bash, python, json "
                "(training rows) or text (nothing to type), or teach tests/test_docs.py"
            )


def run_line(line: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run `c2c` in this process; of what would install things, check that it names what is there."""
    command, *arguments = words(line)
    if command == "c2c" and (name := " ".join(arguments[:2]).split(" --")[0]) in PORTS:
        serve_in_background(arguments, PORTS[name], f"{place}: {line}")
    elif command == "c2c":
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        printed = capsys.readouterr()
        assert leaving.value.code in (0, None), f"{place}: {line}\n{printed.err}"
        assert printed.out.strip() or "precompute" in arguments, f"{place}: {line} printed nothing"
        assert "warning:" not in printed.err, f"{place}: {line}\n{printed.err}"
        if "--json" in arguments:
            json.loads(printed.out)
    elif command in ("torchrun", "accelerate"):  # tests/training/test_loop.py runs several processes
        behind = check_launch(command, arguments, place)
        if "shard=true" not in behind:  # which one process is refused
            run_line(shlex.join(["c2c", *behind]), place, capsys)
    elif command == "make":  # sets up an environment and fetches gigabytes; the tests run inside `make test`
        check_make(arguments, place)
    elif command == "pip":  # needs the index; tests/test_quality.py builds the wheel
        check_pip(arguments, place)
    elif command == "curl":
        done = subprocess.run([command, "--fail", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "error" not in json.loads(done.stdout), f"{place}: {line}\n{done.stderr}"
    elif command == "python":  # minutes; tests/test_benchmarks.py runs parts of them
        check_benchmark(arguments, place)
    else:
        pytest.fail(f"{place}: no test knows how to run {line!r}; teach tests/test_docs.py")


PORTS = {"sharer serve": 8600, "serve": 8000, "demo": 7860}  # the defaults


def serve_in_background(arguments: list[str], port: int, place: str) -> None:
    """A server that the rest of the page may talk to; it ends with the tests."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            pytest.fail(f"{place} needs port {port}, where something else listens: {error}")
    thread = threading.Thread(target=main, args=(arguments,), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert thread.is_alive(), f"{place} ended"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    pytest.fail(f"{place} doesn't listen on its default port")


def check_launch(command: str, arguments: list[str], place: str) -> list[str]:
    """The launcher understands its options and starts `python -m cache2cache`; returns what comes behind that."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if command == "accelerate":
        assert arguments.pop(0) == "launch", place
    parsed = (launch_command_parser() if command == "accelerate" else get_args_parser()).parse_args(arguments)
    assert parsed.module and parsed.training_script == "cache2cache", f"{place}: {arguments}"
    behind: list[str] = parsed.training_script_args
    return behind


def check_make(arguments: list[str], place: str) -> None:
    """The target is there, and make understands it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{place}: {done.stderr}"
    declared = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    targets = {word for word in arguments if "=" not in word}
    assert targets <= declared, f"{place}: the Makefile has no {targets - declared}"


def check_pip(arguments: list[str], place: str) -> None:
    """`pip install` of this checkout, or of the package with extras that it has."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'name = "cache2cache"' in project
    assert arguments[0] == "install" and len(arguments) == 2, f"{place}: no test knows pip {' '.join(arguments)}"
    named = re.fullmatch(r"(?:\.|cache2cache)(?:\[([\w,-]+)\])?", arguments[1])
    assert named, f"{place}: {arguments[1]} is not this package"
    declared = re.findall(
        r"^([\w-]+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
    assert set((named[1] or "").split(",")) - {""} <= set(declared), f"{place}: {arguments[1]} has an unknown extra"


def check_benchmark(arguments: list[str], place: str) -> None:
    """The file is there and defines the options."""
    script = ROOT / arguments[0]
    assert script.parent == ROOT / "benchmarks" and script.is_file(), f"{place}: no test knows {arguments[0]}"
    source = script.read_text(encoding="utf-8")
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source, f"{place}: {arguments[0]} has no {option}"


@pytest.mark.parametrize(
    "line",
    [
        "curl -s http://127.0.0.1:9/v1/models",
        "c2c ask Hi > answer.txt",
        "echo Hi | c2c chat",
        "pip install torch",
        "make nonsense",
        "python x.py",
    ],
)
def test_a_line_that_cannot_be_tested_fails(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_line(line, "here", capsys)


@pytest.mark.parametrize("line", ["c2c ask Hi --only nothing", "c2c models path nothing", "c2c ask --nonsense"])
def test_a_command_that_fails_is_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="here"):
        run_line(line, "here", capsys)


def test_the_pages_are_read() -> None:
    """The README shows both ways in, and each of them was found by the code above."""
    found = blocks(ROOT / "README.md")
    typed = [line for block in found if block.language == "bash" for _, line in lines(block)]
    assert {"make demo", "make test", "c2c chat"} <= {" ".join(words(line)) for line in typed}
    assert any("from_pretrained()" in block.text for block in found if block.language == "python")


# ---- what the text names ---------------------------------------------------------------------------------------------


def options_of(command: Any, path: str = "c2c") -> Iterator[tuple[str, set[str]]]:
    """Every command by its full name, with its options."""
    yield path, {"--help"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for name, sub in getattr(command, "commands", {}).items():
        yield from options_of(sub, f"{path} {name}")


LAUNCHER_OPTIONS = {"--multi_gpu", "--mixed_precision", "--use_fsdp"}


@every_page
def test_named_options_and_commands_exist(page: Path) -> None:
    commands = dict(options_of(typer.main.get_command(app)))
    assert "--data-dir" in commands["c2c train"]
    known = set().union(*commands.values())
    for span in code_spans(page):
        first, *rest = span.split()
        if first == "make":
            check_make([word for word in words(span)[1:] if word != "…"], page.name)
        elif span.startswith("pip install"):
            check_pip(words(span)[1:], page.name)
        elif span.startswith("python benchmarks/"):
            check_benchmark(rest, page.name)
        else:
            if first == "c2c":
                name = max((name for name in commands if f"{span} ".startswith(f"{name} ")), key=len)
                assert name != "c2c" or not rest or rest[0].startswith(("-", "…")), f"{page.name}: {span}"
                known_here = commands[name]
            else:
                known_here = known | LAUNCHER_OPTIONS
            for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", span):
                assert option in known_here, f"{page.name}: {option} in `{span}` is no option"


@every_page
def test_named_settings_exist(page: Path) -> None:
    """In a table headed by a configuration's name, the first column names its fields."""
    for name, rows in re.findall(r"^\| `(\w+)` \|.*\n\|[ |:-]+\n((?:\|.*\n?)+)", prose(page), re.M):
        fields = getattr(cache2cache.config, name).model_fields
        named = [field for row in rows.splitlines() for field in re.findall(r"`(\w+)`", row.split("|")[1])]
        assert named and set(named) <= set(fields), f"{page.name}: {set(named) - set(fields)} of {name}"
    paths = [path for folder in ("src", "tests/real") for path in (ROOT / folder).rglob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    for variable in set(re.findall(r"\bC2C_[A-Z_]+\b", page.read_text(encoding="utf-8"))):
        assert f'"{variable}"' in sources, f"{page.name}: nothing reads {variable}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *CARDS, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_paths(page: Path) -> None:
    """Links inside the repository lead somewhere, and so do paths named in backticks."""
    text = re.sub(r"`[^`]+`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert not file.startswith("/") and path.resolve().is_relative_to(ROOT), f"{page.name}: {target} leads outside"
        assert path.exists(), f"{page.name}: {target} leads nowhere"
        assert not anchor or anchor in anchors(path), f"{page.name}: no heading for {target}"
    for span in code_spans(page):
        if re.fullmatch(r"(benchmarks|docs|fusers|recipes|results|src|tests)/[\w./*-]+", span):
            assert any(ROOT.glob(span)), f"{page.name}: there is no {span}"


_MACHINE_PATH = re.compile(r"(?<![\w:/.~<>{}$*…)\]-])/(?!path/to/|dev/)[A-Za-z][\w.-]*/[\w.][\w./-]*|\b[A-Z]:\\\w")


@every_page
def test_no_path_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not (found := _MACHINE_PATH.findall(text)), f"{page.name}: {found}"


def test_machine_paths_are_recognised() -> None:
    for path in (
        "`/etc/x`",
        "in /opt/.cache,",
        "see /mnt/models/a.gguf",
        "--data-dir /srv/data",
        '"/opt/x/y"',
        "C:\\models",
    ):
        assert _MACHINE_PATH.search(path), path
    for fine in (
        "[a](https://example.org/a/b)",
        "~/.cache/x",
        "<folder>/<owner>/<name>/x",
        "and/or",
        "`/clear`, `/exit`",
    ):
        assert not _MACHINE_PATH.search(fine), fine
