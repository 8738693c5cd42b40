"""The API reference, docs/api.md, from the docstrings and signatures of what users are pointed to.

    python docs/make_api.py            # writes it
    python docs/make_api.py --check    # fails where it is out of date, and says so

A new public name is one entry in PUBLIC; what is said about it is its docstring.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import cache2cache

PAGE = Path(__file__).with_name("api.md")
COMMAND = ".venv/bin/python docs/make_api.py"
PUBLIC: dict[str, list[str]] = {
    "cache2cache": cache2cache.__all__,
    "cache2cache.pair": ["FusedCache", "PromptIds", "Turn"],
    "cache2cache.kv": ["KV", "Prefilled", "prefill_prompts"],
    "cache2cache.decode": ["Chunk", "Score", "confidence"],
    "cache2cache.remote": ["RemoteSharer", "Transfer"],
    "cache2cache.transfer": ["to_bytes", "from_bytes", "save", "load"],
    "cache2cache.fuser": ["VARIANTS", "C2CFuser"],
    "cache2cache.training.loop": ["Trainer"],
    "cache2cache.training.single": ["load_single"],
    "cache2cache.evaluation.lm_eval": ["HarnessLM", "task_of"],
    "cache2cache.config": ["TrainConfig", "FuserSource", "LoraSpec", "DataSource", "ModelIdentity"],
}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}


# ---- docstrings ------------------------------------------------------------------------------------------------------


def sections(docstring: str) -> dict[str, str]:
    """The text under "" and what stands under each heading of a docstring, dedented."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(docstring), flags=re.M)
    found = {"": parts[0].strip()}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        found[heading] = textwrap.dedent(text).strip("\n")
    return found


def entries(section: str) -> dict[str, str]:
    """The entries `name: what` of a section, continued on lines that are indented further."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", section.strip()):
        name, colon, what = entry.partition(":")
        # Notes on shapes may stand between a name and its colon.
        found[" ".join((name if colon else entry).split())] = " ".join(what.split())
    return found


def markdown(docstring: str) -> Iterator[str]:
    """A docstring as markdown: paragraphs and code as they are, sections of entries as lists."""
    for heading, text in sections(docstring).items():
        if heading:
            yield f"**{heading}**"
        if heading in ("", "Returns", "Yields"):
            yield from (
                paragraph if paragraph.startswith("    ") else fill(paragraph)
                for paragraph in re.split(r"\n\s*\n", text)
                if paragraph.strip()
            )
        else:
            yield "\n".join(fill(f"- {code_of(name)}: {what}", "  ") for name, what in entries(text).items())


def code_of(names: str) -> str:
    """The names before an entry's colon as code, shapes in brackets behind them as text."""
    return re.sub(r"\([^)]*\)|[\w.]+", lambda m: m[0] if m[0].startswith("(") else f"`{m[0]}`", names)


def fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


# ---- signatures ------------------------------------------------------------------------------------------------------


def signature(name: str, what: Any) -> str:
    """As in the source, without self; one parameter a line where it would be long."""
    found = inspect.signature(what)
    parts, last = [], None
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and last not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parts.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        value = "" if parameter.default is parameter.empty else f" = {default(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{kind}{value}")
        last = parameter.kind
    returned = "" if found.return_annotation in (found.empty, None, "None") else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){returned}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def default(value: Any) -> str:
    """A default as it can be written; … for what is made anew each time."""
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}()"
    if isinstance(value, Path):
        return repr(value.as_posix())
    return repr(value) if isinstance(value, (str, int, float, tuple, type(None))) else "…"


def fields(model: type[BaseModel]) -> Iterator[str]:
    """The fields of a configuration: type, default, bounds and description."""
    types = inspect.get_annotations(model)
    for name, field in model.model_fields.items():
        value = "" if field.is_required() else f" = {default(field.default)}"
        bounds = [f"{BOUNDS[key]} {getattr(m, key)}" for m in field.metadata for key in BOUNDS if hasattr(m, key)]
        limits = f" ({', '.join(bounds)})" if bounds else ""
        text = f": {field.description}" if field.description else ""
        yield fill(f"- `{name}: {types[name]}{value}`{limits}{text}", "  ")


# ---- the page --------------------------------------------------------------------------------------------------------


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class's own, in the order of the source."""
    for name, member in vars(cls).items():
        method = isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member)
        if not name.startswith("_") and (method or isinstance(member, (property, cached_property))):
            yield name, member


def public() -> Iterator[tuple[str, str, Any]]:
    """Module, name and object of everything on the page but methods."""
    for module, names in PUBLIC.items():
        for name in names:
            yield module, name, getattr(import_module(module), name)


def described(module: str, name: str, what: Any) -> Iterator[str]:
    yield f"### {name}"
    if isinstance(what, dict):  # a registry, which has no docstring of its own
        yield "\n".join(
            fill(f"- `{key}`: {inspect.getdoc(value).partition(chr(10) * 2)[0]}", "  ")  # type: ignore[union-attr]
            for key, value in what.items()
            if value.__module__.startswith("cache2cache.")  # and not one that a test or a user put in
        )
        return
    if not (inspect.isclass(what) and issubclass(what, (BaseModel, Exception))):
        yield code(signature(name, what))
    yield from markdown(what.__doc__ or "")
    if not inspect.isclass(what):
        return
    if issubclass(what, BaseModel):
        yield "\n".join(fields(what))
        return
    properties = []
    for member, value in members(what):
        if isinstance(value, (property, cached_property)):
            text = (value.__doc__ or "").strip().partition("\n\n")[0]
            properties.append(fill(f"- `{member}`: {text}" if text else f"- `{member}`", "  "))
    if properties:
        yield "**Properties**"
        yield "\n".join(properties)
    for member, value in members(what):
        if not isinstance(value, (property, cached_property)):
            yield f"#### {name}.{member}"
            yield code(signature(member, getattr(what, member)))
            yield from markdown(value.__doc__ or "")


def code(text: str) -> str:
    return f"```text\n{text}\n```"


def page() -> str:
    parts = ["# API reference", f"Made from the docstrings by `{COMMAND}`; change those and run it again."]
    last = ""
    for module, name, what in public():
        if module != last:
            parts.append(f"## {module}")
            last = module
        parts += described(module, name, what)
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/api.md from the docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"docs/api.md is out of date with the docstrings; run {COMMAND}")


if __name__ == "__main__":
    main()
