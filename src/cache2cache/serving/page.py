"""The page where one sees the difference: one question, four answers side by side, and what the fuser did.

It asks the same engines as the API does and is mounted under /ui beside it.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Response

from .engine import About, Engine, EngineError, Event, Finished, Job, Piece, Started, Way, Weights
from .metrics import Metrics

EXAMPLES = Path(__file__).with_name("examples.jsonl")
MAX_QUEUE = 64  # events of open pages that wait
MAX_COLUMNS = 120  # tokens of a heat map; of longer prompts the last ones are shown
LABELS: dict[Way, str] = {
    "receiver": "Receiver alone",
    "sharer": "Sharer alone",
    "text": "Text-to-text",
    "c2c": "Cache-to-cache",
}
GROUPS = {"better": "C2C changes the answer for the better", "worse": "… and for the worse", "": "Others"}

_CSS = """
.c2c-answer { min-height: 9em; }
.c2c-answer h3 { margin: 0; }
.c2c-answer .model { opacity: .7; font-size: .8em; overflow-wrap: anywhere; }
.c2c-answer .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6em 0; }
.c2c-answer .message { white-space: pre-wrap; overflow-wrap: anywhere; font-style: italic; opacity: .7; }
.c2c-answer[data-state=running] h3::after { content: " …"; }
.c2c-answer[data-state=failed] .text { color: #b91c1c; }
.c2c-answer dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .8em; margin: 0; font-size: .8em; }
.c2c-answer dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.c2c-scroll { overflow-x: auto; max-width: 100%; }
.c2c-gates { border-collapse: collapse; font-size: .75em; }
.c2c-gates td, .c2c-gates th { border: 0; padding: 1px 5px; text-align: center; }
"""


def mount(app: FastAPI, engines: Sequence[Engine], metrics: Metrics, *, keys: Sequence[str] = ()) -> FastAPI:
    """The application with the page under /ui. Where there are API keys, one of them is the page's password."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    def known(user: str, password: str) -> bool:
        return any(hmac.compare_digest(password.encode(), key.encode()) for key in keys)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)  # browsers ask for it there, wherever the page is

    @app.post("/ui/gradio_api/upload", include_in_schema=False)
    async def no_files() -> Response:
        raise HTTPException(404, "the page takes no files")  # Gradio would keep whatever is sent there

    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page = make_page(engines, metrics)
    app = gradio.mount_gradio_app(
        app,
        page,
        "/ui",
        auth=known if keys else None,
        auth_message="Any name, and an API key of this server as the password." if keys else None,
        theme=gradio.themes.Default(**fonts),  # nothing is fetched from elsewhere
        css=_CSS,
        footer_links=[],
        ssr_mode=False,
    )
    mounted: Any = app.routes[-1]
    app.state.on_stop.append(mounted.app.stop_event.set)  # ends the connections that each open page holds
    return app


