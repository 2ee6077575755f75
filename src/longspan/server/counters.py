"""`/metrics`: what the scheduler counts, requests by route and status, and the process, in Prometheus' form."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from longspan.engine.serving import Scheduler
from longspan.engine.serving.metrics import SECONDS, Histogram
from longspan.server.serving import Serving, serving_of

router = APIRouter(tags=["Operation"])
_GAUGES = (
    ("waiting", "Requests that wait in the queue", "waiting_now"),
    ("reading", "Requests whose documents and prompts are being read", "reading_now"),
    ("writing", "Answers that are being written", "writing_now"),
    ("sessions", "Sessions in memory", "sessions_now"),
    ("cached_contexts", "Contexts kept for requests that begin alike", "cached_now"),
    ("kv_bytes", "Bytes of keys and values that contexts refer to", "kv_bytes_now"),
)
_COUNTERS = (
    ("refused", "Requests that found the queue full", "refused"),
    ("prompt_tokens", "Tokens of documents and prompts, cached ones among them", "prompt_tokens"),
    ("cached_tokens", "Prompt tokens that were not computed again", "cached_tokens"),
    ("read_tokens", "Tokens run through the model before answers", "read_tokens"),
    ("written_tokens", "Tokens of answers", "written_tokens"),
    ("prefix_hits", "Requests that began where another one or a saved session stood", "prefix_hits"),
    ("steps", "Batched steps of decode", "steps"),
)
_HISTOGRAMS = (
    ("first_token_seconds", "From a request to its answer's first token", "first_token"),
    ("between_tokens_seconds", "From one token of an answer to the next", "between_tokens"),
    ("queued_seconds", "Before anything of a request was read", "queued"),
)


class Counters(Collector):
    """What is counted, collected anew whenever somebody asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Take the scheduler, whose counters are told beside those of requests."""
        self._scheduler, self._lock = scheduler, threading.Lock()
        self._requests: dict[tuple[str, str, str], int] = {}
        self._seconds: dict[str, Histogram] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(namespace="longspan", registry=self.registry)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request under its route: paths that a client may choose would be labels without end."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "other"
        with self._lock:
            place = (method, route, str(status or "closed"))
            self._requests[place] = self._requests.get(place, 0) + 1
            self._seconds.setdefault(route, Histogram()).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield everything that is counted."""
        now = self._scheduler.metrics()
        for name, about, field in _GAUGES:
            yield GaugeMetricFamily(f"longspan_{name}", about, float(getattr(now, field)))
        for name, about, field in _COUNTERS:
            yield CounterMetricFamily(f"longspan_{name}", about, float(getattr(now, field)))
        finished = CounterMetricFamily("longspan_finished", "Answers by how they ended", labels=["reason"])
        for reason, count in now.finished.items():
            finished.add_metric([reason], count)
        pages = GaugeMetricFamily("longspan_pages", "Pages held, by tier and format", labels=["tier", "format"])
        for (tier, form), count in now.pages_now.items():
            pages.add_metric([tier, form], count)
        taken = GaugeMetricFamily("longspan_session_bytes", "Bytes of sessions in memory, by tier", labels=["tier"])
        for tier, count in now.session_bytes_now.items():
            taken.add_metric([tier], count)
        moves = CounterMetricFamily("longspan_session_moves", "Sessions that moved, or could not", labels=["move"])
        for move, count in now.session_moves.items():
            moves.add_metric([move], count)
        yield from (finished, pages, taken, moves)
        for name, about, field in _HISTOGRAMS:
            family = HistogramMetricFamily(f"longspan_{name}", about)
            _fill(family, [], getattr(now, field))
            yield family
        yield from self._of_requests()

    def _of_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "longspan_http_requests", "Requests by route and status", labels=["method", "route", "status"]
        )
        seconds = HistogramMetricFamily("longspan_http_seconds", "Seconds that requests took", labels=["route"])
        with self._lock:
            for place, count in self._requests.items():
                requests.add_metric(list(place), count)
            for route, histogram in self._seconds.items():
                _fill(seconds, [route], histogram)
        yield from (requests, seconds)


def _fill(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets, reached = [], 0
    for bound, count in zip((*map(str, SECONDS), "+Inf"), histogram.counts, strict=True):
        reached += count
        buckets.append((bound, float(reached)))
    family.add_metric(labels, buckets, histogram.total)


@router.get("/metrics", summary="Counters for Prometheus", response_class=Response)
def metrics(serving: Annotated[Serving, Depends(serving_of)]) -> Response:
    """Tell what is counted. Not on the event loop: /proc is read for the process's own numbers."""
    return Response(generate_latest(serving.counters.registry), media_type=CONTENT_TYPE_LATEST)
