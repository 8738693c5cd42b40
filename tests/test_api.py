"""docs/api.md says what the docstrings say, and the docstrings say what every argument is."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import cache2cache

_PATH = Path(__file__).resolve().parents[1] / "docs" / "make_api.py"
_SPEC = importlib.util.spec_from_file_location("make_api", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
make_api = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_api)


def callables() -> dict[str, Any]:
    """Functions, classes and public methods of the page by name; configurations have fields instead."""
    found = {}
    for _, name, what in make_api.public():
        if isinstance(what, dict):
            continue
        found[name] = what
        for member, value in make_api.members(what) if inspect.isclass(what) else ():
            if not isinstance(value, (property, make_api.cached_property)):
                found[f"{name}.{member}"] = getattr(what, member)
    return found


def test_the_page_is_up_to_date() -> None:
    now = make_api.PAGE.read_text(encoding="utf-8") if make_api.PAGE.is_file() else ""
    assert now == make_api.page(), f"docs/api.md is out of date with the docstrings; run {make_api.COMMAND}"


def test_every_public_name_is_on_it() -> None:
    page = make_api.page()
    assert set(cache2cache.__all__) <= {name for _, name, _ in make_api.public()}
    for name in callables():
        assert f"\n### {name}\n" in page or f"\n#### {name}\n" in page
    for field in cache2cache.FuserConfig.model_fields:
        assert f"\n- `{field}: " in page
    assert " at 0x" not in page and "<factory>" not in page  # nothing that differs from run to run


@pytest.mark.parametrize("name", callables())
def test_what_each_argument_is(name: str) -> None:
    """By an entry of Args or Attributes, or by its name in the text; none is named that isn't there."""
    what = callables()[name]
    docstring = inspect.getdoc(what) or ""
    assert docstring, f"{name} has no docstring"
    if inspect.isclass(what) and issubclass(what, (make_api.BaseModel, Exception)):
        return
    found = make_api.sections(docstring)
    parameters = [p for p in inspect.signature(what).parameters if p not in ("self", "cls")]
    listed = [n for names in make_api.entries(found.get("Args", "")) for n in re.findall(r"\w+", names)]
    assert set(listed) <= set(parameters), f"{name} describes {set(listed) - set(parameters)}, which it doesn't take"
    if "Args" in found and not re.search(r"\b[Aa]s `\w+`", found[""]):
        assert set(parameters) <= set(listed), f"{name} says nothing of {set(parameters) - set(listed)}"


def test_how_a_docstring_is_shown() -> None:
    docstring = """What it does.

        with code

    Args:
        one, two (B, T): said of both,
            in two lines: with a colon.
        three: more.

    Returns:
        Something.
    """
    assert list(make_api.markdown(docstring)) == [
        "What it does.",
        "    with code",
        "**Args**",
        "- `one`, `two` (B, T): said of both, in two lines: with a colon.\n- `three`: more.",
        "**Returns**",
        "Something.",
    ]

    def long(first_argument_of_many: str | None = "it's", *rest: int, second: dict[str, int], **more: Any) -> str:
        return ""

    assert make_api.signature("long", long) == (
        'long(\n    first_argument_of_many: str | None = "it\'s",\n    *rest: int,\n    second: dict[str, int],\n'
        "    **more: Any,\n) -> str"
    )
