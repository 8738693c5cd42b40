"""What is counted for Prometheus: every job goes through `Metrics.submit`, whoever asks for it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Answering, Engine, EngineError, Event, Finished, Job, Piece, Started

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

    def submit(self, engine: Engine, jobs: Sequence[Job]) -> list[Answering]:
        """The jobs of one request, queued and counted, as `Engine.submit` does it."""
        try:
            answers = engine.submit(jobs)
        except EngineError as error:
            for job in jobs:
                self.errors.labels(engine.name, job.way, error.reason).inc()
            raise
        return [_Counted(self, engine, job, answering) for job, answering in zip(jobs, answers, strict=True)]

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Counted:
    """The events of a job, which are counted as they are read."""

    def __init__(self, metrics: Metrics, engine: Engine, job: Job, answering: Answering) -> None:
        self.metrics, self.job, self.answering = metrics, job, answering
        self.labels = (engine.name, job.way)
        self.began, self.first = time.perf_counter(), 0.0

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await anext(self.answering)
        except EngineError as error:
            self.metrics.errors.labels(*self.labels, error.reason).inc()
            raise
        self._count(event)
        return event

    def close(self) -> None:
        self.answering.close()

    def _count(self, event: Event) -> None:
        metrics, labels, now = self.metrics, self.labels, time.perf_counter() - self.began
        if isinstance(event, Started):
            metrics.prompt.labels(*labels).inc(event.prompt_tokens)
            metrics.reused.labels(*labels).inc(event.reused)
            if event.first:
                metrics.batch.labels(*labels).observe(event.batch)
        elif isinstance(event, Piece) and not event.message and not self.first:
            self.first = now
            metrics.first.labels(*labels).observe(now)
        elif isinstance(event, Finished):
            metrics.total.labels(*labels).observe(now)
            metrics.new.labels(*labels).inc(event.new_tokens)
            metrics.passed.labels(*labels).inc(event.bytes_passed)
            if event.new_tokens > self.job.n and now > self.first:
                metrics.rate.labels(*labels).observe((event.new_tokens - self.job.n) / (now - self.first))


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
        restarts = CounterMetricFamily("c2c_worker_restarts", "Times a worker was started again", labels=["model"])
        for engine in self.engines:
            restarts.add_metric([engine.name], engine.restarts)
        yield restarts
