"""README.md's tables of results: what follows the line `<!-- docs/make_results.py NAME -->` is from results/NAME.

python docs/make_results.py            # writes them
python docs/make_results.py --check    # fails where they are out of date, and says so
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from cache2cache.evaluation.report import LABELS, WORDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
RESULTS = ROOT / "results"
COMMAND = ".venv/bin/python docs/make_results.py"
BLOCK = re.compile(
    r"(?P<start><!-- docs/make_results\.py (?P<name>[\w-]+) -->\n)(?P<made>.*?)<!-- end -->\n", re.DOTALL
)


def percent(found: dict[str, Any], asked: int) -> str:
    """Accuracy with its interval, and the number of questions where it is of fewer than were asked."""
    low, high = found["interval"]
    some = "" if found["questions"] == asked else f" (of {found['questions']})"
    return f"{found['accuracy']:.1f} [{low:.1f}, {high:.1f}]{some}"


def tables(summary: dict[str, Any]) -> str:
    """One by option likelihood, one by what is written: methods in rows, sets in columns."""
    return "\n".join(table(summary, way) for way in WORDS if way in summary)


def table(summary: dict[str, Any], way: str) -> str:
    sets = {task: asked for task, asked in summary["asked"].items() if task in summary[way]["tasks"]}
    found = [summary[way]["tasks"][task] for task in sets]
    lines = [
        [WORDS[way], *(f"{task} ({asked})" for task, asked in sets.items())],
        ["---"] * (len(sets) + 1),
    ]
    for method in (m for m in LABELS if any(isinstance(column.get(m), dict) for column in found)):
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


def filled(page: str) -> str:
    """The page with the tables that the results give now."""

    def block(match: re.Match[str]) -> str:
        summary = json.loads((RESULTS / match["name"] / "summary.json").read_text(encoding="utf-8"))
        return f"{match['start']}{tables(summary)}<!-- end -->\n"

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if given.check:
        if not BLOCK.search(page) or new != page:
            sys.exit(f"{PAGE.name} has other tables than {RESULTS.relative_to(ROOT)} gives; run {COMMAND}")
    else:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