def make_page(engines: Sequence[Engine], metrics: Metrics) -> Any:
    """The page as Gradio blocks."""
    import gradio as gr

    by_name = {engine.name: engine for engine in engines}
    longest = min(256, *(engine.about.max_new_tokens for engine in engines))
    names = list(by_name)

    running: dict[str, set[asyncio.Event]] = {}  # by open page: what stops its questions

    async def ask(
        name: str, question: str, at_once: bool, new_tokens: float, request: Any
    ) -> AsyncGenerator[list[Any], None]:
        stop, mine = asyncio.Event(), running.setdefault(request.session_hash, set())
        mine.add(stop)
        try:
            async with aclosing(answers(metrics, by_name[name], question, at_once, int(new_tokens), stop)) as so_far:
                async for columns, heat in so_far:
                    yield [*(columns[way].html() for way in LABELS), gr.skip() if heat is None else heat]
        finally:
            mine.discard(stop)
            if not mine:
                running.pop(request.session_hash, None)

    async def halt(request: Any) -> None:
        # The questions end by themselves, so that nothing of theirs comes in behind what is shown next.
        while mine := running.get(request.session_hash):
            for stop in mine:
                stop.set()
            await asyncio.sleep(0.02)

    # By this Gradio knows what it is to hand over; it is imported here alone, so the signatures can't say it.
    ask.__annotations__["request"] = halt.__annotations__["request"] = gr.Request

    def switch(name: str) -> list[str]:
        engine = by_name[name]
        return [*_blank(engine), pair_html(engine.about), ""]

    with gr.Blocks(title="Cache-to-Cache", analytics_enabled=False) as page:
        gr.Markdown(
            "# Cache-to-Cache\nOne question, answered in four ways. In the last one the sharer passes no text: a fuser "
            "rewrites the receiver's key-value cache with what the sharer has read."
        )
        with gr.Row():
            model = gr.Dropdown(names, value=names[0], label="Fuser", elem_id="fuser", scale=2, min_width=200)
            tokens = gr.Slider(
                1, longest, value=min(64, longest), step=1, label="Longest answer, tokens", scale=2, min_width=200
            )
            at_once = gr.Checkbox(False, label="All at once (clocks tell less)", elem_id="at-once", min_width=200)
        question = gr.Textbox(label="Question", lines=2, elem_id="question", placeholder="Ask something")
        with gr.Row():
            button = gr.Button("Ask", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop")
        columns = []
        with gr.Row():
            for way, first in zip(LABELS, _blank(by_name[names[0]]), strict=True):
                with gr.Column(min_width=260):
                    columns.append(gr.HTML(first, elem_id=f"way-{way}", container=True, padding=True))
        with gr.Accordion("The pair, its gates and the weights of the last question", open=False, elem_id="panel"):
            pair = gr.HTML(pair_html(by_name[names[0]].about), elem_id="gates")
            heat = gr.HTML("", elem_id="weights")
        groups: dict[str, list[list[str]]] = {}
        for row in read_examples():
            groups.setdefault(row["change"], []).append([row["question"]])
        if groups.keys() & {"better", "worse"}:
            gr.Markdown(
                "Questions written for this page. Those under the first two headings were picked for what happens."
            )
        for change, rows in sorted(groups.items(), key=lambda item: list(GROUPS).index(item[0])):
            gr.Examples(rows, [question], label=GROUPS[change], elem_id=f"examples-{change or 'others'}")

        inputs, outputs = [model, question, at_once, tokens], [*columns, heat]
        options: dict[str, Any] = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}
        # One event: while a page's question is answered it asks no other, whose answers would go to the same places.
        gr.on([button.click, question.submit], ask, inputs, outputs, **options)
        stop.click(halt, **options)
        model.change(halt, **options).then(switch, [model], [*columns, pair, heat], **options)
    page.queue(max_size=MAX_QUEUE)
    return page


def read_examples() -> list[dict[str, str]]:
    """Rows of question and change ("better", "worse" or "": what C2C does to the receiver's answer)."""
    return [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines() if line.strip()]


# ---- asking ----------------------------------------------------------------------------------------------------------


@dataclass
class Column:
    """One way's answer so far."""

    way: Way
    models: str
    state: str = "waiting"
    text: str = ""
    message: str = ""
    first_token_s: float | None = None
    total_s: float | None = None
    tokens: int = 0
    message_tokens: int = 0
    bytes_passed: int = 0

    def html(self) -> str:
        figures = {
            "first token": "" if self.first_token_s is None else f"{self.first_token_s:.2f} s",
            "in all": "" if self.total_s is None else f"{self.total_s:.2f} s",
            "tokens": f"{self.message_tokens} + {self.tokens}" if self.message_tokens else str(self.tokens or ""),
            "bytes passed": f"{self.bytes_passed:,}" if self.state == "done" else "",
        }
        rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in figures.items())
        message = f'<div class="message">sharer: {html.escape(self.message.strip())}</div>' if self.message else ""
        return (
            f'<div class="c2c-answer" data-state="{self.state}"><h3>{LABELS[self.way]}</h3>'
            f'<div class="model">{html.escape(self.models)}</div>{message}'
            f'<div class="text">{html.escape(self.text.strip())}</div><dl>{rows}</dl></div>'
        )

    def take(self, event: Event, seconds: float) -> None:
        if isinstance(event, Started):
            self.state = "running"
        elif isinstance(event, Piece) and event.message:
            self.state, self.message = "running", self.message + event.text
        elif isinstance(event, Piece):
            self.text, self.tokens, self.total_s = self.text + event.text, self.tokens + 1, seconds
            self.first_token_s = self.first_token_s or seconds
        else:
            self.state, self.message_tokens = "done", event.message_tokens
            self.bytes_passed = event.bytes_passed


def _blank(engine: Engine) -> list[str]:
    return [column.html() for column in _columns(engine).values()]


def _columns(engine: Engine) -> dict[Way, Column]:
    about, columns = engine.about, {}
    for way in LABELS:
        models = [about.receiver] if way == "receiver" else [about.sharers[0]] if way == "sharer" else None
        columns[way] = Column(way, " ← ".join(models or [about.receiver, " + ".join(about.sharers)]))
    return columns


