"""What is counted for Prometheus: every job goes through `Metrics.events`, whoever asks for it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Engine, EngineError, Event, Finished, Job, Piece, Started

_LABELS = ("model", "way")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counters of some engines, by model (an engine's name) and way."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(engines))
        labels: dict[str, Any] = {"labelnames": _LABELS, "registry": self.registry}
        self.first = Histogram(
            "c2c_time_to_first_token_seconds", "From asking to the first token", buckets=_SECONDS, **labels
        )
        self.total = Histogram("c2c_request_seconds", "From asking to the last token", buckets=_SECONDS, **labels)
        self.rate = Histogram("c2c_tokens_per_second", "Of a request, behind its first token", buckets=_RATES, **labels)
        self.batch = Histogram("c2c_batch_size", "Answers written together", buckets=(1, 2, 4, 8, 16, 32, 64), **labels)
        self.prompt = Counter("c2c_prompt_tokens", "Tokens of prompts", **labels)
        self.reused = Counter("c2c_reused_tokens", "Of these, known from earlier turns", **labels)
        self.new = Counter("c2c_new_tokens", "Tokens written", **labels)
        self.passed = Counter("c2c_bytes_passed", "From sharers to receivers", **labels)
        self.errors = Counter("c2c_errors", "Jobs without an answer", [*_LABELS, "reason"], registry=self.registry)
        self.responses = Counter("c2c_responses", "Answers of the API", ["path", "status"], registry=self.registry)

    async def events(self, engine: Engine, job: Job) -> AsyncGenerator[Event, None]:
        """The events of a job, counted. Closing the generator gives the job up."""
        labels = (engine.name, job.way)
        began, first = time.perf_counter(), 0.0
        try:
            answering = engine.submit(job)
        except EngineError as error:
            self.errors.labels(*labels, error.reason).inc()
            raise
        try:
            async for event in answering:
                now = time.perf_counter() - began
                if isinstance(event, Started):
                    self.prompt.labels(*labels).inc(event.prompt_tokens)
                    self.reused.labels(*labels).inc(event.reused)
                    if event.first:
                        self.batch.labels(*labels).observe(event.batch)
                elif isinstance(event, Piece) and not event.message and not first:
                    first = now
                    self.first.labels(*labels).observe(first)
                elif isinstance(event, Finished):
                    self.total.labels(*labels).observe(now)
                    self.new.labels(*labels).inc(event.new_tokens)
                    self.passed.labels(*labels).inc(event.bytes_passed)
                    if event.new_tokens > job.n and now > first:
                        self.rate.labels(*labels).observe((event.new_tokens - job.n) / (now - first))
                yield event
        except EngineError as error:
            self.errors.labels(*labels, error.reason).inc()
            raise
        finally:
            answering.close()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Engines:
    """What the engines say of themselves when they are asked."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines

    def collect(self) -> Iterator[Metric]:
        for name, help_text, value in (
            ("c2c_ready", "Whether the models are loaded", lambda e: float(e.ready)),
            ("c2c_waiting", "Jobs that wait for their turn", lambda e: e.waiting),
            ("c2c_running", "Jobs that are being answered", lambda e: e.running),
            ("c2c_kept_bytes", "Caches of earlier turns", lambda e: e.kept_bytes),
        ):
            gauge = GaugeMetricFamily(name, help_text, labels=["model"])
            for engine in self.engines:
                gauge.add_metric([engine.name], value(engine))
            yield gauge
        restarts = CounterMetricFamily("c2c_worker_restarts", "Workers that ended and came back", labels=["model"])
        for engine in self.engines:
            restarts.add_metric([engine.name], engine.restarts)
        yield restarts
