"""The report as one HTML file that needs nothing else: tables, and drawings as inline SVG. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import combinations
from typing import Any

from ..tasks.base import LETTERS
from .answers import GENERATION, LIKELIHOOD, WAYS, Answer
from .report import (
    WORDS,
    Run,
    columns_of,
    label_of,
    methods_of,
    seconds_of,
    sections,
    setup_of,
    verdict,
    which,
)

WORST = 10  # regressions of each task and way
COLOURS = ("#3b6ea5", "#d08a2e", "#4f9a5b", "#a65a8b", "#7a7a7a", "#b5533c", "#5aa3a8")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto;
  font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8885; padding: .2rem .7rem; text-align: left; white-space: nowrap; }
pre { white-space: pre-wrap; background: #8881; padding: .5rem; max-height: 20rem; overflow: auto; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.parts { display: flex; flex-wrap: wrap; gap: 2rem; }
"""


def page(runs: Sequence[Run]) -> str:
    """The whole file."""
    parts = ["<h1>Evaluation</h1>"]
    parts += [f"<p>{_e(setup_of(run))}</p>" for run in runs]
    for run in runs:
        parts.append(f"<h2>What it is worth{_of(run, runs)}</h2><ul>")
        parts += [f"<li>{_e(line)}</li>" for line in verdict(run.summary)]
        parts.append("</ul>")
    for run in runs:
        for way in run.ways:
            parts.append(f"<h2>Accuracy {WORDS[way]}{_of(run, runs)}</h2><div class=parts>")
            for task, result in columns_of(run.summary[way]).items():
                if task != "average":
                    parts.append(_figure(task, bars(result)))
            parts.append("</div>")
            splits = {t: r for t, r in columns_of(run.summary[way]).items() if "presence" in r}
            if splits:
                parts.append(_figure("the gain in points: presence, and content on top of it", split(splits)))
            for task, result in run.summary[way]["tasks"].items():
                if "subjects" in result:
                    parts.append(_figure(f"{task} by subject: receiver ○, C2C ●", subjects(result["subjects"])))
                own = [a for a in run.answers if a.task == task and a.answers == way]
                asked = [{a.id for a in own if a.method == m} for m in ("receiver", "sharer", "c2c")]
                if (all_three := set.intersection(*asked)) and not any(a.graded for a in own):
                    right = [a for a in own if a.id in all_three and a.value == 1]
                    sets = {m: {a.id for a in right if a.method == m} for m in ("receiver", "sharer", "c2c")}
                    parts.append(_figure(f"{task}: right, of {len(all_three)} that all three were asked", venn(sets)))
        if task := run.summary.get("timing", {}).get("task"):
            parts.append(f"<h2>Time against accuracy{_of(run, runs)}</h2>")
            parts.append(_figure(task, latency(run, task)))
    for title, header, rows, note in sections(runs):
        if rows:
            parts.append(f"<h2>{_e(title)}</h2>{f'<p>{_e(note)}</p>' if note else ''}{grid(header, rows)}")
    for run in runs:
        parts += worst(run, _of(run, runs))
    body = "\n".join(parts)
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Evaluation</title>"
        f"<style>{_STYLE}</style>"
    )
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"


def _e(text: object) -> str:
    return escape(str(text), quote=True)


def _of(run: Run, runs: Sequence[Run]) -> str:
    return _e(which(run, runs))


