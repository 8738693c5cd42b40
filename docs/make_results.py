"""Tables and the figure of results in README.md and docs/results.md.

python docs/make_results.py            # writes them
python docs/make_results.py --check    # fails where they are out of date, and says so

What follows a line `<!-- docs/make_results.py NAME -->` is from results/NAME, with `main` behind the name only the rows
of MAIN. docs/results.svg is from results/FIGURE.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from cache2cache.evaluation.report import LABELS, WORDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PICTURE = ROOT / "docs" / "results.svg"
RESULTS = ROOT / "results"
FIGURE = "reproduce-small"
MAIN = ("receiver", "text", "other", "c2c", "sharer")
COMMAND = ".venv/bin/python docs/make_results.py"
BLOCK = re.compile(
    r"(?P<start><!-- docs/make_results\.py (?P<name>[\w-]+)(?P<main> main)? -->\n)(?P<made>.*?)<!-- end -->\n",
    re.DOTALL,
)


def percent(found: dict[str, Any], asked: int) -> str:
    """Accuracy with its interval, and the number of questions where it is of fewer than were asked."""
    low, high = found["interval"]
    some = "" if found["questions"] == asked else f" (of {found['questions']})"
    return f"{found['accuracy']:.1f} [{low:.1f}, {high:.1f}]{some}"


def tables(summary: dict[str, Any], methods: Sequence[str] = tuple(LABELS)) -> str:
    """One by option likelihood, one by what is written: methods in rows, sets in columns."""
    return "\n".join(table(summary, way, methods) for way in WORDS if way in summary)


def table(summary: dict[str, Any], way: str, methods: Sequence[str]) -> str:
    sets = {task: asked for task, asked in summary["asked"].items() if task in summary[way]["tasks"]}
    found = [summary[way]["tasks"][task] for task in sets]
    lines = [
        [WORDS[way], *(f"{task} ({asked})" for task, asked in sets.items())],
        ["---"] * (len(sets) + 1),
    ]
    for method in (m for m in LABELS if m in methods and any(isinstance(column.get(m), dict) for column in found)):
        cells = [
            percent(column[method], asked) if method in column else "–"
            for column, asked in zip(found, sets.values(), strict=True)
        ]
        bold = "**" if method == "c2c" else ""
        lines.append([f"{bold}{LABELS[method]}{bold}", *cells])
    lines.append(
        ["gain = presence + content", *(f"{c['gain']:+.1f} = {c['presence']:+.1f} {c['content']:+.1f}" for c in found)]
    )
    lines.append(["gap to the sharer recovered, %", *map(recovered, found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def recovered(column: dict[str, Any]) -> str:
    if column.get("recovered") is None:
        return "–"
    bounds = column.get("recovered_interval")
    return f"{column['recovered']:.0f}" + ("" if bounds is None else " [{:.0f}, {:.0f}]".format(*bounds))


# ---- the figure ------------------------------------------------------------------------------------------------------

COLOURS = {"receiver": "#9aa5b1", "text": "#6d8fb3", "other": "#e3bd8b", "c2c": "#d0711e", "sharer": "#3f5f4a"}
TOP, HEIGHT = 58, 210
CHANCE = 25  # %: what guessing one of four options is worth
BAR, WHISKER = 17, "stroke='#333' stroke-width='1'"


def figure(summary: dict[str, Any]) -> str:
    """Accuracy by option likelihood, set by set with intervals, beside the seconds of an answer, as SVG."""
    sets, parts = summary["likelihood"]["tasks"], []
    highest = 10 * (1 + max(found[m]["interval"][1] for found in sets.values() for m in MAIN) // 10)
    group = BAR * len(MAIN) + 24
    width = group * len(sets)
    parts.append(label(46, 22, "right answers by option likelihood, % with 95% intervals", weight="bold"))
    for tick in range(0, int(highest), 20):
        y = height_of(tick, highest)
        parts += [line(46, y, 46 + width, y, "stroke='#ddd'"), label(40, y + 4, tick, "end")]
    for place, (task, found) in enumerate(sets.items()):
        left = 46 + 12 + place * group
        for row, method in enumerate(MAIN):
            x, (low, high) = left + row * BAR, found[method]["interval"]
            parts.append(bar(x, found[method]["accuracy"], highest, COLOURS[method], f"{LABELS[method]}, {task}"))
            parts.append(line(x + 7.5, height_of(low, highest), x + 7.5, height_of(high, highest), WHISKER))
        parts.append(label(left + group / 2 - 12, TOP + HEIGHT + 18, task, "middle"))
    y = height_of(CHANCE, highest)
    parts.append(line(46, y, 46 + width, y, "stroke='#b00' stroke-dasharray='4 3'"))
    parts.append(label(46 + width + 4, y + 4, "chance"))
    left, timing = 46 + width + 90, summary["timing"]
    timed = [m for m in MAIN if m in timing]
    most = 50 * (1 + max(timing[m]["seconds"]["256"]["median"] for m in timed) // 50)
    parts.append(label(left - 16, 22, "seconds for 256 tokens", weight="bold"))
    parts.append(line(left - 16, height_of(0, 1), left + 42 * len(timed), height_of(0, 1), "stroke='#ddd'"))
    for row, method in enumerate(timed):
        seconds = timing[method]["seconds"]["256"]["median"]
        parts.append(bar(left + row * 42, seconds, most, COLOURS[method], LABELS[method], 26))
        parts.append(label(left + row * 42 + 13, height_of(seconds, most) - 6, f"{seconds:.0f}", "middle"))
    x = 46.0
    for method in MAIN:
        parts.append(f"<rect x='{x:.0f}' y='34' width='11' height='11' fill='{COLOURS[method]}'/>")
        parts.append(label(x + 16, 44, LABELS[method]))
        x += 34 + 6.3 * len(LABELS[method])
    whole, tall = left + 42 * len(timed) + 16, TOP + HEIGHT + 30
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {whole} {tall}' width='{whole}' height='{tall}' "
        "font-family='Helvetica, Arial, sans-serif' font-size='12' fill='#222'>\n"
        f"<rect width='{whole}' height='{tall}' rx='8' fill='#fff'/>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def height_of(value: float, most: float) -> float:
    return TOP + HEIGHT * (1 - value / most)


def bar(x: float, value: float, most: float, colour: str, about: str, width: float = BAR - 2) -> str:
    y = height_of(value, most)
    return (
        f"<rect x='{x:g}' y='{y:.1f}' width='{width}' height='{TOP + HEIGHT - y:.1f}' fill='{colour}'>"
        f"<title>{escape(about)}: {value:.1f}</title></rect>"
    )


def line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    return f"<line x1='{x1:g}' y1='{y1:.1f}' x2='{x2:g}' y2='{y2:.1f}' {more}/>"


def label(x: float, y: float, text: object, anchor: str = "start", weight: str = "normal") -> str:
    return f"<text x='{x:g}' y='{y:.1f}' text-anchor='{anchor}' font-weight='{weight}'>{escape(str(text))}</text>"


# ---- pages -----------------------------------------------------------------------------------------------------------


def summary_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8"))
    return found


def filled(page: str) -> str:
    """The page with the tables that the results give now."""

    def block(match: re.Match[str]) -> str:
        made = tables(summary_of(match["name"]), MAIN if match["main"] else tuple(LABELS))
        return f"{match['start']}{made}<!-- end -->\n"

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    made = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES} | {PICTURE: figure(summary_of(FIGURE))}
    if given.check:
        for path, text in made.items():
            old = path.read_text(encoding="utf-8")
            if old != text or (path in PAGES and not BLOCK.search(old)):
                where = RESULTS.relative_to(ROOT)
                sys.exit(f"{path.relative_to(ROOT)} has other numbers than {where} gives; run {COMMAND}")
    else:
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