async def answers(
    metrics: Metrics, engine: Engine, question: str, at_once: bool, new_tokens: int, stop: asyncio.Event
) -> AsyncGenerator[tuple[dict[Way, Column], str | None], None]:
    """The four answers as they grow, and the heat map once it is there. `stop` ends them, closing it does too."""
    columns = _columns(engine)
    if not question.strip():
        yield columns, None
        return
    ready: asyncio.Queue[str | None] = asyncio.Queue()

    async def one(way: Way) -> None:
        column = columns[way]
        if way not in engine.about.ways:
            column.state, column.text = "failed", "The sharer is served elsewhere and doesn't answer."
            return
        job = Job(
            [{"role": "user", "content": question}],
            way,
            max_tokens=new_tokens,
            weights=way == "c2c",
            reuse=False,
            aside=at_once,
        )
        began = time.perf_counter()
        column.state = "running"
        try:
            (events,) = metrics.submit(engine, [job])
            try:
                async for event in events:
                    column.take(event, time.perf_counter() - began)
                    weights = event.weights if isinstance(event, Finished) else ()
                    ready.put_nowait(heat_html(engine.about, weights) if weights else "")
            finally:
                events.close()
        except EngineError as error:
            column.state, column.text = "failed", str(error)

    async def run() -> None:
        try:
            if at_once:
                await asyncio.gather(*(one(way) for way in LABELS))
            else:
                for way in LABELS:
                    await one(way)
        finally:
            ready.put_nowait(None)

    async def stopping() -> None:
        await stop.wait()
        running.cancel()

    running, stopper = asyncio.create_task(run()), asyncio.create_task(stopping())
    try:
        heat: str | None = ""  # that of the question before goes
        ended = False
        while not ended:
            yield columns, heat
            news = [await ready.get()]
            while not ready.empty():  # what came meanwhile, in one go
                news.append(ready.get_nowait())
            heat = next((item for item in news if item), None)
            ended = None in news
        await asyncio.wait([running])
        for column in columns.values():
            if column.state == "running":
                column.state = "stopped"
        yield columns, heat
        if not running.cancelled():
            running.result()
    finally:
        stopper.cancel()
        running.cancel()
        await asyncio.gather(running, stopper, return_exceptions=True)


# ---- what the fuser did ----------------------------------------------------------------------------------------------


def pair_html(about: About) -> str:
    """The models, and per layer which gates are open."""
    parts = [f"<p>Receiver: {html.escape(about.receiver)}</p>"]
    for gates in about.gates:
        count = sum(gates.keys) + sum(gates.values)
        heads = "".join(f"<th>{layer}</th>" for layer in gates.receiver_layers)
        reads = "".join(f"<td>{layer}</td>" for layer in gates.sharer_layers)
        kinds = ""
        for name, kind in (("keys", gates.keys), ("values", gates.values)):
            cells = "".join(
                f'<td title="{"open" if is_open else "closed"}">{"●" if is_open else "○"}</td>' for is_open in kind
            )
            kinds += f"<tr><th>{name}</th>{cells}</tr>"
        parts.append(
            f"<p>Sharer: {html.escape(gates.sharer)}. {count} of {2 * len(gates.keys)} gates are open (●).</p>"
            f'<div class="c2c-scroll"><table class="c2c-gates"><tr><th>receiver layer</th>{heads}</tr>'
            f"<tr><th>reads sharer layer</th>{reads}</tr>{kinds}</table></div>"
        )
    return "".join(parts)


def heat_html(about: About, weights: Sequence[Weights | None]) -> str:
    """Per sharer two maps, layers down and tokens across: the darker, the more of the projection is added."""
    parts = []
    for gates, one in zip(about.gates, weights, strict=True):
        if one is None:
            continue
        for name, rows in (("keys", one.keys), ("values", one.values)):
            parts.append(f"<p>Weights of the {name}, {html.escape(gates.sharer)}: layers down, tokens across.</p>")
            parts.append(f'<div class="c2c-scroll">{_map(one.tokens, gates.receiver_layers, rows)}</div>')
    return "".join(parts)


def _map(tokens: Sequence[str], layers: Sequence[int], rows: Sequence[Sequence[float | None]]) -> str:
    cell, left = 13, 30
    skip = max(0, len(tokens) - MAX_COLUMNS)
    shown = tokens[skip:]
    height = cell * len(layers)
    out = [f'<svg width="{left + cell * len(shown)}" height="{height + 90}" font-size="9" fill="currentColor">']
    for y, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        out.append(f'<text x="0" y="{y * cell + 10}">{layer}</text>')
        for x, value in enumerate(row[skip:]):
            if value is not None:
                place = f'x="{left + x * cell}" y="{y * cell}" width="{cell - 1}" height="{cell - 1}"'
                out.append(f'<rect {place} fill="#2563eb" fill-opacity="{value:.2f}"/>')
    for x, token in enumerate(shown):
        at = f"{left + x * cell + 4} {height + 6}"
        text = html.escape(token.replace("\n", "⏎").strip(" ")[:12] or "␣")
        out.append(f'<text transform="translate({at}) rotate(60)">{text}</text>')
    return "".join([*out, "</svg>"])