def _figure(title: str, drawing: str) -> str:
    return f"<figure><figcaption>{_e(title)}</figcaption>{drawing}</figure>"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["".join(f"<td>{_e(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{_e(cell)}</th>" for cell in header)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


# ---- drawings --------------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f"<svg viewBox='0 0 {width:g} {height:g}' width='{width:g}' height='{height:g}' role=img>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: object, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{_e(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, more: str = "stroke='currentColor'") -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' {more}/>"


def bars(result: Mapping[str, Any]) -> str:
    """A bar per method from 0 to 100%, with its interval."""
    methods, left, scale, step = methods_of({"": result}), 260, 2.4, 22
    parts = []
    for row, method in enumerate(methods):
        measured, y = result[method], row * step
        parts += [
            _text(left - 6, y + 15, label_of(method), "end"),
            f"<rect x='{left}' y='{y + 4}' width='{scale * measured['accuracy']:.1f}' height='14' "
            f"fill='{COLOURS[1] if method == 'c2c' else COLOURS[0]}' opacity='.8'/>",
        ]
        low, high = measured.get("interval", (measured["accuracy"],) * 2)
        parts += [
            _line(left + scale * low, y + 11, left + scale * high, y + 11),
            _text(left + scale * max(high, measured["accuracy"]) + 6, y + 15, f"{measured['accuracy']:.1f}"),
        ]
    return _svg(left + 100 * scale + 50, len(methods) * step + 6, parts)


def split(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Presence and content of each column, one behind the other from the receiver's zero."""
    points = [x for r in columns.values() for x in (0.0, r["presence"], r["presence"] + r["content"])]
    low, high = min(points), max(points)
    left, scale, step = 160, 420 / max(high - low, 1e-9), 24
    zero = left - low * scale
    parts = []
    for row, (name, result) in enumerate(columns.items()):
        y = row * step
        parts.append(_text(left - 6, y + 16, name, "end"))
        ends = (0.0, result["presence"], result["presence"] + result["content"])
        for (a, b), colour, part in zip(
            ((ends[0], ends[1]), (ends[1], ends[2])), COLOURS[3:5], ("presence", "content"), strict=True
        ):
            x, width = zero + min(a, b) * scale, abs(b - a) * scale
            parts.append(
                f"<rect x='{x:.1f}' y='{y + (4 if part == 'presence' else 8)}' width='{width:.1f}' height='8' "
                f"fill='{colour}'>"
                f"<title>{part} {_e(f'{b - a:+.1f}')}</title></rect>"
            )
        parts.append(_text(left + 430, y + 16, f"{ends[1]:+.1f} presence, {ends[2] - ends[1]:+.1f} content"))
    parts.append(_line(zero, 0, zero, len(columns) * step))
    return _svg(left + 640, len(columns) * step + 4, parts)


def subjects(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Receiver and C2C of each subject on one line, those that gain most first; of as many questions each."""
    both = {s: r for s, r in found.items() if {"receiver", "c2c"} <= r.keys()}
    both = {s: r for s, r in both.items() if r["receiver"]["questions"] == r["c2c"]["questions"]}
    order = sorted(both, key=lambda s: both[s]["receiver"]["accuracy"] - both[s]["c2c"]["accuracy"])
    left, scale, step = 260, 4.0, 16
    parts = []
    for row, subject in enumerate(order):
        y, (mine, fused) = row * step + 10, (both[subject][m]["accuracy"] for m in ("receiver", "c2c"))
        colour = COLOURS[2] if fused >= mine else COLOURS[5]
        parts += [
            _text(left - 8, y + 4, f"{subject} ({both[subject]['c2c']['questions']})", "end"),
            _line(left + scale * mine, y, left + scale * fused, y, f"stroke='{colour}' stroke-width='2'"),
            f"<circle cx='{left + scale * mine:.1f}' cy='{y}' r='4' fill='none' stroke='{colour}'/>",
            f"<circle cx='{left + scale * fused:.1f}' cy='{y}' r='4' fill='{colour}'/>",
        ]
    return _svg(left + 100 * scale + 20, len(order) * step + 10, parts)


def venn(sets: Mapping[str, set[str]]) -> str:
    """Three circles, and in each region how many questions exactly these methods answer right."""
    names = list(sets)
    centres = dict(zip(names, ((120, 100), (200, 100), (160, 170)), strict=True))
    parts = [
        f"<circle cx='{x}' cy='{y}' r='75' fill='{colour}' opacity='.3'/>"
        for (x, y), colour in zip(centres.values(), COLOURS, strict=False)
    ]
    anchors = dict(zip(names, ((75, 18), (245, 18), (160, 262)), strict=True))
    parts += [_text(*anchors[n], f"{label_of(n)} {len(sets[n])}", "middle") for n in names]
    for size in (1, 2, 3):
        for inside in combinations(names, size):
            outside = [sets[n] for n in names if n not in inside]
            count = len(set.intersection(*(sets[n] for n in inside)).difference(*outside))
            x, y = (sum(centres[n][axis] for n in inside) / size for axis in (0, 1))
            # Away from the middle, out of the other circles.
            away = {1: 1.75, 2: 1.9, 3: 1.0}[size]
            x, y = 160 + (x - 160) * away, 123 + (y - 123) * away
            parts.append(_text(x, y + 4, count, "middle"))
    return _svg(330, 270, parts)


def latency(run: Run, task: str) -> str:
    """Accuracy over median seconds on the set that was clocked, of answers in words of each method's own length, or of
    8 tokens."""
    tasks = [run.summary.get(way, {}).get("tasks", {}) for way in (GENERATION, LIKELIHOOD)]
    ways = [found[task] for found in tasks if task in found]
    result = next((found for found in ways if "c2c" in found), ways[0])
    points = {}
    for method in methods_of({"": result}):
        timed = run.summary["timing"].get(method)
        seconds = seconds_of(run.summary, method, result)
        if seconds is None and timed:
            seconds = timed["seconds"].get("8", timed["first_token"])["median"]
        if seconds is not None:
            points[method] = (seconds, result[method]["accuracy"])
    longest = max((s for s, _ in points.values()), default=1.0) or 1.0
    left, top, width, height = 50, 10, 480, 240
    parts = [_line(left, top + height, left + width, top + height), _line(left, top, left, top + height)]
    for share in (0, 50, 100):
        parts.append(_text(left - 6, top + height - share / 100 * height + 4, f"{share}%", "end"))
    for part in (0.0, 0.5, 1.0):
        parts.append(_text(left + part * width, top + height + 18, f"{part * longest:.2f} s", "middle"))
    for n, (method, (seconds, accuracy)) in enumerate(points.items()):
        x, y = left + seconds / longest * width, top + height - accuracy / 100 * height
        parts += [
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{COLOURS[n % len(COLOURS)]}'/>",
            _text(
                x + 8 if x < left + width / 2 else x - 8,
                y - 6,
                label_of(method),
                "start" if x < left + width / 2 else "end",
            ),
        ]
    return _svg(left + width + 60, top + height + 30, parts)


# ---- regressions -----------------------------------------------------------------------------------------------------


def regressions(answers: Sequence[Answer], task: str, way: str) -> list[tuple[Answer, Answer]]:
    """The receiver's and C2C's answers where only the receiver's is right, those with the greatest loss first."""
    own = [a for a in answers if a.task == task and a.answers == way]
    mine, fused = ({a.id: a for a in own if a.method == m} for m in ("receiver", "c2c"))
    worse = [(mine[i], fused[i]) for i in mine if i in fused and fused[i].value < mine[i].value]
    return sorted(worse, key=lambda pair: (-_loss(*pair), pair[0].id))


def _loss(mine: Answer, fused: Answer) -> float:
    """By how much the right option's likelihood falls, or the score."""
    if mine.logprobs and fused.logprobs:
        return mine.logprobs[mine.choice] - fused.logprobs[mine.choice]
    return mine.value - fused.value


def worst(run: Run, of: str) -> Iterator[str]:
    """The worst regressions with prompts and outputs."""
    for way in WAYS:
        for task in run.summary.get(way, {}).get("tasks", {}):
            found = regressions(run.answers, task, way)
            if not found:
                continue
            yield f"<h2>{_e(task)}, {WORDS[way]}: worst of {len(found)} regressions{of}</h2>"
            for mine, fused in found[:WORST]:
                asked = run.questions.get((task, mine.id))
                yield f"<details><summary>{_e(mine.id)}</summary>"
                if asked is not None:
                    yield f"<pre>{_e(_short(asked.prompt, 4000))}</pre><p>Right: {_e(_short(asked.answer, 500))}</p>"
                for name, answer in (("receiver", mine), ("c2c", fused)):
                    yield f"<p>{_e(label_of(name))}:</p><pre>{_e(_said(answer))}</pre>"
                yield "</details>"


def _short(text: str, most: int) -> str:
    """Of a long text both ends, so that a page with many of them stays small."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n[…]\n{text[-half:]}"


def _said(answer: Answer) -> str:
    if answer.error is not None:
        return answer.error
    if answer.text is not None:
        return _short(answer.text, 4000)
    return ", ".join(f"{LETTERS[n]} {x:.2f}" for n, x in enumerate(answer.logprobs))
